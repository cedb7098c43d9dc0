"""The extension's own product with the correction inside, and DoRA's column scales, against float64."""

from __future__ import annotations

import pytest
import torch

from lowrank_kernels import _extension
from tests.tolerance import assert_as_exact_as_eager

_extension.require("dora_linear_fused")
CPP = torch.ops.lowrank_kernels
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(m, k, n, r, dtype, factor_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    factor_dtype = factor_dtype or dtype

    def normal(*shape, scale=1.0, of=dtype):
        return (scale * torch.randn(shape, generator=generator)).to(of)

    return (
        normal(m, k),
        normal(n, k, scale=k**-0.5),
        normal(r, k, scale=k**-0.5, of=factor_dtype),
        normal(n, r, scale=r**-0.5, of=factor_dtype),
    )


def formula(x, weight, a, b, bias=None, gate=None, scaling=1.0, column_scale=None):
    a, b = a.to(x.dtype), b.to(x.dtype)
    p = x @ a.T if gate is None else (x @ a.T) * gate.to(x.dtype)
    u = x @ weight.T + scaling * (p @ b.T)
    y = u if column_scale is None else column_scale.to(x.dtype) * u
    return (y if bias is None else y + bias), u


def check(m, k, n, r, dtype, *, factor_dtype=None, bias=False, gate=False, scale=False):
    x, weight, a, b = operands(m, k, n, r, dtype, factor_dtype)
    extra = {
        "bias": torch.randn(n).to(dtype) if bias else None,
        "gate": torch.randn(r) if gate else None,
        "column_scale": 0.5 + torch.rand(n) if scale else None,
    }
    y, p, u = CPP.lora_linear_fused(
        x, weight, a, b, extra["bias"], extra["gate"], 0.7, None, 0.0, extra["column_scale"], scale
    )
    wide = {name: None if t is None else t.double() for name, t in extra.items()}
    rounded = [t.to(dtype).double() for t in (a, b)]
    oracle_y, oracle_u = formula(x.double(), weight.double(), *rounded, scaling=0.7, **wide)
    eager_y, eager_u = formula(x, weight, a, b, scaling=0.7, **extra)
    assert_as_exact_as_eager(y, eager_y.to(dtype), oracle_y, what="y")
    assert_as_exact_as_eager(p, x @ a.to(dtype).T, x.double() @ rounded[0].T, what="p")
    if scale:
        assert_as_exact_as_eager(u, eager_u, oracle_u, what="u")
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 33, 64, 128, 131])
def test_any_number_of_tokens(m, dtype):
    check(m, 96, 80, 8, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("k", "n", "r"), [(1, 1, 1), (31, 33, 7), (257, 45, 16), (64, 1, 33), (2100, 40, 64), (40, 64, 512)]
)
def test_odd_widths_and_ranks(k, n, r, dtype):
    tokens = 9 if n > 1 else 100  # eager's largest error over a few numbers says little
    check(tokens, k, n, r, dtype, factor_dtype=torch.float32)


# Many rows: more than one task of rows; a reduction cut in two; outputs that fill no block; few outputs.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(1030, 40, 70, 3), (140, 2090, 300, 16), (1100, 2100, 1, 7), (200, 1, 33, 40)]
)
def test_many_rows_of_odd_widths(m, k, n, r, dtype):
    check(m, k, n, r, dtype, bias=True, gate=True, scale=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"bias": True}, {"gate": True}, {"scale": True}, {"bias": True, "scale": True}])
def test_bias_gate_and_column_scale(options, dtype):
    check(16, 128, 96, 16, dtype, **options)


# The norms come from the same pass over W: few rows, many, a cut reduction, more rows than a task takes, none; and A in
# one, two and three bfloat16 parts.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [(9, 96, 80, 8), (128, 257, 45, 33), (140, 2090, 300, 7), (600, 64, 70, 1), (1030, 40, 33, 16), (0, 48, 20, 3)],
)
def test_norms_of_the_product_are_those_of_the_norm_itself(m, k, n, r, dtype, factor_dtype):
    x, weight, a, b = operands(m, k, n, r, dtype, factor_dtype)
    weight[n // 2] = b[n // 2] = 0
    bias, magnitude = torch.randn(n), torch.randn(n)
    square = CPP.dora_norm(weight, a, b, 0.7, None, None)[1]
    norm, _, scale = CPP.dora_norm(weight, a, b, 0.7, square, magnitude)
    y, p, u, found_norm, found_scale = CPP.dora_linear_fused(
        x, weight, a, b, magnitude, square, bias, 0.7, None, 0.0, True
    )
    for found, separate in ((found_norm, norm), (found_scale, scale)):  # a last bit: sums of other lengths
        torch.testing.assert_close(found, separate, rtol=2.5e-7, atol=0.0)
    assert found_norm[n // 2] == 0 == found_scale[n // 2]
    separate = CPP.lora_linear_fused(x, weight, a, b, bias, None, 0.7, None, 0.0, found_scale, True)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip((y, p, u), separate, strict=True))


@pytest.mark.parametrize("m", [9, 600])
def test_what_a_call_leaves_in_its_memory_does_not_reach_the_next(m):
    def norms(r, fill):
        x, weight, a, b = operands(m, 96, 80, r, torch.bfloat16)
        weight.fill_(fill)
        return CPP.dora_linear_fused(x, weight, a, b, torch.ones(80), torch.ones(80), None, 0.7, None, 0.0, False)[3]

    assert norms(16, torch.nan).isnan().all()
    assert norms(7, 1.0).isfinite().all()  # 9 columns of 16 are padding


@pytest.mark.parametrize(("dtype", "tokens"), [(torch.bfloat16, 16), (torch.bfloat16, 600), (torch.float32, 16)])
def test_dora_takes_its_norms_from_the_product(dtype, tokens, monkeypatch):
    import lowrank_kernels as lk
    from lowrank_kernels.ops import dora
    from lowrank_kernels.ops.planning import plan

    x, weight, a, b = operands(tokens, 96, 80, 8, dtype)
    magnitude = torch.rand(80)
    _, _, square = lk.dora_column_scale(weight, a, b, magnitude)
    call = dora.DoRALinear(x, weight, a, b, magnitude, *(None,) * 4, 1.0, 0.0, None, False, True, False, "auto")
    own = plan("dora_linear", call).norm == "inside"
    calls = []
    original = dora._norm
    monkeypatch.setattr(dora, "_norm", lambda *args: calls.append(1) or original(*args))
    known = lk.dora_linear(x, weight, a, b, magnitude, weight_sq_norm=square)
    assert torch.equal(known, lk.dora_linear(x, weight, a, b, magnitude))
    assert len(calls) == (0 if own else 2)


def test_no_token_and_no_output():
    x, weight, a, b = operands(0, 32, 16, 4, torch.float32)
    assert CPP.lora_linear_fused(x, weight, a, b, None, None, 1.0, None, 0.0, None, False)[0].shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_feel_its_batch(dtype):
    x, weight, a, b = operands(150, 160, 96, 8, dtype)  # rows alone take another form than 150 do
    call = lambda rows: CPP.lora_linear_fused(rows, weight, a, b, None, None, 1.0, None, 0.0, None, False)[0]  # noqa: E731
    few, whole = call(x[:8]), call(x)  # up to 8 rows are summed another way than more, where there are no tiles
    for row in (0, 3, 7):
        assert torch.equal(call(x[row : row + 1])[0], few[row])
    for first in (0, 17, 141):
        assert torch.equal(call(x[first : first + 9]), whole[first : first + 9])


def test_the_large_path_agrees_with_the_few_token_path():
    """200 bfloat16 tokens take the library's product; the first 16 of them alone take the extension's."""
    import lowrank_kernels as lk

    x, weight, a, b = operands(200, 128, 96, 8, torch.bfloat16)
    bound = 2 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(
        lk.lora_linear(x, weight, a, b)[:16], lk.lora_linear(x[:16], weight, a, b), rtol=bound, atol=bound
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "r"), [(1, 5, 1), (70, 130, 7), (33, 257, 33)])
@pytest.mark.parametrize("separate", [True, False])
def test_dora_up(separate, m, n, r, dtype):
    generator = torch.Generator().manual_seed(0)
    u, p, b, bias = (torch.randn(s, generator=generator).to(dtype) for s in ((m, n), (m, r), (n, r), (n,)))
    scale = 0.5 + torch.rand(n, generator=generator)
    exact = u.double() + 0.7 * (p.double() @ b.double().T)
    eager = u + 0.7 * (p @ b.T)
    target = u.clone()
    y = torch.full_like(u, float("nan")) if separate else None
    CPP.dora_up_(target, p, b, 0.7, scale, bias, y)
    if separate:
        assert_as_exact_as_eager(target, eager, exact, what="u")
    assert_as_exact_as_eager(
        y if separate else target, (eager * scale.to(dtype) + bias), exact * scale.double() + bias.double(), what="y"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(0, 8), (1, 1), (70, 131), (40, 600)])
def test_dora_scale_grad(m, n, dtype):
    generator = torch.Generator().manual_seed(0)
    grad_y, u = (torch.randn(m, n, generator=generator).to(dtype) for _ in range(2))
    scale, norm = (0.5 + torch.rand(n, generator=generator) for _ in range(2))
    norm[n // 2] = 0.0  # a zero row has no gradient
    inverse = torch.where(norm > 0, 1 / norm.double(), 0.0)
    grad_u, grad_m = CPP.dora_scale_grad(grad_y, u, scale, norm)
    assert_as_exact_as_eager(grad_u, grad_y * scale.to(dtype), grad_y.double() * scale.double(), what="grad_u")
    eager, exact = (
        (grad_y.float() * u.float()).sum(0) * inverse.float(),
        (grad_y.double() * u.double()).sum(0) * inverse,
    )
    assert_as_exact_as_eager(grad_m, eager, exact, what="grad_m")
    without_u, nothing = CPP.dora_scale_grad(grad_y, None, scale, norm)
    assert torch.equal(without_u, grad_u) and nothing.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [
        (1, 8, 5, 1),
        (3, 131, 300, 7),
        (8, 70, 577, 33),
        (5, 33, 64, 300),
        (70, 131, 45, 7),
        (40, 600, 96, 33),
        (1100, 64, 2100, 16),
    ],
)
@pytest.mark.parametrize(("dropout_p", "scaled"), [(0.0, False), (0.3, False), (0.3, True)])
def test_grad_x(m, n, k, r, dtype, dropout_p, scaled):
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(m, n, generator=generator).to(dtype)
    weight = (n**-0.5 * torch.randn(n, k, generator=generator)).to(dtype)
    a, q, gate = (torch.randn(s, generator=generator).to(dtype) for s in ((r, k), (m, r), (r,)))
    scale = 0.5 + torch.rand(n, generator=generator) if scaled else None
    seed = torch.tensor(5)
    keep = CPP.dropout_keep_mask(seed, m, k, dropout_p) / (1 - dropout_p)
    got = CPP.lora_grad_x(grad_y, q, weight, a, gate, 0.7, seed if dropout_p else None, dropout_p, scale)

    def formula(dtype):
        dy = grad_y.to(dtype) * (1 if scale is None else scale.to(dtype))
        return dy @ weight.to(dtype) + 0.7 * keep.to(dtype) * ((q.to(dtype) * gate.to(dtype)) @ a.to(dtype))

    assert_as_exact_as_eager(got, formula(dtype), formula(torch.float64), what="grad_x")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_grad_x_does_not_feel_its_batch(dtype):
    generator = torch.Generator().manual_seed(1)
    grad_y, weight, a, q = (
        torch.randn(s, generator=generator).to(dtype) for s in ((40, 70), (70, 300), (7, 300), (40, 7))
    )
    call = lambda first, last: CPP.lora_grad_x(grad_y[first:last], q[first:last], weight, a, None, 0.7, None, 0.0)  # noqa: E731
    few, whole = call(0, 8), call(0, 40)  # up to 8 rows are summed another way than more
    for row in (0, 5, 7):
        assert torch.equal(call(row, row + 1)[0], few[row])
    for first in (0, 13, 31):
        assert torch.equal(call(first, first + 9), whole[first : first + 9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "n", "r"), [(0, 8, 3), (1, 1, 1), (70, 131, 7), (600, 96, 33), (300, 40, 80), (40, 2100, 5)]
)
@pytest.mark.parametrize("keep_grad_u", [True, False])
def test_dora_down_grad(m, n, r, dtype, keep_grad_u):
    generator = torch.Generator().manual_seed(0)
    grad_y, u, p, b = (torch.randn(s, generator=generator).to(dtype) for s in ((m, n), (m, n), (m, r), (n, r)))
    scale, norm = (0.5 + torch.rand(n, generator=generator) for _ in range(2))
    alone, grad_m_alone = CPP.dora_scale_grad(grad_y, u, scale, norm)
    grad_u, grad_m, q, grad_b = CPP.dora_down_grad(grad_y, u, scale, norm, b, p, 0.7, dtype, keep_grad_u)
    assert torch.equal(grad_u, alone) if keep_grad_u else grad_u.numel() == 0
    torch.testing.assert_close(grad_m, grad_m_alone, rtol=1e-5, atol=1e-4)  # sums over rows, cut elsewhere
    exact_u, eager_u = grad_y.double() * scale.double(), grad_y * scale.to(dtype)
    assert_as_exact_as_eager(q, eager_u @ b, exact_u @ b.double(), what="q")
    assert_as_exact_as_eager(grad_b, 0.7 * (eager_u.T @ p), 0.7 * (exact_u.T @ p.double()), what="grad_b")


@pytest.mark.parametrize("dtype", DTYPES)
def test_core_a_call_of_each_kind(dtype):
    check(9, 70, 45, 7, dtype, bias=True, gate=True)
    check(5, 70, 45, 7, dtype, bias=True, gate=True)
    test_grad_x(5, 131, 300, 7, dtype, 0.3, True)
    check(33, 64, 96, 16, dtype, scale=True)
    test_dora_up(True, 33, 130, 7, dtype)
    test_dora_scale_grad(40, 75, dtype)
    test_grad_x(70, 131, 45, 7, dtype, 0.3, True)
    test_dora_down_grad(70, 131, 7, dtype, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [3, 8, 9, 40, 129, 300])
@pytest.mark.parametrize(("k", "n"), [(64, 64), (65, 33), (131, 77), (17, 1001)])
def test_a_row_has_the_same_bits_at_any_place(k, n, m, dtype):
    """In our own products; a library's promises nothing."""
    x, weight, a, b = operands(m, k, n, 8, dtype)
    order = torch.randperm(m)
    scale = torch.rand(n)
    for column_scale in (None, scale):
        there, elsewhere = (
            CPP.lora_linear_inference(t, weight, a, b, None, None, 0.7, column_scale) for t in (x, x[order])
        )
        assert torch.equal(there[order], elsewhere)
    grad_y, q = torch.randn(m, n).to(dtype), torch.randn(m, 8).to(dtype)
    there, elsewhere = (
        CPP.lora_grad_x(dy, p, weight, a, None, 0.7, None, 0.0) for dy, p in ((grad_y, q), (grad_y[order], q[order]))
    )
    assert torch.equal(there[order], elsewhere)
