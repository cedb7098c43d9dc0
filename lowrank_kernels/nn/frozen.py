"""Which modules a correction can be put on, and what all layers around one have in common."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_backward_hooks as _for_all_backwards
from torch.nn.modules.module import _global_backward_pre_hooks as _before_all_backwards
from torch.nn.modules.module import _global_forward_hooks as _for_all_forwards
from torch.nn.modules.module import _global_forward_pre_hooks as _before_all_forwards
from torch.nn.parameter import is_lazy

from ..weights import Weight
from ..weights import of as stored
from .matrix import frozen_weight, is_conv1d, matrix_shape, weight_shape, weight_tensor
from .sharded import is_dtensor

# Subclasses of nn.Linear that compute the same by other calls: that of transformers' Falcon adds the bias by itself.
_SAME_FUNCTION = ("FalconLinear",)
_HOOKED = "it carries hooks or a replaced forward; remove them first, and add them to base_layer afterwards"
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def must_be_called(*linears: nn.Module) -> bool:
    """Whether calling one of these modules does more than its formula with the weight that is in it now: it carries
    hooks (as FSDP's and offloading's, which bring the weight), is wrapped, or there are global hooks."""
    for linear in linears:
        own = linear.__dict__  # at every forward of a layer: nothing is faster
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or (type(linear) is not nn.Linear and not _has_plain_forward(linear))
        ):
            return True
    return has_global_hooks()


def _has_plain_forward(module: nn.Module) -> bool:
    kind = type(module)
    plain = kind.forward in _PLAIN_FORWARDS or is_conv1d(module) or kind.__name__ in _SAME_FUNCTION
    return plain or stored(module) is not None


def has_global_hooks() -> bool:
    """Whether torch calls something at every module's forward or backward."""
    return bool(_for_all_forwards or _before_all_forwards or _for_all_backwards or _before_all_backwards)


def check_weight_may_be_read(op: str, base_layer: nn.Linear) -> None:
    """Raise, in the layer's name, where reading the base layer's weight would miss what calling it does.

    For layers that have no way through the call of their base layer.
    """
    if must_be_called(base_layer):
        raise RuntimeError(
            f"{op}: expected a base_layer without hooks and wrappers (or global module hooks), which would not run: "
            f"its weight is read, it is not called; attach them to the {op} itself, or remove them"
        )
    if is_tracked_view(frozen_weight(base_layer)):
        raise RuntimeError(
            f"{op}: expected a frozen weight, got a view of FSDP1's flat parameter, of which other parts train; shard "
            f"the model with torch.distributed.fsdp.fully_shard instead"
        )


def is_tracked_view(weight: Weight) -> bool:
    """Whether a frozen weight seems to need a gradient because it is a view of FSDP1's flat parameter, of which other
    parts train."""
    return isinstance(weight, Tensor) and weight.requires_grad and not weight.is_leaf


def drop_compiled() -> None:
    """Drop what torch.compile has made so far: its guards do not see hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def why_not_frozen(module: nn.Module) -> str | None:
    """Why ``module`` cannot be used as x ↦ x Wᵀ + bias with a plain frozen weight W; None when it can."""
    kind = type(module).__name__
    try:
        if stored(module) is not None:
            return _HOOKED if has_hooks(module) else None
    except ValueError as error:  # of a format that is known, in a state that cannot be read
        return str(error)
    if not isinstance(module, nn.Linear):
        if hasattr(module, "base_layer"):
            return f"already adapted ({kind})"
        if kind == "Conv1D":
            return "transformers' Conv1D keeps its weight as (in, out); an nn.Linear is needed"
        if kind == "OptimizedModule":
            return "it is compiled; adapt the model before torch.compile"
        return f"not an nn.Linear but a {kind}"
    return why_not_plain(module, nn.Linear)


def why_not_plain(module: Any, kind: type[nn.Module]) -> str | None:
    """Why ``module``, a ``kind``, is not just that with a plain frozen weight; None when it is."""
    name, shape = type(module).__name__, weight_shape(module)
    if is_lazy(module._parameters.get("weight")):
        return f"a {name} has no weight before its first call; run the model once, then adapt it"
    if torch.nn.utils.parametrize.is_parametrized(module, "weight"):
        return "its weight is computed by torch.nn.utils.parametrize"
    weight = module.weight
    if weight.dtype not in FLOAT_DTYPES:
        return f"quantised ({name}, weight of {weight.dtype})"
    if type(module).forward is not kind.forward and name not in _SAME_FUNCTION:
        return f"a {name} has a forward of its own"
    if is_dtensor(weight) or getattr(module, "_is_fsdp_managed_module", False):
        return "its weight is sharded already (DTensor, FSDP); adapt the model before it is sharded or wrapped"
    if type(weight) in (nn.Parameter, torch.Tensor) and weight.shape != shape:
        return (
            f"its weight has the shape {tuple(weight.shape)}, not {shape}: it is partitioned (DeepSpeed ZeRO-3) or "
            f"sharded; adapt the model before that, or gather the weight first"
        )
    if type(weight) not in (nn.Parameter, torch.Tensor) or weight.layout is not torch.strided:
        return f"its weight is a {type(weight).__name__} of layout {weight.layout}, not a plain tensor"
    return _HOOKED if has_hooks(module) else None


def check_wrappable(op: str, module: nn.Module) -> None:
    """Raise TypeError, in the layer's name and with the reason, for what is no plain linear with a frozen weight."""
    reason = why_not_frozen(module)
    if reason is not None:
        raise TypeError(f"{op}: expected a plain nn.Linear, but this one cannot be wrapped: {reason}")


class AroundBase(nn.Module):
    """A layer around ``base_layer``, whose own parameters it shares, and whose sizes and bias it has."""

    base_layer: nn.Linear
    base_only_depth: int | None = None
    """How many :func:`lowrank_kernels.base_only` of it are open; None: there has been none."""

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or pickle, which is in no context, and in no chain's round."""
        return {key: value for key, value in self.__dict__.items() if key not in ("base_only_depth", "rests")}

    def base_forward(self, x: Tensor) -> Tensor:
        """What the layer computes without its correction, unmerged."""
        y: Tensor = self.base_layer(x)
        return y

    @property
    def in_features(self) -> int:
        """K."""
        return matrix_shape(self.base_layer)[1]

    @property
    def out_features(self) -> int:
        """N."""
        return matrix_shape(self.base_layer)[0]

    @property
    def weight(self) -> Tensor:
        """The wrapped module's, as that keeps it."""
        return weight_tensor(self.base_layer)

    @property
    def matrix(self) -> Any:
        """W (N, K), as ops take it."""
        return frozen_weight(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)
