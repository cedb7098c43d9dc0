"""Calls by their sizes alone, contiguous and without options: what `lrk doctor --explain` plans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .block_sparse import BlockSparseWeightGrad
from .dora import DoRALinear, DoRALinearBackward, DoRAWeightNorm
from .galore import GaLoreAdam
from .importance import LoRAImportance
from .lora import LoRALinear, LoRALinearBackward
from .magnitude import MagnitudeHistogram
from .merge import MergeLoRA
from .multi_lora import MultiLoRALinear, MultiLoRALinearBackward
from .planning import Meta
from .svft import SVFTLinear, SVFTLinearBackward

Sizes = Mapping[str, int]
_EVERYTHING = (True,) * 5


@dataclass(frozen=True)
class Example:
    """An op's call made of its sizes.

    Attributes:
        sizes: the names of the sizes, as `lrk bench` has them.
        forward: (sizes, of) -> the op's record, ``of(*shape, dtype=...)`` making a Meta.
        backward: the same of its backward; None where it has none.
    """

    sizes: str
    forward: Callable[[Sizes, Callable[..., Meta]], Any]
    backward: Callable[[Sizes, Callable[..., Meta]], Any] | None = None

    def call(self, sizes: Sizes, dtype: torch.dtype, device: torch.device, *, backward: bool = False) -> Any:
        def of(*shape: int, dtype: torch.dtype = dtype) -> Meta:
            return Meta.contiguous(*shape, dtype=dtype, device=device)

        make = self.backward if backward else self.forward
        assert make is not None
        return make(sizes, of)


def _operands(s: Sizes, of: Callable[..., Meta]) -> tuple[Any, ...]:
    """(x, W, A, B)."""
    return of(s["M"], s["K"]), of(s["N"], s["K"]), of(s["R"], s["K"]), of(s["N"], s["R"])


def _lora(s: Sizes, of: Callable[..., Meta]) -> LoRALinear:
    return LoRALinear._make((*_operands(s, of), None, None, 1.0, 0.0, None, False, "auto", None))


def _lora_backward(s: Sizes, of: Callable[..., Meta]) -> LoRALinearBackward:
    x, *others = _operands(s, of)
    dy, p = of(s["M"], s["N"]), of(s["M"], s["R"])
    return LoRALinearBackward._make((dy, x, *others, None, p, 1.0, 0.0, None, _EVERYTHING, "auto", None, None))


def _dora(s: Sizes, of: Callable[..., Meta]) -> DoRALinear:
    magnitude: Any = of(s["N"])
    return DoRALinear._make(
        (*_operands(s, of), magnitude, None, None, None, None, 1.0, 0.0, None, False, True, False, "auto")
    )


def _dora_backward(s: Sizes, of: Callable[..., Meta]) -> DoRALinearBackward:
    x, *others = _operands(s, of)
    dy: Any = of(s["M"], s["N"])
    p, n = of(s["M"], s["R"]), of(s["N"], dtype=torch.float32)
    saved: Any = n, n, p, dy
    return DoRALinearBackward._make(
        (dy, x, *others, *saved, 1.0, 0.0, None, False, True, _EVERYTHING, torch.float32, "auto")
    )


def _norm(s: Sizes, of: Callable[..., Meta]) -> DoRAWeightNorm:
    return DoRAWeightNorm._make((*_operands({"M": 1, **s}, of)[1:], 1.0, None, None, "auto"))


def _merge(s: Sizes, of: Callable[..., Meta]) -> MergeLoRA:
    return MergeLoRA._make((*_operands({"M": 1, **s}, of)[1:], 1.0, None, None, None, "auto"))


def _importance(s: Sizes, of: Callable[..., Meta]) -> LoRAImportance:
    _, weight, a, b = _operands({"M": 1, **s}, of)
    return LoRAImportance(weight, a, b, a, b, 1.0, "rows", "auto")


def _galore(s: Sizes, of: Callable[..., Meta]) -> GaLoreAdam:
    weight: Any = of(s["N"], s["K"])
    low: Any = of(s["R"], s["K"], dtype=torch.float32)
    basis: Any = of(s["N"], s["R"], dtype=torch.float32)
    return GaLoreAdam(weight, weight, basis, low, low, 1e-3, 0.9, 0.999, 1e-8, 0.0, 0.25, 1, "auto")


def _magnitude(s: Sizes, of: Callable[..., Meta]) -> MagnitudeHistogram:
    values: Any = of(s["N"], s["K"])
    return MagnitudeHistogram(values, 0, 0, "auto")


def _stack(s: Sizes, of: Callable[..., Meta]) -> tuple[Any, ...]:
    """(x, W, A, B, table, scalings, rank, slices, ids) of G adapters, one a row."""
    x, weight, *_ = _operands(s, of)
    rows, i32 = s["G"] * s["R"], torch.int32
    table, ids = of(s["G"], 3, dtype=i32), of(s["M"], 1, dtype=i32)
    scalings = of(s["G"], dtype=torch.float32)
    return x, weight, of(rows, s["K"]), of(rows, s["N"]), table, scalings, s["R"], None, ids


def _multi(s: Sizes, of: Callable[..., Meta]) -> MultiLoRALinear:
    x, weight, a, b, *of_stack = _stack(s, of)
    return MultiLoRALinear._make((x, weight, a, b, None, None, *of_stack, *(None,) * 8, False, False, "auto"))


def _multi_backward(s: Sizes, of: Callable[..., Meta]) -> MultiLoRALinearBackward:
    x, weight, a, b, *of_stack = _stack(s, of)
    dy: Any = of(s["M"], s["N"])
    return MultiLoRALinearBackward._make(
        (dy, x, weight, a, b, None, None, *of_stack, *(None,) * 8, _EVERYTHING, "auto")
    )


def _block_grad(s: Sizes, of: Callable[..., Meta]) -> BlockSparseWeightGrad:
    x: Any = of(s["M"], s["K"])
    dy: Any = of(s["M"], s["N"])
    index: Any = of(s["blocks"], 2, dtype=torch.int32)
    return BlockSparseWeightGrad(x, dy, index, s["size"], s["size"], x.dtype, "auto")


def _svft(s: Sizes, of: Callable[..., Meta]) -> SVFTLinear:
    r = min(s["N"], s["K"])
    products = of(s["M"], s["K"]), of(s["N"], s["K"]), of(s["N"], r), of(r, s["K"])
    m = of(s["E"], dtype=torch.float32), of(3 * s["E"] + 2 * r + 2, dtype=torch.int32)
    return SVFTLinear._make((*products, *m, None, False, "auto"))


def _svft_backward(s: Sizes, of: Callable[..., Meta]) -> SVFTLinearBackward:
    _, *operands, _, _, backend = _svft(s, of)
    dy: Any = of(s["M"], s["N"])
    t: Any = of(s["M"], min(s["N"], s["K"]))
    return SVFTLinearBackward._make((dy, *operands, t, (True,) * 3, backend))


EXAMPLES = {
    "lora_linear": Example("M K N R", _lora, _lora_backward),
    "dora_linear": Example("M K N R", _dora, _dora_backward),
    "dora_weight_norm": Example("K N R", _norm),
    "merge_lora_": Example("K N R", _merge),
    "galore_adam_": Example("K N R", _galore),
    "lora_importance": Example("K N R", _importance),
    "magnitude_histogram": Example("K N", _magnitude),
    "multi_lora_linear": Example("M K N R G", _multi, _multi_backward),
    "svft_linear": Example("M K N E", _svft, _svft_backward),
    "block_sparse_weight_grad": Example("M K N blocks size", _block_grad),
}
