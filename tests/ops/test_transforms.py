"""torch.func transforms and forward-mode differentiation: the derivatives of the plain formula, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import lowrank_kernels as lk
from lowrank_kernels.functional import block_adamw_, read_blocks
from tests.problems import Problem, problems

M, K, N, R = 5, 12, 18, 3
CALLS = [
    "lora",
    "lora, gate, dropout",
    "dora",
    "dora, full gradients",
    "dora, dropout of the base",
    "norm",
    "multi",
    "multi, dora",
    "blocks",
    "block gradients",
]


def call(name: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[Tensor, ...]]:
    """(the public function, the formula in plain PyTorch, the operands that it is differentiated in), all float32."""
    torch.manual_seed(0)
    x, w, a, b, bias = (torch.randn(*s) for s in ((M, K), (N, K), (R, K), (N, R), (N,)))
    m, gate = torch.rand(N) + 0.5, torch.randn(R)
    keep = lk.reference.dropout_keep_mask_ref(torch.tensor(7), M, K, 0.5)
    ids, index = torch.tensor([0, 1, -1, 1, 0]), torch.tensor([[0, 0], [1, 0]], dtype=torch.int32)
    stack = lk.LoRAStack.from_factors([(a, b, 0.5), (2 * a, b, 2.0, m) if name == "multi, dora" else (2 * a, b, 2.0)])

    def plain_lora(x, a, b, bias, gate, keep=None):  # type: ignore[no-untyped-def]
        dropped = x if keep is None else torch.where(keep, x, 0) / 0.5
        return x @ w.T + bias + 0.5 * ((dropped @ a.T) * gate) @ b.T

    def plain_norm(a, b):  # type: ignore[no-untyped-def]
        return (w + 0.5 * b @ a).norm(dim=1)

    def plain_dora(x, a, b, m, bias, through=False, keep=None):  # type: ignore[no-untyped-def]
        g = m / (plain_norm(a, b) if through else plain_norm(a.detach(), b.detach()))
        dropped = x if keep is None else torch.where(keep, x, 0) / 0.5
        return x @ w.T + (g - 1) * (dropped @ w.T) + g * (0.5 * (dropped @ a.T) @ b.T) + bias

    def of_stack(a_all, b_all, magnitude=None):  # type: ignore[no-untyped-def]
        return lk.LoRAStack(a_all, b_all, stack.places, magnitude)

    def plain_multi(x, a_all, b_all, bias, magnitude=None):  # type: ignore[no-untyped-def]
        rows = []
        for row, i in enumerate(ids.tolist()):
            y = w @ x[row]
            if i >= 0:
                own = slice(R * i, R * (i + 1))
                s = (0.5, 2.0)[i]
                y = y + s * (b_all[own].T @ (a_all[own] @ x[row]))
                if magnitude is not None and i == 1:
                    n = (w + s * b_all[own].T.detach() @ a_all[own].detach()).norm(dim=1)
                    y = magnitude[0] / n * y
            rows.append(y + bias)
        return torch.stack(rows)

    def plain_blocks(x, blocks, bias):  # type: ignore[no-untyped-def]
        inside = torch.nn.functional.pad(torch.cat([blocks[0, :, :K], blocks[1, :2, :K]]), (0, 0, 0, 0))
        return x @ inside.T + bias

    def block_gradients(x, dy):  # type: ignore[no-untyped-def]
        padded = torch.nn.functional.pad(dy.T @ x, (0, 16 - K, 0, 32 - N))
        return torch.stack([padded[:16], padded[16:]])

    drop = {"dropout_p": 0.5, "dropout_seed": 7}
    return {
        "lora": (
            lambda x, a, b, bias: lk.lora_linear(x, w, a, b, bias, scaling=0.5),
            lambda x, a, b, bias: plain_lora(x, a, b, bias, 1.0),
            (x, a, b, bias),
        ),
        "lora, gate, dropout": (
            lambda x, a, b, bias, gate: lk.lora_linear(x, w, a, b, bias, scaling=0.5, gate=gate, **drop),
            lambda *t: plain_lora(*t, keep=keep),
            (x, a, b, bias, gate),
        ),
        "dora": (
            lambda x, a, b, m, bias: lk.dora_linear(x, w, a, b, m, bias, scaling=0.5),
            plain_dora,
            (x, a, b, m, bias),
        ),
        "dora, full gradients": (
            lambda x, a, b, m, bias: lk.dora_linear(x, w, a, b, m, bias, scaling=0.5, detach_norm=False),
            lambda *t: plain_dora(*t, through=True),
            (x, a, b, m, bias),
        ),
        "dora, dropout of the base": (
            lambda x, a, b, m, bias: lk.dora_linear(x, w, a, b, m, bias, scaling=0.5, dropout_base=True, **drop),
            lambda *t: plain_dora(*t, keep=keep),
            (x, a, b, m, bias),
        ),
        "norm": (lambda a, b: lk.dora_weight_norm(w, a, b, scaling=0.5), plain_norm, (a, b)),
        "multi": (
            lambda x, a, b, bias: lk.multi_lora_linear(x, w, of_stack(a, b), ids, bias),
            plain_multi,
            (x, stack.lora_a, stack.lora_b, bias),
        ),
        "multi, dora": (
            lambda x, a, b, bias, m: lk.multi_lora_linear(x, w, of_stack(a, b, m), ids, bias),
            plain_multi,
            (x, stack.lora_a, stack.lora_b, bias, m[None]),
        ),
        "blocks": (
            lambda x, blocks, bias: lk.block_sparse_linear(x, w, blocks, index, bias),
            plain_blocks,
            (x, read_blocks(w, index, (16, 16)), bias),
        ),
        "block gradients": (
            lambda x, dy: lk.block_sparse_weight_grad(x, dy, index, 16),
            block_gradients,
            (x, torch.randn(M, N)),
        ),
    }[name]


def tangents_of(primals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(p.shape, generator=generator) for p in primals)


def assert_close(ours: object, plain: object) -> None:
    torch.testing.assert_close(ours, plain, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", CALLS)
def test_jvp(name: str) -> None:
    ours, plain, primals = call(name)
    assert_close(jvp(ours, primals, tangents_of(primals)), jvp(plain, primals, tangents_of(primals)))


@pytest.mark.parametrize("name", CALLS)
def test_dual_numbers(name: str) -> None:
    ours, plain, primals = call(name)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents_of(primals), strict=True)]
        found, expected = (forward_ad.unpack_dual(f(*duals)) for f in (ours, plain))
        assert_close(found.primal, expected.primal)
        assert_close(found.tangent, expected.tangent)


@pytest.mark.parametrize("name", CALLS)
def test_vjp_and_both_jacobians(name: str) -> None:
    ours, plain, primals = call(name)
    (y, back), (plain_y, plain_back) = vjp(ours, *primals), vjp(plain, *primals)
    assert_close(y, plain_y)
    assert_close(back(torch.ones_like(y)), plain_back(torch.ones_like(y)))
    wanted = jacrev(plain, argnums=1)(*primals)
    assert_close(jacrev(ours, argnums=1)(*primals), wanted)
    assert_close(jacfwd(ours, argnums=1)(*primals), wanted)


@pytest.mark.parametrize("name", ["lora", "dora", "blocks"])
def test_hessian(name: str) -> None:
    ours, plain, primals = call(name)
    assert_close(
        hessian(lambda t: ours(primals[0], t, *primals[2:]).square().sum())(primals[1]),
        hessian(lambda t: plain(primals[0], t, *primals[2:]).square().sum())(primals[1]),
    )


@pytest.mark.parametrize("name", ["lora", "dora", "blocks", "norm"])
def test_gradients_of_each_sample(name: str) -> None:
    ours, plain, primals = call(name)
    batch = torch.randn(4, *primals[0].shape)

    def of_each(f: Callable[..., Tensor]) -> object:
        return vmap(grad(lambda first, second: f(first, second, *primals[2:]).square().sum(), (0, 1)), (0, None))(
            batch, primals[1]
        )

    assert_close(of_each(ours), of_each(plain))


@pytest.mark.parametrize(
    "make",
    [
        lambda linear: lk.nn.LoRALinear.from_linear(linear, 3),
        lambda linear: lk.nn.DoRALinear.from_linear(linear, 3),
        lambda linear: lk.nn.DoRALinear.from_linear(linear, 3).eval(),
        lambda linear: lk.nn.BlockSparseLinear.from_linear(linear, torch.tensor([[0, 0], [1, 0]]), 16),
        lambda linear: lk.nn.MultiLoRALinear.from_linear(linear, (3, 2)),
    ],
    ids=["LoRA", "DoRA", "DoRA, evaluation", "blocks", "many"],
)
def test_layers(make: Callable[[torch.nn.Linear], torch.nn.Module]) -> None:
    """Gradients by torch.func are those of backward, and a directional derivative is their product."""
    torch.manual_seed(0)
    layer = make(torch.nn.Linear(K, N))
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.1 * torch.randn_like(p))
    x = torch.randn(M, K)
    given = {"adapter_ids": torch.tensor([0, 1, 0, -1, 1])} if isinstance(layer, lk.nn.MultiLoRALinear) else {}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(layer, parameters, (x,), given).square().sum()

    layer(x, **given).square().sum().backward()
    values = {name: p.detach().clone() for name, p in trained.items()}
    found = grad(loss)(values)
    for name, p in trained.items():
        assert_close(found[name], p.grad)
    tangents = {name: torch.randn_like(p) for name, p in values.items()}
    _, tangent = jvp(loss, (values,), (tangents,))
    assert_close(tangent, sum((found[name] * tangents[name]).sum() for name in values))


@pytest.mark.parametrize(
    "problem", [pytest.param(p, id=p.name) for p in problems() if p.name.endswith("torch.float32")]
)
def test_batched_gradients_are_each_ones_own(problem: Problem) -> None:
    """As vectorised Jacobians ask for them."""
    tensors = {name: t.detach().requires_grad_(t.requires_grad) for name, t in problem.tensors.items()}
    y = problem.run(tensors, "auto")
    trained = [t for t in tensors.values() if t.requires_grad]
    directions = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, trained, directions, is_grads_batched=True, retain_graph=True)
    for i, direction in enumerate(directions):
        for all_of, alone in zip(together, torch.autograd.grad(y, trained, direction, retain_graph=True), strict=True):
            torch.testing.assert_close(all_of[i], alone)


def test_in_place_functions_refuse_transforms() -> None:
    w, a, b = torch.randn(16, 16), torch.randn(2, 16), torch.randn(16, 2)
    before = copy.deepcopy(w)
    with pytest.raises(RuntimeError, match=r"merge_lora_.*has no derivative"):
        jvp(lambda a: lk.merge_lora_(w, a, b), (a,), (a,))
    with pytest.raises(RuntimeError, match=r"merge_lora_.*has no derivative"), forward_ad.dual_level():
        lk.merge_lora_(w, forward_ad.make_dual(a, a), b)
    state, index = torch.zeros(1, 16, 16), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"block_adamw_.*has no derivative"):
        grad(lambda g: block_adamw_(state, g, state.clone(), state.clone(), w, index, step=1) or g.sum())(state + 1)
    assert torch.equal(w, before)


def test_forward_over_reverse_is_refused_where_the_graph_was_recorded_before() -> None:
    layer, x = lk.nn.LoRALinear.from_linear(torch.nn.Linear(K, N), 2), torch.randn(M, K, requires_grad=True)
    y = layer(x)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            torch.autograd.grad(y, x, dual)


def test_ids_that_vmap_maps_over_are_refused_by_name():
    stack = lk.LoRAStack.from_factors([(torch.randn(R, K), torch.randn(N, R), 0.5)])
    x, w, ids = torch.randn(M, K), torch.randn(N, K), torch.zeros(M, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"multi_lora_linear: expected adapter_ids that torch\.func\.vmap does not"):
        vmap(lambda row, i: lk.multi_lora_linear(row[None], w, stack, i[None]))(x, ids)
