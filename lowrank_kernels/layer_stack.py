"""The stack of equal layers that a transformers model runs its hidden states through, found and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from .names import held, named_modules


class Call(NamedTuple):
    """A layer's call: the hidden states it got, what it got besides, and the hidden states it returned."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


class LayerStack(NamedTuple):
    """Where the layers of a model are: ``owner._modules[key]`` is the list of them, ``path`` its name in the model."""

    path: str
    owner: nn.Module
    key: str
    layers: nn.ModuleList

    def replace(self, stack: WholeStack, part: str) -> Callable[[], None]:
        """Put another stack in its place. Returns what puts this one back, without a module ``part`` in its layers."""
        self.owner._modules[self.key] = stack

        def undo() -> None:
            self.layers.training = stack.training
            self.owner._modules[self.key] = self.layers
            for layer in self.layers.children():
                layer._modules.pop(part, None)

        return undo


class WholeStack(nn.ModuleList):
    """A stack that is called as one module, in the place of the model's list of layers and with their names.

    The model, which iterates over the list to call what is in it, finds one module there, the stack: ``list(stack)`` is
    ``[stack]``, while ``stack[i]`` is layer i and ``stack.children()`` are the layers.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__(layers.children())
        self.training = layers.training

    def __iter__(self) -> Iterator[nn.Module]:
        yield self

    def __getitem__(self, index: Any) -> Any:
        return (self,) if isinstance(index, slice) else super().__getitem__(index)

    __repr__ = nn.Module.__repr__


def find_stack(model: nn.Module, op: str) -> LayerStack:
    """The one list of ``config.num_hidden_layers`` layers of one class in a model.

    Raises:
        TypeError: not a module.
        ValueError: a model in DistributedDataParallel's or another's hands; no config; no such list, or several, as an
            encoder and a decoder are.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if held(model) is not model:
        raise ValueError(f"{op}: expected a model before it is wrapped, got a {type(model).__name__}; wrap it after")
    kind = type(model).__name__
    config: Any = getattr(model, "config", None)
    number = getattr(config, "num_hidden_layers", None)
    if not isinstance(number, int):
        raise ValueError(
            f"{op}: expected a model of transformers, whose config has num_hidden_layers, got a {kind}, whose layers "
            f"are not recognised"
        )
    found = [
        LayerStack(f"{path}.{key}" if path else key, module, key, child)
        for path, module in named_modules(model)
        for key, child in module._modules.items()
        if isinstance(child, nn.ModuleList) and len(child) == number and len(set(map(type, child.children()))) == 1
    ]
    if len(found) != 1:
        names = ", ".join(stack.path for stack in found) or "none"
        raise ValueError(
            f"{op}: expected one list of {number} layers of one class in this {kind}, found {names}; its layers are "
            f"not recognised"
        )
    return found[0]


def check_plain(stack: LayerStack, op: str) -> None:
    """Raise ValueError for a stack that another method has put in already."""
    if isinstance(stack.layers, WholeStack):
        raise ValueError(
            f"{op}: expected the model's own layers, got a {type(stack.layers).__name__} in their place; call undo() "
            f"on its report first"
        )


def first(output: Any) -> Tensor:
    """The hidden states that a layer returns, alone or first of several."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def without_caches(value: Any) -> Any:
    """Arguments with every cache of keys and values left out."""
    return tree_map(lambda leaf: None if is_cache(leaf) else leaf, value)


def is_cache(leaf: Any) -> bool:
    return hasattr(leaf, "get_seq_length") and hasattr(leaf, "update")


def filled_cache(*values: Any) -> bool:
    """True if a cache among the arguments holds tokens already."""
    return any(is_cache(leaf) and leaf.get_seq_length() > 0 for leaf in tree_flatten(values)[0])


@torch.no_grad()
def record_calls(model: nn.Module, stack: LayerStack, op: str) -> list[Call]:
    """The calls of the layers as the model makes them for three tokens, the first of them padding.

    Raises:
        ValueError: the model does not run on token numbers; it does not call each layer once, in order, on what the one
            before it returned; or gives one layer other arguments than another.
    """
    calls: list[tuple[int, Call]] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, args, kwargs, output, i=i: calls.append((i, Call(args[0], args[1:], kwargs, first(output)))),
            with_kwargs=True,
        )
        for i, layer in enumerate(stack.layers.children())
    ]
    device = next(stack.layers.parameters()).device
    ids = torch.arange(3, device=device)[None]
    try:
        with in_evaluation(model):
            model(input_ids=ids, attention_mask=(ids > 0).long())
    except Exception as error:
        raise ValueError(f"{op}: expected a model that runs on three tokens, got {error!r:.300}") from error
    finally:
        for hook in hooks:
            hook.remove()
    in_order = [i for i, _ in calls] == list(range(len(stack.layers)))
    chained = all(b.hidden is a.output for (_, a), (_, b) in pairwise(calls))
    if not (in_order and chained):
        raise ValueError(
            f"{op}: expected a {type(model).__name__} that calls each layer of {stack.path} once, on what the layer "
            f"before it returned; it does not, so that its layers are not recognised"
        )
    if not all(_same(calls[0][1], call) for _, call in calls):
        raise ValueError(
            f"{op}: expected layers that get the same arguments, got a {type(model).__name__} whose layers do not, as "
            f"where some attend within a window"
        )
    return [call for _, call in calls]


def _same(a: Call, b: Call) -> bool:
    (one, spec), (other, other_spec) = (tree_flatten((call.args, call.kwargs)) for call in (a, b))
    return spec == other_spec and all(
        p is q or (not isinstance(p, Tensor) and not isinstance(q, Tensor) and p == q)
        for p, q in zip(one, other, strict=True)
    )


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
