"""``LoRALinear``: a frozen nn.Linear and its trained low-rank correction."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import lora_linear
from ..init.factors import init_factors_
from ..merge import merge_lora_
from .frozen import AroundLinear, check_wrappable

TRAIN = {"both": (True, True), "a": (True, False), "b": (False, True)}


class _Merged(NamedTuple):
    """What was added to the weight, and so has to come out again, whatever the factors have become meanwhile."""

    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scaling: float


class LoRALinear(AroundLinear):
    """y = x Wᵀ + bias + s (drop(x) Aᵀ) Bᵀ, with s = alpha / R, or alpha / sqrt(R) with ``rslora``.

    Parameters, named as in a file of PEFT's: ``base_layer.weight`` (N, K), ``base_layer.bias`` (N,), both the
    ones of the wrapped layer itself, frozen and not copied; ``lora_A.weight`` (R, K); ``lora_B.weight`` (N,
    R); with ``lora_bias`` also ``lora_B.bias`` (N,), which enters as s · bias. ``weight`` and ``bias`` read
    the wrapped layer's.

    Args:
        base_layer: a plain nn.Linear of float32, bfloat16, float16 or float64.
        r: rank R.
        alpha: numerator of s.
        dropout: probability of zeroing an element of the correction's input; active in training alone.
        rslora: divide alpha by sqrt(R) instead of R (Kalajdzievski, arXiv 2312.03732).
        lora_bias: give B a bias.
        init: "kaiming" (PEFT's default), "gaussian", "orthonormal" or "zero"; see ``lowrank_kernels.init``.
        train: "both", or only "a" or "b"; the other factor is then sampled and frozen.
        dtype: of the factors; default float32, or float64 over a float64 weight.

    x (..., K) has W's dtype, or runs under autocast. Factors are rounded to x's dtype inside the product;
    their gradients have their own dtype. ``state_dict`` always describes the unmerged layer.

    Raises:
        TypeError: a base layer that cannot be wrapped, with the reason; a dtype that is not a float.
        ValueError: a rank below 1, an alpha that is not finite, a dropout outside [0, 1), an unknown
            ``train``/``init``.

    Source: Hu et al., arXiv 2106.09685.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int = 8,
        *,
        alpha: float = 16.0,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        init: str = "kaiming",
        train: str = "both",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_wrappable("LoRALinear", base_layer)
        check_lora_settings("LoRALinear", r=r, alpha=alpha, dropout=dropout, train=train, dtype=dtype)
        weight = base_layer.weight
        dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.weight_shared_with: tuple[str, ...] = ()
        self._merged: Any = None

        empty = torch.nn.utils.skip_init
        k, n = base_layer.in_features, base_layer.out_features
        lora_a = empty(nn.Linear, k, r, bias=False, device=weight.device, dtype=dtype)
        lora_b = empty(nn.Linear, r, n, bias=lora_bias, device=weight.device, dtype=dtype)
        init_factors_(lora_a.weight, lora_b.weight, init, sampled="b" if train == "a" else "a")
        if lora_bias:
            nn.init.zeros_(lora_b.bias)
        lora_a.requires_grad_(TRAIN[train][0])
        lora_b.requires_grad_(TRAIN[train][1])
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = lora_a
        self.lora_B = lora_b
        self.train(base_layer.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 8, **settings: Any) -> LoRALinear:
        """Wrap ``linear``, sharing and freezing its weight and bias. Settings are those of the class."""
        return cls(linear, r, **settings)

    @property
    def weight(self) -> Tensor:
        """W, without the correction unless it is merged."""
        return self.base_layer.weight

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    @property
    def merged(self) -> bool:
        """Whether the weight holds the correction."""
        return self._merged is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        base, lora_b = self.base_layer, self.lora_B
        return lora_linear(
            x,
            base.weight,
            self.lora_A.weight,
            lora_b.weight,
            add_bias(base.bias, lora_b.bias, self.scaling, base.weight.dtype),
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def resize_(self, r: int) -> LoRALinear:
        """Give A and B the rank r, and zeros: the same parameters with other shapes, without gradients.

        Their optimizer state is of the old shapes; drop it.

        Raises:
            ValueError: a rank below 1; a merged layer.
        """
        check_lora_settings("LoRALinear.resize_", r=r, alpha=self.alpha, dropout=self.dropout, train="both", dtype=None)
        if self.merged:
            raise ValueError("LoRALinear.resize_: expected an unmerged layer; call unmerge_()")
        for factor, shape in (
            (self.lora_A.weight, (r, self.in_features)),
            (self.lora_B.weight, (self.out_features, r)),
        ):
            factor.data, factor.grad = factor.new_zeros(shape), None
        self.lora_A.out_features = self.lora_B.in_features = self.r = r
        return self

    def merge_(self) -> LoRALinear:
        """W ← W + s B A, in float32, rounded once; forward is then the plain linear. Nothing when merged.

        The merged factors are remembered, (N + K) R elements, so that ``unmerge_`` takes out what was put in
        even when the factors have changed since.

        Raises:
            ValueError: a weight that another module uses as well; a bias to merge and none to take it;
                factors that are not finite. The layer is then as it was.
        """
        if self.merged:
            return self
        if self.weight_shared_with:
            raise ValueError(
                f"LoRALinear.merge_: this weight is also that of {', '.join(self.weight_shared_with)}, which "
                f"would change with it; give the layer a weight of its own and clear weight_shared_with"
            )
        lora_bias = self.lora_B.bias
        if lora_bias is not None and self.base_layer.bias is None:
            raise ValueError("LoRALinear.merge_: expected a base layer with a bias to take lora_B.bias, got none")
        state = self._merge_state()
        self._put_in(self.base_layer.weight, self.base_layer.bias, state)
        self._merged = state
        return self

    def _merge_state(self) -> Any:
        lora_bias = self.lora_B.bias
        return _Merged(
            self.lora_A.weight.detach().clone(),
            self.lora_B.weight.detach().clone(),
            None if lora_bias is None else lora_bias.detach().clone(),
            self.scaling,
        )

    def unmerge_(self) -> LoRALinear:
        """Take out what ``merge_`` put in: W to within one rounding of what it was. Nothing when not merged."""
        if self._merged is not None:
            self._take_out(self.base_layer.weight, self.base_layer.bias, self._merged)
            self._merged = None
        return self

    def _put_in(self, weight: Tensor, bias: Tensor | None, state: Any) -> None:
        self._add_to(weight, bias, state, 1.0)

    def _take_out(self, weight: Tensor, bias: Tensor | None, state: Any) -> None:
        self._add_to(weight, bias, state, -1.0)

    @staticmethod
    @torch.no_grad()
    def _add_to(weight: Tensor, bias: Tensor | None, state: _Merged, sign: float) -> None:
        merge_lora_(weight, state.lora_a, state.lora_b, scaling=sign * state.scaling)
        if state.bias is not None:
            assert bias is not None
            wide = torch.promote_types(bias.dtype, torch.float32)
            bias.copy_(bias.to(wide) + sign * state.scaling * state.bias.to(bias.device, wide))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As of any module; while merged, the base weight and bias in it are unmerged copies."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self._merged is not None:
            base = {name: prefix + "base_layer." + name for name in ("weight", "bias")}
            copies = {name: state[key].detach().clone() for name, key in base.items() if key in state}
            self._take_out(copies["weight"], copies.get("bias"), self._merged)
            state.update({base[name]: copy for name, copy in copies.items()})
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "base_layer.weight" in state_dict:
            self._merged = None  # the weight that is about to arrive is an unmerged one
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"r={self.r}, alpha={self.alpha}, scaling={self.scaling:.6g}, "
            f"dropout={self.dropout}, merged={self.merged}"
        )


def add_bias(bias: Tensor | None, lora_bias: Tensor | None, scaling: float, dtype: torch.dtype) -> Tensor | None:
    """bias + s · lora_bias in the wider of their dtypes, rounded once to ``dtype``; None where both are."""
    if lora_bias is None:
        return bias
    scaled = scaling * lora_bias
    return (scaled if bias is None else bias + scaled).to(dtype)


def check_lora_settings(
    op: str, *, r: int, alpha: float, dropout: float, train: str, dtype: torch.dtype | None
) -> None:
    """Raise ValueError or TypeError, in the op's name, for settings no LoRA layer can have."""
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"{op}: expected r to be an integer of at least 1, got {r!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise ValueError(f"{op}: expected alpha to be a finite number, got {alpha!r}")
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"{op}: expected 0 <= dropout < 1, got {dropout!r}")
    if train not in TRAIN:
        raise ValueError(f"{op}: expected train to be one of {', '.join(TRAIN)}, got {train!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"{op}: expected dtype to be a floating dtype, got {dtype!r}")
