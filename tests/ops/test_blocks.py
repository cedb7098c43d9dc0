"""Blocks as one node: against float64, against the separate calls of their parts, and what they keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from lowrank_kernels import LoRAPart, _extension
from lowrank_kernels.cpp import cpp
from lowrank_kernels.reference import dora_linear_ref, dora_weight_norm_ref
from lowrank_kernels.reference.blocks import ACTIVATIONS, mlp_hidden_ref
from lowrank_kernels.weights import NF4Weight
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

M, K, F, N = 22, 24, 34, 66
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
GENERATOR = torch.Generator()


def random(*shape: int, dtype: torch.dtype = F32, size: float = 1.0) -> Tensor:
    return (size * torch.randn(*shape, generator=GENERATOR, dtype=F64)).to(dtype)


def part(n: int, k: int, rank: int | None, dtype: torch.dtype = F32, *, kind: str = "lora", bias: bool = False) -> Any:
    """A part whose factors are float32, and train."""
    weight = random(n, k, dtype=dtype, size=k**-0.5)
    b = random(n, dtype=dtype).requires_grad_() if bias else None
    if rank is None:
        return LoRAPart(weight, bias=b)
    lora_a, lora_b = random(rank, k, size=k**-0.5).requires_grad_(), random(n, rank, size=0.3).requires_grad_()
    magnitude = random(n).abs().add(0.5).requires_grad_() if kind == "dora" else None
    return LoRAPart(weight, lora_a, lora_b, b, magnitude, scaling=1.5)


def linear(x: Tensor, part: LoRAPart) -> Tensor:
    """The formula, by PyTorch, in x's dtype."""
    weight, a, b, bias, magnitude, _, scaling = part
    y = x @ weight.T
    if a is not None:
        y = y + scaling * (x @ a.to(x.dtype).T) @ b.to(x.dtype).T
    if magnitude is not None:
        exact = torch.promote_types(x.dtype, F32)
        norm = (weight.to(exact) + scaling * b.detach().to(exact) @ a.detach().to(exact)).norm(dim=1)
        y = (magnitude / norm).to(x.dtype) * y
    return y if bias is None else y + bias


def separate_linears(x: Tensor, parts: Sequence[LoRAPart]) -> tuple[Tensor, ...]:
    return tuple(linear(x, part) for part in parts)


def separate_mlp(x: Tensor, gate: Any, up: Any, down: Any, activation: str) -> Tensor:
    ys = [linear(x, part) for part in (gate, up) if part is not None]
    pair = ys[0].chunk(2, -1) if gate is None and ys[0].shape[-1] == 2 * down.weight.shape[1] else ys
    return linear(mlp_hidden_ref(activation, pair[0], pair[1] if len(pair) > 1 else None), down)


def trained(*parts: LoRAPart | None) -> list[Tensor]:
    return [t for part in parts if part is not None for t in part[:6] if t is not None and t.requires_grad]


def wide(value: Any) -> Any:
    """Operands in float64, that train where they did."""
    if isinstance(value, Tensor):
        return value.detach().to(F64).requires_grad_(value.requires_grad)
    return value if value is None else LoRAPart(*[wide(t) for t in value[:6]], value.scaling)


def outputs_and_gradients(function: Callable[..., Any], x: Tensor, parts: Sequence[Any]) -> list[Tensor]:
    """All outputs of a block, and all gradients of one sum over them."""
    x = x.detach().requires_grad_()
    ys = function(x, *parts)
    ys = ys if isinstance(ys, tuple) else (ys,)
    dys = [torch.linspace(-1, 1, y.numel()).sin().reshape(y.shape).to(y.dtype) for y in ys]
    return [*ys, *torch.autograd.grad(ys, [x, *trained(*parts)], dys)]


def assert_right(ours: Callable[..., Any], eager: Callable[..., Any], x: Tensor, parts: Sequence[Any]) -> None:
    found = outputs_and_gradients(ours, x, parts)
    plain = outputs_and_gradients(eager, x, parts)
    oracle = outputs_and_gradients(eager, x.to(F64), [wide(part) for part in parts])
    assert len(found) == len(plain) == len(oracle)
    for number, results in enumerate(zip(found, plain, oracle, strict=True)):
        assert_as_exact_as_eager(*results, factor=GRADIENT_FACTOR, what=f"result {number}")


RANKS = [(1, 7, 4), (4, None, 3), (None, None, 2), (5, None, None)]


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", RANKS, ids=str)
@pytest.mark.parametrize("shape", [(M, K), (2, 65, K), (1, K)], ids=str)
def test_linears_of_one_x(dtype: torch.dtype, ranks: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    GENERATOR.manual_seed(1)
    parts = [part(n, K, r, dtype, bias=n == 7) for n, r in zip((N, 7, 2 * N), ranks, strict=True)]
    eager = lambda x, *parts: separate_linears(x, parts)  # noqa: E731
    assert_right(lambda x, *parts: lk.qkv_lora(x, parts), eager, random(*shape, dtype=dtype), parts)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_dora_in_a_block_is_doras_own_op(dtype: torch.dtype) -> None:
    GENERATOR.manual_seed(1)
    parts = [part(N, K, 4, dtype, kind="dora", bias=True), part(7, K, 3, dtype, kind="dora")]
    x = random(2, 65, K, dtype=dtype)
    ours = outputs_and_gradients(lambda x, *p: lk.qkv_lora(x, p), x, parts)
    theirs = outputs_and_gradients(lambda x, *p: tuple(as_separate_op(x, each) for each in p), x, parts)
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(mine, other), number


@pytest.mark.skipif(not _extension.available(), reason="the extension is not built")
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "gelu"])
@pytest.mark.parametrize("size", [1, 7, 61, 1031])
@pytest.mark.parametrize("gated", [False, True])
def test_the_hidden_columns_in_one_pass_core(dtype: torch.dtype, activation: str, size: int, gated: bool) -> None:
    """Against PyTorch's own functions in float64; beyond finite numbers, what PyTorch gives."""
    GENERATOR.manual_seed(3)
    f = ACTIVATIONS[activation]
    both = random(5, 2 * size, dtype=dtype, size=3.0)
    both[0, 0], both[1, 0], both[2, 0], both[3, 0] = math.nan, math.inf, 60.0, -60.0
    gate, up = both[:, :size], both[:, size:] if gated else None  # rows of a wider matrix
    dh = random(5, size, dtype=dtype)
    d_gate, d_up = torch.full_like(dh, math.nan), torch.full_like(dh, math.nan) if gated else None
    h = cpp.glu(gate, up, activation)
    cpp.glu_grad_(d_gate, d_up, dh, gate, up, activation)

    def formula(dtype: torch.dtype) -> list[Tensor]:
        z, u, d = gate.to(dtype), None if up is None else up.to(dtype), dh.to(dtype)
        value = f.value(z)
        slope = f.gradient(d if u is None else d * u, z)
        return [value if u is None else value * u, slope, *([] if u is None else [d * value])]

    ours = [h, d_gate, *([] if d_up is None else [d_up])]
    for mine, eager, oracle in zip(ours, formula(dtype), formula(F64), strict=True):
        assert torch.equal(mine.isfinite()[:2], eager.isfinite()[:2])
        rest = mine[2:], eager[2:], oracle[2:]
        assert_as_exact_as_eager(*rest, factor=GRADIENT_FACTOR)
    in_place = dh.clone()
    cpp.glu_grad_(in_place, d_up, in_place, gate, up, activation)
    assert torch.equal(in_place[2:], d_gate[2:])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("form", ["gated", "split", "plain"])
@pytest.mark.parametrize("ranks", [*RANKS, "dora"], ids=str)
def test_an_mlp(dtype: torch.dtype, activation: str, form: str, ranks: Any) -> None:
    GENERATOR.manual_seed(2)
    kind, (r_gate, r_up, r_down) = ("dora", RANKS[0]) if ranks == "dora" else ("lora", ranks)
    gate = part(F, K, r_gate, dtype, kind=kind, bias=True) if form == "gated" else None
    up = part(2 * F if form == "split" else F, K, r_up, dtype, kind=kind)
    down = part(N, F, r_down, dtype, kind=kind, bias=True)
    eager = lambda x, *parts: separate_mlp(x, *parts, activation)  # noqa: E731
    ours = lambda x, *parts: lk.mlp_lora(x, *parts, activation=activation)  # noqa: E731
    assert_right(ours, eager, random(3, M, K, dtype=dtype), [gate, up, down])


def as_separate_op(x: Tensor, part: LoRAPart, *, dropout_seed: int = 5, **options: Any) -> Tensor:
    """A part by its own op."""
    w, a, b, bias, m, norm, s = part
    given = {"scaling": s, "dropout_seed": dropout_seed, **options}
    if a is None:
        return lk.frozen_linear(x, w, bias)
    if m is None:
        return lk.lora_linear(x, w, a, b, bias, **given)
    return lk.dora_linear(x, w, a, b, m, bias, weight_sq_norm=norm, **given)


def as_separate_ops(x: Tensor, gate: Any, up: Any, down: Any, **options: Any) -> Tensor:
    """The MLP by the ops of its parts."""
    h = torch.nn.functional.silu(as_separate_op(x, gate, **options)) * as_separate_op(x, up, **options)
    return as_separate_op(h, down, dropout_seed=6, **options)


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("rows", [3, 200])
def test_dropout_and_values_are_those_of_the_separate_ops(kind: str, dropout_p: float, rows: int) -> None:
    """One mask for gate and up, another for down; frozen factors, biases and inputs get no gradient."""
    GENERATOR.manual_seed(3)
    parts = [part(F, K, 4, kind=kind), part(F, K, 3, kind=kind, bias=True), part(N, F, 2, kind=kind)]
    parts[0].lora_a.requires_grad_(False)
    parts[1].lora_b.requires_grad_(False)
    options, x = {"dropout_p": dropout_p}, random(rows, K)
    ours = outputs_and_gradients(lambda x, *p: lk.mlp_lora(x, *p, dropout_seed=5, **options), x, parts)
    theirs = outputs_and_gradients(lambda x, *p: as_separate_ops(x, *p, **options), x, parts)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-5)


def test_a_drawn_mask_is_drawn_again_by_activation_checkpointing() -> None:
    GENERATOR.manual_seed(5)
    parts = [part(F, K, 4), part(F, K, 4), part(N, F, 4)]
    block = lambda x, *p: lk.mlp_lora(x, *p, dropout_p=0.5)  # noqa: E731
    x = random(M, K)
    torch.manual_seed(0)
    plain = outputs_and_gradients(block, x, parts)
    torch.manual_seed(0)
    again = outputs_and_gradients(lambda x, *p: checkpoint(block, x, *p, use_reentrant=False), x, parts)
    assert all(map(torch.equal, plain, again))
    torch.manual_seed(1)
    assert not torch.equal(outputs_and_gradients(block, x, parts)[0], plain[0])


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_it_is_one_node_and_keeps_neither_activation_nor_product(kind: str) -> None:
    GENERATOR.manual_seed(6)
    m, parts = 64, [part(F, K, 4, kind=kind), part(F, K, 4, kind=kind), part(N, F, 4, kind=kind)]
    x = random(m, K).requires_grad_()

    def saved(block: Callable[..., Tensor]) -> tuple[int, Tensor]:
        """Elements that autograd keeps for as many rows as x has."""
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            if m in t.shape:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = block(x, *parts)
        return sum(kept.values()), y

    block, y = saved(lk.mlp_lora)
    separate, _ = saved(as_separate_ops)
    u = 2 * F + N if kind == "dora" else 0
    assert block == m * (K + 2 * F + 12 + u)
    assert block <= (0.7 if kind == "lora" else 0.8) * separate
    leaves = {type(node).__name__ for node, _ in y.grad_fn.next_functions if node is not None}
    assert leaves == {"AccumulateGrad"}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_compiled_whole_it_gives_the_same(kind: str, dropout_p: float) -> None:
    GENERATOR.manual_seed(7)
    parts = [part(F, K, 4, kind=kind, bias=True), part(F, K, 3, kind=kind), part(N, F, 2, kind=kind)]
    block = lambda x, *p: lk.mlp_lora(x, *p, dropout_p=dropout_p, dropout_seed=3)  # noqa: E731
    x = random(2, 40, K)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    ours, plain = (outputs_and_gradients(f, x, parts) for f in (compiled, block))
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_the_ops_pass_torchs_own_checks() -> None:
    GENERATOR.manual_seed(8)
    from lowrank_kernels.ops.blocks import form_of, operands_of

    for kind in ("lora", "dora"):
        parts = [part(F, K, 4, kind=kind), part(F, K, 3, kind=kind), part(N, F, 2, kind=kind)]
        parts = [LoRAPart(*[None if t is None else t.detach() for t in p[:6]], p.scaling) for p in parts]
        form = form_of([LoRAPart(*p[:6], p.scaling) for p in parts], "silu", False, False, 0.0, "auto")
        args = random(M, K), None, operands_of(parts), form
        torch.library.opcheck(torch.ops.lowrank_kernels.lora_block.default, args)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_under_autocast_it_gives_what_the_separate_ops_give(kind: str) -> None:
    GENERATOR.manual_seed(9)
    parts = [part(F, K, 4, kind=kind, bias=True), part(F, K, 3, kind=kind), part(N, F, 2, kind=kind)]
    x = random(M, K)

    def cast(block: Callable[..., Tensor]) -> list[Tensor]:
        def inside(x: Tensor, *p: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return block(x, *p)

        return outputs_and_gradients(inside, x, parts)

    for mine, other in zip(cast(lk.mlp_lora), cast(as_separate_ops), strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=3e-2, atol=1e-2 * float(other.abs().max()))


def test_over_a_weight_of_few_bits() -> None:
    GENERATOR.manual_seed(10)
    parts = [part(64, 64, 4), part(64, 64, 3), part(64, 64, 2)]
    coded = [p._replace(weight=NF4Weight.from_dense(p.weight)) for p in parts]
    dense = [p._replace(weight=p.weight.dense()) for p in coded]
    x = random(70, 64)
    ours = outputs_and_gradients(lambda x, *_: lk.mlp_lora(x, *coded), x, parts)
    theirs = outputs_and_gradients(lambda x, *_: lk.mlp_lora(x, *dense), x, parts)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_a_given_norm_of_w_is_used() -> None:
    GENERATOR.manual_seed(11)
    p = part(N, K, 3, kind="dora")
    exact = p.weight.square().sum(1)
    x = random(M, K)
    plain, given = lk.qkv_lora(x, [p]), lk.qkv_lora(x, [p._replace(weight_sq_norm=exact)])
    torch.testing.assert_close(given[0], plain[0], rtol=1e-6, atol=1e-6)
    other = lk.qkv_lora(x, [p._replace(weight_sq_norm=exact * 4)])[0]
    assert not torch.allclose(other, plain[0], rtol=1e-2)
    norm = dora_weight_norm_ref(p.weight, p.lora_a, p.lora_b, scaling=p.scaling)
    y, _, _ = dora_linear_ref(x, p.weight, p.lora_a, p.lora_b, p.magnitude / norm, None, scaling=p.scaling)
    torch.testing.assert_close(plain[0], y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, K), (2, 0, K), (1, K), (5, K, 2)], ids=str)
def test_empty_one_token_and_not_contiguous(shape: tuple[int, ...]) -> None:
    GENERATOR.manual_seed(12)
    parts = [part(F, K, 4), part(F, K, 1), part(N, F, 7)]
    x = random(*shape) if shape[-1] == K else random(*shape).transpose(-1, -2)
    found = outputs_and_gradients(lk.mlp_lora, x, parts)
    expected = outputs_and_gradients(lambda x, *p: separate_mlp(x, *p, "silu"), x, parts)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_an_output_that_nobody_uses_costs_no_gradient() -> None:
    GENERATOR.manual_seed(13)
    parts = [part(N, K, 3), part(N, K, 4)]
    x = random(M, K).requires_grad_()
    first, _ = lk.qkv_lora(x, parts)
    first.sum().backward()
    expected = torch.autograd.grad(linear(x, parts[0]).sum(), [x, parts[0].lora_b])
    torch.testing.assert_close(x.grad, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts[0].lora_b.grad, expected[1], rtol=1e-5, atol=1e-5)
    assert parts[1].lora_a.grad is None


def test_a_second_backward_is_right_and_a_gradient_of_gradients_is_refused() -> None:
    GENERATOR.manual_seed(14)
    parts = [part(F, K, 3), part(F, K, 4), part(N, F, 2)]
    x = random(M, K).requires_grad_()
    y = lk.mlp_lora(x, *parts)
    first, second = (torch.autograd.grad(y.sum(), [x, *trained(*parts)], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_transforms_see_the_formula() -> None:
    GENERATOR.manual_seed(15)
    parts = [part(F, K, 3), part(F, K, 4), part(N, F, 2)]
    x = random(4, K)
    ours = torch.func.vmap(torch.func.grad(lambda row: lk.mlp_lora(row[None], *parts).sum()))(x)
    theirs = torch.func.vmap(torch.func.grad(lambda row: separate_mlp(row[None], *parts, "silu").sum()))(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [np.float64(1.5), np.float32(1.5), 2], ids=lambda n: type(n).__name__)
def test_a_scaling_of_numpy_or_an_integer_is_a_number(number: Any) -> None:
    GENERATOR.manual_seed(17)
    given, x = part(N, K, 3), random(M, K)
    if isinstance(number, np.float32):
        with pytest.raises(TypeError, match="qkv_lora: part 0: expected scaling to be a number, got float32"):
            lk.qkv_lora(x, [given._replace(scaling=number)])
    else:
        ours, plain = (lk.qkv_lora(x, [given._replace(scaling=s)])[0] for s in (number, float(number)))
        assert torch.equal(ours, plain)


def mlp_operands() -> dict[str, Any]:
    GENERATOR.manual_seed(16)
    return {"x": random(3, K), "gate": part(F, K, 2), "up": part(F, K, 2), "down": part(N, F, 2)}


BAD: list[tuple[Any, Any, str]] = [
    (lambda o: {"x": [1.0]}, TypeError, "mlp_lora: expected x to be a tensor, got list"),
    (lambda o: {"x": torch.zeros(3, 7)}, ValueError, r"mlp_lora: gate: expected x of shape \(\.\.\., K\)"),
    (lambda o: {"up": o["up"].weight}, TypeError, "mlp_lora: expected parts to be LoRAPart, got Tensor"),
    (lambda o: {"up": o["up"]._replace(weight=None)}, TypeError, "mlp_lora: expected weight to be a tensor"),
    (lambda o: {"down": o["up"]}, ValueError, "mlp_lora: expected gate and up to give the 24 columns .* 34 and 34"),
    (lambda o: {"gate": None, "down": o["up"]}, ValueError, "expected up to give the 24 .* twice as many; got 34"),
    (lambda o: {"activation": "tanh"}, ValueError, "expected activation to be one of silu, .*, got 'tanh'"),
    (lambda o: {"gate": o["gate"]._replace(lora_b=None)}, ValueError, "mlp_lora: gate: expected lora_a and lora_b, or"),
    (
        lambda o: {"gate": o["gate"]._replace(lora_a=None, lora_b=None, magnitude=torch.ones(F))},
        ValueError,
        "mlp_lora: gate: expected lora_a and lora_b with a magnitude",
    ),
    (lambda o: {"down": o["down"]._replace(magnitude=torch.ones(3))}, ValueError, "mlp_lora: down: .* magnitude"),
    (lambda o: {"down": o["down"]._replace(scaling=math.inf)}, ValueError, "mlp_lora: down: expected scaling"),
    (
        lambda o: {"up": o["up"]._replace(weight=o["up"].weight.requires_grad_())},
        ValueError,
        "mlp_lora: up: expected a frozen weight",
    ),
    (lambda o: {"up": o["up"]._replace(weight=o["up"].weight.half())}, TypeError, "mlp_lora: up: .* of one dtype"),
    (lambda o: {"dropout_p": 1.0}, ValueError, "mlp_lora: expected 0 <= dropout_p < 1"),
    (lambda o: {"dropout_p": 0.5, "dropout_seed": "x"}, TypeError, "mlp_lora: expected dropout_seed"),
    (lambda o: {"backend": "rocket"}, ValueError, "mlp_lora: expected backend to be one of"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_a_bad_call_is_refused_by_name(change: Callable[[Any], dict[str, Any]], error: Any, message: str) -> None:
    operands = mlp_operands()
    with pytest.raises(error, match=message):
        lk.mlp_lora(**{**operands, **change(operands)})


@pytest.mark.parametrize("parts", [[], None, mlp_operands()["up"]], ids=["none", "no list", "a part itself"])
def test_linears_of_one_x_need_a_list_of_parts(parts: Any) -> None:
    with pytest.raises(ValueError, match="qkv_lora: expected parts to be a list of one LoRAPart or more"):
        lk.qkv_lora(torch.zeros(3, K), parts)


class Listening(TorchDispatchMode):
    """Sends calls through the dispatcher, as profilers, counters of operations and selective checkpointing do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_an_unused_output_is_no_error_where_something_listens() -> None:
    parts = [part(N, K, rank, bias=True) for rank in (4, 5, 6)]
    x = random(M, K).requires_grad_()
    leaves = [x, *(t for p in parts for t in (p.lora_a, p.lora_b, p.bias))]
    expected = torch.autograd.grad(lk.qkv_lora(x, parts)[1].sum(), leaves, allow_unused=True)
    with Listening():
        found = torch.autograd.grad(lk.qkv_lora(x, parts)[1].sum(), leaves, allow_unused=True)
    assert (
        [g is None for g in found] == [g is None for g in expected] == [False] + [True] * 3 + [False] * 3 + [True] * 3
    )
    assert all(f is None or torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", [(M, K), (2, 3, K)], ids=str)
def test_outputs_may_be_changed_in_place(shape: tuple[int, ...]) -> None:
    parts, down = [part(F, K, 4), part(F, K, 4)], part(N, F, 4)
    x = random(*shape).requires_grad_()
    ys, y = lk.qkv_lora(x, parts), lk.mlp_lora(x, parts[0], parts[1], down)
    expected = torch.autograd.grad([t.mul(2).sum() for t in (*ys, y)], x, retain_graph=True)[0]
    found = torch.autograd.grad([t.mul_(2).sum() for t in (*ys, y)], x)[0]
    assert torch.equal(found, expected)


def test_on_the_meta_device_gradients_have_their_shapes() -> None:
    factors = torch.empty(4, K, device="meta").requires_grad_(), torch.empty(N, 4, device="meta").requires_grad_()
    x = torch.empty(2, 3, K, device="meta").requires_grad_()
    (y,) = lk.qkv_lora(x, [LoRAPart(torch.empty(N, K, device="meta"), *factors)])
    assert y.shape == (2, 3, N)
    y.sum().backward()
    assert [t.grad.shape for t in (x, *factors) if t.grad is not None] == [x.shape, *(t.shape for t in factors)]
