"""MEFT: a pretrained stack of layers made reversible, in place."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layer_stack import Call as LayerCall
from ..layer_stack import check_plain, find_stack, in_evaluation, record_calls, without_caches
from ..names import named_modules
from ..report import Replaced, Report, count_parameters
from .halves import Call, adapter_then_layer, attention_then_mlp, layer_then_adapter
from .stack import ReversibleStack

HALVES = {1: layer_then_adapter, 2: adapter_then_layer, 3: attention_then_mlp}
SCALES = {1: (0.1, 0.1), 2: (1.0, 0.1), 3: (-0.1, 0.1)}
"""λ and β of each variant, unless told otherwise."""


@dataclass(frozen=True)
class MEFTConfig:
    """How :func:`meft` makes a stack reversible.

    Attributes:
        variant: what F and G are. 1: the pretrained layer, and a small adapter. 2: the adapter, and the layer. 3:
            attention and MLP of the layer, each with its residual. Halves change places after a layer of 1 and 2.
        lam: λ, that x1 goes on with; not 0. None: 0.1, under variant 2 1, under 3 −0.1.
        beta: β, that x2 goes on with; not 0. None: 0.1.
        adapter_size: width of the adapters of 1 and 2.
        keep_every: inputs of every so many layers are kept; those in between are computed back. 1 keeps all.
        check: None, or the relative error of a half that was computed back above which backward raises ValueError.

    Raises:
        ValueError: another variant, λ or β of 0 or not finite, a size or number below 1, a check that is not positive.
    """

    variant: int = 1
    lam: float | None = None
    beta: float | None = None
    adapter_size: int = 16
    keep_every: int = 2
    check: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.variant, bool) or not isinstance(self.variant, int) or self.variant not in SCALES:
            raise ValueError(f"MEFTConfig: expected variant 1, 2 or 3, got {self.variant!r}")
        for name, default in zip(("lam", "beta"), SCALES[self.variant], strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value == 0:
                raise ValueError(f"MEFTConfig: expected {name} to be finite and not 0, to divide by it, got {value!r}")
        for name in ("adapter_size", "keep_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"MEFTConfig: expected {name} to be an integer of at least 1, got {value!r}")
        is_number = isinstance(self.check, (int, float)) and not isinstance(self.check, bool)
        if self.check is not None and not (is_number and 0 < self.check < math.inf):
            raise ValueError(f"MEFTConfig: expected check to be None or a positive number, got {self.check!r}")


class MEFTAdapter(nn.Module):
    """y = ReLU(x Dᵀ) Uᵀ, with ``down`` D (R, H) drawn from N(0, 0.02²) and ``up`` U (H, R) of zeros."""

    stands_beside_layers = True

    def __init__(self, width: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(size, width, dtype=dtype, device=device) * 0.02)
        self.up = nn.Parameter(torch.zeros(width, size, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        of_down = nn.functional.linear(x.to(self.down.dtype), self.down)  # the model may have been cast since
        return nn.functional.linear(of_down.relu(), self.up).to(x.dtype)


def meft(model: nn.Module, config: MEFTConfig | None = None) -> Report:
    """Make the layers of a transformers model reversible, in place (Liao et al., arXiv 2306.00477).

    What trains stays what it was, and the adapters of variants 1 and 2 train too: adapt the model first
    (:func:`~lowrank_kernels.adapt`), or freeze it. The adapters are ``meft.down`` and ``meft.up`` of each layer, of
    float32 over half precision. :class:`ReversibleStack` says what is computed. The model is run once, on three tokens,
    to see how it calls its layers.

    Returns:
        A report. Its ``undo()`` puts the list of layers back, without the adapters: the model that was.

    Raises:
        TypeError: not a module, or not a MEFTConfig.
        ValueError: a model whose layers are not recognised, or are reversible already; layers that are not called
            alike, one after another; under variant 3 a layer that is not attention and MLP as Llama, GPT-2 or BERT have
            them. The model is then as it was.
    """
    config = MEFTConfig() if config is None else config
    if not isinstance(config, MEFTConfig):
        raise TypeError(f"meft: expected config to be a MEFTConfig, got {type(config).__name__}")
    if isinstance(model, nn.Module) and any(isinstance(m, ReversibleStack) for _, m in named_modules(model)):
        raise ValueError("meft: this model is reversible already; call undo() on its report first")
    found = find_stack(model, "meft")
    check_plain(found, "meft")
    calls = record_calls(model, found, "meft")
    layers = list(found.layers.children())
    halves, hidden = HALVES[config.variant], calls[0].hidden
    if config.variant == 3:
        with in_evaluation(model), torch.no_grad():
            for layer, call in zip(layers, calls, strict=True):
                _check_halves(layer, call)
    width = hidden.shape[-1]
    if config.variant != 3:
        wide = torch.float32 if hidden.dtype in (torch.bfloat16, torch.float16) else hidden.dtype
        adapters = [MEFTAdapter(width, config.adapter_size, wide, hidden.device) for _ in layers]
        for layer, adapter in zip(layers, adapters, strict=True):
            layer.meft = adapter.train(layer.training)
    assert config.lam is not None and config.beta is not None
    stack = ReversibleStack(
        found.layers, halves, config.lam, config.beta, config.variant != 3, config.keep_every, config.check
    )
    undo = found.replace(stack, "meft")
    rank = 0 if config.variant == 3 else config.adapter_size
    size = "attention and MLP" if config.variant == 3 else f"adapter of {rank}"
    replaced = tuple(
        Replaced(f"{found.path}.{i}", f"MEFT{config.variant}", (width, width), rank, size) for i in range(len(layers))
    )
    trainable, total = count_parameters(model)
    return Report(f"MEFT{config.variant}", replaced, (), trainable, total, _undo=[undo])


def config_of_meft(model: nn.Module, op: str) -> MEFTConfig:
    """The config of a model that :func:`meft` made. Raises ValueError of any other."""
    found = [m for _, m in named_modules(model) if isinstance(m, ReversibleStack)]
    if len(found) != 1 or found[0].halves not in HALVES.values():
        raise ValueError(f"{op}: expected a model that lk.reversible.meft made, got a {type(model).__name__}")
    stack = found[0]
    variant = next(v for v, halves in HALVES.items() if halves is stack.halves)
    size = len(stack[0].meft.down) if variant != 3 else MEFTConfig.adapter_size
    return MEFTConfig(variant, stack.lam, stack.beta, size, stack.keep_every, stack.check)


def _check_halves(layer: nn.Module, call: LayerCall) -> None:
    """Raise ValueError where attention and MLP, one after another, are not the layer."""
    args, kwargs = without_caches((call.args, call.kwargs))
    f, g = attention_then_mlp(layer, Call(args, kwargs, call.hidden.dtype))
    difference = (g(f(call.hidden)) - call.output).abs().max()
    bound = 64 * torch.finfo(call.output.dtype).eps * call.output.abs().max()
    if not difference <= bound:
        raise ValueError(
            f"meft: expected a {type(layer).__name__} to be its attention and its MLP, one after another, got outputs "
            f"that differ by {difference:.3g}; use variant 1 or 2"
        )
