"""``MultiLoRALinear``: a frozen nn.Linear and many adapters, one for each row of a batch, that train together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import BatchPlan, multi_lora_linear, plan_batch, stack_column_scale
from ..init.factors import init_factors_
from ..merge import merge_dora_, merge_lora_
from ..stack import LoRAStack
from .frozen import AroundLinear, check_wrappable
from .lora import check_lora_settings


class SequenceBatch:
    """Which adapter each sequence of a batch has, and the plans of its rows, made once for all linears.

    Args:
        adapter_ids: (B,) integers from -1, for none, to ``num_adapters`` - 1.
    """

    def __init__(self, adapter_ids: Tensor, num_adapters: int) -> None:
        self.adapter_ids, self.num_adapters = adapter_ids, num_adapters
        self._plans: dict[tuple[int, torch.device], BatchPlan] = {}

    def plan(self, x: Tensor) -> BatchPlan:
        """The plan of x (..., K), whose rows are B sequences of one length, or that many of each (beams, samples).

        Raises:
            ValueError: a number of rows that B does not divide.
        """
        rows, sequences = x.shape[:-1].numel(), self.adapter_ids.shape[0]
        key = (rows, x.device)
        if key not in self._plans:
            if sequences == 0 or rows % sequences:
                raise ValueError(
                    f"multi_lora_linear: expected a multiple of {sequences} rows, one adapter id a sequence, got {rows}"
                )
            ids = self.adapter_ids.repeat_interleave(rows // sequences).to(x.device)
            self._plans[key] = plan_batch(ids, self.num_adapters)
        return self._plans[key]


_current: ContextVar[Tensor | None] = ContextVar("lowrank_kernels_adapter_ids", default=None)
_batches: ContextVar[dict[int, SequenceBatch] | None] = ContextVar("lowrank_kernels_sequence_batches", default=None)


@contextmanager
def use_adapters(adapter_ids: Tensor | Sequence[int]) -> Iterator[None]:
    """Context in which every :class:`MultiLoRALinear` takes sequence b of its batch to adapter ``adapter_ids[b]``.

    Ids are one a sequence; -1 for the base alone. The context belongs to the thread (and its asyncio task). Backward,
    and recomputation under activation checkpointing, must run inside of it too.
    """
    ids = torch.as_tensor(adapter_ids)
    if ids.dim() != 1 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"use_adapters: expected one integer a sequence, (B,), got {ids.dtype} {tuple(ids.shape)}")
    tokens = _current.set(ids), _batches.set({})
    try:
        yield
    finally:
        _current.reset(tokens[0])
        _batches.reset(tokens[1])


def _current_batch(num_adapters: int) -> SequenceBatch | None:
    ids, batches = _current.get(), _batches.get()
    if ids is None or batches is None:
        return None
    if num_adapters not in batches:
        batches[num_adapters] = SequenceBatch(ids, num_adapters)
    return batches[num_adapters]


class MultiLoRALinear(AroundLinear):
    """y_m = g_i ∘ (W x_m + s_i B_i A_i drop_i(x_m)) + bias, i being the adapter of row m; see ``lk.multi_lora_linear``.

    Parameters: ``base_layer.weight`` (N, K) and ``base_layer.bias`` (N,), the wrapped layer's own, frozen and not
    copied; ``lora_A`` (ΣR, K) and ``lora_B`` (ΣR, N), the adapters one after another along the rank; with DoRA
    adapters ``lora_magnitude`` (D, N). With slices ``lora_A`` is (S, ΣR, K); see ``lk.LoRAStack``.

    Args:
        base_layer: a plain nn.Linear of a float dtype.
        stack: the adapters; their tensors become the parameters.
        dropout: probability of zeroing an element of the correction's input, for all adapters or one each; active in
            training alone.

    ``forward(x, adapter_ids)`` takes ids of x's leading shape; without them, those of :func:`use_adapters`; without
    those, the base alone.

    Raises:
        TypeError: a base layer that cannot be wrapped, with the reason.
        ValueError: a stack for another linear, a dropout outside [0, 1).
    """

    table: Tensor
    scalings: Tensor

    def __init__(self, base_layer: nn.Linear, stack: LoRAStack, *, dropout: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        check_wrappable("MultiLoRALinear", base_layer)
        shape = (base_layer.in_features, base_layer.out_features)
        if (stack.in_features, stack.out_features) != shape:
            raise ValueError(
                f"MultiLoRALinear: expected a stack for (K, N) = {shape}, "
                f"got one for {(stack.in_features, stack.out_features)}"
            )
        each = [dropout] * len(stack) if isinstance(dropout, (int, float)) else list(dropout)
        if len(each) != len(stack) or not all(0.0 <= p < 1.0 for p in each):
            raise ValueError(
                f"MultiLoRALinear: expected 0 <= dropout < 1, for all adapters or each of {len(stack)}, got {dropout}"
            )
        self.dropout = tuple(float(p) for p in each)
        self.places = stack.places
        self.slices = stack.slices if stack.is_sliced else None
        self.merged_adapter: int | None = None
        self.weight_shared_with: tuple[str, ...] = ()
        self._unmerged: Tensor | None = None
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(stack.lora_a.detach())
        self.lora_B = nn.Parameter(stack.lora_b.detach())
        self.lora_magnitude = None if stack.magnitude is None else nn.Parameter(stack.magnitude.detach())
        self.register_buffer("table", stack.table, persistent=False)
        self.register_buffer("scalings", stack.scalings, persistent=False)
        self.train(base_layer.training)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        ranks: Sequence[int],
        *,
        alpha: float = 16.0,
        rslora: bool = False,
        dora: bool = False,
        dropout: float | Sequence[float] = 0.0,
        init: str = "kaiming",
        dtype: torch.dtype | None = None,
        slices: Sequence[int] | None = None,
    ) -> MultiLoRALinear:
        """Wrap ``linear`` with a fresh adapter of each rank; settings as of ``LoRALinear``, for all adapters alike.

        ``slices``: widths of the projections that the linear is made of (Q, K, V; gate, up). An adapter then has
        factors of that rank for each of them.
        """
        weight = linear.weight
        dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        widths = (linear.out_features,) if slices is None else tuple(slices)
        if sum(widths) != linear.out_features:
            raise ValueError(f"MultiLoRALinear: expected slices that add up to N = {linear.out_features}, got {widths}")
        adapters: list[Any] = []
        for r in ranks:
            check_lora_settings("MultiLoRALinear", r=r, alpha=alpha, dropout=0.0, train="both", dtype=dtype)
            adapters.append([])
            for n in widths:
                lora_a = torch.empty(r, linear.in_features, dtype=dtype, device=weight.device)
                lora_b = torch.empty(n, r, dtype=dtype, device=weight.device)
                init_factors_(lora_a, lora_b, init, sampled="a")
                adapters[-1].append((lora_a, lora_b, alpha / (math.sqrt(r) if rslora else r)))
        if dora:
            ones = [torch.ones(n, dtype=dtype, device=weight.device) for n in widths]
            plain = [[(*part, one) for part, one in zip(parts, ones, strict=True)] for parts in adapters]
            norm, _ = stack_column_scale(weight.detach(), LoRAStack.from_factors(plain, slices=widths))
            adapters = [
                [(*part, m) for part, m in zip(parts, of_one.to(dtype).split(widths), strict=True)]
                for parts, of_one in zip(adapters, norm, strict=True)
            ]
        if slices is None:
            adapters = [parts[0] for parts in adapters]
        return cls(linear, LoRAStack.from_factors(adapters, slices=slices), dropout=dropout)

    @property
    def stack(self) -> LoRAStack:
        """The adapters, sharing the parameters."""
        return LoRAStack(
            self.lora_A, self.lora_B, self.places, self.lora_magnitude,
            slices=self.slices, table_and_scalings=(self.table, self.scalings),
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def merged(self) -> bool:
        """Whether the weight holds an adapter."""
        return self.merged_adapter is not None

    def forward(self, x: Tensor, adapter_ids: Tensor | BatchPlan | None = None) -> Tensor:
        if adapter_ids is None:
            batch = _current_batch(len(self.places))
            adapter_ids = None if batch is None else batch.plan(x)
        if adapter_ids is None or self.merged:
            return self.base_layer(x)
        dropout = self.dropout if self.training else 0.0
        base = self.base_layer
        return multi_lora_linear(x, base.weight, self.stack, adapter_ids, base.bias, dropout_p=dropout)

    @torch.no_grad()
    def merge_(self, adapter: int = 0) -> MultiLoRALinear:
        """W ← g ∘ (W + s B A) of one adapter, in float32, rounded once; forward is then the plain linear for every row.

        W is kept, N K elements, so that ``unmerge_`` restores it bit for bit. Nothing when that adapter is merged.

        Raises:
            ValueError: another adapter is merged; there is no such adapter; a weight that another module uses as well;
                factors that are not finite. The layer is then as it was.
        """
        if self.merged_adapter == adapter:
            return self
        if self.merged:
            raise ValueError(f"MultiLoRALinear.merge_: adapter {self.merged_adapter} is merged; call unmerge_() first")
        if not 0 <= adapter < len(self.places):
            raise ValueError(f"MultiLoRALinear.merge_: expected an adapter of {len(self.places)}, got {adapter}")
        if self.weight_shared_with:
            raise ValueError(
                f"MultiLoRALinear.merge_: this weight is also that of {', '.join(self.weight_shared_with)}, which "
                f"would change with it; give the layer a weight of its own and clear weight_shared_with"
            )
        stack, weight = self.stack, self.base_layer.weight
        kept = weight.detach().clone()
        row = self.places[adapter].magnitude
        scale = None if row < 0 else stack_column_scale(kept, stack)[1][row]
        try:
            for s in range(len(stack.slices)):
                lora_a, lora_b, scaling, _ = stack.factors(adapter, s)
                own = stack.columns(s)
                if scale is not None:
                    merge_dora_(weight[own], lora_a, lora_b, scale[own], scaling=scaling)
                elif lora_a.shape[0]:
                    merge_lora_(weight[own], lora_a, lora_b, scaling=scaling)
        except ValueError:
            weight.copy_(kept)
            raise
        self._unmerged, self.merged_adapter = kept, adapter
        return self

    @torch.no_grad()
    def unmerge_(self) -> MultiLoRALinear:
        """W as it was before ``merge_``, bit for bit. Nothing when not merged."""
        if self._unmerged is not None:
            self.base_layer.weight.copy_(self._unmerged)
            self._unmerged, self.merged_adapter = None, None
        return self

    def extra_repr(self) -> str:
        ranks = [place.rank for place in self.places]
        return f"adapters={len(ranks)}, ranks={ranks if len(ranks) <= 8 else (*ranks[:8], '...')}, merged={self.merged}"
