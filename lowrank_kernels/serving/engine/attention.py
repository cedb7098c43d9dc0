"""Rows of a running batch, of any lengths, one after another in one forward of a ``transformers`` model.

Linears see all rows' tokens as one matrix, without padding. Attention runs row by row, with the model's own attention
function of ``transformers``, over keys and values that each row keeps: no row's result depends on another's length.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_GROWS_BY = 64  # tokens, at least


class RowCache:
    """The keys and values of one row, by layer: (1, heads, capacity, head_dim), of which ``length`` tokens are there.

    Args:
        bound: tokens that it will ever hold.
    """

    def __init__(self, bound: int) -> None:
        self.bound, self.length, self.capacity = bound, 0, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def next_capacity(self, tokens: int) -> int:
        """The capacity that holding ``tokens`` takes: grown by a half at least, so that few are copied often."""
        if tokens <= self.capacity:
            return self.capacity
        return min(self.bound, max(tokens, self.capacity * 3 // 2, self.capacity + _GROWS_BY))

    def reserve(self, tokens: int) -> None:
        """Make room for that many tokens in all."""
        capacity = self.next_capacity(tokens)
        if capacity > self.capacity:
            self._layers = {i: _grown(*kv, self.length, capacity) for i, kv in self._layers.items()}
            self.capacity = capacity

    def copy_from(self, other: RowCache, tokens: int) -> None:
        """Take over the first ``tokens`` of another row's, whose adapter is the same."""
        self.reserve(tokens)
        for layer, kv in other._layers.items():
            self._layers[layer] = _grown(*kv, tokens, self.capacity)
        self.length = tokens

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put the next tokens' (1, heads, n, head_dim) behind those that are there; all of them, as views."""
        begin, end = self.length, self.length + keys.shape[2]
        if layer not in self._layers:
            self._layers[layer] = _grown(keys, values, 0, self.capacity)
        own_keys, own_values = self._layers[layer]
        own_keys[:, :, begin:end] = keys
        own_values[:, :, begin:end] = values
        return own_keys[:, :, :end], own_values[:, :, :end]


def _grown(keys: Tensor, values: Tensor, length: int, capacity: int) -> tuple[Tensor, Tensor]:
    """Both with room for ``capacity`` tokens, the first ``length`` of which are there."""
    new = [t.new_empty(1, t.shape[1], capacity, t.shape[3]) for t in (keys, values)]
    for larger, t in zip(new, (keys, values), strict=True):
        larger[:, :, :length] = t[:, :, :length]
    return new[0], new[1]


@dataclass
class Span:
    """Tokens of one row in a forward: ``count`` of them, after those in ``cache``."""

    cache: RowCache
    count: int
    masks: dict[Any, Tensor | None] = field(default_factory=dict)

    def mask(self, window: int | None, keys: int, like: Tensor, additive: bool) -> Tensor | None:
        """(1, 1, count, keys): True, or 0, where a token attends; None where the attention function needs none.

        ``keys`` are the last ones of the row. A token attends to itself and to those before it, ``window`` in all.
        """
        whole = window is None or keys <= window
        if self.count == 1 or (not additive and whole and keys == self.count):
            return None
        key = window if not whole else None, keys, additive
        if key not in self.masks:
            behind = torch.arange(keys - self.count, keys, device=like.device)[:, None]
            behind = behind - torch.arange(keys, device=like.device)  # how many tokens a key lies behind its query
            mask = (behind >= 0) if window is None else (behind >= 0) & (behind < window)
            if additive:
                mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, torch.finfo(like.dtype).min)
            self.masks[key] = mask[None, None]
        return self.masks[key]


class PackedModel:
    """A causal language model of ``transformers`` that runs rows one after another. Its own forward stays what it was.

    Raises:
        ValueError: its attention does not go through ``transformers``' attention interface, keeps a state other than
            keys and values, or its packed rows do not give what its own forward gives.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.plain = model.config._attn_implementation
        if self.plain not in ("sdpa", "eager"):
            raise ValueError(
                f"Engine: expected a model with attn_implementation 'sdpa' or 'eager', got {self.plain!r}; "
                f"model.set_attn_implementation('sdpa') changes it"
            )
        text = model.config.get_text_config()
        odd = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if odd:
            raise ValueError(f"Engine: expected layers of full or sliding attention, got {', '.join(sorted(odd))}")
        name = _register(self.plain)
        try:
            model.set_attn_implementation(name)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"Engine: {type(model).__name__} has no attention that can be packed: {error}") from None
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the model its own attention back."""
        self.model.set_attn_implementation(self.plain)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], spans: Sequence[Span], keep: Sequence[int]) -> Tensor:
        """Logits (len(keep), vocabulary) at the positions ``keep`` of ``tokens``, which are the spans' one by one.

        The spans' caches have room; their lengths are as before, so that a forward that fails may be repeated.
        """
        device = self.model.device
        positions = torch.cat([torch.arange(s.cache.length, s.cache.length + s.count) for s in spans])
        _current.spans = spans
        try:
            out = self.model(
                input_ids=torch.tensor([list(tokens)], device=device),
                position_ids=positions[None].to(device),
                use_cache=False,
                logits_to_keep=torch.tensor(list(keep), dtype=torch.long, device=device),
            )
        finally:
            _current.spans = None
        return out.logits[0]

    @torch.inference_mode()
    def _check(self) -> None:
        """Two rows, one of them in two parts, against the model's own forward."""
        size = self.model.config.get_text_config().vocab_size
        rows = [[i * 7 % size for i in range(1, 6)], [i * 11 % size for i in range(1, 4)]]
        caches = [RowCache(8), RowCache(8)]
        for cache in caches:
            cache.reserve(8)
        was_training = self.model.training
        self.model.eval()
        try:
            self.forward(rows[0][:3], [Span(caches[0], 3)], [2])
            caches[0].length = 3
            spans = [Span(caches[0], 2), Span(caches[1], 3)]
            packed = self.forward(rows[0][3:] + rows[1], spans, [1, 4])
            own = [self.model(input_ids=torch.tensor([row], device=self.model.device)).logits[0, -1] for row in rows]
        finally:
            self.model.train(was_training)
        expected = torch.stack(own)
        error = float((packed - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
        if not error <= 64 * torch.finfo(packed.dtype).eps:
            raise ValueError(
                f"Engine: {type(self.model).__name__} does not give in packed rows what it gives alone (they differ by "
                f"{error:.1e} of the largest logit); it cannot be served"
            )


class _Current(threading.local):
    spans: Sequence[Span] | None = None  # of the forward that runs on this thread


_current = _Current()


def _register(plain: str) -> str:
    """The name of the attention function that packs rows and is ``plain`` outside of that."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"lowrank_kernels_{plain}"

    def function_of(module: nn.Module) -> Callable[..., Any]:
        if plain == "eager":  # stands in the model's own file
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[plain]

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **kwargs: Any) -> Any:
        spans = _current.spans
        if spans is None:
            return function_of(module)(module, query, key, value, mask, *args, **kwargs)
        return _attend(function_of(module), spans, plain == "eager", (module, query, key, value), args, kwargs)

    def make_mask(*args: Any, **kwargs: Any) -> Any:
        return None if _current.spans is not None else ALL_MASK_ATTENTION_FUNCTIONS[plain](*args, **kwargs)

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)
    return name


def _attend(
    function: Callable[..., Any], spans: Sequence[Span], additive: bool, given: Any, args: Any, kwargs: Any
) -> tuple[Tensor, None]:
    """``function`` over each span's queries and its row's keys and values: (1, tokens, heads, head_dim)."""
    module, query, key, value = given
    window = kwargs.get("sliding_window")
    found, begin = [], 0
    for span in spans:
        end = begin + span.count
        keys, values = span.cache.write(module.layer_idx, key[:, :, begin:end], value[:, :, begin:end])
        if window is not None and keys.shape[2] > window + span.count - 1:
            keys, values = (t[:, :, -(window + span.count - 1) :] for t in (keys, values))
        mask = span.mask(window, keys.shape[2], query, additive)
        found.append(function(module, query[:, :, begin:end], keys, values, mask, *args, **kwargs)[0])
        begin = end
    return torch.cat(found, 1), None


__all__ = ["PackedModel", "RowCache", "Span"]
