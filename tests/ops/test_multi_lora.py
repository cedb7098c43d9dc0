"""multi_lora_linear as a citizen of torch, its messages, and what a row may not feel of its batch."""

from __future__ import annotations

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.stack import Place
from tests.fuzz.check import poisoned_memory
from tests.problems.multi_lora import POPULATIONS, RANKS, population

K, N = 72, 50


def make_stack(ranks=(4, 7, 2), dora=(), dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(1)
    given = []
    for i, r in enumerate(ranks):
        a, b = torch.randn(r, K, generator=generator) / 8, torch.randn(N, r, generator=generator) / 3
        magnitude = (torch.rand(N, generator=generator).to(dtype),) if i in dora else ()
        given.append((a.to(dtype), b.to(dtype), 0.5 + i / 4, *magnitude))
    stack = lk.LoRAStack.from_factors(given)
    for t in (stack.lora_a, stack.lora_b, stack.magnitude):
        if t is not None:
            t.requires_grad_(grad)
    return stack


def operands(rows=10, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, K, generator=generator).to(dtype), torch.randn(N, K, generator=generator).to(dtype) / 8


# ------------------------------------------------------------------------------------------ what a row may not feel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_permuting_the_batch_permutes_the_result(dtype):
    x, weight = operands(70, dtype)
    stack = make_stack(RANKS, dora=(1, 4), dtype=dtype)
    ids = population("mixed", 70, len(RANKS))
    y = lk.multi_lora_linear(x, weight, stack, ids)
    turn = torch.randperm(70, generator=torch.Generator().manual_seed(3))
    assert torch.equal(lk.multi_lora_linear(x[turn], weight, stack, ids[turn]), y[turn])


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("trains", [False, True])  # with a magnitude that trains, x Wᵀ is kept beside y
@pytest.mark.parametrize("removed", [(1,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("name", POPULATIONS)
def test_every_row_is_written_when_adapters_have_gone_and_come(name, removed, trains, backend):
    if backend == "cpu" and not _extension.available():
        pytest.skip("the extension is not built")
    x, weight = operands(30)
    stack, ids, bias = make_stack(dora=(1,)), population(name, 30, 3), torch.linspace(-1, 1, N)
    a, b, scaling, magnitude = (t.clone() if isinstance(t, torch.Tensor) else t for t in stack.factors(1))

    def run(ids):
        stack.magnitude.requires_grad_(trains)
        with poisoned_memory():
            y = lk.multi_lora_linear(x, weight, stack, ids, bias, backend=backend).detach()
        stack.magnitude.requires_grad_(False)
        return y

    for adapter in removed:
        stack.remove(adapter)
    expected = x @ weight.T + bias
    for adapter in {0, 2}.difference(removed):
        a_i, b_i, s_i, _ = stack.factors(adapter)
        expected += torch.where((ids == adapter)[:, None], s_i * x @ a_i.T @ b_i.T, 0.0)
    torch.testing.assert_close(run(ids), expected)
    again = stack.add(a, b, scaling, magnitude)
    direction = weight + scaling * b @ a
    expected = x @ (magnitude / direction.norm(dim=1))[:, None].mul(direction).T + bias
    torch.testing.assert_close(run(torch.full_like(ids, again)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_correction_does_not_feel_the_other_rows(dtype):
    """Down, up and what backward makes of them, by the C++ kernels: the bits of a row alone and in a batch."""
    if not _extension.available():
        pytest.skip("the extension is not built")
    ops, stack = torch.ops.lowrank_kernels, make_stack(RANKS, dtype=dtype)
    x, _ = operands(70, dtype)

    def correction(rows, ids):
        plan = lk.plan_batch(ids, len(stack))
        p = ops.multi_lora_down(rows, stack.lora_a, stack.table, 64, plan.order[0], plan.tiles[0], None, None)
        y = torch.zeros(len(rows), N, dtype=dtype)
        of_plan = (stack.lora_b, stack.table, stack.scalings, plan.order[0], plan.tiles[0])
        ops.multi_lora_up_(y, p, *of_plan, *[None] * 6)
        return p, y

    for name in POPULATIONS:
        ids = population(name, 70, len(RANKS))
        together = correction(x, ids)
        for row in (0, 33, 69):
            alone = correction(x[row : row + 1], ids[row : row + 1])
            assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, together, strict=True)), (name, row)


def test_base_rows_are_the_base_product():
    x, weight = operands(20)
    stack, bias = make_stack(), torch.randn(N)
    y = lk.multi_lora_linear(x, weight, stack, torch.full((20,), -1), bias)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias))


def test_the_same_as_each_adapter_alone():
    x, weight = operands(30, torch.float64)
    stack = make_stack(dora=(1,), dtype=torch.float64)
    ids = population("mixed", 30, 3)
    y = lk.multi_lora_linear(x, weight, stack, ids, backend="reference")
    for i in range(3):
        a, b, scaling, magnitude = stack.factors(i)
        args = (a, b) if magnitude is None else (a, b, magnitude)
        op = lk.lora_linear if magnitude is None else lk.dora_linear
        alone = op(x[ids == i], weight, *args, scaling=scaling, backend="reference")
        torch.testing.assert_close(y[ids == i], alone, rtol=1e-6, atol=1e-6)  # scalings are float32


# ------------------------------------------------------------------------------------------------- citizen of torch


@pytest.mark.parametrize("dora", [(), (1,)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend, dora):
    x, weight = operands()
    x.requires_grad_()
    stack, plan = make_stack(dora=dora, grad=True), lk.plan_batch(population("mixed", 10, 3), 3)
    norm, scale = lk.stack_column_scale(weight, stack) if dora else (None, None)
    p, seed = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64), torch.tensor(3)
    tail = (stack.table, stack.scalings, 7, None, *plan, None, norm, scale, p, seed)
    forward = torch.ops.lowrank_kernels.multi_lora_linear.default
    factors = x, weight, stack.lora_a, stack.lora_b
    torch.library.opcheck(forward, (*factors, stack.magnitude, torch.randn(N), *tail, True, bool(dora), backend))
    backward = torch.ops.lowrank_kernels.multi_lora_linear_backward.default
    saved = torch.randn(1, 10, 7), torch.randn(10, N) if dora else None
    factors = (t.detach() for t in factors)
    needs = [True, True, True, bool(dora), True]
    torch.library.opcheck(backward, (torch.randn(10, N), *factors, *saved, *tail, needs, backend))


def test_opcheck_of_the_plan():
    plan = torch.ops.lowrank_kernels.batch_plan.default
    torch.library.opcheck(plan, (population("mixed", 40, 5)[:, None].int(), 5))


def test_gradcheck_in_float64():
    x, weight = operands(8, torch.float64)
    stack = make_stack((2, 3), dora=(1,), dtype=torch.float64, grad=True)
    ids = torch.tensor([0, 1, -1, 1, 0, 0, 1, -1])
    found = lk.stack_column_scale(weight, stack)  # a constant, as in backward

    def call(x, lora_a, lora_b, bias):
        again = lk.LoRAStack(lora_a, lora_b, stack.places, stack.magnitude)
        return lk.multi_lora_linear(
            x, weight, again, ids, bias, norm_and_scale=found, dropout_p=0.3, dropout_seed=5, backend="reference"
        )

    bias = torch.randn(N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x.requires_grad_(), stack.lora_a, stack.lora_b, bias))


@pytest.mark.parametrize("dora", [(), (1,)])
def test_compile_fullgraph(dora):
    x, weight = operands(12)
    stack, ids = make_stack(dora=dora, grad=True), population("mixed", 12, 3)

    def loss(x, lora_a, lora_b):
        again = lk.LoRAStack(lora_a, lora_b, stack.places, stack.magnitude)
        return lk.multi_lora_linear(x, weight, again, ids).square().sum()

    wanted = [x.requires_grad_(), stack.lora_a, stack.lora_b]
    expected = torch.autograd.grad(loss(*wanted), wanted)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*wanted), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_leading_dimensions():
    x, weight = operands(12)
    stack, ids = make_stack(), population("mixed", 12, 3)
    y = lk.multi_lora_linear(x, weight, stack, ids)
    assert torch.equal(lk.multi_lora_linear(x.view(3, 4, K), weight, stack, ids.view(3, 4)), y.view(3, 4, N))


def test_autocast():
    x, weight = operands(12)
    stack, ids = make_stack(), population("mixed", 12, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = lk.multi_lora_linear(x, weight, stack, ids)
    assert y.dtype == torch.bfloat16
    expected = lk.multi_lora_linear(x.bfloat16(), weight.bfloat16(), stack, ids)
    assert torch.equal(y, expected)


def test_only_what_trains_gets_a_gradient():
    x, weight = operands(12)
    stack, ids = make_stack(), population("mixed", 12, 3)
    stack.lora_b.requires_grad_()
    y = lk.multi_lora_linear(x, weight, stack, ids)
    y.sum().backward()
    assert stack.lora_a.grad is None and x.grad is None and stack.lora_b.grad is not None


def test_an_adapter_without_rows_gets_a_gradient_of_zero():
    x, weight = operands(12)
    stack = make_stack(grad=True)
    lk.multi_lora_linear(x, weight, stack, torch.ones(12, dtype=torch.int32)).sum().backward()
    assert not stack.lora_a.grad[:4].any() and stack.lora_a.grad[4:11].any() and not stack.lora_b.grad[11:].any()


def test_gradients_of_gradients_say_what_to_do():
    x, weight = operands()
    x.requires_grad_()
    y = lk.multi_lora_linear(x, weight, make_stack(), torch.zeros(10, dtype=torch.int64))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="multi_lora_linear: gradients of gradients are not implemented"):
        grad.sum().backward()


def test_a_plan_serves_several_linears():
    x, weight = operands(20)
    stack, ids = make_stack(), population("mixed", 20, 3)
    plan = lk.plan_batch(ids, 3)
    assert torch.equal(lk.multi_lora_linear(x, weight, stack, plan), lk.multi_lora_linear(x, weight, stack, ids))
    with pytest.raises(ValueError, match="expected a plan for 3 adapters, got one for 4"):
        lk.multi_lora_linear(x, weight, stack, lk.plan_batch(ids, 4))


# --------------------------------------------------------------------------------------------------------- messages


IDS = torch.zeros(3, dtype=torch.int64)
BAD = [
    ({"x": [1.0]}, TypeError, "expected x to be a tensor, got list"),
    ({"x": torch.zeros(3, K + 1)}, ValueError, r"expected x of shape \(\.\.\., K\) = \(\.\.\., 72\), got \(3, 73\)"),
    ({"x": torch.zeros(3, K).long()}, TypeError, r"expected x of a floating dtype, got torch.int64"),
    ({"x": torch.zeros(3, K).bfloat16()}, TypeError, r"expected x and weight of one dtype, got .*bfloat16"),
    ({"weight": torch.zeros(N, K, 1)}, ValueError, r"expected weight of shape \(N, K\), got"),
    ({"weight": torch.zeros(N, K, requires_grad=True)}, ValueError, r"expected a frozen weight.*requires_grad_"),
    ({"weight": torch.zeros(N + 1, K)}, ValueError, r"expected a stack for .* \(72, 51\), got one for \(72, 50\)"),
    ({"stack": None}, TypeError, "expected stack to be a LoRAStack, got NoneType"),
    ({"adapter_ids": IDS[:2]}, ValueError, r"expected adapter_ids of x's leading shape, \(3,\), 3 rows in all, got 2"),
    ({"adapter_ids": IDS + 3}, ValueError, "expected adapter_ids from -1 to 2, got 3 to 3"),
    ({"adapter_ids": IDS - 2}, ValueError, "expected adapter_ids from -1 to 2, got -2 to -2"),
    ({"adapter_ids": IDS.float()}, TypeError, "expected adapter_ids to be a tensor of integers, got torch.float32"),
    ({"adapter_ids": IDS.bool()}, TypeError, "expected adapter_ids to be a tensor of integers, got torch.bool"),
    ({"weights": torch.zeros(3)}, ValueError, r"expected weights of adapter_ids' shape \(M, J\) = \(3, 1\)"),
    ({"weights": torch.zeros(3, 1, requires_grad=True)}, ValueError, "expected weights that do not require grad"),
    ({"bias": torch.zeros(3)}, ValueError, r"expected bias of shape \(N,\) = \(50,\), got \(3,\)"),
    ({"bias": torch.zeros(N, device="meta")}, ValueError, "expected bias on cpu like x, got meta"),
    ({"dropout_p": 1.0}, ValueError, r"expected 0 <= dropout_p < 1"),
    ({"dropout_p": (0.1, 0.2)}, ValueError, r"expected 0 <= dropout_p < 1, for all adapters or for each of 3"),
    ({"backend": "rocket"}, ValueError, "expected backend to be one of auto"),
    ({"backend": "cuda"}, ValueError, "backend 'cuda' cannot run here"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_messages(changes, error, message):
    x, weight = operands(3)
    given = {"x": x, "weight": weight, "stack": make_stack(), "adapter_ids": IDS, **changes}
    with pytest.raises(error, match=rf"^multi_lora_linear: {message}"):
        lk.multi_lora_linear(**given)


def test_several_dora_adapters_a_row_do_not_add_up():
    x, weight = operands(3)
    with pytest.raises(ValueError, match="expected one adapter a row, without weights, since the stack holds DoRA"):
        lk.multi_lora_linear(x, weight, make_stack(dora=(0,)), IDS[:, None].expand(3, 2))


def test_the_compiled_kernels_trust_no_table():
    """A table or a plan that does not fit the tensors is refused before memory is touched."""
    if not _extension.available():
        pytest.skip("the extension is not built")
    x, _ = operands(3)
    stack, plan = make_stack(), lk.plan_batch(IDS, 3)
    down = torch.ops.lowrank_kernels.multi_lora_down
    tiles = plan.tiles[0]
    for table in (stack.table + 7, -stack.table):
        with pytest.raises(RuntimeError, match="within the 13 rows of the factor"):
            down(x, stack.lora_a, table.contiguous(), 7, plan.order[0], tiles, None, None)
    with pytest.raises(RuntimeError, match="expected max_rank of at least 7"):
        down(x, stack.lora_a, stack.table, 6, plan.order[0], tiles, None, None)
    with pytest.raises(RuntimeError, match="expected order to hold rows below 3"):
        down(x, stack.lora_a, stack.table, 7, plan.order[0] + 1, tiles, None, None)
    with pytest.raises(RuntimeError, match="expected tile 0 to be of a plan for"):
        down(x, stack.lora_a, stack.table, 7, plan.order[0], tiles * 9, None, None)


def test_a_stack_made_by_hand():
    stack = lk.LoRAStack(torch.randn(5, K), torch.randn(5, N), [Place(0, 2, 1.0), Place(2, 3, 0.5)])
    x, weight = operands(3)
    y = lk.multi_lora_linear(x, weight, stack, torch.tensor([1, 0, -1]))
    torch.testing.assert_close(y[0], weight @ x[0] + 0.5 * stack.lora_b[2:].T @ (stack.lora_a[2:] @ x[0]))
