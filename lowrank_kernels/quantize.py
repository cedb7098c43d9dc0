"""``quantize_``: a model's linears in few bits, in place; ``dequantize_``: dense again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .adapt import output_head
from .config import names_match
from .names import named_modules, place
from .nn.coded import CodedLinear
from .nn.frozen import why_not_frozen
from .read_weights import why_not_called
from .report import Replaced, Report, Skipped, count_parameters
from .weights import DTYPES, dense, encoders, like, of


def quantize_(model: nn.Module, format: str = "nf4", *, skip: str | Sequence[str] = (), **settings: Any) -> Report:
    """Store the weights of a model's linears in few bits, in place, one after the other: the base of a QLoRA.

    Every nn.Linear becomes a :class:`~lowrank_kernels.nn.CodedLinear`, whose dense weight is gone for good; the output
    head, a weight that several modules share, and what is no plain linear stay. Adapt the model afterwards.

    Args:
        model: of floating-point weights, on any device; not adapted yet.
        format: "nf4", "fp4", "int8", "fp8" or "mxfp4".
        skip: names of modules to leave as they are, as ``target_modules`` of :class:`~lowrank_kernels.LoRAConfig`.
        settings: of the format's ``from_dense``: ``block_size`` of nf4 and fp4, ``block`` of fp8.

    Returns:
        A report of every linear replaced, and every one left and why. It cannot be undone.

    Raises:
        ValueError: an unknown format, no linear to replace, a weight that holds NaN or infinity (by its module's name;
            the modules before it are replaced already).
        TypeError: ``model`` is none.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", arXiv 2305.14314, section 3.
    """
    op = "quantize_"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    kinds = encoders()
    if format not in kinds:
        raise ValueError(f"{op}: expected format to be one of {', '.join(kinds)}, got {format!r}")
    kind = kinds[format]
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    if isinstance(model, nn.Linear):
        raise ValueError(f"{op}: expected a model, got an nn.Linear by itself, which has no place to be replaced in")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(f"{op}: expected a model that is not adapted yet; adapt it afterwards")
    head = output_head(model)
    replaced: list[Replaced] = []
    skipped: list[Skipped] = []
    modules = dict(named_modules(model))
    for name, module in modules.items():
        if not isinstance(module, nn.Linear):
            continue
        above = {
            path: m for path, m in modules.items() if m is not module and (not path or name.startswith(path + "."))
        }
        reason = why_not_frozen(module) or why_not_called(module, name, above)
        if names_match(skip, name):
            reason = "in skip"
        elif module is head:
            reason = "the output head"
        elif owners[id(module.weight)] > 1:
            reason = "its weight is shared with another module"
        elif module.weight.is_meta:
            reason = "its weight is on the meta device; load it first"
        if reason is not None:
            skipped.append(Skipped(name, reason))
            continue
        try:
            weight = kind.from_dense(module.weight.detach(), **settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{op}: {name}: {error}") from error
        modules[name] = CodedLinear(weight, module.bias).train(module.training)
        _replace_everywhere(model, module, modules[name])
        n, k = weight.shape
        replaced.append(Replaced(name, "CodedLinear", (n, k), 0, format))
        del module, weight  # the dense weight is gone before the next one is read
    if not replaced:
        raise ValueError(f"{op}: expected a model with an nn.Linear to replace, got none")
    return Report(op, tuple(replaced), tuple(skipped), *count_parameters(model))


def _replace_everywhere(model: nn.Module, module: nn.Module, by: nn.Module) -> None:
    """Under every name that the module has."""
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is module:
                parent._modules[key] = by


def _dtype_beside(model: nn.Module, stored: Iterable[nn.Module]) -> torch.dtype | None:
    """What a model runs in, by the parameters around its linears of few bits and their adapters."""
    inside = {id(p) for module in stored for p in module.parameters()}
    around = (p for name, p in model.named_parameters() if "lora_" not in name and id(p) not in inside)
    return next((p.dtype for p in around if p.dtype in DTYPES), None)


def dequantize_(model: nn.Module, dtype: torch.dtype | None = None) -> Report:
    """Make a model's weights of few bits dense again, in place, one after the other: for a merge that keeps all of it.

    Every linear whose weight a format of :mod:`lowrank_kernels.weights` knows, those under the layers of an adapted
    model too, becomes an nn.Linear with the values that its codes stand for; the adapters stay as they are. A weight of
    4 bits takes 4 times its memory in bfloat16.

    Args:
        model: with such linears: of ``lk.quantize_``, bitsandbytes, GPTQModel, ...
        dtype: of the weights; by default that of the linear's bias, or of the parameters around, or of the format.

    Returns:
        A report of every linear replaced. It cannot be undone.

    Raises:
        ValueError: no such linear; one that cannot be read, or that an adapter is merged into (by its name).
        TypeError: ``model`` is none.
    """
    op = "dequantize_"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if of(model) is not None:
        raise ValueError(f"{op}: expected a model, got a linear by itself, which has no place to be replaced in")
    found: dict[str, nn.Module] = {}
    for name, module in named_modules(model):
        try:
            weight = of(module)
        except ValueError as error:
            raise ValueError(f"{op}: {name}: {error}; nothing has changed") from error
        if weight is None or not name:
            continue
        if any(hasattr(part, "full_tensor") for part in weight.parts()):
            raise ValueError(f"{op}: {name}: its weight is sharded; gather the model first; nothing has changed")
        owner = place(model, name)[0]
        if getattr(owner, "merged", False):
            raise ValueError(f"{op}: {name}: an adapter is merged into it; call unmerge_() first; nothing has changed")
        found[name] = module
    if not found:
        raise ValueError(f"{op}: expected a model with weights of few bits, got none")
    replaced: list[Replaced] = []
    around = _dtype_beside(model, found.values())
    for name, module in found.items():
        weight = of(module)
        assert weight is not None
        (n, k), bias = weight.shape, getattr(module, "bias", None)
        wanted = dtype or (around if bias is None else bias.dtype) or weight.dtype
        values = dense(like(torch.empty(0, dtype=wanted), weight)).to(wanted)
        linear = nn.Linear(k, n, bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(values, requires_grad=False)
        if bias is not None:
            linear.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach(), requires_grad=False)
        for hooks in ("_forward_pre_hooks", "_forward_hooks"):  # the same dicts, so that their handles remove them
            for kind in (hooks, f"{hooks}_with_kwargs"):
                setattr(linear, kind, getattr(module, kind))
        _replace_everywhere(model, module, linear.train(module.training))
        replaced.append(Replaced(name, "Linear", (n, k), 0, str(values.dtype).removeprefix("torch.")))
    return Report(op, tuple(replaced), (), *count_parameters(model))
