"""``fuse``: the attention and MLP blocks of a model that has been adapted, each computed as one autograd node."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import LoRAPart, mlp_lora, qkv_lora
from .names import named_modules
from .nn.frozen import has_hooks, must_be_called
from .nn.matrix import frozen_weight, matrix_shape
from .reference.blocks import ACTIVATIONS
from .report import Replaced, Report, Skipped, count_parameters

_ATTENTION = ("q_proj", "k_proj", "v_proj")
_MLPS = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))
_OF_OTHERS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")
"""Arguments of cross-attention: what K and V are made of in the place of hidden_states."""
_LEFT_ALONE = (
    "a block runs its linears by themselves while one of them is merged, carries hooks, has a gate, VeLoRA or a "
    "dropout of its own, or, with DoRA, is in evaluation, drops its base product's input or differentiates its norm"
)


def part_of(linear: nn.Module, x: Tensor) -> tuple[LoRAPart, float] | None:
    """(the linear as a part of a block, its dropout) as things stand now; None where it has to be called."""
    if has_hooks(linear):
        return None
    as_part: Any = getattr(linear, "as_part", None)
    if as_part is not None:
        found: tuple[LoRAPart, float] | None = as_part(x)
        return found
    if must_be_called(linear) or not isinstance(linear, nn.Linear):
        return None
    weight = frozen_weight(linear)
    return None if weight.requires_grad else (LoRAPart(weight, bias=linear.bias), 0.0)


def _parts(linears: Sequence[nn.Module], x: Tensor) -> tuple[list[LoRAPart], float] | None:
    """(the parts, the dropout of all that have one); None where one has to be called, or dropouts differ."""
    parts, dropouts = [], set()
    for linear in linears:
        found = part_of(linear, x)
        if found is None:
            return None
        parts.append(found[0])
        if found[0].lora_a is not None:
            dropouts.add(found[1])
    return (parts, dropouts.pop()) if len(dropouts) == 1 else None


class _Fused:
    """A module of a model whose class was changed by :func:`fuse`, and nothing else of it."""

    plain: Any
    """The module's own class."""

    def _get_name(self) -> str:
        return str(self.plain.__name__)

    def __reduce__(self) -> Any:
        return _new, (self.block, self.plain), self.__dict__

    block: str
    """Which of the two it is: a key of ``_BLOCKS``."""


def _new(block: str, plain: type[nn.Module]) -> Any:
    kind = _fused_class(block, plain)
    return kind.__new__(kind)


class _FusedMLP(_Fused):
    """down(f(gate(x)) ∘ up(x)) by ``mlp_lora``."""

    block = "mlp"
    fused_activation: str
    fused_linears: tuple[str, ...]

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        linears = [getattr(self, name) for name in self.fused_linears]
        found = None if args or kwargs else _parts(linears, x)
        if found is None:
            return self.plain.forward(self, x, *args, **kwargs)
        (*gate, up, down), dropout_p = found
        options = {"activation": self.fused_activation, "dropout_p": dropout_p}
        return mlp_lora(x, gate[0] if gate else None, up, down, **options)


class _FusedAttention(_Fused):
    """q_proj, k_proj and v_proj by ``qkv_lora``: the attention's own forward calls them, and gets what was computed."""

    block = "attention"
    arguments: tuple[str, ...]
    """Names of the arguments of the module's own forward, in order."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        x: Any = given.get("hidden_states")
        linears = [getattr(self, name) for name in _ATTENTION]
        crosses = any(v is not None for name, v in given.items() if name in _OF_OTHERS)
        found = _parts(linears, x) if isinstance(x, Tensor) and not crosses else None
        if found is None:
            return self.plain.forward(self, *args, **kwargs)
        for linear, y in zip(linears, qkv_lora(x, found[0], dropout_p=found[1]), strict=True):
            linear.__dict__["forward"] = _given(linear, x, y)
        try:
            return self.plain.forward(self, *args, **kwargs)
        finally:
            for linear in linears:
                linear.__dict__.pop("forward", None)


def _given(linear: Any, x: Tensor, y: Tensor) -> Any:
    """A forward that returns y for x itself, and for any other input what the linear computes."""

    def forward(other: Tensor, *args: Any, **kwargs: Any) -> Any:
        return y if other is x and not args and not kwargs else type(linear).forward(linear, other, *args, **kwargs)

    return forward


_BLOCKS: dict[str, Any] = {"attention": _FusedAttention, "mlp": _FusedMLP}
_CLASSES: dict[tuple[str, Any], Any] = {}


def _arguments(plain: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(plain.forward).parameters)[1:]


def _fused_class(block: str, plain: Any) -> Any:
    kind = _CLASSES.get((block, plain))
    if kind is None:
        members = {"plain": plain, "arguments": _arguments(plain), "__doc__": plain.__doc__}
        kind = type(f"Fused{plain.__name__}", (_BLOCKS[block], plain), members)
        _CLASSES[block, plain] = kind
    return kind


def fuse(model: nn.Module) -> Report:
    """Compute the attention projections and the MLPs of an adapted model as one autograd node each, in place.

    Takes, by their structure, every module with ``q_proj``, ``k_proj`` and ``v_proj``, and every one that computes
    down_proj(f(gate_proj(x)) ∘ up_proj(x)) or has a ``gate_up_proj`` for both (Llama, Qwen2 and 3, Mistral, Gemma,
    Phi3, SmolLM, and models like them), of which at least one linear is adapted: by ``adapt`` with LoRA or DoRA, or
    PEFT's layers after ``accelerate``. What an MLP computes is tried on numbers first, in both modes, and its f
    recognised by its values; cross-attention runs its linears by themselves. The block is then
    :func:`lowrank_kernels.qkv_lora` or :func:`lowrank_kernels.mlp_lora`.

    A module's class changes and nothing else: parameters, names, checkpoints, merging and hooks on it stay. The order
    in which gradients of x are added up may change by rounding; with dropout, linears of one x share a mask.

    Returns:
        A report of the blocks, and of what looks like one and was left; ``undo()`` gives the modules their classes
        back.

    Raises:
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: expected an nn.Module, got {type(model).__name__}")
    replaced, skipped, taken = [], [], []
    for name, module in named_modules(model):
        for block, linears in _candidates(module):
            activation = _activation(module) if block == "mlp" else None
            reason = _why_not(module, block, linears, activation)
            if reason is not None:
                skipped.append(Skipped(name, reason))
                continue
            taken.append((module, block, linears, activation))
            replaced.append(_replaced(name, module, block, linears, activation))
    undo = [lambda: unfuse(*(module for module, *_ in taken))]
    for module, block, linears, activation in taken:
        if block == "mlp":
            module.__dict__["fused_linears"] = linears
            module.__dict__["fused_activation"] = activation
        module.__class__ = _fused_class(block, type(module))
    return Report("Blocks", tuple(replaced), tuple(skipped), *count_parameters(model), (_LEFT_ALONE,), _undo=undo)


def unfuse(*modules: nn.Module) -> None:
    """Give the fused blocks in these modules their own classes back."""
    for module in (inner for outer in modules for inner in outer.modules()):
        if isinstance(module, _Fused):
            module.__class__ = module.plain
            for name in ("fused_linears", "fused_activation"):
                module.__dict__.pop(name, None)


def _candidates(module: nn.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(block, names of its linears) of what a module may be."""
    if all(isinstance(module._modules.get(name), nn.Module) for name in _ATTENTION):
        yield "attention", _ATTENTION
    for names in _MLPS:
        if all(isinstance(module._modules.get(name), nn.Module) for name in names):
            yield "mlp", names
            break


def _replaced(name: str, module: nn.Module, block: str, linears: Sequence[str], activation: str | None) -> Replaced:
    of = [getattr(module, linear) for linear in linears]
    shape = sum(_shape(linear)[0] for linear in of) if block == "attention" else _shape(of[-1])[0], _shape(of[0])[1]
    what = "of one x" if activation is None else f"f = {activation}"
    return Replaced(name, block, shape, 0, size=f"{', '.join(linears)}: one node, {what}")


def _shape(linear: Any) -> tuple[int, int]:
    return matrix_shape(getattr(linear, "base_layer", linear))


def _is_adapted(linear: nn.Module) -> bool:
    return hasattr(linear, "as_part")


def _why_not(module: nn.Module, block: str, linears: Sequence[str], activation: str | None) -> str | None:
    if isinstance(module, _Fused):
        return "already fused"
    of = [getattr(module, name) for name in linears]
    if not any(map(_is_adapted, of)):
        return "none of its linears is adapted by a layer that can be a part of a block"
    other = [
        name
        for name, linear in zip(linears, of, strict=True)
        if not (_is_adapted(linear) or isinstance(linear, nn.Linear))
    ]
    if other:
        return f"its {', '.join(other)} is a {type(getattr(module, other[0])).__name__}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance"
    if any(t.is_meta for t in module.parameters()):
        return "it is on the meta device: fuse the model when its weights are there"
    return _why_no_attention(module, of) if block == "attention" else _why_no_mlp(module, of, activation)


def _why_no_attention(module: nn.Module, linears: Sequence[nn.Module]) -> str | None:
    if len({_shape(linear)[1] for linear in linears}) > 1:
        return f"its {', '.join(_ATTENTION)} take inputs of different widths"
    if "hidden_states" not in _arguments(type(module)):
        return "its forward takes no hidden_states"
    return None


def _activation(module: Any) -> str | None:
    """The name of the module's f, told by its values on a row of numbers."""
    f = getattr(module, "act_fn", getattr(module, "activation_fn", None))
    if not callable(f):
        return None
    z = torch.linspace(-6.0, 6.0, 97)
    try:
        with torch.no_grad():
            values = f(z)
    except Exception:  # an activation that takes something else
        return None
    close = (name for name, of in ACTIVATIONS.items() if torch.allclose(of.value(z), values, rtol=1e-5, atol=1e-6))
    return next(close, None)


def _why_no_mlp(module: Any, linears: Sequence[Any], activation: str | None) -> str | None:
    """None where the module, on two rows of numbers, gives what the formula of its own linears does."""
    if activation is None:
        return f"its activation is none of {', '.join(ACTIVATIONS)}"
    weight: Any = frozen_weight(getattr(linears[0], "base_layer", linears[0]))
    rows = torch.linspace(-1.0, 1.0, 2 * _shape(linears[0])[1]).view(2, -1)
    rows = rows.to(weight.device, weight.dtype)
    modes = [(child, child.training) for child in module.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng([weight.device] if weight.is_cuda else []):
            for training in (False, True):  # a dropout, or a clamp of what is large, is to show
                module.train(training)
                for linear in linears:
                    linear.eval()
                reached = max(float(linear(rows).abs().max()) for linear in linears[:-1])
                for x in (rows, rows * (_LARGE / reached if reached else 1.0)):
                    if not _computes(module, linears, activation, x):
                        return "its forward is not down(f(gate(x)) ∘ up(x))" + " in training" * training
    except Exception as error:  # whatever its forward wants
        return f"its forward takes no rows of x: {type(error).__name__}"
    finally:
        for child, mode in modes:
            child.training = mode
    return None


_LARGE = 100.0
"""Beyond the clamps of models' MLPs, which are at 7 to 16; its square is within float16's range."""


def _computes(module: Any, linears: Sequence[Any], activation: str, x: Tensor) -> bool:
    """True where module(x) is down(f(gate(x)) ∘ up(x))."""
    ys = [linear(x) for linear in linears[:-1]]
    gate, up = ys[0].chunk(2, -1) if len(ys) == 1 else ys
    expected, found = linears[-1](ACTIVATIONS[activation].value(gate) * up), module(x)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    tolerance = 32 * torch.finfo(x.dtype).eps * float(expected.abs().max())
    return bool((found - expected).abs().max() <= tolerance)
