"""The compiled CPU passes against float64 formulas, at every instruction set that runs here.

tests/ops/test_instruction_sets.py runs the `core` tests of this file on the lower instruction sets too.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import torch

from lowrank_kernels import _extension

if not _extension.available():
    pytest.skip(f"no compiled extension: {_extension.reason()}", allow_module_level=True)

OPS = torch.ops.lowrank_kernels
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEED = -0x1234_5678_9ABC_DEF0
DROPOUT_P = 0.3


def philox_words(seed: int, rows: int, columns: int) -> torch.Tensor:
    """The random word of every element, from the published algorithm in exact integers."""
    low = 0xFFFFFFFF

    def mul(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        # 32 x 32 bits in int64 halves: torch has no unsigned 64-bit product.
        b_high, b_low = b >> 16, b & 0xFFFF
        lo = a * b_low
        hi = a * b_high
        mid = hi + (lo >> 16)
        return (mid >> 16) & low, ((mid << 16) | (lo & 0xFFFF)) & low

    key = [seed & low, (seed >> 32) & low]
    groups = (columns + 3) // 4
    c = [
        torch.arange(groups).expand(rows, groups).clone(),
        torch.arange(rows)[:, None].expand(rows, groups).clone(),
        torch.zeros(rows, groups, dtype=torch.int64),
        torch.zeros(rows, groups, dtype=torch.int64),
    ]
    for _ in range(10):
        hi0, lo0 = mul(c[0], 0xD2511F53)
        hi1, lo1 = mul(c[2], 0xCD9E8D57)
        c = [hi1 ^ c[1] ^ key[0], lo1, hi0 ^ c[3] ^ key[1], lo0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return torch.stack(c, dim=-1).reshape(rows, groups * 4)[:, :columns]


def keep_mask(rows: int, columns: int, p: float = DROPOUT_P, seed: int = SEED) -> torch.Tensor:
    return philox_words(seed, rows, columns) >= int(p * 2**32)


def seed_tensor(seed: int = SEED) -> torch.Tensor:
    return torch.tensor(seed, dtype=torch.int64)


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


def strided(t: torch.Tensor) -> torch.Tensor:
    """The same values with a row stride beyond the width, NaN in between."""
    wide = torch.full((t.shape[0], t.shape[1] + 3), float("nan"), dtype=t.dtype)
    wide[:, : t.shape[1]] = t
    return wide[:, : t.shape[1]]


def assert_close(out: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, times: float = 2.0) -> None:
    """`out` errs at most `times` as much as eager torch in the same dtype, plus a few ulp."""
    assert out.shape == exact.shape
    if exact.numel() == 0:
        return
    error = (out.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    ulp = torch.finfo(out.dtype).eps * max(exact.abs().max().item(), 1e-3)
    assert error <= times * eager_error + 4 * ulp, f"error {error:.3e}, eager {eager_error:.3e}, ulp {ulp:.3e}"


class Case:
    """One set of operands, and each pass as compiled op, float64 formula and eager formula."""

    def __init__(
        self,
        m: int,
        width: int,
        r: int,
        dtype: torch.dtype,
        factor_dtype: torch.dtype | None = None,
        *,
        gate: bool = False,
        dropout: bool = False,
        rank_last: bool = False,
        row_stride: bool = False,
    ) -> None:
        torch.manual_seed(m * 1009 + width * 31 + r)
        self.dtype, self.rank_last, self.scaling = dtype, rank_last, 0.7
        lay: Callable[[torch.Tensor], torch.Tensor] = strided if row_stride else (lambda t: t)
        self.big = lay(rand(m, width, dtype=dtype))
        self.p = lay(rand(m, r, dtype=dtype))
        self.y = lay(rand(m, width, dtype=dtype))
        factor = rand(width, r) if rank_last else rand(r, width)
        self.factor = lay((factor / max(r, 1) ** 0.5).to(factor_dtype or dtype))
        self.gate = rand(r, dtype=factor_dtype or dtype) if gate else None
        self.seed = seed_tensor() if dropout else None
        self.dropout_p = DROPOUT_P if dropout else 0.0
        self.mask = keep_mask(m, width) if dropout else torch.ones(m, width, dtype=torch.bool)
        self.inverse_keep = 1 / (1 - self.dropout_p)

    def _operands(self, wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        factor = self.factor.to(wide)
        if self.rank_last:
            factor = factor.t()
        p = self.p.to(wide)
        if self.gate is not None:
            p = p * self.gate.to(wide)
        return self.big.to(wide) * self.mask, p, factor

    def down(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = OPS.lora_down(self.big, self.factor, self.rank_last, self.seed, self.dropout_p)
        results = []
        for wide in (torch.float64, self.dtype):
            big, _, factor = self._operands(wide)
            results.append((big @ factor.t()) * self.inverse_keep)
        return out, results[0], results[1]

    def up(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = self.y.clone() if self.y.is_contiguous() else strided(self.y)
        assert (
            OPS.lora_up_(out, self.p, self.factor, self.rank_last, self.gate, self.scaling, self.seed, self.dropout_p)
            is None
        )
        results = []
        for wide in (torch.float64, self.dtype):
            _, p, factor = self._operands(wide)
            results.append(self.y.to(wide) + self.mask * (self.scaling * self.inverse_keep) * (p @ factor))
        return out, results[0], results[1]

    def grad(self, out_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = OPS.lora_grad(
            self.big, self.p, self.gate, self.scaling, self.rank_last, self.seed, self.dropout_p, out_dtype
        )
        assert out.dtype == out_dtype
        results = []
        for wide in (torch.float64, self.dtype):
            big, p, _ = self._operands(wide)
            product = (p.t() @ big) * (self.scaling * self.inverse_keep)
            results.append(product.t() if self.rank_last else product)
        return out, results[0], results[1]

    def down_grad(self) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]:
        assert self.rank_last and self.seed is None
        q, grad_b = OPS.lora_down_grad(self.big, self.factor, self.p, self.gate, self.scaling, self.factor.dtype)
        assert q.dtype == self.dtype and grad_b.dtype == self.factor.dtype
        qs, grads = [q], [grad_b]
        for wide in (torch.float64, self.dtype):
            big, p, factor = self._operands(wide)
            qs.append(big @ factor.t())
            grads.append(self.scaling * (big.t() @ p))
        return tuple(qs), tuple(grads)

    def check(self) -> None:
        assert_close(*self.down())
        assert_close(*self.up())
        assert_close(*self.grad(self.factor.dtype), times=3.0)
        if self.rank_last and self.seed is None:
            for triple in self.down_grad():
                assert_close(*triple, times=3.0)


SIZES = [(1, 64), (5, 31), (16, 257), (33, 530), (70, 1090)]


@pytest.mark.parametrize("rank_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("r", [1, 7, 16, 33, 64, 512])
def test_core_sizes(r: int, dtype: torch.dtype, rank_last: bool) -> None:
    for m, width in SIZES:
        Case(m, width, r, dtype, rank_last=rank_last).check()


@pytest.mark.parametrize("rank_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_gate_dropout_strides_and_factor_dtypes(dtype: torch.dtype, rank_last: bool) -> None:
    for gate, dropout, row_stride, factor_dtype in itertools.product(
        [False, True], [False, True], [False, True], DTYPES
    ):
        for m, width, r in [(3, 45, 5), (67, 333, 16)]:
            Case(
                m,
                width,
                r,
                dtype,
                factor_dtype,
                gate=gate,
                dropout=dropout,
                rank_last=rank_last,
                row_stride=row_stride,
            ).check()


@pytest.mark.parametrize("rank_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_core_many_rows(dtype: torch.dtype, rank_last: bool) -> None:
    """Enough rows for several chunks of a gradient's reduction."""
    Case(2500, 96, 9, dtype, rank_last=rank_last).check()
    Case(1030, 40, 16, dtype, rank_last=rank_last, dropout=True, gate=True).check()


def test_core_keep_mask() -> None:
    for seed, (rows, columns) in itertools.product(
        [0, 1, SEED, 2**63 - 1], [(1, 1), (3, 37), (40, 1000), (0, 5), (5, 0)]
    ):
        out = OPS.dropout_keep_mask(seed_tensor(seed), rows, columns, DROPOUT_P)
        assert out.dtype == torch.bool
        assert torch.equal(out, keep_mask(rows, columns, seed=seed))


def test_known_answers_of_philox() -> None:
    """The authors' test vector for an all-zero key and counter, through a threshold just at the word."""
    words = philox_words(0, 1, 4)[0].tolist()
    assert [f"{w:08x}" for w in words] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    for column, word in enumerate(words):
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            assert OPS.dropout_keep_mask(seed_tensor(0), 1, 4, p)[0, column].item() is kept


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_keep_rate(p: float) -> None:
    kept = OPS.dropout_keep_mask(seed_tensor(3), 512, 2048, p).double().mean().item()
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / 2**20) ** 0.5 + 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(dtype: torch.dtype) -> None:
    for m, width, r in [(0, 8, 4), (4, 0, 4), (4, 8, 0), (0, 0, 0)]:
        for rank_last in (False, True):
            case = Case(m, width, r, dtype, rank_last=rank_last)
            case.check()
            assert not case.grad(dtype)[0].any()
            assert not case.down()[0].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    x, a = rand(77, 600, dtype=dtype), rand(16, 600, dtype=dtype)
    b, y = rand(300, 16, dtype=dtype), rand(77, 300, dtype=dtype)
    p = OPS.lora_down(x, a, False)
    up = y.clone()
    OPS.lora_up_(up, p, b, True)
    few = OPS.lora_down(x[:8], a, False)  # up to 8 rows are summed another way than more
    for rows in (slice(0, 1), slice(5, 8), slice(2, 6)):
        assert torch.equal(OPS.lora_down(x[rows], a, False), few[rows])
    for rows in (slice(0, 9), slice(13, 60), slice(68, 77)):
        assert torch.equal(OPS.lora_down(x[rows], a, False), p[rows])
    for rows in (slice(0, 1), slice(40, 41), slice(13, 60), slice(76, 77)):
        part = y[rows].clone()
        OPS.lora_up_(part, p[rows], b, True)
        assert torch.equal(part, up[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_results(dtype: torch.dtype) -> None:
    case = Case(2100, 700, 24, dtype, rank_last=True, gate=True)
    dropped = Case(2100, 700, 24, dtype, rank_last=True, dropout=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(
                [
                    *(t[0] for t in case.down_grad()),
                    *(f()[0] for c in (case, dropped) for f in (c.down, c.up, lambda c=c: c.grad(dtype))),
                ]
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_dropout_masks_nan_and_infinity_away() -> None:
    """A dropped element has no influence at all, whatever it is."""
    for dtype in DTYPES:
        x, a = rand(8, 256, dtype=dtype), rand(4, 256, dtype=dtype)
        mask = keep_mask(8, 256)
        clean = OPS.lora_down(x, a, False, seed_tensor(), DROPOUT_P)
        x[~mask] = float("nan")
        assert torch.equal(OPS.lora_down(x, a, False, seed_tensor(), DROPOUT_P), clean)


def test_special_values_pass_through() -> None:
    for dtype in DTYPES:
        y = rand(4, 40, dtype=dtype)
        y[0, 0], y[1, 1], y[2, 2] = float("nan"), float("inf"), -float("inf")
        before = y.clone()
        OPS.lora_up_(y, torch.zeros(4, 2, dtype=dtype), rand(40, 2, dtype=dtype), True)
        assert torch.equal(torch.nan_to_num(y), torch.nan_to_num(before)) and y[0, 0].isnan()


def down(x: torch.Tensor, factor: torch.Tensor, rank_last: bool = False, *dropout: object) -> object:
    return OPS.lora_down(x, factor, rank_last, *dropout)


def up(y: torch.Tensor, p: torch.Tensor, factor: torch.Tensor, gate: torch.Tensor | None = None) -> object:
    return OPS.lora_up_(y, p, factor, False, gate)


def grad(out_dtype: torch.dtype) -> object:
    return OPS.lora_grad(rand(4, 8), rand(4, 2), None, 1.0, False, None, 0.0, out_dtype)


def down_grad(lora_b: torch.Tensor) -> object:
    return OPS.lora_down_grad(rand(4, 8), lora_b, rand(4, 2), None, 1.0, torch.float32)


MESSAGES: list[tuple[Callable[[], object], str]] = [
    (
        lambda: down(rand(4, 8), rand(2, 7)),
        "lora_down: expected factor of shape (R, width) = (2, 8), got (2, 7)",
    ),
    (
        lambda: down(rand(4, 8), rand(2, 8), True),
        "lora_down: expected factor of shape (width, R) = (8, 8), got (2, 8)",
    ),
    (lambda: down(rand(8), rand(2, 8)), "lora_down: expected x with 2 dimensions, got shape (8,)"),
    (
        lambda: down(rand(4, 8).double(), rand(2, 8)),
        "lora_down: expected x of dtype float32, bfloat16 or float16, got float64",
    ),
    (lambda: down(rand(8, 4).t(), rand(2, 8)), "lora_down: expected x with adjacent columns (stride 1)"),
    (
        lambda: down(rand(4, 8), rand(2, 8), False, None, 0.5),
        "lora_down: expected a dropout_seed since dropout_p is 0.5",
    ),
    (
        lambda: down(rand(4, 8), rand(2, 8), False, torch.zeros(2), 0.5),
        "lora_down: expected dropout_seed as an int64 CPU tensor with one element, got float32 of shape (2,)",
    ),
    (
        lambda: down(rand(4, 8), rand(2, 8), False, seed_tensor(), 1.0),
        "lora_down: expected 0 <= dropout_p < 1, got 1",
    ),
    (
        lambda: up(rand(4, 8), rand(5, 2), rand(2, 8)),
        "lora_up_: expected p of shape (M, R) = (4, 2), got (5, 2)",
    ),
    (
        lambda: up(rand(1, 8).expand(4, 8), rand(4, 2), rand(2, 8)),
        "lora_up_: expected y whose rows do not overlap, got row stride 0 for 8 columns",
    ),
    (
        lambda: up(rand(4, 8), rand(4, 2), rand(2, 8), rand(3)),
        "lora_up_: expected gate of shape (R,) = (2,) on the CPU, got (3,)",
    ),
    (lambda: grad(torch.float64), "lora_grad: expected out_dtype of dtype float32, bfloat16 or float16"),
    (
        lambda: down_grad(rand(7, 2)),
        "lora_down_grad: expected lora_b of shape (N, R) = (8, 2), got (7, 2)",
    ),
]


@pytest.mark.parametrize(("call", "message"), MESSAGES)
def test_messages(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(message)):
        call()
