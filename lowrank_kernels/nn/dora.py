"""``DoRALinear``: a frozen linear whose direction is corrected at low rank, and whose row norms train."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import LoRAPart
from ..finite import all_finite
from ..functional import ScaleCache, check_flag, dora_column_scale, dora_linear, dora_weight_norm
from ..merge import merge_dora_, unmerge_dora_
from ..weights import FrozenWeight, Weight
from .base_only import runs_base_alone
from .frozen import is_tracked_view, must_be_called
from .lora import LoRALayer, LoRALinear
from .matrix import as_matrix, frozen_weight, matrix_shape, weight_shape, write_matrix_
from .sharded import by_rows_like, fill_, is_dtensor, own_part, whole, why_not_written


class _Merged(NamedTuple):
    """What was merged, and the rows of W that merging does not allow to be computed back."""

    lora_a: Tensor
    lora_b: Tensor
    column_scale: Tensor
    scaling: float
    rows: Tensor
    kept: Tensor


class DoRALayer(LoRALayer):
    """A :class:`LoRALayer` with a magnitude m for each row of W besides: W becomes g ∘ (W + s B A), g = m / n,
    n_i = ‖W_i + s B_i A‖₂. What all kinds of DoRA layers have in common; mixed into the kinds of LoRA layers."""

    _keep_copy = False

    def __init__(
        self,
        base_layer: Any,
        r: int = 8,
        *,
        dropout_base: bool = False,
        detach_norm: bool = True,
        **settings: Any,
    ) -> None:
        kind = type(self).__name__
        if settings.get("lora_bias"):
            raise ValueError(f"{kind}: expected lora_bias to be False, got True; a bias of B's has no norm to share")
        if settings.get("velora") is not None:
            raise ValueError(f"{kind}: expected velora to be None, got {settings['velora']!r}; LoRALinear has it")
        check_flag(kind, "dropout_base", dropout_base)
        check_flag(kind, "detach_norm", detach_norm)
        super().__init__(base_layer, r, **settings)
        self.dropout_base, self.detach_norm = dropout_base, detach_norm
        self.scale_cache = ScaleCache()
        lora_a, lora_b = (factor.detach() for factor in self.factors())
        with torch.no_grad():
            norm = dora_weight_norm(self.matrix.detach(), lora_a, lora_b, scaling=self.scaling)
        self.lora_magnitude_vector = nn.Parameter(norm.to(lora_a.dtype).view(self.along_n(base_layer)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        sharded = is_dtensor(self.weight)
        reason = why_not_written(self.base_layer) if sharded else None
        if reason is not None or (sharded and not isinstance(self.matrix, Tensor)):
            reason = reason or "it is a shard of codes"
            raise ValueError(f"{type(self).__name__}.reset_parameters: expected whole rows of W, but {reason}")
        super().reset_parameters()
        (a, b), weight = self.factors(), self.matrix.detach()
        weight = own_part(weight) if sharded else weight
        norm = dora_weight_norm(weight, whole(a), self._rows_of_weight(b), scaling=self.scaling)
        every = whole(by_rows_like(self.weight, norm)) if sharded else norm
        fill_(self.lora_magnitude_vector, every.view(self.along_n(self.base_layer)))

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int, lora_bias: bool = False) -> dict[str, tuple[int, ...]]:
        of_lora = super().shapes(base_layer, r, lora_bias)
        return of_lora | {"lora_magnitude_vector": cls.along_n(base_layer)}

    @classmethod
    def along_n(cls, base_layer: nn.Module) -> tuple[int, ...]:
        """The shape of the magnitude in a file of PEFT's."""
        return (matrix_shape(base_layer)[0],)

    @property
    def magnitude(self) -> Tensor:
        """m (N,)."""
        return self.lora_magnitude_vector.flatten()

    def over_output(self, vector: Tensor) -> Tensor:
        """A vector (N,) in a shape that scales the layer's output."""
        return vector

    def column_scale(self) -> Tensor:
        """g = m / n (N,), for layers whose op does not compute it."""
        return column_scale(
            self.matrix, *self.factors(), self.lora_magnitude_vector, scaling=self.scaling, detach_norm=self.detach_norm
        )

    def check_at_hand(self) -> None:
        """Raise where the norm, which reads the weights beside the calls of the modules, would not find them."""
        weights = [("base_layer", self.weight, weight_shape(self.base_layer)), *self.correction_parameters()]
        for name, t, shape in weights:
            if t.is_meta or is_dtensor(t) or tuple(t.shape) != shape:
                raise ValueError(
                    f"{type(self).__name__}: expected the whole weight of {name} at hand, which the norm needs, got "
                    f"{type(t).__name__} {tuple(t.shape)} on {t.device}; shard or offload the layer as a whole, not "
                    f"the modules in it (preload_module_classes=['{type(self).__name__}'] of accelerate's cpu_offload)"
                )

    def _call_submodules(self, x: Tensor) -> Tensor:
        """y = base_layer(x) + (g - 1) ∘ W x + g ∘ s lora_B(lora_A(drop(x))), with W x = base_layer(x) - bias.

        With ``dropout_base`` the W x that g - 1 scales is that of drop(x). The norm reads the weights beside the calls.
        """
        self.check_at_hand()
        scale = self.over_output(self.column_scale())
        dropped = nn.functional.dropout(x, self.dropout, self.training)
        y = self.base_layer(x)
        base = self.base_layer(dropped) if self.dropout_base and dropped is not x else y
        bias = self.bias
        if bias is not None:
            base = base - self.over_output(bias.to(base.dtype))
        return (y + (scale - 1) * base + scale * self._correct(dropped)).to(y.dtype)

    def merge_(self, keep_copy: bool = False, *, requantize: str | None = None) -> Any:
        """W ← g ∘ (W + s B A), in float32, rounded once; forward is then the wrapped module's. Nothing when merged.

        Args:
            keep_copy: keep W, N K elements, so that ``unmerge_`` restores it bit for bit. Without it, only the rows
                that cannot be computed back are kept (g = 0, or so small that the merged row is subnormal), and the
                others come back to within one rounding of the merged row.
            requantize: as for ``LoRALinear.merge_``.

        Raises:
            ValueError: as ``LoRALinear.merge_``, and for a magnitude that is not finite.
        """
        self._keep_copy = keep_copy
        try:
            return super().merge_(requantize=requantize)
        finally:
            self._keep_copy = False

    def _merge_state(self) -> _Merged:
        weight, factors = own_part(self.matrix.detach()), self.factors()
        a, b = whole(factors[0].detach()).clone(), self._rows_of_weight(factors[1].detach()).clone()
        m = self._rows_of_weight(self.magnitude.detach())
        norm, scale, _ = dora_column_scale(weight, a, b, m, scaling=self.scaling)
        # All ranks agree, so that none has merged where another refuses.
        every_scale = whole(by_rows_like(self.weight, scale)) if is_dtensor(self.weight) else scale
        if not all_finite(every_scale):
            raise ValueError(f"{type(self).__name__}.merge_: expected a finite column scale m / n, found NaN or Inf")
        # A merged row has norm |g n|, and so an element of at least |g n| / sqrt(K).
        least = math.inf if self._keep_copy else math.sqrt(weight.shape[1]) * torch.finfo(weight.dtype).tiny
        rows = (~((scale * norm).abs() >= least)).nonzero().squeeze(1)
        if isinstance(weight, FrozenWeight):  # its codes are kept
            rows = rows[:0]
        kept = weight[rows].clone() if isinstance(weight, Tensor) else scale.new_empty(0, weight.shape[1])
        return _Merged(a, b, scale, self.scaling, rows, kept)

    @torch.no_grad()
    def _put_in(self, weight: Tensor, bias: Tensor | None, state: _Merged) -> None:
        part = own_part(weight)
        if len(state.lora_b):
            matrix = as_matrix(self.base_layer, part)
            merge_dora_(matrix, state.lora_a, state.lora_b, state.column_scale, scaling=state.scaling)
            write_matrix_(part, matrix)

    @torch.no_grad()
    def _take_out(self, weight: Tensor, bias: Tensor | None, state: _Merged) -> None:
        part = own_part(weight)
        matrix = as_matrix(self.base_layer, part)
        if len(state.lora_b):
            unmerge_dora_(matrix, state.lora_a, state.lora_b, state.column_scale, scaling=state.scaling)
        matrix[state.rows.to(matrix.device)] = state.kept.to(matrix.device, matrix.dtype)
        write_matrix_(part, matrix)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout_base={self.dropout_base}, detach_norm={self.detach_norm}"


class DoRALinear(DoRALayer, LoRALinear):
    """y = g ∘ (x Wᵀ + s (drop(x) Aᵀ) Bᵀ) + bias with g = m / n, n_i = ‖W_i + s B_i A‖₂, and B ∘ gate for B with a gate.

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

    def forward(self, x: Tensor) -> Tensor:
        base, lora_a, lora_b, m = self.base_layer, self.lora_A, self.lora_B, self.lora_magnitude_vector
        if self._merged is not None or (self.base_only_depth is not None and runs_base_alone(self)):
            return base(x)
        weight = frozen_weight(base)
        if must_be_called(base, lora_a, lora_b) or is_tracked_view(weight):
            return self._call_submodules(x)
        a, b = lora_a.weight, lora_b.weight
        return dora_linear(
            x,
            weight,
            a,
            b,
            m,
            base.bias,
            scaling=self.scaling,
            gate=self.lora_gate,
            # A compiled graph keeps no state between calls: the norm is a part of it.
            scale_cache=None if self.training or torch.compiler.is_compiling() else self.scale_cache,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_base=self.dropout_base,
            detach_norm=self.detach_norm,
        )

    def as_part(self, x: Tensor) -> tuple[LoRAPart, float] | None:
        """As of :class:`LoRALinear`; None, too, where g is kept between calls, the norm is differentiated, or dropout
        reaches the base product."""
        found = super().as_part(x) if self.training and self.detach_norm else None
        if found is None or (self.dropout_base and found[1] > 0.0):
            return None
        return found[0]._replace(magnitude=self.lora_magnitude_vector), found[1]


def column_scale(
    weight: Weight, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor, *, scaling: float, detach_norm: bool
) -> Tensor:
    """g = m / n (N,), 0 where n is 0; gradients reach m, and n unless detached.

    Args:
        weight: W (N, K).  lora_a: A (R, K).  lora_b: B (N, R).  magnitude: m, N elements in any shape.
    """
    if detach_norm:
        lora_a, lora_b = lora_a.detach(), lora_b.detach()
    norm = dora_weight_norm(weight.detach(), lora_a, lora_b, scaling=scaling)
    return torch.where(norm == 0, 0.0, magnitude.flatten() / torch.where(norm == 0, 1.0, norm))
