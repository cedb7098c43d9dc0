"""``MultiLoRALinear``: a frozen nn.Linear and many adapters, one for each row of a batch, that train together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import BatchPlan, check_flag, multi_lora_linear, stack_column_scale
from ..init.factors import init_factors_
from ..merge import merge_dora_, merge_lora_
from ..stack import LoRAStack
from ..weights import FrozenWeight
from .base_only import runs_base_alone
from .batches import Batch, Batches
from .frozen import AroundBase, check_weight_may_be_read, check_wrappable
from .lora import check_lora_settings
from .matrix import frozen_weight
from .sharded import why_not_written

_BATCHES = Batches[Batch]("use_adapters", "use_adapters([-1])")


@contextmanager
def use_adapters(
    adapter_ids: Tensor | Sequence[Any], *, cu_seqlens: Tensor | Sequence[int] | None = None
) -> Iterator[None]:
    """Context in which every :class:`MultiLoRALinear` takes sequence b of its batch to adapter ``adapter_ids[b]``.

    Args:
        adapter_ids: integers, -1 for the base alone: (B,), one for each sequence that the model sees; or of x's
            leading shape, one for each row.
        cu_seqlens: B + 1 ascending positions, 0 first, of the sequences in rows that hold them one after another
            without padding: x (T, K) or (1, T, K), with T the last of them.

    Layers find out which rows of x belong to which sequence, or raise: see ``docs/many_adapters.md``. The context holds
    for its thread (and its asyncio task), for threads that are started in it, and for the backward of what ran in it,
    on any thread: with activation checkpointing, backward must run before the context ends.

    Raises:
        ValueError, TypeError: ids or positions that are not such integers. Layers raise ValueError for ids that they
            have no adapter for and rows of which it is not known whose they are, RuntimeError outside of any batch
            while one is open in another thread.
    """
    with _BATCHES.open(Batch("use_adapters", adapter_ids, cu_seqlens)):
        yield


class MultiLoRALinear(AroundBase):
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
    those, the base alone. ``state_dict`` always describes the unmerged layer, and loading a base weight makes it one.

    Attributes:
        row_order: "sequences" or "positions" where the calls of a model do not tell which rows of x lie together:
            those of a sequence, x (B, L, K), or those of a position, x (L, B, K). What it says is trusted.

    Raises:
        TypeError: a base layer that cannot be wrapped, with the reason.
        ValueError: a stack for another linear, a dropout outside [0, 1).
    """

    row_order: str | None = None
    found_order: str | None = None

    def __init__(self, base_layer: nn.Linear, stack: LoRAStack, *, dropout: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        check_wrappable("MultiLoRALinear", base_layer)
        shape = (base_layer.in_features, base_layer.out_features)
        if (stack.in_features, stack.out_features) != shape:
            raise ValueError(
                f"MultiLoRALinear: expected a stack for (K, N) = {shape}, "
                f"got one for {(stack.in_features, stack.out_features)}"
            )
        if not isinstance(dropout, (int, float, Sequence)) or isinstance(dropout, (str, bool)):
            raise TypeError(f"MultiLoRALinear: expected dropout to be a number, or one an adapter, got {dropout!r}")
        each = [dropout] * len(stack) if isinstance(dropout, (int, float)) else list(dropout)
        if len(each) != len(stack) or not all(isinstance(p, (int, float)) and 0.0 <= p < 1.0 for p in each):
            raise ValueError(
                f"MultiLoRALinear: expected 0 <= dropout < 1, for all adapters or each of {len(stack)}, got {dropout}"
            )
        self.dropout = tuple(float(p) for p in each)
        self.places = stack.places
        self.slices = stack.slices if stack.is_sliced else None
        self.merged_adapter: int | None = None
        self.weight_shared_with: tuple[str, ...] = ()
        self._unmerged: Tensor | None = None
        self._loading: tuple[str, list[str]] | None = None  # key of the base weight that is on its way, errors so far
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Parameter(stack.lora_a.detach())
        self.lora_B = nn.Parameter(stack.lora_b.detach())
        self.lora_magnitude = None if stack.magnitude is None else nn.Parameter(stack.magnitude.detach())
        # No buffers: what casts or averages a model's buffers would change them.
        self._table_and_scalings = (stack.table, stack.scalings)
        self.register_state_dict_post_hook(_describe_unmerged)
        self.register_load_state_dict_post_hook(_settle_after_load)
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
        check_wrappable("MultiLoRALinear", linear)
        check_flag("MultiLoRALinear", "dora", dora)
        if not isinstance(ranks, Sequence) or not ranks:
            raise ValueError(f"MultiLoRALinear: expected ranks to be one rank an adapter, got {ranks!r}")
        for r in ranks:
            check_lora_settings("MultiLoRALinear", r=r, alpha=alpha, dropout=0.0, dtype=dtype, rslora=rslora, init=init)
        weight, n = frozen_weight(linear), linear.out_features
        dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        widths = (n,) if slices is None else tuple(slices)
        if any(not isinstance(w, int) or w < 1 for w in widths) or sum(widths) != n:
            raise ValueError(f"MultiLoRALinear: expected slices, widths that add up to N = {n}, got {slices!r}")
        adapters: list[Any] = []
        for r in ranks:
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
        if self._table_and_scalings[0].device != self.lora_A.device:
            with torch.inference_mode(False):  # a later backward saves them
                made = LoRAStack(self.lora_A, self.lora_B, self.places, slices=self.slices)
            self._table_and_scalings = (made.table, made.scalings)
        return LoRAStack(
            self.lora_A,
            self.lora_B,
            self.places,
            self.lora_magnitude,
            slices=self.slices,
            table_and_scalings=self._table_and_scalings,
        )

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def merged(self) -> bool:
        """Whether the weight holds an adapter."""
        return self.merged_adapter is not None

    def forward(self, x: Tensor, adapter_ids: Tensor | BatchPlan | None = None) -> Tensor:
        if self.merged or (self.base_only_depth is not None and runs_base_alone(self)):
            return self.base_forward(x)
        if adapter_ids is None:
            batch = _BATCHES.current()
            adapter_ids = None if batch is None else batch.plan(self, x, len(self.places))
        if adapter_ids is None:
            return self.base_layer(x)
        dropout = self.dropout if self.training else 0.0
        base = self.base_layer
        check_weight_may_be_read("MultiLoRALinear", base)
        return multi_lora_linear(x, frozen_weight(base), self.stack, adapter_ids, base.bias, dropout_p=dropout)

    @torch.no_grad()
    def merge_(self, adapter: int = 0) -> MultiLoRALinear:
        """W ← g ∘ (W + s B A) of one adapter, in float32, rounded once; forward is then the plain linear for every row.

        W is kept, N K elements, so that ``unmerge_`` restores it bit for bit. Nothing when that adapter is merged.

        Raises:
            ValueError: another adapter is merged; there is no such adapter; a weight that another module uses as well,
                or that cannot be written just now; factors that are not finite. The layer is then as it was.
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
        stored = frozen_weight(self.base_layer)
        if isinstance(stored, FrozenWeight):
            raise ValueError(
                f"MultiLoRALinear.merge_: expected a dense weight to merge into, got one stored as {stored.format}; "
                f"lk.dequantize_ makes it dense"
            )
        reason = why_not_written(self.base_layer, whole=True)
        if reason is not None:
            raise ValueError(f"MultiLoRALinear.merge_: expected a weight that can be changed in place, but {reason}")
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

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "ranks"] = torch.tensor([place.rank for place in self.places], device="cpu")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        ranks = [place.rank for place in self.places]
        given = state_dict.get(prefix + "ranks")
        if given is not None and given.tolist() != ranks:
            raise ValueError(
                f"MultiLoRALinear: expected a state of adapters of ranks {ranks} at {prefix}ranks, got "
                f"{given.tolist()}; make the layer with those"
            )
        key = prefix + "base_layer.weight"
        self._loading = (key, args[-1]) if key in state_dict else None
        others = {k: t for k, t in state_dict.items() if k != prefix + "ranks"}
        super()._load_from_state_dict(others, prefix, *args)

    def extra_repr(self) -> str:
        ranks = [place.rank for place in self.places]
        return f"adapters={len(ranks)}, ranks={ranks if len(ranks) <= 8 else (*ranks[:8], '...')}, merged={self.merged}"


def _describe_unmerged(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the weight from before ``merge_`` into a state dict."""
    assert isinstance(layer, MultiLoRALinear)
    key, kept = prefix + "base_layer.weight", layer._unmerged
    if kept is not None and key in state:
        state[key] = kept.to(state[key].device, state[key].dtype)


def _settle_after_load(layer: nn.Module, _: Any) -> None:
    """Make the layer an unmerged one if a base weight has arrived: not if loading it failed."""
    assert isinstance(layer, MultiLoRALinear)
    if layer._loading is not None:
        key, errors = layer._loading
        if not any(f" {key}:" in error or f'"{key}"' in error for error in errors):
            layer._unmerged, layer.merged_adapter = None, None
        layer._loading = None
