"""VeLoRA: layers that save projections of their input; ``VeLoRALinear``, a linear of which all of W trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import velora_linear, velora_vector
from .frozen import AroundBase, check_weight_may_be_read, check_wrappable
from .sharded import is_dtensor


class Projecting(nn.Module):
    """A layer that may save z for its backward, one number of each sub-token of x, in place of x.

    Attributes:
        velora: sub-tokens G of a token, each of K / G elements; None: x is saved as it is.
        velora_vector: v (K / G,), a buffer in float32, or float64 where W is: in the state dict, and zeros until it is
            made of the first batch, from the mean of all its sub-tokens. ``lk.init.velora_`` makes it ahead of
            training, and leaves padding out.

    z is saved in training where gradients are recorded; in evaluation x is, and gradients are exact. A batch that is
    empty, or whose mean is not finite, is not the first one: x is saved for it.
    """

    velora: int | None = None
    velora_made: bool = False
    """True once ``velora_vector`` is known to be made."""
    velora_vector: Tensor
    in_features: Any

    def make_velora_(self, velora: int) -> None:
        """Divide tokens into ``velora`` sub-tokens from now on, with a v that is yet to be made."""
        op, k = type(self).__name__, self.in_features
        if isinstance(velora, bool) or not isinstance(velora, int) or velora < 1 or k % velora:
            raise ValueError(
                f"{op}: expected velora to be a number of sub-tokens that divides K = {k}, got {velora!r}; each is K / "
                f"velora elements long"
            )
        weight: Any = self.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.velora, self.velora_made = velora, False
        self.register_buffer("velora_vector", torch.zeros(k // velora, dtype=dtype, device=weight.device))

    def velora_vector_for(self, x: Tensor) -> Tensor | None:
        """v for the backward of this call, made of x where it is the first; None where x itself is to be saved."""
        if not (self.training and torch.is_grad_enabled()):
            return None
        if not self.velora_made:
            self.set_velora_vector_(x)
        return self.velora_vector if self.velora_made else None

    @torch.no_grad()
    def set_velora_vector_(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Make v of x (..., K), or of the tokens of it whose entry in ``mask`` (...) is not 0. Does nothing where there
        is one, which a state may have brought, and where the mean is not finite. Waits for the device."""
        v = self.velora_vector
        if not v.any():
            if is_dtensor(self.weight) or getattr(self.base_layer, "_is_fsdp_managed_module", False):
                raise ValueError(
                    f"{type(self).__name__}: expected velora_vector to be made before the model is sharded, since each "
                    f"rank would make another one of its own batch; call lk.init.velora_ on the same batch first"
                )
            v.copy_(velora_vector(x, len(v), mask))
        self.velora_made = bool(v.any())

    def _load_from_state_dict(self, *args: Any) -> None:
        self.velora_made = False  # to be looked at
        super()._load_from_state_dict(*args)


class VeLoRALinear(Projecting, AroundBase):
    """y = x Wᵀ + bias, of which W and bias train: dW = dYᵀ x̂ with x̂ = z ⊗ v, and z (M, G) is what is saved of x.

    Parameters: ``base_layer.weight`` (N, K) and ``base_layer.bias`` (N,), the ones of the wrapped layer itself, which
    require grad from now on. In training ``base_layer`` is read and not called: hooks belong on the layer itself.

    Args:
        base_layer: a plain nn.Linear of float32, bfloat16, float16 or float64.
        velora: sub-tokens G of a token, a divisor of K.

    Raises:
        TypeError: a base layer that cannot be wrapped, with the reason.
        ValueError: a ``velora`` that does not divide K.

    See :class:`Projecting` for v, and :func:`lowrank_kernels.velora_linear` for the op.

    Source: Miles et al., arXiv 2405.17991.
    """

    def __init__(self, base_layer: nn.Linear, velora: int = 32) -> None:
        super().__init__()
        check_wrappable("VeLoRALinear", base_layer)
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"VeLoRALinear: expected a dense nn.Linear to train, got a {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.make_velora_(velora)
        base_layer.requires_grad_(True)
        self.train(base_layer.training)

    @classmethod
    def from_linear(cls, linear: nn.Linear, velora: int = 32) -> VeLoRALinear:
        """Wrap ``linear``, sharing its weight and bias, which train."""
        return cls(linear, velora)

    def forward(self, x: Tensor) -> Tensor:
        check_weight_may_be_read("VeLoRALinear", self.base_layer)
        base, v = self.base_layer, self.velora_vector_for(x)
        y: Tensor = base(x) if v is None else velora_linear(x, base.weight, v, base.bias)
        return y

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, velora={self.velora}"
