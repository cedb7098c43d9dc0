"""``LaMDALinear``: a frozen linear corrected between its own leading singular vectors, by a small square matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..finite import all_finite
from ..functional import lora_linear
from ..weights import FrozenWeight
from .base_only import runs_base_alone
from .frozen import is_tracked_view, must_be_called
from .lora import LoRALayer, LoRALinear
from .matrix import frozen_weight, matrix_shape
from .sharded import whole

EXACT_UP_TO = 2000
"""Width of W above which its leading singular vectors come from a randomised decomposition."""


class LaMDALinear(LoRALayer):
    """y = x Wᵀ + bias + s (drop(x) Aᵀ) (B S - B₀ S₀)ᵀ, with B₀ S₀ A = U_R Σ_R V_Rᵀ, the leading part of W's SVD.

    A = V_Rᵀ is frozen, S (R, R) trains from S₀ = Σ_R, and B (N, R) from B₀ = U_R until it is frozen, column by column
    (:class:`lowrank_kernels.allocate.LaMDA`). It is the same function as W - s B₀ S₀ A beside a trained s B S A, but W
    stays as it is: the layer starts as the wrapped one, whatever W's dtype, and its correction is a LoRA of rank R.

    Tensors: ``base_layer.weight`` (N, K) and ``base_layer.bias`` (N,), the wrapped layer's own, frozen;
    ``lamda_A`` (R, K), frozen; ``lamda_B`` (N, R); ``lamda_S`` (R, R); ``lamda_start`` (N, R), the constant B₀ S₀.

    Args:
        base_layer: as for ``LoRALinear``, in a dense format or any other.
        r: rank R, at most min(N, K).
        alpha: numerator of s.
        dropout: probability of zeroing an element of the correction's input; active in training alone.
        rslora: divide alpha by sqrt(R) instead of R.
        dtype: of A, B and S; default float32, or float64 over a float64 weight.

    Saved for backward: P = drop(x) Aᵀ, M x R elements, and no x. Merging, ``state_dict`` and adapter files are as
    LoRALinear's; in a file of PEFT's, B is B S - B₀ S₀.

    Raises:
        TypeError: a base layer that cannot be wrapped, with the reason; a dtype that is not a float.
        ValueError: a rank below 1 or above min(N, K), a weight that is not finite, and as ``LoRALinear``.

    Source: Azizi, Kundu and Pedram, "LaMDA", arXiv 2406.12832, section 3.
    """

    wraps = "nn.Linear"
    lamda_start: Tensor
    frozen_columns = 0
    """How many leading columns of B are constants."""

    def __init__(
        self,
        base_layer: Any,
        r: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base_layer, r, alpha=alpha, dropout=dropout, rslora=rslora, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 8, **settings: Any) -> LaMDALinear:
        """Wrap ``linear``, sharing and freezing its weight and bias. Settings are those of the class."""
        return cls(linear, r, **settings)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        return LoRALinear.why_not(module)

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int, lora_bias: bool = False) -> dict[str, tuple[int, ...]]:
        n, k = matrix_shape(base_layer)
        return {"lamda_A": (r, k), "lamda_B": (n, r), "lamda_S": (r, r), "lamda_start": (n, r)}

    def make_factors(self, init: str, train: str, lora_bias: bool, **options: Any) -> None:
        n, k = self.out_features, self.in_features
        if self.r > min(n, k):
            raise ValueError(f"LaMDALinear: expected a rank of at most min(N, K) = {min(n, k)}, got {self.r}")
        u, sigma, vh = leading_svd(frozen_weight(self.base_layer), self.r)
        self.lamda_A = nn.Parameter(vh.to(**options), requires_grad=False)
        self.lamda_B = nn.Parameter(u.to(**options))
        self.lamda_S = nn.Parameter(sigma.diag().to(**options))
        self.register_buffer("lamda_start", (self.lamda_B @ self.lamda_S).detach())

    def factors(self) -> tuple[Tensor, Tensor]:
        b: Tensor = self.lamda_B
        if self.frozen_columns >= self.r:
            b = b.detach()
        elif self.frozen_columns:
            b = torch.cat([b[:, : self.frozen_columns].detach(), b[:, self.frozen_columns :]], dim=1)
        return self.lamda_A, self._b_from(b, self.lamda_S)

    def _b_from(self, b: Tensor, s: Tensor) -> Tensor:
        with torch.autocast(b.device.type, enabled=False):  # rounded, two large products would not cancel
            return b @ s - self.lamda_start

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """A and B S - B₀ S₀ without gradients; of shards gathered, which every rank has to call."""
        a, b, s = (whole(p.detach()) for p in (self.lamda_A, self.lamda_B, self.lamda_S))
        return a, self._b_from(b, s)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if self._merged is not None or (self.base_only_depth is not None and runs_base_alone(self)):
            return base(x)
        weight = frozen_weight(base)
        if must_be_called(base) or is_tracked_view(weight):
            return self._call_submodules(x)
        dropout = self.dropout if self.training else 0.0
        return lora_linear(x, weight, *self.factors(), base.bias, scaling=self.scaling, dropout_p=dropout)

    def _apply(self, fn: Any, recurse: bool = True) -> LaMDALinear:
        """As of any module; after a cast, B₀ S₀ is what leaves the correction as it was. Rounded by itself, it would
        not cancel B S where the layer starts."""
        b, s, start = self.lamda_B.detach(), self.lamda_S.detach(), self.lamda_start
        super()._apply(fn, recurse)
        if self.lamda_B.dtype != b.dtype and not self.lamda_B.is_meta:
            with torch.no_grad():
                self.lamda_start.copy_(self.lamda_B @ self.lamda_S - (b @ s - start).to(self.lamda_start))
        return self

    def _correct(self, x: Tensor) -> Tensor:
        a, b = self.factors()
        return self.scaling * linear(linear(x.to(a.dtype), a), b)

    def reset_parameters(self) -> None:
        """Refused: the factors are parts of W's decomposition."""
        raise ValueError(
            "LaMDALinear.reset_parameters: expected a layer that starts from samples, and this one starts from W's "
            "singular vectors; adapt the model when its weights are there"
        )

    def change_ranks_(self, keep: Sequence[int], added: int = 0, *, scaling: float | None = None) -> None:
        """Refused: the rank is that of a part of W's decomposition."""
        raise ValueError("LaMDALinear.change_ranks_: expected a layer of A and B alone; choose the rank when adapting")


@torch.no_grad()
def leading_svd(weight: Tensor | FrozenWeight, r: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U (N, R), Σ (R,), Vᵀ (R, K): the R leading singular triples of W (N, K), in float32 or wider.

    By a whole decomposition up to a width of 2000; above, randomised, from 2 R + 16 columns and 4 power iterations,
    whose random numbers ``seed`` starts: torch's generators are as before.

    Raises:
        ValueError: W holds NaN or Inf, or is on the meta device.
    """
    dense = weight if isinstance(weight, Tensor) else weight.dense()
    if dense.is_meta:
        raise ValueError("leading_svd: expected a weight at hand, got one on the meta device; load it first")
    if not all_finite(dense):
        raise ValueError("leading_svd: expected a finite weight, and it holds NaN or Inf")
    dense = dense.detach().to(torch.promote_types(dense.dtype, torch.float32))
    if max(dense.shape) <= EXACT_UP_TO:
        u, sigma, vh = torch.linalg.svd(dense, full_matrices=False)
    else:
        devices = [dense.device] if dense.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            u, sigma, v = torch.svd_lowrank(dense, q=min(2 * r + 16, *dense.shape), niter=4)
        vh = v.mT
    return u[:, :r].contiguous(), sigma[:r], vh[:r].contiguous()
