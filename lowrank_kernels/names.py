"""Names of modules and parameters as the plain model has them, whatever wraps it or its parts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

# Where torch's wrappers keep what they wrap: FSDP, activation checkpointing, torch.compile.
_WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
COMPILED = "_orig_mod"


def unwrapped(name: str) -> str:
    """A module's or parameter's name without what wrappers put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def held(model: nn.Module) -> nn.Module:
    """The model that DistributedDataParallel, DataParallel or a DeepSpeed engine holds; else the model itself."""
    holders = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, holders) or type(model).__name__ == "DeepSpeedEngine":
        model = model.module  # type: ignore[assignment]
    return model


def wrapped_in(module: nn.Module) -> tuple[str, nn.Module] | None:
    """(key, module) of what a wrapper wraps; None of any other module."""
    return next(((key, inner) for key in _WRAPPED if (inner := module._modules.get(key)) is not None), None)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each module but the wrappers, once."""
    return ((unwrapped(name), m) for name, m in held(model).named_modules() if wrapped_in(m) is None)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, parameter), under every name that it has."""
    return ((unwrapped(name), p) for name, p in held(model).named_parameters(remove_duplicate=False))


def named_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer), under every name that it has."""
    return ((unwrapped(name), b) for name, b in held(model).named_buffers(remove_duplicate=False))


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The module of that name, inside of its wrappers. Raises AttributeError where there is none."""
    module = _inside(held(model))
    for part in name.split(".") if name else ():
        module = _inside(module.get_submodule(part))
    return module


def place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(owner, key) with ``owner._modules[key]`` the module of that name, inside of its wrappers."""
    parent, _, key = name.rpartition(".")
    owner = submodule(model, parent)
    while (wrapped := wrapped_in(owner.get_submodule(key))) is not None:
        owner, key = owner.get_submodule(key), wrapped[0]
    return owner, key


def _inside(module: nn.Module) -> nn.Module:
    while (wrapped := wrapped_in(module)) is not None:
        module = wrapped[1]
    return module
