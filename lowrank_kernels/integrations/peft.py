"""PEFT's LoRA and DoRA layers on this package's ops: ``accelerate`` and ``restore``. Written against PEFT 0.21."""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft.tuners.lora.dora import (
    DoraConv1dLayer,
    DoraConv2dLayer,
    DoraConv3dLayer,
    DoraEmbeddingLayer,
    DoraLinearLayer,
)
from peft.tuners.lora.layer import Conv1d as PeftConv1d
from peft.tuners.lora.layer import Conv2d as PeftConv2d
from peft.tuners.lora.layer import Conv3d as PeftConv3d
from peft.tuners.lora.layer import Embedding as PeftEmbedding
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    VeloraLinearVariant,
)
from torch import Tensor, nn

from ..blocks import LoRAPart
from ..distributed.tensor_parallel import distributed_input, local_output
from ..functional import ScaleCache, dora_linear, lora_linear, velora_vector
from ..fuse import fuse, unfuse
from ..nn.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d, dora_conv, is_patch, library_convolves, lora_conv
from ..nn.dora import column_scale
from ..nn.embedding import LoRAEmbedding, corrected
from ..nn.experts import expert_stack, expert_weights, from_peft, run_experts, why_not_experts
from ..nn.frozen import has_global_hooks, has_hooks
from ..nn.lora import LoRALinear, add_bias
from ..nn.matrix import frozen_weight, matrix_shape
from ..nn.sharded import is_dtensor
from ..report import Replaced, Report, Skipped, count_parameters

_LEFT_TO_PEFT = (
    "PEFT's own forward still runs merged or disabled layers, batches with adapter_names, several active adapters "
    "with dropout in training, with DoRA or beside embeddings and convolutions, bases that train, and layers whose "
    "submodules got hooks"
)
_CACHES = "_lowrank_scale_caches"  # of a layer: {adapter: ScaleCache}
_FACTORS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Accelerated:
    """A layer of PEFT's that runs on this package's ops whatever they can take, and the rest by PEFT's own forward.

    Made by :func:`accelerate`, which changes a layer's class and nothing else: parameters, names, adapters, merging
    and saving are PEFT's.
    """

    pefts: Any
    """PEFT's class of the layer."""
    ours: Any
    """This package's layer of the same formula."""
    dora: Any
    """PEFT's classes of DoRA's variant and of its magnitude."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapters = [] if args or any(v is not None for v in kwargs.values()) else self._adapters_for_op()
        if adapters:
            return self._on_ops(x, adapters)
        y: Tensor = self.pefts.forward(self, x, *args, **kwargs)
        return y

    def _on_ops(self, x: Tensor, adapters: list[str]) -> Tensor:
        raise NotImplementedError

    def _get_name(self) -> str:
        return str(self.pefts.__name__)  # a model prints as PEFT prints it

    def _adapters_for_op(self: Any) -> list[str]:
        """The active adapters, if the op can take all of them as things stand now; else none."""
        if self.disable_adapters or self.merged or not self.cast_input_dtype_enabled or has_global_hooks():
            return []
        base = self.base_layer
        names = [name for name in self.active_adapters if name in _first_factors(self)]
        if has_hooks(base) or base.weight.requires_grad or any(_why_not_adapter(self, name) for name in names):
            return []
        if len(names) > 1 and (self.ours is not LoRALinear or any(name in self.lora_variant for name in names)):
            return []
        drops = [d for d in (self.lora_dropout[name] for name in names) if isinstance(d, nn.Dropout) and d.training]
        return [] if drops and (len(names) > 1 or drops[0].p >= 1.0) else names

    def _dropout(self: Any, name: str) -> float:
        dropout = self.lora_dropout[name]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


class _OverLinear(_Accelerated):
    """y = x Wᵀ + bias + Σ s_i (drop(x) A_iᵀ) B_iᵀ over the active adapters as one op, or with a DoRA adapter as one op.

    With PEFT's VeLoRA, z is saved in x's dtype, by PEFT's vector of the adapter, which is made as PEFT makes it, but of
    x before dropout.

    Numbers: factors are rounded to x's dtype inside the op, which accumulates in float32. PEFT casts x to the factors'
    dtype, multiplies there, and rounds the base product and then the sum to x's dtype.
    """

    ours, dora = LoRALinear, (DoraLinearVariant, DoraLinearLayer)

    def as_part(self: Any, x: Tensor) -> tuple[LoRAPart, float] | None:
        """(the layer as a part of a block, its dropout) for this x, as things stand now; None where it has to be
        called: it has not one active adapter that the op takes, or one with VeLoRA, or DoRA in evaluation, with dropout
        or at B = 0 (see ``_dora``)."""
        adapters = self._adapters_for_op()
        if len(adapters) != 1:
            return None
        (name,), base = adapters, self.base_layer
        weight, variant, p = frozen_weight(base), type(self.lora_variant.get(name)), self._dropout(name)
        a, b, scaling = self.lora_A[name].weight, self.lora_B[name], self.scaling[name]
        if variant is DoraLinearVariant:
            if not self.training or p > 0.0 or self._starts_as_base(x, b.weight):
                return None
            magnitude: Any = self.lora_magnitude_vector[name].weight
            return LoRAPart(weight, a, b.weight, base.bias, magnitude, scaling=scaling), p
        if variant is VeloraLinearVariant:
            return None
        return LoRAPart(weight, a, b.weight, add_bias(base.bias, b.bias, scaling, weight.dtype), scaling=scaling), p

    def _on_ops(self: Any, x: Tensor, adapters: list[str]) -> Tensor:
        variant = type(self.lora_variant.get(adapters[0]))
        if variant is DoraLinearVariant:
            return self._dora(x, adapters[0])
        base: Any = self.base_layer
        weight = frozen_weight(base)
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
        p = self._dropout(adapters[0])
        compresses = variant is VeloraLinearVariant and self.training and torch.is_grad_enabled()
        v = self._velora_vector(adapters[0], x) if compresses else None
        return lora_linear(x, weight, lora_a, lora_b, bias, scaling=scaling, gate=gate, dropout_p=p, velora_vector=v)

    @torch.no_grad()
    def _velora_vector(self: Any, name: str, x: Tensor) -> Tensor:
        """√scale v, so that x̂ has PEFT's scale; v is made of this x where PEFT makes it."""
        vectors, made, kind = self.lora_velora_embed, self.lora_velora_initialized, self.lora_velora_init_type[name]
        if kind == "batch_average" or not made[name]:
            old = vectors[name]
            new = velora_vector(x, len(old))  # zeros without a finite mean, where PEFT's is NaN: the old one stays
            vectors[name] = torch.where(new.any(), new, old.to(new)).to(old)
            made[name] = made[name] or bool(vectors[name].any())
        return vectors[name] * self.lora_velora_scale[name] ** 0.5

    def _dora(self: Any, x: Tensor, name: str) -> Tensor:
        base: Any = self.base_layer
        layers: Any = self.lora_A[name], self.lora_B[name], self.lora_magnitude_vector[name]
        a, b, m = (layer.weight for layer in layers)
        cache, compiling = None, torch.compiler.is_compiling()
        if not self.training and not compiling:
            cache = self.__dict__.setdefault(_CACHES, {}).setdefault(name, ScaleCache())
        scaling, weight = self.scaling[name], frozen_weight(base)
        if self._starts_as_base(x, b):
            dropped = self.lora_dropout[name](x)
            scale = column_scale(weight, a, b, m, scaling=scaling, detach_norm=True)
            y = base(x)
            plain = y if dropped is x else base(dropped)
            plain = plain if base.bias is None else plain - base.bias
            correction: Tensor = scaling * nn.functional.linear(nn.functional.linear(dropped, a), b)
            return (y + (scale - 1) * plain + scale * correction).to(y.dtype)
        return dora_linear(
            x,
            weight,
            a,
            b,
            m,
            base.bias,
            scaling=scaling,
            scale_cache=cache,
            dropout_p=self._dropout(name) if self.training else 0.0,
            dropout_base=True,
        )

    @staticmethod
    def _starts_as_base(x: Tensor, b: Tensor) -> bool:
        """Whether a new DoRA adapter (B = 0) would show: PEFT promises that it changes nothing, for its sum starts with
        the base's own output, and the op's product of few rows differs from that in the last bits."""
        shows_bits = x.is_cpu and x.dtype == torch.float32 and torch.is_grad_enabled()
        few = shows_bits and not torch.compiler.is_compiling() and x.shape[:-1].numel() <= _FEW_ROWS
        return few and not b.detach().any()


class AcceleratedLinear(_OverLinear, PeftLinear):
    """PEFT's ``lora.Linear``."""

    pefts = PeftLinear


class AcceleratedCutLinear(_OverLinear, PeftLinear):
    """PEFT's ``lora.Linear`` over a weight that transformers has cut (``DistributedConfig(tp_size=...)``): one op on
    DTensors for one active LoRA adapter, in the place of three calls that each move data."""

    pefts = PeftLinear

    def as_part(self: Any, x: Tensor) -> None:
        """None: the layer is called."""

    def _adapters_for_op(self: Any) -> list[str]:
        if self.disable_adapters or self.merged or not self.cast_input_dtype_enabled or has_global_hooks():
            return []
        names = [name for name in self.active_adapters if name in self.lora_A]
        fits = len(names) == 1 and not _why_not_adapter(self, names[0]) and not self.base_layer.weight.requires_grad
        return names if fits else []

    def _on_ops(self: Any, x: Tensor, adapters: list[str]) -> Tensor:
        base, (name,) = self.base_layer, adapters
        lora_a, lora_b, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        columns, mesh = base._hf_tp_plan == "colwise", base.weight.device_mesh
        bias = None if lora_b.bias is None else _on_mesh(lora_b.bias, mesh)
        y = lora_linear(
            distributed_input(x, mesh, not columns),
            base.weight,
            _on_mesh(lora_a.weight, mesh),
            _on_mesh(lora_b.weight, mesh),
            add_bias(base.bias, bias, scaling, base.weight.dtype),
            scaling=scaling,
            dropout_p=self._dropout(name),
        )
        return local_output(y, columns)


def _on_mesh(t: Any, mesh: Any) -> Any:
    """A parameter that every rank has whole as a DTensor, whose gradient is summed; a DTensor as it is."""
    return t if is_dtensor(t) else distributed_input(t, mesh, False)


def _is_cut(layer: Any) -> bool:
    """Whether a layer of PEFT's is over a weight that transformers has cut over ranks."""
    base = layer.base_layer
    plan = getattr(base, "_hf_tp_plan", None)
    return type(base) is nn.Linear and plan in ("colwise", "rowwise") and is_dtensor(base.weight)


_FEW_ROWS = 64  # for which the extension's product of W is its own


class AcceleratedEmbedding(_Accelerated, PeftEmbedding):
    """PEFT's ``lora.Embedding``: g ∘ (E[ids] + s A[:, ids]ᵀ Bᵀ), g = 1 without DoRA. The sum is made in one pass, and
    DoRA's norm without the dense B A."""

    pefts, ours, dora = PeftEmbedding, LoRAEmbedding, (DoraEmbeddingVariant, DoraEmbeddingLayer)

    def _on_ops(self, x: Tensor, adapters: list[str]) -> Tensor:
        base: Any = self.base_layer
        (name,), scale = adapters, None
        a, b, scaling = self.lora_embedding_A[name], self.lora_embedding_B[name], self.scaling[name]
        if name in self.lora_variant:
            magnitude: Any = self.lora_magnitude_vector[name]
            matrix = frozen_weight(base)
            scale = column_scale(matrix, a, b, magnitude.weight, scaling=scaling, detach_norm=True)
        return corrected(base(x), x, base, a, b, scaling, scale)


class _AcceleratedConv(_Accelerated):
    """PEFT's ``lora.Conv1d``, ``lora.Conv2d`` or ``lora.Conv3d``, where this package's layer is faster."""

    def _on_ops(self: Any, x: Tensor, adapters: list[str]) -> Tensor:
        base, (name,) = self.base_layer, adapters
        a, b, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        if name not in self.lora_variant:
            return lora_conv(x, base, a.weight, b.weight, b.bias, scaling, self._dropout(name))
        return dora_conv(
            x,
            base,
            a.weight,
            b.weight,
            self.lora_magnitude_vector[name].weight,
            scaling=scaling,
            dropout_p=self._dropout(name) if self.training else 0.0,
            dropout_base=True,
            detach_norm=True,
        )


class AcceleratedConv1d(_AcceleratedConv, PeftConv1d):
    pefts, ours, dora = PeftConv1d, LoRAConv1d, (DoraConv1dVariant, DoraConv1dLayer)


class AcceleratedConv2d(_AcceleratedConv, PeftConv2d):
    pefts, ours, dora = PeftConv2d, LoRAConv2d, (DoraConv2dVariant, DoraConv2dLayer)


class AcceleratedConv3d(_AcceleratedConv, PeftConv3d):
    pefts, ours, dora = PeftConv3d, LoRAConv3d, (DoraConv3dVariant, DoraConv3dLayer)


class AcceleratedParamWrapper(_Accelerated, ParamWrapper):
    """PEFT's ``lora.ParamWrapper`` over a weight of a block of experts: products over the rows of each expert in the
    place of a dense delta of all of them. Of the wrappers around one block the outermost runs them all."""

    pefts, ours, dora = ParamWrapper, None, (None, None)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        routed = [*args, *kwargs.values()]
        stacks = self._stacks() if len(routed) == 2 and all(isinstance(t, Tensor) for t in routed) else None
        if stacks:
            return run_experts(self.get_base_layer(), stacks, x, *routed)
        y: Tensor = self.pefts.forward(self, x, *args, **kwargs)
        return y

    def _stacks(self: Any) -> dict[str, Any] | None:
        """The corrections of all wrappers around the block, by weight; None where PEFT has to run them."""
        base: Any = self.get_base_layer()
        stacks: dict[str, Any] = {}
        wrapper: Any = self
        a: Any
        b: Any
        if has_global_hooks() or why_not_experts(base) or any(p.requires_grad for p in base.parameters()):
            return None
        while wrapper is not base:
            if not isinstance(wrapper, AcceleratedParamWrapper) or wrapper.disable_adapters or wrapper.merged:
                return None
            names = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
            hooked = wrapper is not self and has_hooks(wrapper)
            if hooked or len(names) > 1 or any(_why_not_adapter(wrapper, name) for name in names):
                return None
            for name in names:
                a, b = (factor[name].weight for factor in (wrapper.lora_A, wrapper.lora_B))
                stacks[wrapper.parameter_name] = expert_stack(
                    a, from_peft(b, wrapper.num_experts), wrapper.num_experts, wrapper.scaling[name]
                )
            wrapper = wrapper.base_layer
        return stacks


AcceleratedParamWrapper.__name__ = "ParamWrapper"  # by which PEFT knows its own, when it adds an adapter

_CLASSES: dict[Any, Any] = {
    accelerated.pefts: accelerated
    for accelerated in (
        AcceleratedLinear,
        AcceleratedEmbedding,
        AcceleratedConv1d,
        AcceleratedConv2d,
        AcceleratedConv3d,
        AcceleratedParamWrapper,
    )
}


def _know_bitsandbytes() -> None:
    """Add PEFT's layers over bitsandbytes' linears, where PEFT has loaded them: without it there are none."""
    theirs = sys.modules.get("peft.tuners.lora.bnb")
    for name in ("Linear4bit", "Linear8bitLt"):
        pefts = getattr(theirs, name, None)
        if pefts is not None and pefts not in _CLASSES:
            members = {"pefts": pefts, "__doc__": f"PEFT's ``lora.{name}``, whose codes are read where they lie."}
            _CLASSES[pefts] = type(f"Accelerated{name}", (_OverLinear, pefts), members)


def _first_factors(layer: Any) -> Any:
    """PEFT's A of each adapter."""
    return layer.lora_embedding_A if isinstance(layer, PeftEmbedding) else layer.lora_A


def _why_not_layer(layer: Any) -> str | None:
    if isinstance(layer, _Accelerated):
        return "already accelerated"
    if type(layer) not in _CLASSES:
        return f"a lora.{type(layer).__name__}, which no op computes"
    if "forward" in layer.__dict__:
        return "its forward was replaced on the instance (by accelerate's hooks, for example)"
    if isinstance(layer, PeftEmbedding) and layer.input_fns:
        return "its factors are sharded (tensor parallel)"
    if isinstance(layer, ParamWrapper):
        base = layer.get_base_layer()
        why_not = why_not_experts(base)
        if why_not is None and layer.parameter_name not in expert_weights(base):
            why_not = f"{layer.parameter_name} is no weight that its experts multiply by"
        return why_not
    base = layer.base_layer
    if type(layer) is PeftLinear and _is_cut(layer):
        return None
    if getattr(base, "_is_fsdp_managed_module", False) and type(base) is nn.Linear and is_dtensor(base.weight):
        return "its base layer is sharded by itself; shard the layer as a whole" if has_hooks(base) else None
    why_not = _CLASSES[type(layer)].ours.why_not(base)
    return why_not


def _why_not_adapter(layer: Any, name: str) -> str | None:
    of_dora, magnitudes = _CLASSES[layer.pefts if isinstance(layer, _Accelerated) else type(layer)].dora
    variant = layer.lora_variant.get(name)
    if type(variant) is VeloraLinearVariant:
        groups, k = layer.lora_velora_num_groups[name], layer.in_features
        if k % groups:
            return f"adapter {name!r} has VeLoRA with {groups} groups, which do not divide K = {k}"
    elif variant is not None:
        if type(variant) is not of_dora:
            return f"adapter {name!r} is a {type(variant).__name__}"
        magnitude = layer.lora_magnitude_vector[name]
        if type(magnitude) is not magnitudes or has_hooks(magnitude):
            return f"adapter {name!r} has a magnitude that is not a plain {magnitudes.__name__}"
    if isinstance(layer, PeftEmbedding):
        return None
    base = layer.base_layer
    if type(layer) in (PeftLinear, AcceleratedCutLinear) and _is_cut(layer):
        return None if variant is None else f"adapter {name!r} is no plain LoRA, over a weight that is cut over ranks"
    if variant is None and not isinstance(layer, ParamWrapper) and not _pays_without_dora(base):
        return f"adapter {name!r} takes two small convolutions, which are as fast in PEFT's own forward"
    for factor in (layer.lora_A[name], layer.lora_B[name]):
        if type(factor) not in _FACTORS or has_hooks(factor):
            return f"adapter {name!r} has a factor that is not a plain nn.{type(base).__name__}"
    dropout = layer.lora_dropout[name]
    if type(dropout) not in (nn.Identity, nn.Dropout) or has_hooks(dropout):
        return f"adapter {name!r} has a {type(dropout).__name__} for dropout"
    return None


def _shape_of(layer: Any) -> tuple[int, int]:
    """(N, K) of what a layer of PEFT's corrects."""
    if isinstance(layer, ParamWrapper):
        shape: Any = layer.out_features, layer.in_features
        return shape
    return matrix_shape(layer.base_layer)


def _pays_without_dora(base: Any) -> bool:
    """Whether ordinary LoRA over this module is faster on the ops: not over convolutions that the library makes well.

    PEFT took 0.99 to 1.13 times as long over convolutions with kernels 3×3, 1×1 and 3 in float32; up to 1.3 times over
    patches; 17 to 26 times over those in bfloat16 on a CPU without instructions for it (docs/peft.md).
    """
    if not isinstance(base, nn.modules.conv._ConvNd):
        return True
    return is_patch(base) or not library_convolves(base.weight.dtype, base.weight.device)


def accelerate(peft_model: nn.Module, *, blocks: bool = False) -> Report:
    """Let PEFT's LoRA, VeLoRA and DoRA layers run on this package's ops, in place.

    Takes every ``lora.Linear`` over a plain nn.Linear or transformers' Conv1D, and every ``lora.Linear4bit`` and
    ``lora.Linear8bitLt`` over bitsandbytes' linears, that holds at least one LoRA or DoRA
    adapter, with any rank, alpha, rsLoRA, dropout, lora_bias, pattern and bias
    mode, and any number of active adapters. Adapters may be added, deleted, switched, merged, hot-swapped and saved
    afterwards through PEFT as before. Layers that PEFT makes later (an added adapter with new targets) are PEFT's:
    call again.

    DoRA's column scale is computed from what W, A, B and m hold at each call; in evaluation on a CPU it is kept and
    used again where their values prove to be the same.

    Takes every ``lora.Embedding`` over a plain nn.Embedding, too, and of ``lora.Conv1d``, ``lora.Conv2d`` and
    ``lora.Conv3d`` what is faster than in PEFT's forward: DoRA, patches (kernel = stride), and half precision on a CPU
    whose library has no convolution of it. These run one active adapter at a time on the ops. And every
    ``lora.ParamWrapper`` (``target_parameters``) over the weights of a block of experts of transformers', without the
    dense delta, one active adapter at a time.

    What it does not take runs as before and is in the report's ``skipped``: LoRA over other convolutions, the other
    variants, bases of other quantisations, layers of other classes.

    Args:
        peft_model: a PeftModel, or any model with PEFT's LoRA layers in it.
        blocks: compute attention projections and MLPs as one node each, too: see :func:`lowrank_kernels.fuse`. With
            dropout their linears then share masks, which PEFT's do not.

    Returns:
        A report as of ``adapt``; ``undo()`` is :func:`restore` for the layers of this call.

    Raises:
        ValueError: no LoRA layer of PEFT's in the model.
    """
    _know_bitsandbytes()
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
        variants = [] if reason else [_why_not_adapter(layer, adapter) for adapter in _first_factors(layer)]
        skipped += [Skipped(name, why) for why in (reason, *variants) if why]
        if reason is None and (not variants or None in variants):
            kind = f"lora.{type(layer).__name__}"
            replaced.append(Replaced(name, kind, _shape_of(layer), dict(layer.r)))
            taken.append(layer)
    for layer in taken:
        cut = type(layer) is PeftLinear and _is_cut(layer)
        layer.__class__ = AcceleratedCutLinear if cut else _CLASSES[type(layer)]
    undo, notes = [lambda: _give_back(taken)], [_LEFT_TO_PEFT]
    if blocks:
        fused = fuse(peft_model)
        replaced, skipped = [*replaced, *fused.replaced], [*skipped, *fused.skipped]
        undo, notes = [*undo, fused.undo], [*notes, *fused.notes]
    return Report(
        "PEFT on lowrank_kernels",
        tuple(replaced),
        tuple(skipped),
        *count_parameters(peft_model),
        tuple(notes),
        _undo=undo,
    )


def restore(peft_model: nn.Module) -> int:
    """Give every accelerated layer of the model back to PEFT, and its blocks to their model. Returns how many layers
    there were."""
    unfuse(peft_model)
    taken = [m for m in peft_model.modules() if isinstance(m, _Accelerated)]
    _give_back(taken)
    return len(taken)


def _give_back(layers: list[Any]) -> None:
    for layer in layers:
        layer.__class__ = layer.pefts
        layer.__dict__.pop(_CACHES, None)
