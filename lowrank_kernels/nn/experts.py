"""``LoRAExperts``: the frozen experts of a mixture and their low-rank corrections, as products over sorted rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..finite import all_finite
from ..functional import RoutedRows, check_flag, experts_column_scale, experts_linear, plan_experts, under_autocast
from ..init.factors import init_factors_
from ..merge import check_float16_range, merge_dora_, merge_lora_
from ..stack import LoRAStack, Place
from .base_only import runs_base_alone
from .frozen import FLOAT_DTYPES, AroundBase, has_hooks
from .lora import TRAIN, check_lora_settings
from .sharded import is_dtensor, whole

_SAYS = ("num_experts", "has_gate", "has_bias", "is_transposed")
"""Attributes by which transformers' blocks of experts say how their weights lie."""


def expert_weights(experts: Any) -> dict[str, Tensor]:
    """Name and W (E, N, K) of each stacked weight of a block of experts, in the order in which they multiply; views."""
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    weights: dict[str, Tensor] = {name: getattr(experts, name) for name in names}
    return {name: w.transpose(1, 2) for name, w in weights.items()} if experts.is_transposed else weights


def looks_like_experts(module: nn.Module) -> bool:
    """True for a block of experts whose forward is that of transformers' ``use_experts_implementation``."""
    return all(hasattr(module, name) for name in _SAYS) and isinstance(module._parameters.get("down_proj"), Tensor)


def from_peft(lora_b: Tensor, experts: int) -> Tensor:
    """PEFT's B (N, R E), rank by rank with the expert fastest, as (E R, N), expert by expert."""
    return lora_b.view(lora_b.shape[0], -1, experts).permute(2, 1, 0).reshape(-1, lora_b.shape[0])


def to_peft(lora_b: Tensor, experts: int) -> Tensor:
    """The inverse of :func:`from_peft`."""
    return lora_b.view(experts, -1, lora_b.shape[1]).permute(2, 1, 0).reshape(lora_b.shape[1], -1)


def why_not_experts(module: Any) -> str | None:
    """Why ``module`` is no block of experts that can be adapted; None where it is."""
    if not looks_like_experts(module):
        return f"a {type(module).__name__}, whose formula is not known"
    if has_hooks(module):
        return "it carries hooks or a replaced forward; remove them first"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over several ranks (expert parallelism)"
    up, down = (module._parameters.get(n) for n in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"))
    for w in (up, down):
        if type(w) not in (nn.Parameter, torch.Tensor) or is_dtensor(w) or w.dim() != 3 or w.dtype not in FLOAT_DTYPES:
            said = "no parameter" if w is None else f"a {type(w).__name__} {tuple(w.shape)} of {w.dtype}"
            return f"its weights are not plain tensors (E, N, K) of a float dtype, but one is {said}"
    return None


def expert_stack(
    lora_a: Tensor,
    lora_b: Tensor,
    experts: int,
    scaling: float,
    magnitude: Tensor | None = None,
    *,
    table_and_scalings: tuple[Tensor, Tensor] | None = None,
) -> LoRAStack:
    """A stack of one adapter an expert, all of one rank: A (E R, K), B (E R, N) and m (E, N), expert by expert."""
    r = len(lora_a) // experts
    places = [Place(e * r, r, scaling, -1 if magnitude is None else e) for e in range(experts)]
    with torch.inference_mode(False):  # a later backward saves the table
        return LoRAStack(lora_a, lora_b, places, magnitude, table_and_scalings=table_and_scalings)


def peft_prefixes(experts: nn.Module, adapted: Collection[str]) -> dict[str, str]:
    """What PEFT's files have before the tensors of each adapted weight: PEFT wraps a block once for each of them, in
    the order in which the block has them, so that the last is the outermost."""
    names = [name for name in experts._parameters if name in adapted]
    return {name: "base_layer." * (len(names) - 1 - i) for i, name in enumerate(names)}


def peft_shapes(weight: Tensor, r: int, dora: bool) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors that PEFT's files have of W (E, N, K); of magnitudes too, which PEFT has not."""
    e, n, k = weight.shape
    shapes: dict[str, tuple[int, ...]] = {"lora_A.weight": (e * r, k), "lora_B.weight": (n, r * e)}
    return shapes | ({"lora_magnitude_vector": (e, n)} if dora else {})


class ExpertFactors(nn.Module):
    """A_e (R, K) and B_e (N, R) of each expert e for one stacked weight (E, N, K), and with DoRA m_e (N,).

    Parameters: ``lora_A`` (E R, K) and ``lora_B`` (E R, N), expert by expert, so that row e R + r of ``lora_B`` is
    column r of B_e; with ``dora`` also ``lora_magnitude`` (E, N).
    """

    def __init__(
        self,
        weight: Tensor,
        r: int,
        alpha: float,
        *,
        rslora: bool = False,
        dora: bool = False,
        init: str = "kaiming",
        train: str = "both",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_lora_settings(
            "LoRAExperts", r=r, alpha=alpha, dropout=0.0, train=train, dtype=dtype, rslora=rslora, init=init
        )
        self.experts, self.out_features, self.in_features = weight.shape
        self.r, self.alpha, self.rslora = r, alpha, rslora
        options: Any = {"dtype": dtype or torch.promote_types(weight.dtype, torch.float32), "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(self.experts * r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.experts * r, self.out_features, **options))
        for e in range(self.experts):
            lora_a, lora_b, *_ = self.of_expert(e)
            init_factors_(lora_a, lora_b, init, sampled="b" if train == "a" else "a")
        for factor, trains in zip((self.lora_A, self.lora_B), TRAIN[train], strict=True):
            factor.requires_grad_(trains)
        self.lora_magnitude: Any = None
        self._table_and_scalings: tuple[Tensor, Tensor] | None = None
        if dora:
            ones = nn.Parameter(torch.ones(self.experts, self.out_features, **options))
            self.lora_magnitude = ones
            self.lora_magnitude = nn.Parameter(experts_column_scale(weight.detach(), self.stack)[0].to(ones.dtype))
            self._table_and_scalings = None

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def of_expert(self, e: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """A_e (R, K), B_e (N, R) and m_e (N,), views that record no gradient."""
        own = slice(e * self.r, (e + 1) * self.r)
        magnitude = getattr(self, "lora_magnitude", None)
        return self.lora_A.detach()[own], self.lora_B.detach()[own].T, None if magnitude is None else magnitude[e]

    @property
    def stack(self) -> LoRAStack:
        """One adapter an expert, sharing the parameters."""
        known = self._table_and_scalings
        if known is not None and known[0].device != self.lora_A.device:
            known = None
        factors = self.lora_A, self.lora_B, self.experts, self.scaling
        stack = expert_stack(*factors, self.lora_magnitude, table_and_scalings=known)
        self._table_and_scalings = (stack.table, stack.scalings)
        return stack

    def peft_tensors(self) -> dict[str, Tensor]:
        """The tensors of :func:`peft_shapes`."""
        found = {
            "lora_A.weight": whole(self.lora_A.detach()),
            "lora_B.weight": to_peft(whole(self.lora_B.detach()), self.experts),
        }
        if self.lora_magnitude is not None:
            found["lora_magnitude_vector"] = whole(self.lora_magnitude.detach())
        return found

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, r={self.r}, "
            f"alpha={self.alpha}, scaling={self.scaling:.6g}, dora={self.lora_magnitude is not None}"
        )


class LoRAExperts(AroundBase):
    """A block of experts with corrections: each expert's W_e becomes W_e + s B_e A_e, or g_e ∘ (W_e + s B_e A_e).

    Takes the place of a block of transformers' (Mixtral, Qwen2/3-MoE, GptOss, DeepSeek, and all others that
    ``use_experts_implementation`` decorates), and is called as that: ``forward(hidden_states, top_k_index,
    top_k_weights)``, x (T, K), (T, top-k) and (T, top-k). The rows are sorted by expert once; W's products are over
    each expert's rows, the corrections' over the same plan (:func:`lowrank_kernels.experts_linear`), and of what lies
    between the two, the activation is computed again in the backward instead of being saved.

    Parameters: ``base_layer``'s own, frozen and not copied, and an :class:`ExpertFactors` of each adapted weight in
    ``adapters``, by its name. ``state_dict`` always describes the unmerged block.

    Args:
        base_layer: the block.
        r, alpha: of all adapted weights, or a dict by the names of the weights, which then are the adapted ones.
        parameters: which weights get a correction, of "gate_up_proj" (or "up_proj") and "down_proj"; None: both.
        dropout: of the corrections' inputs, in training. The mask is over the sorted rows.
        dora: with magnitudes, whose norm is a constant in backward; computed in each forward.
        rslora, init, train, dtype: as for ``LoRALinear``.

    Raises:
        TypeError: a module that is no such block, with the reason.
        ValueError: names of weights that it has not; settings as for ``LoRALinear``.
    """

    base_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        r: int | Mapping[str, int] = 8,
        *,
        alpha: float | Mapping[str, float] = 16.0,
        parameters: Sequence[str] | None = None,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        init: str = "kaiming",
        train: str = "both",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        reason = why_not_experts(base_layer)
        if reason is not None:
            raise TypeError(f"LoRAExperts: expected a block of experts, but this one cannot be wrapped: {reason}")
        check_flag("LoRAExperts", "dora", dora)
        check_lora_settings("LoRAExperts", r=1, alpha=1.0, dropout=dropout)
        weights = expert_weights(base_layer)
        named = r if isinstance(r, Mapping) else dict.fromkeys(weights if parameters is None else parameters, r)
        if not named or not set(named) <= set(weights):
            raise ValueError(f"LoRAExperts: expected parameters of {', '.join(weights)}, got {list(named)}")
        self.dropout = dropout
        self._kept: dict[str, Tensor] | None = None
        self.base_layer = base_layer.requires_grad_(False)
        settings: Any = {"rslora": rslora, "dora": dora, "init": init, "train": train, "dtype": dtype}
        self.adapters: Any = nn.ModuleDict()
        for name, weight in weights.items():
            if name in named:
                own = alpha[name] if isinstance(alpha, Mapping) else alpha
                self.adapters[name] = ExpertFactors(weight, named[name], own, **settings)
        self.register_state_dict_post_hook(_describe_unmerged)
        self.train(base_layer.training)

    @property
    def merged(self) -> bool:
        """Whether the weights hold the corrections."""
        return self._kept is not None

    def base_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.base_layer(*args, **kwargs)
        return y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        base = self.base_layer
        if self.merged or (self.base_only_depth is not None and runs_base_alone(self)):
            return self.base_forward(hidden_states, top_k_index, top_k_weights)
        if has_hooks(base):
            raise RuntimeError(
                "LoRAExperts: expected a base_layer without hooks, which would not run: its weights are read, it is "
                "not called; attach them to the LoRAExperts itself, or remove them"
            )
        stacks = {name: self.adapters[name].stack for name in self.adapters}
        return run_experts(base, stacks, hidden_states, top_k_index, top_k_weights, self.dropout * self.training)

    @torch.no_grad()
    def merge_(self, *, keep: bool = True) -> LoRAExperts:
        """W_e ← W_e + s B_e A_e, or g_e ∘ (W_e + s B_e A_e), in float32, rounded once. Nothing when merged.

        Args:
            keep: keep the weights as they were, E N K elements each, so that ``unmerge_`` restores them bit for bit.

        Raises:
            ValueError: factors or column scales that are not finite; sums that leave float16's range. The weights are
                then as they were.
        """
        if self.merged:
            return self
        merges = self.prepare_merge()
        weights = expert_weights(self.base_layer)
        self._kept = {name: weights[name].clone() if keep else weights[name][:0] for name in self.adapters}
        for merge in merges:
            merge()
        return self

    @torch.no_grad()
    def prepare_merge(self) -> list[Callable[[], Any]]:
        """What merges each expert, once all that could stop it is known not to. Raises what ``merge_`` raises."""
        op, merges = "LoRAExperts.merge_", list[Callable[[], Any]]()
        if any(is_dtensor(p) for p in self.parameters()):
            raise ValueError(f"{op}: expected whole weights and factors, got shards; gather the model first")
        weights = expert_weights(self.base_layer)
        for name, of in self.adapters.items():
            for key, p in of.named_parameters():
                if key != "lora_magnitude" and not all_finite(p.detach()):
                    raise ValueError(
                        f"LoRAExperts.merge_: expected finite factors, and {key} of {name} holds NaN or Inf"
                    )
            scale = None
            if of.lora_magnitude is not None:
                scale = experts_column_scale(weights[name].detach(), of.stack)[1]
                if not all_finite(scale):
                    raise ValueError(f"{op}: expected a finite column scale m / n of {name}")
            for e, w in enumerate(weights[name].detach()):
                lora_a, lora_b, _ = of.of_expert(e)
                merges.append(_merge(w, lora_a, lora_b, of.scaling, None if scale is None else scale[e]))
        return merges

    @torch.no_grad()
    def unmerge_(self) -> LoRAExperts:
        """The weights as they were before ``merge_``, bit for bit. Nothing when not merged.

        Raises:
            ValueError: they were merged with ``keep=False``.
        """
        if self._kept is not None:
            weights = expert_weights(self.base_layer)
            if any(not len(kept) for kept in self._kept.values()):
                raise ValueError(
                    "LoRAExperts.unmerge_: expected weights that merge_ kept, but it was called with keep=False"
                )
            for name, kept in self._kept.items():
                weights[name].copy_(kept)
            self._kept = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self._kept is not None and any(f"{prefix}base_layer.{name}" in state_dict for name in self._kept):
            self.unmerge_()
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def in_features(self) -> int:
        return next(iter(expert_weights(self.base_layer).values())).shape[2]

    @property
    def out_features(self) -> int:
        return expert_weights(self.base_layer)["down_proj"].shape[1]

    def extra_repr(self) -> str:
        return f"parameters={list(self.adapters)}, dropout={self.dropout}, merged={self.merged}"


def _merge(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, scale: Tensor | None
) -> Callable[[], Tensor]:
    op = "LoRAExperts.merge_"
    if scale is None:
        check_float16_range(op, weight, lora_a, lora_b, scaling)
        return lambda: merge_lora_(weight, lora_a, lora_b, scaling=scaling, check_finite=False)
    check_float16_range(op, weight, lora_a, lora_b, scaling, scale)
    return lambda: merge_dora_(weight, lora_a, lora_b, scale, scaling=scaling)


def _describe_unmerged(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the weights from before ``merge_`` into a state dict."""
    assert isinstance(layer, LoRAExperts)
    transposed = layer.base_layer.is_transposed
    for name, kept in (layer._kept or {}).items():
        key = f"{prefix}base_layer.{name}"
        if key in state and len(kept):
            state[key] = (kept.transpose(1, 2) if transposed else kept).to(state[key].device, state[key].dtype)


def run_experts(
    experts: Any,
    stacks: Mapping[str, LoRAStack],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    dropout_p: float = 0.0,
) -> Tensor:
    """What a block of experts computes with a correction of the weights that ``stacks`` names, one adapter an expert.

    y_t = Σ_j w_tj down_e(act(up_e(x_t))), e = top_k_index[t, j], by products over the rows sorted by expert.
    """
    weights = expert_weights(experts)
    up, down = weights
    k, width = top_k_index.shape[-1], hidden_states.shape[-1]
    x = hidden_states.reshape(-1, width)
    if not under_autocast(x):
        x = x.to(weights[up].dtype)  # as transformers' own products do
    routed = plan_experts(top_k_index.reshape(-1), experts.num_experts)
    order, rows = routed.order.long(), routed.sorted()
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    x = _Take.apply(x, order // k, place, k)
    x = _linear(experts, up, weights[up], stacks.get(up), x, rows, dropout_p)
    x = _activated(experts._apply_gate if experts.has_gate else experts.act_fn, x)
    x = _linear(experts, down, weights[down], stacks.get(down), x, rows, dropout_p)
    if getattr(experts, "has_post_expert_norm", False):
        x = experts.post_expert_norm(x)
    x = _Take.apply(x, place, order, 1).view(-1, k, x.shape[1])
    y = (x * top_k_weights.reshape(-1, k, 1)).sum(1)
    return y.to(hidden_states.dtype).view(hidden_states.shape)


def _linear(
    experts: Any, name: str, weight: Tensor, stack: LoRAStack | None, x: Tensor, rows: RoutedRows, dropout_p: float
) -> Tensor:
    if stack is None:  # the experts' own product, and dX
        a, b = weight.new_empty(0, weight.shape[2]), weight.new_empty(0, weight.shape[1])
        stack = LoRAStack(a, b, [Place(0, 0, 0.0)] * len(weight))
    y = experts_linear(x, weight, stack, rows, dropout_p=dropout_p)
    return y + getattr(experts, f"{name}_bias")[rows.experts].to(y.dtype) if experts.has_bias else y


class _Take(torch.autograd.Function):
    """x[index], each row of x being taken ``times`` times; ``places``: where those are, row by row, for the gradient:
    a sum in a fixed order, without atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, places: Tensor, times: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.times = times
        return x[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        taken = grad[places]
        return taken if ctx.times == 1 else taken.view(-1, ctx.times, grad.shape[1]).sum(1), None, None, None


def _activated(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The activation of x, of which x alone is saved. (A compiled graph is cut by what it saves, too.)"""
    y: Tensor = activation(x) if torch.compiler.is_compiling() else _Recomputed.apply(activation, x)
    return y


class _Recomputed(torch.autograd.Function):
    """The activation, some rows at a time: what lies between its steps is never there for all of them."""

    @staticmethod
    def forward(ctx: Any, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x)
        return torch.cat([activation(part) for part in _parts(x)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        grad_x, first = torch.empty_like(x), 0
        for part in _parts(x):
            own = slice(first, first + len(part))
            with torch.enable_grad():
                again = part.detach().requires_grad_()
                y = ctx.activation(again)
            grad_x[own] = torch.autograd.grad(y, again, grad[own])[0]
            first = own.stop
        return None, grad_x


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Rows of x, as many at a time as stay in a cache on a CPU, and as keep a GPU busy."""
    return x.split(max(1, (1 << 18 if x.is_cpu else 1 << 25) // max(1, x.shape[1])))
