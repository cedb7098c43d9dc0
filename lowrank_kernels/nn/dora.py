"""``DoRALinear``: a frozen nn.Linear whose direction is corrected at low rank, and whose row norms train."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..finite import all_finite
from ..functional import ScaleCache, dora_column_scale, dora_linear, dora_weight_norm
from ..merge import merge_dora_, unmerge_dora_
from .lora import LoRALinear


class _Merged(NamedTuple):
    """What was merged, and the rows of W that merging does not allow to be computed back."""

    lora_a: Tensor
    lora_b: Tensor
    column_scale: Tensor
    scaling: float
    rows: Tensor
    kept: Tensor


class DoRALinear(LoRALinear):
    """y = g ∘ (x Wᵀ + s (drop(x) Aᵀ) Bᵀ) + bias with g = m / n, n_i = ‖W_i + s B_i A‖₂.

    Parameters are those of :class:`LoRALinear` and ``lora_magnitude_vector`` (N,), PEFT's name, which starts at the
    norm of W + s B A, so that the layer starts as the wrapped one, and always trains. Rows of norm 0 yield their bias.

    Args:
        dropout_base: dropout reaches the base product of the correction too, as PEFT does it; see ``lk.dora_linear``.
        detach_norm: the norm is a constant in backward (the paper's choice, and PEFT's).
        (the others as for ``LoRALinear``; there is no ``lora_bias``)

    g is computed in every forward, from the same read of W as the product where this package makes that. In evaluation
    on a CPU it is kept, and used again where the values of W, A, B and m prove to be what they were (see
    :class:`~lowrank_kernels.functional.ScaleCache`).

    Source: Liu et al., "DoRA", arXiv 2402.09353.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int = 8,
        *,
        dropout_base: bool = False,
        detach_norm: bool = True,
        **settings: Any,
    ) -> None:
        if settings.get("lora_bias"):
            raise ValueError("DoRALinear: expected lora_bias to be False, got True; a bias of B's has no norm to share")
        super().__init__(base_layer, r, **settings)
        self.dropout_base, self.detach_norm = dropout_base, detach_norm
        self.scale_cache = ScaleCache()
        with torch.no_grad():
            norm = dora_weight_norm(
                self.weight.detach(), self.lora_A.weight.detach(), self.lora_B.weight.detach(), scaling=self.scaling
            )
        self.lora_magnitude_vector = nn.Parameter(norm.to(self.lora_A.weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        base, a, b, m = self.base_layer, self.lora_A.weight, self.lora_B.weight, self.lora_magnitude_vector
        return dora_linear(
            x, base.weight, a, b, m, base.bias, scaling=self.scaling,
            # A compiled graph keeps no state between calls: the norm is a part of it.
            scale_cache=None if self.training or torch.compiler.is_compiling() else self.scale_cache,
            dropout_p=self.dropout if self.training else 0.0, dropout_base=self.dropout_base,
            detach_norm=self.detach_norm,
        )  # fmt: skip

    def merge_(self, keep_copy: bool = False) -> DoRALinear:
        """W ← g ∘ (W + s B A), in float32, rounded once; forward is then the plain linear. Nothing when merged.

        Args:
            keep_copy: keep W, N K elements, so that ``unmerge_`` restores it bit for bit. Without it, only the rows
                that cannot be computed back are kept (g = 0, or so small that the merged row is subnormal), and the
                others come back to within one rounding.

        Raises:
            ValueError: as ``LoRALinear.merge_``, and for a magnitude that is not finite.
        """
        self._keep_copy = keep_copy
        super().merge_()
        return self

    def _merge_state(self) -> _Merged:
        weight, a, b = self.weight.detach(), self.lora_A.weight.detach().clone(), self.lora_B.weight.detach().clone()
        norm, scale, _ = dora_column_scale(weight, a, b, self.lora_magnitude_vector.detach(), scaling=self.scaling)
        if not all_finite(scale):
            raise ValueError("DoRALinear.merge_: expected a finite column scale m / n, found NaN or Inf")
        # A merged row has norm |g n|, and so an element of at least |g n| / sqrt(K).
        least = math.inf if self._keep_copy else math.sqrt(weight.shape[1]) * torch.finfo(weight.dtype).tiny
        rows = (~((scale * norm).abs() >= least)).nonzero().squeeze(1)
        return _Merged(a, b, scale, self.scaling, rows, weight[rows].clone())

    @torch.no_grad()
    def _put_in(self, weight: Tensor, bias: Tensor | None, state: _Merged) -> None:
        merge_dora_(weight, state.lora_a, state.lora_b, state.column_scale, scaling=state.scaling)

    @torch.no_grad()
    def _take_out(self, weight: Tensor, bias: Tensor | None, state: _Merged) -> None:
        unmerge_dora_(weight, state.lora_a, state.lora_b, state.column_scale, scaling=state.scaling)
        weight[state.rows.to(weight.device)] = state.kept.to(weight.device, weight.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_base={self.dropout_base}, detach_norm={self.detach_norm}"
