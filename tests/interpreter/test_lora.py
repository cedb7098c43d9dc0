"""The LoRA linear's kernels and launchers, in the interpreter."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.inspect.memory import record_memory
from lowrank_kernels.inspect.registry import ARCHITECTURES
from lowrank_kernels.inspect.triton_internals import watched_interpreter
from lowrank_kernels.kernels.lora import lora_linear_bwd, lora_linear_fwd
from lowrank_kernels.kernels.lora_tiles import LoRATiles, Strategy, fused_fits, lora_tiles
from lowrank_kernels.kernels.target import TARGETS
from lowrank_kernels.kernels.tiles import cast, dropout_keep, load_tile, store_tile
from lowrank_kernels.ops.lora import LoRALinear, LoRALinearBackward
from lowrank_kernels.ops.planning import plan
from lowrank_kernels.reference import dropout_keep_mask_ref, lora_linear_backward_ref, lora_linear_ref
from tests.problems import leaves
from tests.problems.lora import BF16, F16, F32, SEED, eager_lora_linear, lora_tensors
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

STRATEGIES: tuple[Strategy, ...] = ("fused", "two_kernel", "library")
SCALING = 0.75


def _tiles(arch: str, t: dict[str, Tensor], dropout_p: float, strategy: Strategy, aligned: bool = True) -> LoRATiles:
    """A target's tiles, for three processors: persistent programs take several tiles each."""
    (M, K), (N, R) = t["x"].shape, t["lora_b"].shape
    target = replace(TARGETS[arch], num_sms=3)
    return lora_tiles(target, M, K, N, R, t["x"].dtype, dropout_p > 0.0, strategy=strategy, aligned=aligned)


def _planned(t: dict[str, Tensor], grad_y: Tensor, dropout_p: float) -> LoRATiles:
    """What plans for sm_90 say: a forward's tiles, with the backward's of dX."""
    factors, target = (t["weight"], t["lora_a"], t["lora_b"]), TARGETS["sm_90"]
    forward = LoRALinear(t["x"], *factors, None, None, SCALING, dropout_p, None, True, "triton")
    needs = (True, True, True, False, False)
    backward = LoRALinearBackward(grad_y, t["x"], *factors, None, None, SCALING, dropout_p, None, needs, "triton")
    of_dx = plan("lora_linear_backward", backward, target=target).tiles
    tiles: LoRATiles = plan("lora_linear", forward, target=target).tiles
    return replace(tiles, main_dx=of_dx.main_dx)


def _by_pointers(tiles: LoRATiles) -> LoRATiles:
    """The same without descriptors."""
    return replace(tiles, main=replace(tiles.main, tma=False), main_dx=replace(tiles.main_dx, tma=False))


def _launch(t: dict[str, Tensor], grad_y: Tensor, tiles: LoRATiles, dropout_p: float = 0.0) -> dict[str, Tensor]:
    """Everything that forward and backward give, by the launchers."""
    t = {name: value.detach() for name, value in t.items()}
    seed = torch.tensor(SEED) if dropout_p else None
    operands = t["x"], t["weight"], t["lora_a"], t["lora_b"]
    common = {"scaling": SCALING, "gate": t.get("gate"), "dropout_p": dropout_p, "dropout_seed": seed}
    y, p = lora_linear_fwd(*operands, tiles, store_p=True, bias=t.get("bias"), **common)
    wanted = {"needs": (True, True, True), "need_q": True}
    grad_x, grad_a, grad_b, q = lora_linear_bwd(grad_y, *operands, p, tiles, **wanted, **common)
    found = {"y": y, "P": p, "dX": grad_x, "dA": grad_a, "dB": grad_b, "Q": q}
    return {name: value for name, value in found.items() if value is not None}


def _oracle(t: dict[str, Tensor], grad_y: Tensor, dropout_p: float) -> dict[str, Tensor]:
    wide = {name: value.detach().double() for name, value in t.items()}
    seed = torch.tensor(SEED) if dropout_p else None
    options: dict[str, Any] = {
        "scaling": SCALING,
        "gate": wide.get("gate"),
        "dropout_p": dropout_p,
        "dropout_seed": seed,
    }
    x, weight, a, b = (wide[k] for k in ("x", "weight", "lora_a", "lora_b"))
    y, p = lora_linear_ref(x, weight, a, b, wide.get("bias"), **options)
    grads = lora_linear_backward_ref(grad_y.double(), x, weight, a, b, p, **options)
    assert grads.x is not None and grads.lora_a is not None and grads.lora_b is not None
    return {"y": y, "P": p, "dX": grads.x, "dA": grads.lora_a, "dB": grads.lora_b, "Q": grad_y.double() @ b}


def _eager(t: dict[str, Tensor], grad_y: Tensor, dropout_p: float) -> dict[str, Tensor]:
    t = leaves(t)
    y = eager_lora_linear(**t, scaling=SCALING, dropout_p=dropout_p)
    grad_x, grad_a, grad_b = torch.autograd.grad(y, [t["x"], t["lora_a"], t["lora_b"]], grad_y)
    dtype = t["x"].dtype
    dropped = t["x"]
    if dropout_p:
        keep = dropout_keep_mask_ref(torch.tensor(SEED), *t["x"].shape, dropout_p)
        dropped = torch.where(keep, t["x"], 0) / (1.0 - dropout_p)
    p, q = dropped @ t["lora_a"].to(dtype).T, grad_y @ t["lora_b"].to(dtype)
    return {"y": y.detach(), "P": p.detach(), "dX": grad_x, "dA": grad_a, "dB": grad_b, "Q": q.detach()}


def _check(ours: dict[str, Tensor], t: dict[str, Tensor], grad_y: Tensor, dropout_p: float) -> None:
    oracle, eager = _oracle(t, grad_y, dropout_p), _eager(t, grad_y, dropout_p)
    for name, value in ours.items():
        factor = GRADIENT_FACTOR if name.startswith("d") else 2.0
        assert_as_exact_as_eager(value, eager[name], oracle[name], factor=factor, what=name)


def _grad_y(M: int, N: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize(
    ("strategy", "M", "dropout_p"),
    [
        # Each strategy at both sizes, with and without dropout; the other pairs nightly.
        pytest.param(strategy, M, dropout_p, marks=[] if (M == 40) == (dropout_p > 0.0) else pytest.mark.nightly)
        for strategy in STRATEGIES
        for M in (40, 150)
        for dropout_p in (0.0, 0.1)
        if strategy != "fused" or fused_fits(M, 16, BF16, dropout_p > 0.0)
    ],
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_strategy_with_every_targets_tiles(arch: str, strategy: Strategy, M: int, dropout_p: float) -> None:
    """Pointers on sm_80 and gfx942, descriptors from sm_90 on; widths that no tile divides."""
    K, N, R = 136, 520, 16
    t = lora_tensors(M, K, N, R, BF16, F32, bias=True, gate=True)
    tiles = _tiles(arch, t, dropout_p, strategy)
    assert tiles.main.tma == (arch in ("sm_90", "sm_100", "sm_120"))
    grad_y = _grad_y(M, N, BF16)
    with record_memory():
        ours = _launch(t, grad_y, tiles, dropout_p)
    _check(ours, t, grad_y, dropout_p)


@pytest.mark.parametrize(
    ("strategy", "R"),
    [(s, R) for s in STRATEGIES for R in (1, 7, 33, 64, 100) if s != "fused" or fused_fits(35, R, F16, False)],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_ranks(arch: str, strategy: Strategy, R: int) -> None:
    M = 35
    t = lora_tensors(M, 72, 80, R, F16)
    grad_y = _grad_y(M, 80, F16)
    _check(_launch(t, grad_y, _tiles(arch, t, 0.0, strategy)), t, grad_y, 0.0)


@pytest.mark.parametrize("M", [9, 70])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unaligned_rows_and_float32(strategy: Strategy, M: int) -> None:
    """Rows that descriptors cannot have: plans ask for none, and with either tiles pointers do."""
    t = lora_tensors(M, 67, 45, 6, F32)
    grad_y = _grad_y(M, 45, F32)
    planned = _planned(t, grad_y, 0.1)
    assert not planned.main.tma and not planned.main_dx.tma
    for aligned in (True, False):
        tiles = _tiles("sm_90", t, 0.1, strategy, aligned)
        assert tiles.main.tma == tiles.main_dx.tma == aligned
        _check(_launch(t, grad_y, _by_pointers(tiles), 0.1), t, grad_y, 0.1)


@pytest.mark.usefixtures("rows_of_a_dot_alone")
@pytest.mark.parametrize(
    ("arch", "strategy"),
    [
        ("sm_80", "fused"),
        ("sm_90", "two_kernel"),
        pytest.param("sm_80", "two_kernel", marks=pytest.mark.nightly),  # the tiles of one with the strategy of another
        pytest.param("sm_90", "fused", marks=pytest.mark.nightly),
    ],
)
def test_a_row_does_not_feel_its_batch(arch: str, strategy: Strategy) -> None:
    """y, P, Q and dX of a row are the same bits alone, among few and among many, wherever it stands."""
    K, N, R = 520, 392, 16
    t = lora_tensors(150, K, N, R, F16)  # three more bits than bfloat16 to show another order of sums
    grad_y = _grad_y(150, N, F16)
    together = _launch(t, grad_y, _tiles(arch, t, 0.0, strategy))
    for rows in (slice(0, 1), slice(37, 38), slice(100, 141), slice(3, 70)):
        part = {**t, "x": t["x"].detach()[rows]}
        alone = _launch(part, grad_y[rows], _tiles(arch, part, 0.0, strategy))
        for name in ("y", "P", "Q", "dX"):
            assert torch.equal(alone[name], together[name][rows]), (name, rows)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_same_bits_every_time(strategy: Strategy) -> None:
    t = lora_tensors(130, 72, 80, 16, BF16)
    grad_y, dropout_p = _grad_y(130, 80, BF16), 0.0 if strategy == "fused" else 0.1
    first, again = (_launch(t, grad_y, _tiles("sm_90", t, dropout_p, strategy), dropout_p) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, again[name]), name


# ------------------------------------------------------------------------------------------------ rounding and dropout


@triton.jit
def _cast_kernel(source, target, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(target + offs, cast(tl.load(source + offs), target.dtype.element_ty))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_cast_rounds_to_nearest_even(dtype: torch.dtype) -> None:
    """As PyTorch does, ties, infinities and NaN included: the interpreter alone would cut off."""
    ties = (1 + torch.arange(64) / 64) * (1 + torch.finfo(dtype).eps / 2)
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3e38, 1e-40, -65504.0])
    values = torch.cat([torch.randn(440, generator=torch.Generator().manual_seed(0)), ties, special])
    out = torch.empty(512, dtype=dtype)
    _cast_kernel[(1,)](values, out, BLOCK=512)
    torch.testing.assert_close(out, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _keep_kernel(seed_ptr, out_ptr, M, K, threshold_bits, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    m0, k0 = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_K
    keep = dropout_keep(tl.load(seed_ptr), m0, k0, threshold_bits, BLOCK_M, BLOCK_K)
    store_tile(out_ptr, keep.to(tl.float32), m0, k0, M, K, K, 1, BLOCK_M, BLOCK_K, False)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
@pytest.mark.parametrize("seed", [0, 1, SEED, 2**63 - 1, -5])
def test_dropout_draws_the_bits_of_the_reference(seed: int, p: float) -> None:
    M, K = 37, 101
    out = torch.empty(M, K)
    threshold = int(p * 2**32)
    bits = threshold - 2**32 if threshold >= 2**31 else threshold
    _keep_kernel[(triton.cdiv(M, 16), triton.cdiv(K, 32))](torch.tensor(seed), out, M, K, bits, BLOCK_M=16, BLOCK_K=32)
    assert torch.equal(out.bool(), dropout_keep_mask_ref(torch.tensor(seed), M, K, p))


# ----------------------------------------------------------------------------------------- what is saved and launched


def _names(record: Any) -> list[str]:
    return [launch.name for launch in record.launches]


def _forward_backward(t: dict[str, Tensor], **options: Any) -> tuple[Any, Any]:
    grad_y = _grad_y(t["x"].shape[0], t["weight"].shape[0], t["x"].dtype)
    with record_memory() as forward:
        y = lk.lora_linear(**t, backend="triton", **options)
    with record_memory() as backward:
        y.backward(grad_y)
    return forward, backward


def test_nothing_is_saved_beyond_inputs_and_p() -> None:
    t = lora_tensors(70, 64, 48, 8, BF16, F32, gate=True, bias=True)
    forward, _ = _forward_backward(t)
    assert forward.saved_bytes(beyond=list(t.values())) == 70 * 8 * 2


def test_frozen_a_saves_no_x_and_launches_nothing_for_it() -> None:
    t = lora_tensors(70, 64, 48, 8, BF16)
    t = {**t, "x": t["x"].detach(), "lora_a": t["lora_a"].detach()}
    forward, backward = _forward_backward(t)
    storages = {saved.untyped_storage().data_ptr() for saved in forward.saved}
    assert t["x"].untyped_storage().data_ptr() not in storages
    assert set(_names(backward)) <= {"lora_grad_kernel", "ordered_sum_kernel"}


def test_frozen_b_saves_no_p() -> None:
    t = lora_tensors(70, 64, 48, 8, BF16)
    t = {**t, "lora_b": t["lora_b"].detach()}
    forward, backward = _forward_backward(t)
    assert forward.saved_bytes(beyond=list(t.values())) == 0
    assert "lora_bwd_q_grad_b_kernel" not in _names(backward)


def test_inference_writes_no_p() -> None:
    t = lora_tensors(40, 64, 48, 8, BF16)
    with torch.no_grad(), record_memory() as record:
        lk.lora_linear(**t, backend="triton")
    (launch,) = record.launches
    assert launch.tensors["p_ptr"].written == 0


# ------------------------------------------------------------------------------------------------------------- traffic


def _peft_style(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dropout_p: float) -> Tensor:
    """The order of operations of a LoRA layer made of modules: base, cast, dropout, A, B, scale, add, cast."""
    functional = torch.nn.functional
    result = functional.linear(x, weight)
    cast = x.to(lora_a.dtype)
    dropped = functional.dropout(cast, dropout_p) if dropout_p else cast
    result = result + functional.linear(functional.linear(dropped, lora_a), lora_b) * scaling
    return result.to(x.dtype)


@pytest.mark.parametrize(
    ("dtype", "dropout_p", "factor_dtype"),
    [
        (BF16, 0.0, F32),
        (BF16, 0.1, None),
        *(  # each setting is above; float16 has two bytes, as bfloat16
            pytest.param(dtype, dropout_p, factor_dtype, marks=pytest.mark.nightly)
            for dtype in (BF16, F16)
            for dropout_p, factor_dtype in ((0.0, F32), (0.0, None), (0.1, F32), (0.1, None))
            if dtype == F16 or (dropout_p > 0.0) == (factor_dtype is not None)
        ),
    ],
)
def test_launches_and_bytes_of_a_training_step(
    dtype: torch.dtype, dropout_p: float, factor_dtype: torch.dtype | None, record_property: Callable[..., None]
) -> None:
    """At most 8 launches and 1.45 times the floor: x, W, y once in forward; dY, W, x, dX once in backward."""
    M, K, N, R = 1024, 512, 512, 16
    t = lora_tensors(M, K, N, R, dtype, factor_dtype)
    floor = 2 * ((M * K + N * K + M * N) + (M * N + N * K + 2 * M * K))
    seed = torch.tensor(SEED)
    forward, backward = _forward_backward(t, dropout_p=dropout_p, dropout_seed=seed)
    launches, ratio = len(forward.launches) + len(backward.launches), (forward.nbytes + backward.nbytes) / floor

    theirs = leaves(t)
    with record_memory() as eager:
        y = _peft_style(*theirs.values(), SCALING, dropout_p)
        y.backward(_grad_y(M, N, dtype))
    summary = (
        f"{launches} launches, {ratio:.3f} of the floor; module by module {len(eager.launches)} launches, "
        f"{eager.nbytes / floor:.3f}"
    )
    record_property("traffic", summary)
    print(summary)
    assert forward.saved_bytes(beyond=[*t.values(), seed]) == M * R * 2
    assert launches <= 8, forward.table() + "\n" + backward.table()
    assert ratio <= 1.45, forward.table() + "\n" + backward.table()


@pytest.mark.parametrize("factor_dtype", [None, F32], ids=["half factors", "float32 factors"])
def test_one_kernel_forward_is_one_launch_at_the_floor(factor_dtype: torch.dtype | None) -> None:
    M, K, N, R = 1024, 512, 512, 16
    t = lora_tensors(M, K, N, R, BF16, factor_dtype)
    with record_memory() as record:
        operands = (t[k].detach() for k in ("x", "weight", "lora_a", "lora_b"))
        lora_linear_fwd(*operands, _tiles("sm_90", t, 0.0, "fused"), scaling=SCALING, store_p=True)
    (launch,) = record.launches
    factors = t["lora_a"].nbytes + t["lora_b"].nbytes
    assert launch.nbytes <= 1.1 * (2 * (M * K + N * K + M * N + M * R) + factors)


# ------------------------------------------------------------------------------------------- offsets beyond 2**31


def _far_apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A matrix whose last row starts past element 2**31, in address space that costs no memory."""
    stride = -(-(2**31 + 1024) // (rows - 1)) // 8 * 8 + 8
    size = dtype.itemsize * ((rows - 1) * stride + columns)
    space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    flat = torch.frombuffer(space, dtype=dtype)
    assert (rows - 1) * stride > 2**31
    return flat.as_strided((rows, columns), (stride, 1))


@triton.jit
def _copy_tile_kernel(
    source, target, rows, columns, stride_source, stride_target, ROWS: tl.constexpr, COLS: tl.constexpr
):
    tile = load_tile(source, 0, 0, rows, columns, stride_source, 1, ROWS, COLS, False)
    store_tile(target, tile, 0, 0, rows, columns, stride_target, 1, ROWS, COLS, False)


def _in_place(run: Callable[[], Any]) -> Any:
    """Run kernels on tensors that are too far apart for ``record_memory``: addresses are checked before they are used,
    and storages are not copied, which the interpreter otherwise does after a launch."""
    spans: list[tuple[int, int]] = []

    def note(kernel: str, arguments: dict[str, Any]) -> None:
        tensors = [getattr(value, "base", value) for value in arguments.values()]
        spans[:] = [
            (t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for t in tensors if isinstance(t, Tensor)
        ]

    def check(kind: str, addresses: Any, mask: Any, nbytes: int) -> None:
        for address in addresses[np.broadcast_to(mask, addresses.shape)].ravel().tolist():
            assert any(low <= address < high for low, high in spans), f"{kind} at a wrong address"

    with watched_interpreter(note, check, lambda: None):
        return run()


def test_tiles_are_loaded_and_stored_beyond_two_to_the_31() -> None:
    near = torch.randn(3, 8)
    far, back = _far_apart(3, 8, F32), torch.zeros(3, 8)

    def there_and_back() -> None:
        _copy_tile_kernel[(1,)](near, far, 3, 8, near.stride(0), far.stride(0), ROWS=4, COLS=8)
        _copy_tile_kernel[(1,)](far, back, 3, 8, far.stride(0), back.stride(0), ROWS=4, COLS=8)

    _in_place(there_and_back)
    assert torch.equal(far, near) and torch.equal(back, near)


@pytest.mark.parametrize("strategy", ["fused", "two_kernel"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_strides_beyond_two_to_the_31(arch: str, strategy: Strategy) -> None:
    t = {k: v.detach() for k, v in lora_tensors(4, 40, 24, 8, BF16).items()}
    grad_y = _grad_y(4, 24, BF16)
    near = _launch(t, grad_y, _tiles(arch, t, 0.0, strategy))
    for name in ("x", "weight", "lora_a", "lora_b"):
        far = _far_apart(*t[name].shape, BF16)
        far.copy_(t[name])
        there = {**t, name: far}
        found = _in_place(lambda there=there: _launch(there, grad_y, _tiles(arch, there, 0.0, strategy)))
        for what, value in found.items():
            assert torch.equal(value, near[what]), (name, what)
        del far, there, found
