"""An adapter by itself, without a model: what every format on disk is read into and written from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..finite import all_finite
from .folder import few


class Factors(NamedTuple):
    """The correction of one module, s B A, in the shapes of PEFT's files.

    A linear has A (R, K) and B (N, R); an embedding of V rows of D has A (R, V) and B (D, R); a convolution has
    A (R, C, *kernel) and B (N, R, 1, ...). DoRA's magnitude is (N,), (D,) or (1, N, 1, ...).
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float
    magnitude: Tensor | None = None
    lora_bias: Tensor | None = None  # of the second factor: y gains s · lora_bias
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.lora_a.shape[0]

    @property
    def convolution(self) -> bool:
        return self.lora_a.dim() > 2

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the correction as a matrix; K is C times the kernel's size for a convolution."""
        return self.lora_b.shape[0], self.lora_a[0].numel()

    def delta(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """s B A as a matrix (N, K), computed in ``dtype``. Without DoRA's magnitude."""
        a, b = self.lora_a.to(dtype).flatten(1), self.lora_b.to(dtype).flatten(1)
        return self.scaling * (b @ a)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the ends of PEFT's names."""
        keys = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        found = {keys[0]: self.lora_a, keys[1]: self.lora_b}
        found |= {} if self.magnitude is None else {"lora_magnitude_vector": self.magnitude}
        return found | ({} if self.lora_bias is None else {"lora_B.bias": self.lora_bias})

    def folded(self) -> Factors:
        """The same correction with s = 1: s B in the place of B, and s · lora_bias.

        B keeps its dtype where s B is exact in it, and otherwise becomes float32 (float64 stays), rounded once.
        """
        if self.scaling == 1.0:
            return self
        bias = None if self.lora_bias is None else _times(self.lora_bias, self.scaling)
        return self._replace(lora_b=_times(self.lora_b, self.scaling), scaling=1.0, lora_bias=bias)

    def padded(self, rank: int) -> Factors:
        """The same correction with zeros for further ranks."""
        more = rank - self.rank
        if more == 0:
            return self
        a = torch.cat([self.lora_a, self.lora_a.new_zeros(more, *self.lora_a.shape[1:])])
        b = torch.cat([self.lora_b, self.lora_b.new_zeros(self.lora_b.shape[0], more, *self.lora_b.shape[2:])], 1)
        return self._replace(lora_a=a, lora_b=b)


def _times(tensor: Tensor, scaling: float) -> Tensor:
    wide = tensor.double() * scaling
    narrow = wide.to(tensor.dtype)
    return narrow if torch.equal(narrow.double(), wide) else wide.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass(frozen=True)
class Adapter:
    """A LoRA or DoRA adapter.

    Args:
        modules: {path in the model: factors}.
        others: {name: tensor} of what is trained beside the factors: biases, modules saved whole.
        settings: of PEFT's config, those that say nothing about the function of the factors (task_type, bias, ...).
        origin: what it was read from, for messages.
    """

    modules: Mapping[str, Factors]
    others: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    origin: str = "the adapter"

    @property
    def dora(self) -> bool:
        return any(f.magnitude is not None for f in self.modules.values())

    def content_hash(self) -> str:
        """The adapter's identity: SHA-256 of paths, shapes, dtypes, scalings and every bit of every tensor.

        Two files of an adapter have the same one whatever their format, the order of their tensors, and the settings
        with which they say a scaling, as long as no bit of a factor or of a scaling differs.
        """
        digest = hashlib.sha256()
        for path in sorted(self.modules):
            factors = self.modules[path]
            digest.update(f"{path}\0{factors.scaling.hex()}\0".encode())
            for name, tensor in sorted(factors.tensors().items()):
                _feed(digest, name, tensor)
        for name in sorted(self.others):
            _feed(digest, name, self.others[name])
        return digest.hexdigest()

    def portable(self) -> Adapter:
        """The same function in the words that every reader knows: s = 1, written into B, and one rank, padded."""
        rank = max(f.rank for f in self.modules.values())
        return replace(self, modules={path: f.folded().padded(rank) for path, f in self.modules.items()})


def _feed(digest: Any, name: str, tensor: Tensor) -> None:
    plain = tensor.detach().cpu().contiguous()
    digest.update(f"{name}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
    if plain.numel():
        digest.update(plain.view(-1).view(torch.uint8).numpy().data)


def check_adapter(adapter: Adapter, op: str) -> Adapter:
    """The adapter, after a check that its factors fit together, are floats and finite.

    Raises:
        ValueError: nothing adapted, shapes that do not fit, a value or a scaling that is not finite.
        TypeError: tensors that are not floats.
    """
    if not adapter.modules:
        raise ValueError(f"{op}: expected factors of at least one module in {adapter.origin}, found none")
    for path, f in adapter.modules.items():
        if f.lora_a.dim() < 2 or f.lora_b.dim() != f.lora_a.dim() or f.lora_b.shape[1] != f.rank or not f.rank:
            raise ValueError(
                f"{op}: expected A (R, K) and B (N, R) of {path[:200]} in {adapter.origin}, got "
                f"{tuple(f.lora_a.shape)} and {tuple(f.lora_b.shape)}"
            )
        if not math.isfinite(f.scaling):
            raise ValueError(f"{op}: expected a finite scaling of {path[:200]} in {adapter.origin}, got {f.scaling}")
        for name, t in f.tensors().items():
            if not t.is_floating_point() or t.element_size() == 1:
                raise TypeError(f"{op}: expected floats in {path[:200]}.{name} of {adapter.origin}, got {t.dtype}")
    if broken := not_finite(adapter):
        raise ValueError(f"{op}: expected finite values, found NaN or Inf in {few(broken)} of {adapter.origin}")
    return adapter


def not_finite(adapter: Adapter) -> list[str]:
    """Names of the tensors that hold NaN or Inf."""
    named = {f"{path}.{name}": t for path, f in adapter.modules.items() for name, t in f.tensors().items()}
    named |= {name: t for name, t in adapter.others.items() if t.is_floating_point()}
    return [name for name, t in named.items() if not all_finite(t)]
