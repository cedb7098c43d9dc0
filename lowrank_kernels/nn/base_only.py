"""Layers that run without their corrections for a while: what ``lk.base_only`` opens, and what they ask."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from .batches import Batch, Batches
from .frozen import AroundBase


class _BaseOnly(Batch):
    """An open context, and the ``id`` of each layer that it is about."""

    def __init__(self, layers: frozenset[int]) -> None:
        super().__init__("base_only", [])
        self.layers = layers


_OPEN = Batches[_BaseOnly]("base_only", "base_only(model)")
_lock = threading.Lock()


@contextmanager
def without_corrections(layers: Collection[AroundBase]) -> Iterator[None]:
    """Context in which these layers compute what their base layers do; see ``lk.base_only``."""
    around = _OPEN.current()
    own = frozenset(map(id, layers))
    with _OPEN.open(_BaseOnly(own if around is None else own | around.layers)):
        _count(layers, 1)
        try:
            yield
        finally:
            _count(layers, -1)


def _count(layers: Collection[AroundBase], step: int) -> None:
    with _lock:
        for layer in layers:
            layer.base_only_depth = (layer.base_only_depth or 0) + step


def runs_base_alone(layer: AroundBase) -> bool:
    """True in a :func:`without_corrections` of the layer, and where autograd repeats a forward that ran in one."""
    if torch.compiler.is_compiling():
        return bool(layer.base_only_depth)  # a compiled graph is guarded by it
    if not layer.base_only_depth and torch._C._current_graph_task_id() == -1:
        return False
    batch = _OPEN.current()
    return batch is not None and id(layer) in batch.layers
