"""DoRA's norm: the compiled one against the float64 norm of the dense sum, at every instruction set that runs here.

tests/ops/test_instruction_sets.py runs the `core` tests of this file on the lower instruction sets too.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import _extension

if not _extension.has_op("dora_norm"):
    pytest.skip(f"no compiled dora_norm: {_extension.reason()}", allow_module_level=True)

OP = torch.ops.lowrank_kernels.dora_norm
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
SCALING = 0.75
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
if not (torch.cuda.is_available() and _extension.has_cuda()):
    DEVICES = ["cpu"]


def operands(
    n: int, k: int, rank: int, dtypes: tuple[torch.dtype, ...] = (F32, F32, F32), size: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """W, A, B of both signs, the correction about as large as W."""
    generator = torch.Generator().manual_seed(seed + n + 7 * k + 31 * rank)
    w = torch.randn(n, k, generator=generator) * size
    a = torch.randn(rank, k, generator=generator) * size
    b = torch.randn(n, rank, generator=generator) / rank**0.5
    return w.to(dtypes[0]), a.to(dtypes[1]), b.to(dtypes[2])


def dense(w: Tensor, a: Tensor, b: Tensor, scaling: float = SCALING) -> Tensor:
    return (w.double() + scaling * (b.double() @ a.double())).norm(dim=1)


def check(w: Tensor, a: Tensor, b: Tensor, scaling: float = SCALING, **options: Tensor | None) -> None:
    """Within 2e-5 of the dense norm; where the terms cancel, what rounding each to float32 leaves of them:

    |n² - n64²| <= 2⁻²¹ T with T = (‖W_i‖ + |s| Σ_r |B_ir| ‖A_r‖)², so |n - n64| <= min(√(2⁻²¹ T), 2⁻²¹ T / n64).
    """
    norm, sq_norm, scale = OP(w, a, b, scaling, options.get("weight_sq_norm"), options.get("magnitude"))
    w, a, b = (t.cpu() for t in (w, a, b))
    exact = dense(w, a, b, scaling)
    assert norm.dtype == sq_norm.dtype == scale.dtype == F32
    terms = w.double().norm(dim=1) + abs(scaling) * (b.double().abs() @ a.double().norm(dim=1))
    loss = 2.0**-21 * terms.square()
    allowed = torch.maximum(2e-5 * exact, torch.minimum(loss.sqrt(), loss / exact.clamp_min(1e-300)))
    error = (norm.cpu().double() - exact).abs()
    assert torch.all(error <= allowed), f"off by up to {float((error / allowed).max()):.3g} times what is allowed"
    square = options.get("weight_sq_norm")
    square = w.double().square().sum(1) if square is None else square.cpu().double()
    torch.testing.assert_close(sq_norm.cpu().double(), square, rtol=2e-6, atol=0)
    magnitude = options.get("magnitude")
    if magnitude is None:
        assert scale.shape == (0,)
    else:
        g = torch.where(norm.cpu() == 0, 0.0, magnitude.cpu().float() / norm.cpu())
        torch.testing.assert_close(scale.cpu(), g, rtol=3e-7, atol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_core_dtypes(dtypes: tuple[torch.dtype, ...], device: str) -> None:
    for n, k, rank in ((33, 130, 16), (70, 300, 33), (5, 31, 3)):
        check(*(t.to(device) for t in operands(n, k, rank, dtypes)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 200, 257, 500, 512])
def test_core_ranks(rank: int, device: str) -> None:
    for dtypes in ((F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16), (F16, F32, F16)):
        check(*(t.to(device) for t in operands(41, 150, rank, dtypes)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=str)
def test_core_in_clusters(dtypes: tuple[torch.dtype, ...], device: str) -> None:
    """Blocks that fetch A together, where a GPU has clusters, give the bits of those that fetch it alone."""
    for n, k, rank in ((300, 1100, 65), (33, 70, 128), (65, 130, 512)):
        w, a, b = (t.to(device) for t in operands(n, k, rank, dtypes))
        check(w, a, b)
        assert torch.equal(OP(w, a, b, SCALING, None, None)[0], OP(w, a, b, SCALING, None, None, False)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_sizes(dtype: torch.dtype, device: str) -> None:
    for n, k in itertools.product((1, 15, 32, 65), (1, 2, 17, 31, 32, 33, 255, 513, 1100)):
        w, a, b = operands(n, k, 5, (dtype, F32, F32))
        # The norm of few elements can cancel by chance; `check` allows for that.
        check(w.to(device), a.to(device), b.to(device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize("dtypes", [(F32, F32, F32), (BF16, F32, F32), (BF16, BF16, BF16)], ids=str)
def test_core_magnitudes(size: float, dtypes: tuple[torch.dtype, ...], device: str) -> None:
    for rank in (7, 48):
        w, a, b = operands(37, 200, rank, dtypes, size=size)
        magnitude = torch.linspace(-1.0, 2.0, 37).to(dtypes[2]).to(device)
        check(w.to(device), a.to(device), b.to(device), magnitude=magnitude)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_zero_rows(dtype: torch.dtype, device: str) -> None:
    w, a, b = operands(40, 96, 16, (dtype, dtype, dtype))
    w[3], b[3] = 0, 0
    w[33], b[33] = 0, 0
    w[7] = 0
    b[8] = 0
    norm, sq_norm, scale = OP(*(t.to(device) for t in (w, a, b)), SCALING, None, torch.ones(40, device=device))
    for row in (3, 33):
        assert norm[row] == 0 and sq_norm[row] == 0 and scale[row] == 0
    assert torch.isfinite(scale).all() and (norm.cpu() > 0).sum() == 38
    check(*(t.to(device) for t in (w, a, b)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [4, 16, 96])
def test_core_weight_that_cancels_the_correction(rank: int, device: str) -> None:
    _, a, b = operands(64, 256, rank, (F32, BF16, BF16))
    w = -SCALING * (b.double() @ a.double()).float()
    norm, _, scale = OP(*(t.to(device) for t in (w, a, b)), SCALING, None, torch.ones(64, device=device))
    assert torch.isfinite(norm).all() and torch.isfinite(scale).all() and (norm >= 0).all()
    assert torch.all(norm.cpu() <= 2e-3 * w.norm(dim=1))
    check(*(t.to(device) for t in (w, a, b)))


@pytest.mark.parametrize("device", DEVICES)
def test_core_given_square_norm(device: str) -> None:
    for dtype, rank in ((F32, 16), (BF16, 16), (BF16, 3)):
        w, a, b = (t.to(device) for t in operands(50, 120, rank, (dtype, F32, F32)))
        square = w.float().square().sum(1)
        check(w, a, b, weight_sq_norm=square)
        # It is taken as given, not computed again: nothing is subtracted from a wrong one.
        more, _, _ = OP(w, a, b, SCALING, square + 100.0, None)
        norm, _, _ = OP(w, a, b, SCALING, square, None)
        torch.testing.assert_close(more.square(), norm.square() + 100.0, rtol=1e-4, atol=1e-3)
        _, sq_norm, _ = OP(w, a, b, SCALING, square, None)
        assert sq_norm.data_ptr() != square.data_ptr() and torch.equal(sq_norm, square)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_square_norm_handed_back_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    """A layer keeps it: a resumed run, which computes it anew, must go on as the one that had kept it."""
    w, a, b = (t.to(device) for t in operands(300, 1300, 8, (dtype, F32, F32)))
    norm, sq_norm, scale = OP(w, a, b, SCALING, None, torch.ones(300, device=device))
    again = OP(w, a, b, SCALING, sq_norm, torch.ones(300, device=device))
    assert all(torch.equal(x, y) for x, y in zip(again, (norm, sq_norm, scale), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_strided_rows(dtype: torch.dtype, device: str) -> None:
    for rank in (5, 40):
        w, a, b = (t.to(device) for t in operands(45, 140, rank, (dtype, dtype, F32)))
        for pad in (1, 3, 8):
            strided = []
            for t in (w, a, b):
                wide = torch.full((t.shape[0], t.shape[1] + pad), float("nan"), dtype=t.dtype, device=device)
                wide[:, pad // 2 : pad // 2 + t.shape[1]] = t
                strided.append(wide[:, pad // 2 : pad // 2 + t.shape[1]])
            check(*strided)
        check(w[0:1].expand(45, 140), a, b)  # stride 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_core_non_finite(value: float, device: str) -> None:
    """A row with a non-finite weight or factor is not finite; the other rows are what they were."""
    for dtype, rank in itertools.product(DTYPES, (6, 20)):
        w, a, b = (t.to(device) for t in operands(40, 90, rank, (dtype, dtype, dtype)))
        clean, _, _ = OP(w, a, b, SCALING, None, None)
        bad_w, bad_b = w.clone(), b.clone()
        bad_w[9, 50] = value
        bad_b[39, 2] = value
        norm, _, _ = OP(bad_w, a, bad_b, SCALING, None, None)
        rows = torch.ones(40, dtype=torch.bool)
        rows[[9, 39]] = False
        assert not torch.isfinite(norm[~rows]).any()
        assert torch.equal(norm[rows], clean[rows])
        bad_a = a.clone()
        bad_a[1, 3] = value
        assert not torch.isfinite(OP(w, bad_a, b, SCALING, None, None)[0]).any()


def test_core_same_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    for dtypes in ((F32, F32, F32), (BF16, F32, BF16), (F16, F16, F16)):
        w, a, b = operands(515, 700, 40, dtypes)
        results = []
        try:
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                results += [OP(w, a, b, SCALING, None, None)[0] for _ in range(2)]
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(results[0], other) for other in results[1:])


def test_core_row_does_not_depend_on_its_neighbours() -> None:
    for dtypes in ((F32, F32, F32), (BF16, F32, BF16)):
        w, a, b = operands(64, 100, 16, dtypes)
        whole, _, _ = OP(w, a, b, SCALING, None, None)
        for start, end in ((0, 1), (13, 64), (31, 50)):
            part, _, _ = OP(w[start:end], a, b[start:end], SCALING, None, None)
            torch.testing.assert_close(part, whole[start:end], rtol=3e-7, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_core_no_rows(device: str) -> None:
    for rank in (3, 16):
        w, a, b = (t.to(device) for t in operands(0, 64, rank))
        results = OP(w, a, b, SCALING, None, torch.empty(0, device=device))
        assert [tuple(t.shape) for t in results] == [(0,)] * 3


@pytest.mark.parametrize("scaling", [0.0, -1.5, 64.0])
def test_core_scalings(scaling: float) -> None:
    for dtype in (F32, BF16):
        check(*operands(20, 64, 16, (dtype, F32, F32)), scaling)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w, a, b: (w, a[:, :-1].contiguous(), b), r"lora_a of shape \(R, K\)"),
        (lambda w, a, b: (w, a, b[:-1]), r"lora_b of shape \(N, R\)"),
        (lambda w, a, b: (w.double(), a, b), "float32, bfloat16 or float16"),
        (lambda w, a, b: (w.t().contiguous().t(), a, b), "adjacent columns"),
        (lambda w, a, b: (w[0], a, b), "2 dimensions"),
        (lambda w, a, b: (w, a[:0], b[:, :0]), "rank of at least 1, got 0"),
    ],
)
def test_misfits_are_refused(change, words: str) -> None:  # type: ignore[no-untyped-def]
    w, a, b = operands(10, 20, 4)
    with pytest.raises(RuntimeError, match=words):
        OP(*change(w, a, b), 1.0, None, None)
    with pytest.raises(RuntimeError, match=r"magnitude of shape \(N,\)"):
        OP(w, a, b, 1.0, None, torch.ones(9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [64, 2048])
def test_where_the_ranks_cancel_one_another_the_error_is_that_of_the_terms(dtype: torch.dtype, k: int) -> None:
    """n_i² within 3e-7 (‖W_i‖ + s Σ_r |B_ir| ‖A_r‖)², as docs/dora.md says; the sum itself is a millionth of that."""
    torch.manual_seed(0)
    weight, a, b = 0.1 * torch.randn(64, k).to(dtype), torch.randn(4, k), torch.randn(64, 4)
    a[1], b[:, 1] = 1.0001 * a[0], -b[:, 0]
    b[:, :2] *= 100
    square = (weight.double() + b.double() @ a.double()).square().sum(1)
    terms = (weight.double().norm(dim=1) + b.double().abs() @ a.double().norm(dim=1)).square()
    error = (lk.dora_weight_norm(weight, a, b, backend="cpu").double().square() - square).abs()
    assert (error <= 3e-7 * terms).all()
    assert square.median() < 1e-3 * terms.median()
