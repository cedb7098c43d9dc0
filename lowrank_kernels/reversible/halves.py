"""What F and G of a reversible layer are, from a pretrained layer: each takes a half and returns one of its dtype."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layer_stack import first


class Call(NamedTuple):
    """What the model calls a layer with, beside the hidden states, and the dtype of these."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype


Half = Callable[[Tensor], Tensor]
Halves = Callable[[nn.Module, Call], tuple[Half, Half]]


def layer_then_adapter(layer: nn.Module, call: Call) -> tuple[Half, Half]:
    """MEFT1: F is the layer, G the adapter."""
    return _whole(layer, call), layer.meft  # type: ignore[return-value]


def adapter_then_layer(layer: nn.Module, call: Call) -> tuple[Half, Half]:
    """MEFT2: F is the adapter, G the layer."""
    return layer.meft, _whole(layer, call)  # type: ignore[return-value]


def _whole(layer: nn.Module, call: Call) -> Half:
    return lambda x: first(layer(x.to(call.dtype), *call.args, **call.kwargs)).to(x.dtype)


PRE_NORM = (
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
    ("ln_1", "attn", "ln_2", "mlp"),
)
"""Children of a layer that computes a = x + attention(norm(x)), then a + mlp(norm(a)): as in Llama, and in GPT-2."""
POST_NORM = ("attention", "intermediate", "output")
"""Children of a layer whose attention and MLP add and normalise by themselves: as in BERT."""


def attention_then_mlp(layer: nn.Module, call: Call) -> tuple[Half, Half]:
    """MEFT3: F is the attention, G the MLP, both with their residuals.

    Raises:
        ValueError: a layer with other children than Llama's, GPT-2's or BERT's.
    """
    parts = next((n for n in (*PRE_NORM, POST_NORM) if layer._modules.keys() == set(n)), None)
    if parts is None:
        raise ValueError(
            f"meft: expected layers of attention and MLP as in Llama, GPT-2 or BERT, got a {type(layer).__name__} of "
            f"{', '.join(layer._modules)}; use variant 1 or 2"
        )
    bound = inspect.signature(layer.forward).bind_partial(None, *call.args, **call.kwargs)
    named: dict[str, Any] = dict(list(bound.arguments.items())[1:])
    named |= named.pop("kwargs", {})
    kwargs = {name: value for name, value in named.items() if not name.startswith("encoder_")}

    def pre_norm(norm: Any, block: Any, **kwargs: Any) -> Half:
        return lambda x: x + first(block(norm(x), **kwargs))

    def widened(block: Half) -> Half:
        return lambda x: block(x.to(call.dtype)).to(x.dtype)

    modules: list[Any] = [layer._modules[name] for name in parts]
    if parts == POST_NORM:
        attention, intermediate, output = modules
        return widened(lambda x: first(attention(x, **kwargs))), widened(lambda x: output(intermediate(x), x))
    norm, attention, mlp_norm, mlp = modules
    return widened(pre_norm(norm, attention, **kwargs)), widened(pre_norm(mlp_norm, mlp))
