"""Which batch a layer runs in: in threads and tasks, and when autograd runs it again."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_kernels.nn import MultiLoRALinear, use_adapters

K = 8
X = torch.linspace(-1, 1, 2 * 3 * K).view(2, 3, K)
WAYS = [pytest.param(True, id="reentrant"), pytest.param(False, id="not reentrant")]


def make_layer():
    torch.manual_seed(0)
    layer = MultiLoRALinear.from_linear(nn.Linear(K, K), (4, 3, 2))
    nn.init.normal_(layer.lora_B, std=0.5)
    return layer


def on_a_thread(call):
    """What ``call`` returns or raises on a thread that is started now."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(call).result(timeout=60)


def expected(layer, ids):
    return layer(X, torch.tensor(ids)[:, None].expand(2, 3))


@pytest.fixture
def layer():
    return make_layer()


# ------------------------------------------------------------------------------------------------------------- threads


def test_a_thread_that_is_started_in_a_batch_runs_in_it(layer):
    with use_adapters([0, 1]):
        with use_adapters([1, 2]):
            assert torch.equal(on_a_thread(lambda: layer(X)), expected(layer, [1, 2]))
        assert torch.equal(on_a_thread(lambda: layer(X)), expected(layer, [0, 1]))
    assert torch.equal(on_a_thread(lambda: layer(X)), layer.base_layer(X))


def test_a_thread_that_takes_the_open_batch_is_told_of_once(layer, caplog):
    from lowrank_kernels.nn.multi_lora import _BATCHES

    _BATCHES._told = False
    with use_adapters([0, 1]):
        for _ in range(3):
            on_a_thread(lambda: layer(X))
    assert [record.message for record in caplog.records if "no batch of its own" in record.message] == [
        caplog.records[0].message
    ]


def test_an_older_thread_outside_of_any_batch_says_so(layer):
    with ThreadPoolExecutor(1) as executor:
        assert torch.equal(executor.submit(layer, X).result(), layer.base_layer(X))
        with (
            use_adapters([0, 1]),
            pytest.raises(RuntimeError, match=r"use_adapters: expected a layer in thread.*1 is open"),
        ):
            executor.submit(layer, X).result()

        def of_its_own():
            with use_adapters([-1, 2]):
                return layer(X)

        with use_adapters([0, 1]):
            assert torch.equal(executor.submit(of_its_own).result(), expected(layer, [-1, 2]))
        assert torch.equal(executor.submit(layer, X).result(), layer.base_layer(X))


def test_a_thread_with_two_batches_to_choose_from_says_so(layer):
    opened, done = threading.Event(), threading.Event()

    def other():
        with use_adapters([1, 1]):
            opened.set()
            done.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    opened.wait(60)
    try:
        with pytest.raises(RuntimeError, match="1 is open elsewhere"):
            layer(X)
        with use_adapters([0, 1]):
            assert torch.equal(layer(X), expected(layer, [0, 1]))
            with pytest.raises(RuntimeError, match="2 are open elsewhere"):
                on_a_thread(lambda: layer(X))
    finally:
        done.set()
        thread.join()
    assert torch.equal(layer(X), layer.base_layer(X))


def test_tasks_have_batches_of_their_own(layer):
    async def main():
        async def task(ids):
            with use_adapters(ids):
                await asyncio.sleep(0)
                here = layer(X)
                return torch.equal(await asyncio.to_thread(layer, X), here) and torch.equal(here, expected(layer, ids))

        return await asyncio.gather(*(task([i, j]) for i in range(3) for j in range(3)))

    assert all(asyncio.run(main()))


def test_what_goes_on_after_its_batch_has_ended_says_so(layer):
    with use_adapters([0, 1]):
        context = contextvars.copy_context()
        assert torch.equal(context.run(layer, X), expected(layer, [0, 1]))
    with pytest.raises(RuntimeError, match="use_adapters: expected a layer to run before its batch has ended"):
        context.run(layer, X)
    assert torch.equal(layer(X), layer.base_layer(X))


# ----------------------------------------------------------------------------------------------------------- backward


class Block(nn.Module):
    """An adapted linear between others, checkpointed; ``nested``: within another checkpoint."""

    def __init__(self, reentrant, nested=False):
        super().__init__()
        self.reentrant, self.nested, self.linear = reentrant, nested, make_layer()
        self.recomputed = 0

    def inner(self, x):
        self.recomputed += torch._C._current_graph_task_id() != -1
        return self.linear(x.sin()).exp()

    def middle(self, x):
        return self.checkpointed(self.inner, x.cos()).tanh()

    def checkpointed(self, function, x):
        return checkpoint(function, x, use_reentrant=self.reentrant)

    def forward(self, x):
        return self.checkpointed(self.middle if self.nested else self.inner, x)


def gradient(x, ids, nested=False):
    layer = make_layer()
    x = x.cos() if nested else x
    y = layer(x.sin(), torch.tensor(ids)[:, None].expand(x.shape[:2])).exp()
    (y.tanh() if nested else y).sum().backward()
    return layer.lora_A.grad, layer.lora_B.grad


def assert_gradient(block, *others):
    assert block.recomputed
    for p, *each in zip((block.linear.lora_A, block.linear.lora_B), *others, strict=True):
        torch.testing.assert_close(p.grad, sum(each))


def leaf():
    return X.clone().requires_grad_()


@pytest.mark.parametrize("call", [lambda f: f(), on_a_thread], ids=["here", "on a thread"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", WAYS)
def test_recomputation_runs_in_the_batch_of_its_forward(reentrant, nested, call):
    block = Block(reentrant, nested)
    with use_adapters([0, 2]):
        loss = block(leaf()).sum()
        call(loss.backward)
    assert_gradient(block, gradient(X, [0, 2], nested))


@pytest.mark.parametrize("call", [lambda f: f(), on_a_thread], ids=["here", "on a thread"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", WAYS)
def test_backward_of_two_batches_at_once(reentrant, nested, call):
    """Inside of both; the inner one is not the outer one's."""
    block = Block(reentrant, nested)
    with use_adapters([0, 1]):
        first = block(leaf()).sum()
        with use_adapters([2, 0]):
            second = block(leaf()).sum()
            call((first + second).backward)
    assert_gradient(block, gradient(X, [0, 1], nested), gradient(X, [2, 0], nested))


@pytest.mark.parametrize("call", [lambda f: f(), on_a_thread], ids=["here", "on a thread"])
@pytest.mark.parametrize("later", [None, [1, 1]])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", WAYS)
def test_backward_after_the_batch_has_ended_says_so(reentrant, nested, later, call):
    block = Block(reentrant, nested)
    with use_adapters([0, 1]):
        loss = block(leaf()).sum()
    with pytest.raises(RuntimeError, match="runs a layer again, before its batch has ended; call backward inside"):
        if later is None:
            call(loss.backward)
        else:
            with use_adapters(later):
                call(loss.backward)


@pytest.mark.parametrize("reentrant", WAYS)
def test_the_base_alone_is_recomputed_as_the_base_alone(reentrant):
    block, x = Block(reentrant), leaf()
    loss = block(x).sum()
    with use_adapters([0, 1]):
        loss.backward()
    other = leaf()
    block.linear.base_layer(other.sin()).exp().sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    assert block.recomputed and block.linear.lora_B.grad is None


@pytest.mark.parametrize("reentrant", WAYS)
def test_training_on_a_thread_of_a_pool_that_has_the_context(reentrant):
    block = Block(reentrant)
    with ThreadPoolExecutor(1) as executor:
        executor.submit(lambda: make_layer()(leaf()).sum().backward()).result()
        with use_adapters([0, 1]):
            loss = executor.submit(contextvars.copy_context().run, lambda: block(leaf()).sum()).result()
            executor.submit(loss.backward).result()
    assert_gradient(block, gradient(X, [0, 1]))


@pytest.mark.parametrize("reentrant", WAYS)
def test_a_batch_that_the_checkpointed_function_opens(reentrant):
    layer, ids = make_layer(), [2, 1]

    def function(x):
        with use_adapters(ids):
            return layer(x.sin()).exp()

    on_a_thread(checkpoint(function, leaf(), use_reentrant=reentrant).sum().backward)
    for p, other in zip((layer.lora_A, layer.lora_B), gradient(X, ids), strict=True):
        torch.testing.assert_close(p.grad, other)


def test_batches_that_overlap_in_a_thread_are_not_taken_for_one_another():
    """As two tasks have them that wait for one another: recomputation on another thread cannot tell which it is of."""
    block, first, second = Block(False), contextvars.Context(), contextvars.Context()
    contexts = use_adapters([0, 1]), use_adapters([1, 2])
    first.run(contexts[0].__enter__)
    second.run(contexts[1].__enter__)
    loss = first.run(lambda: block(leaf()).sum())
    with pytest.raises(RuntimeError, match="of one batch, got one of 2"):
        first.run(loss.backward)
    first.run(contexts[0].__exit__, None, None, None)
    second.run(contexts[1].__exit__, None, None, None)


@pytest.mark.parametrize("around", [nullcontext, lambda: use_adapters([2, 2])], ids=["apart", "in another"])
def test_ended_batches_leave_little_behind(around):
    from lowrank_kernels.nn.multi_lora import _BATCHES

    block = Block(False)
    with around():
        with use_adapters([0, 1]):
            early = block(leaf()).sum()
        for _ in range(100):
            with use_adapters([0, 1]):
                leaf().sum()
        late = block(leaf()).sum()
        assert len(_BATCHES._spans[threading.current_thread()]) <= 64
        with pytest.raises(RuntimeError, match="before its batch has ended"):
            early.backward()
        late.backward()
    if around is not nullcontext:
        assert_gradient(block, gradient(X, [2, 2]))


def test_the_context_decorates_functions(layer):
    @use_adapters([0, 1])
    def function(depth):
        return function(depth - 1) if depth else layer(X)

    for depth in (0, 2, 0):
        assert torch.equal(function(depth), expected(layer, [0, 1]))


def test_batches_without_gradients_leave_nothing_behind(layer):
    from lowrank_kernels.nn.multi_lora import _BATCHES

    before = set(_BATCHES._spans)
    with torch.no_grad():
        for _ in range(3):
            with use_adapters([0, 1]):
                layer(X)
                on_a_thread(lambda: torch.no_grad()(layer)(X))
    assert set(_BATCHES._spans) == before and all(span.end for spans in _BATCHES._spans.values() for span in spans)


# ---------------------------------------------------------------------------------------------------------- generators


def stream(layer, ids):
    with use_adapters(ids):
        while True:
            yield layer(X)


def test_generators_closed_in_the_order_of_their_start_leave_no_batch_behind(layer):
    first, second = stream(layer, [0, 1]), stream(layer, [1, 2])
    next(first), next(second)
    first.close()
    assert torch.equal(layer(X), expected(layer, [1, 2]))
    second.close()
    assert torch.equal(layer(X), layer.base_layer(X))


def test_a_context_ends_where_its_generator_is_run_in_other_contexts(layer):
    def once():
        with use_adapters([0, 1]):
            yield layer(X)

    generator = once()
    assert torch.equal(contextvars.copy_context().run(next, generator), expected(layer, [0, 1]))
    assert contextvars.copy_context().run(next, generator, None) is None
    assert torch.equal(layer(X), layer.base_layer(X))
