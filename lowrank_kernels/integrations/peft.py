"""PEFT's LoRA and DoRA layers on this package's ops: ``accelerate`` and ``restore``. Written against PEFT 0.21."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..functional import ScaleCache, dora_linear, lora_linear
from ..nn.frozen import FLOAT_DTYPES, has_global_hooks, has_hooks, why_not_frozen
from ..nn.lora import add_bias
from ..report import Replaced, Report, Skipped, count_parameters

_LEFT_TO_PEFT = (
    "PEFT's own forward still runs merged or disabled layers, batches with adapter_names, several active adapters "
    "with dropout in training or with DoRA, bases that train, and layers whose submodules got hooks"
)
_CACHES = "_lowrank_scale_caches"  # of a layer: {adapter: ScaleCache}


class AcceleratedLinear(PeftLinear):
    """PEFT's ``lora.Linear`` with y = x Wᵀ + bias + Σ s_i (drop(x) A_iᵀ) B_iᵀ over the active adapters as one op, or
    with a DoRA adapter as one op.

    Made by :func:`accelerate`, which changes a layer's class and nothing else: parameters, names, adapters, merging
    and saving are PEFT's. Whatever the op cannot take goes to PEFT's own forward.

    Numbers: factors are rounded to x's dtype inside the op, which accumulates in float32. PEFT casts x to the factors'
    dtype, multiplies there, and rounds the base product and then the sum to x's dtype.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = [] if args or any(v is not None for v in kwargs.values()) else self._adapters_for_op()
        if not adapters:
            return super().forward(x, *args, **kwargs)
        if adapters[0] in self.lora_variant:
            return self._dora(x, adapters[0])
        base: Any = self.base_layer
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        factors: list[Any] = [(self.lora_A[name], self.lora_B[name], self.scaling[name]) for name in adapters]
        lora_a, lora_b, scaling, gate = factors[0][0].weight, factors[0][1].weight, factors[0][2], None
        if len(factors) > 1:
            # One correction of rank ΣR, whose gate carries each adapter's own scaling.
            lora_a = torch.cat([a.weight for a, _, _ in factors])
            lora_b = torch.cat([b.weight for _, b, _ in factors], dim=1)
            wide = torch.promote_types(lora_b.dtype, torch.float32)
            gate = torch.cat([lora_b.new_full((b.in_features,), s, dtype=wide) for _, b, s in factors])
            scaling = 1.0
        bias = base.bias
        for _, b, s in factors:
            bias = add_bias(bias, b.bias, s, weight.dtype)
        dropout = self.lora_dropout[adapters[0]]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return lora_linear(x, weight, lora_a, lora_b, bias, scaling=scaling, gate=gate, dropout_p=p)

    def _dora(self, x: Tensor, name: str) -> Tensor:
        base: Any = self.base_layer
        layers: Any = self.lora_A[name], self.lora_B[name], self.lora_magnitude_vector[name]
        a, b, m = (layer.weight for layer in layers)
        dropout: Any = self.lora_dropout[name]
        cache = None
        if not self.training and not torch.compiler.is_compiling():
            cache = self.__dict__.setdefault(_CACHES, {}).setdefault(name, ScaleCache())
        drops = self.training and dropout.training and isinstance(dropout, nn.Dropout)
        return dora_linear(
            x, base.weight, a, b, m, base.bias, scaling=self.scaling[name], scale_cache=cache,
            dropout_p=dropout.p if drops else 0.0, dropout_base=True,
        )  # fmt: skip

    def _get_name(self) -> str:
        return "Linear"  # a model prints as PEFT prints it

    def _adapters_for_op(self) -> list[str]:
        """The active adapters, if the op can take all of them as things stand now; else none."""
        if self.disable_adapters or self.merged or not self.cast_input_dtype_enabled or has_global_hooks():
            return []
        base = self.base_layer
        names = [name for name in self.active_adapters if name in self.lora_A]
        if has_hooks(base) or base.weight.requires_grad or any(_why_not_adapter(self, name) for name in names):
            return []
        if len(names) > 1 and any(name in self.lora_variant for name in names):
            return []
        drops = [d for d in (self.lora_dropout[name] for name in names) if isinstance(d, nn.Dropout) and d.training]
        return [] if drops and (len(names) > 1 or drops[0].p >= 1.0) else names


def _why_not_layer(layer: Any) -> str | None:
    if type(layer) is AcceleratedLinear:
        return "already accelerated"
    if type(layer) is not PeftLinear:
        return f"a lora.{type(layer).__name__}, not a lora.Linear"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (by accelerate's hooks, for example)"
    base = layer.base_layer
    if type(base) is Conv1D and base.weight.dtype in FLOAT_DTYPES:
        return "its base carries hooks" if has_hooks(base) else None
    return why_not_frozen(base)


def _why_not_adapter(layer: Any, name: str) -> str | None:
    variant = layer.lora_variant.get(name)
    if variant is not None:
        if type(variant) is not DoraLinearVariant:
            return f"adapter {name!r} is a {type(variant).__name__}"
        if type(layer.base_layer) is Conv1D:
            return f"adapter {name!r} is DoRA over a Conv1D"
        magnitude = layer.lora_magnitude_vector[name]
        if type(magnitude) is not DoraLinearLayer or has_hooks(magnitude):
            return f"adapter {name!r} has a magnitude that is not a plain DoraLinearLayer"
    for factor in (layer.lora_A[name], layer.lora_B[name]):
        if type(factor) is not nn.Linear or has_hooks(factor):
            return f"adapter {name!r} has a factor that is not a plain nn.Linear"
    dropout = layer.lora_dropout[name]
    if type(dropout) not in (nn.Identity, nn.Dropout) or has_hooks(dropout):
        return f"adapter {name!r} has a {type(dropout).__name__} for dropout"
    return None


def accelerate(peft_model: nn.Module) -> Report:
    """Let PEFT's LoRA and DoRA linears run on ``lowrank_kernels::lora_linear`` and ``dora_linear``, in place.

    Takes every ``lora.Linear`` over a plain nn.Linear or transformers' Conv1D that holds at least one ordinary LoRA
    adapter, or over an nn.Linear a DoRA adapter, with any rank, alpha, rsLoRA, dropout, lora_bias, pattern and bias
    mode, and any number of active adapters. Adapters may be added, deleted, switched, merged, hot-swapped and saved
    afterwards through PEFT as before. Layers that PEFT makes later (an added adapter with new targets) are PEFT's:
    call again.

    DoRA's column scale is computed from what W, A, B and m hold at each call; in evaluation on a CPU it is kept and
    used again where their values prove to be the same.

    What it does not take runs as before and is in the report's ``skipped``: DoRA over Conv1D, the other variants,
    quantised bases, embeddings, convolutions, layers of other classes.

    Args:
        peft_model: a PeftModel, or any model with PEFT's LoRA layers in it.

    Returns:
        A report as of ``adapt``; ``undo()`` is :func:`restore` for the layers of this call.

    Raises:
        ValueError: no LoRA layer of PEFT's in the model.
    """
    modules: Any = peft_model.named_modules()
    layers = [(name, module) for name, module in modules if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError(
            f"accelerate: expected a model with LoRA layers of PEFT's, found none in this "
            f"{type(peft_model).__name__}; for a plain model use lowrank_kernels.adapt"
        )
    replaced, skipped, taken = [], [], []
    for name, layer in layers:
        reason = _why_not_layer(layer)
        variants = [] if reason else [_why_not_adapter(layer, adapter) for adapter in layer.lora_A]
        skipped += [Skipped(name, why) for why in (reason, *variants) if why]
        if reason is None and (not variants or None in variants):
            shape: Any = (layer.out_features, layer.in_features)
            replaced.append(Replaced(name, "lora.Linear", shape, dict(layer.r)))
            taken.append(layer)
    for layer in taken:
        layer.__class__ = AcceleratedLinear
    trains, total = count_parameters(peft_model)
    return Report(
        "PEFT on lowrank_kernels", tuple(replaced), tuple(skipped), trains, total, (_LEFT_TO_PEFT,),
        _undo=[lambda: _give_back(taken)],
    )  # fmt: skip


def restore(peft_model: nn.Module) -> int:
    """Give every accelerated layer of the model back to PEFT. Returns how many there were."""
    taken = [m for m in peft_model.modules() if type(m) is AcceleratedLinear]
    _give_back(taken)
    return len(taken)


def _give_back(layers: list[Any]) -> None:
    for layer in layers:
        layer.__class__ = PeftLinear
        layer.__dict__.pop(_CACHES, None)
