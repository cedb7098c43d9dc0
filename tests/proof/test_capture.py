"""Every op is captured for CUDA tensors, forward and backward, on a machine that has no CUDA device.

Forward goes through torch.compile(fullgraph=True) on fake CUDA tensors. Backward cannot go through autograd's engine,
which asks the device for its context before it runs anything; the test walks the recorded nodes itself. On fake-free
CPU tensors the joint graph is then captured and run as usual.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels.families import NAMES
from lowrank_kernels.inspect.registry import Traced, family

TRACED = [pytest.param(traced, id=f"{name}: {traced.name}") for name in NAMES for traced in family(name).traced]


class _OurOps(TorchDispatchMode):
    """Notes which ops of the package run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "lowrank_kernels":
            self.names.append(func._schema.name.removeprefix("lowrank_kernels::"))
        return func(*args, **(kwargs or {}))


def _nodes_from(root: Any) -> list[Any]:
    """The nodes below ``root``, each before the nodes that it passes gradients to."""
    order: list[Any] = []
    seen = set()

    def visit(node: Any) -> None:
        if node is None or node in seen:
            return
        seen.add(node)
        for child, _ in node.next_functions:
            visit(child)
        order.append(node)

    visit(root)
    return order[::-1]


def _walk_backward(y: Tensor, grad: Tensor) -> dict[Tensor, Tensor]:
    """Gradients of leaves, without autograd's engine."""
    waiting: dict[Any, dict[int, Tensor]] = {y.grad_fn: {y.output_nr: grad}}
    leaves: dict[Tensor, Tensor] = {}
    for node in _nodes_from(y.grad_fn):
        inputs = waiting.pop(node, {})
        if hasattr(node, "variable"):
            leaves[node.variable] = inputs[0]
            continue
        # One gradient an output: None for those that nobody used.
        arguments = [inputs.get(i) for i in range(len(node._input_metadata))]
        results = (node if callable(node) else node.apply)(*arguments)
        # A Python node answers for every argument, and lists those that are tensors: what is wanted is in both.
        wanted = [(child, index) for child, index in node.next_functions if child is not None]
        given = [r for r in (results if isinstance(results, tuple) else (results,)) if r is not None]
        for (child, index), result in zip(wanted, given, strict=True):
            there = waiting.setdefault(child, {})
            there[index] = result if index not in there else there[index] + result
    return leaves


def _captured(function: Any) -> tuple[Any, list[torch.fx.GraphModule]]:
    """``function`` under torch.compile(fullgraph=True), and the graph that it becomes."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return torch.compile(function, backend=keep, fullgraph=True), graphs


@pytest.mark.parametrize("traced", TRACED)
def test_captured_for_cuda_without_a_device(traced: Traced) -> None:
    with FakeTensorMode():
        tensors = traced.tensors("cuda")
        compiled, graphs = _captured(traced.function)
        y = compiled(*tensors)
        expected = traced.function(*tensors)
        assert (y.device.type, y.shape, y.dtype, y.stride()) == (
            "cuda",
            expected.shape,
            expected.dtype,
            expected.stride(),
        )
        with _OurOps() as backward:
            grads = _walk_backward(y, torch.ones_like(y))
    (graph,) = graphs
    forward = [str(node.target).split(".")[1] for node in graph.graph.nodes if "lowrank_kernels" in str(node.target)]
    # An op without a backward op is a constant of the graph, such as DoRA's norm.
    wanted = [f"{name}_backward" for name in reversed(forward)]
    assert forward and backward.names == [name for name in wanted if hasattr(torch.ops.lowrank_kernels, name)]
    for leaf, grad in grads.items():
        assert (grad.device.type, grad.shape, grad.dtype) == ("cuda", leaf.shape, leaf.dtype)


@pytest.mark.parametrize("traced", TRACED)
def test_joint_graph_computes_what_eager_does(traced: Traced) -> None:
    tensors = traced.tensors("cpu")

    def run(function: Any) -> list[Tensor]:
        y = function(*tensors)
        wanted = [t for t in tensors if t.requires_grad]
        grads = torch.autograd.grad(y.float().square().sum(), wanted, allow_unused=True)
        return [y, *(g for g in grads if g is not None)]

    torch._dynamo.reset()
    compiled = torch.compile(traced.function, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(run(compiled), run(traced.function), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("traced", TRACED)
def test_a_trace_with_symbols_for_sizes_of_x_computes_what_eager_does(traced: Traced) -> None:
    """Without dynamo, as torch.export traces with strict=False: such calls have no plan, and their dropout a seed."""
    x, *others = (t.detach() for t in traced.tensors("cpu"))
    trace = make_fx(lambda x: traced.function(x, *others), tracing_mode="symbolic", _allow_non_fake_inputs=True)
    graph = trace(x)
    torch.testing.assert_close(graph(x), traced.function(x, *others))
