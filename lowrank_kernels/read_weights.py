"""Linears that are never called: the modules above them read their weight, in a formula or for a fused kernel.

Mamba multiplies by ``self.dt_proj.weight``, and hands ``self.out_proj.weight`` to a kernel; nn.MultiheadAttention reads
that of ``out_proj``. A layer in the place of such a linear would have no effect. Which linears these are stands in the
source of the modules above them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import nn

from .nn.matrix import is_linear

# Methods whose names begin so; diffusers' attention copies its linears into one in `fuse_projections`, when asked to.
_BEFORE_THE_FIRST_CALL = ("init", "reset", "tie", "fuse")
_NOT_ITS_VALUES = {"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}


class _Read(NamedTuple):
    path: str
    """Of the linear, from the module whose method reads it."""
    conditions: tuple[CodeType, ...]
    """``if`` tests around it that a module's settings alone decide; all of them have to hold."""


def why_not_called(module: nn.Module, path: str, above: dict[str, nn.Module]) -> str | None:
    """Which of the modules above ``module`` reads its weight instead of calling it; None where none is known to.

    Args:
        path: of the module.
        above: {path: module} of the modules that it is in, the outermost first.
    """
    if not (is_linear(module) or isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))):
        return None
    for prefix, reader in reversed(above.items()):
        below = path[len(prefix) + 1 :] if prefix else path
        kind: Any = type(reader)
        for read in _weights_read_by(kind):
            if read.path == below and all(_holds(condition, reader) for condition in read.conditions):
                name = f"nn.{kind.__name__}" if kind.__module__.startswith("torch.nn.") else kind.__name__
                relation = "a module above it" if "." in below else "its parent"
                return f"{relation}, {name}, reads its weight instead of calling it"
    return None


@cache
def _weights_read_by(kind: Any) -> tuple[_Read, ...]:
    """What the methods of a class read of ``self.<path>.weight``. Nothing of methods whose source is not at hand."""
    methods: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base not in (object, nn.Module):
            methods.update(vars(base))
    found: list[_Read] = []
    for name, method in methods.items():
        method = inspect.unwrap(getattr(method, "__func__", method))
        if (
            isinstance(method, FunctionType)
            and "weight" in _names(method.__code__)
            and not name.lstrip("_").startswith(_BEFORE_THE_FIRST_CALL)
        ):
            try:
                tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
            except (OSError, TypeError, SyntaxError):
                continue
            found += _reads(tree, ())
    return tuple(found)


def _names(code: CodeType) -> set[str]:
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*inner)


def _reads(node: ast.AST, conditions: tuple[CodeType, ...]) -> Iterator[_Read]:
    match node:
        case ast.If(test=test, body=body, orelse=orelse):
            yield from _reads(test, conditions)
            inside = (*conditions, *_settled(test))
            for statement in body:
                yield from _reads(statement, inside)
            for statement in orelse:
                yield from _reads(statement, conditions)
        case ast.Attribute(value=ast.Attribute(attr="weight"), attr=attr) if attr in _NOT_ITS_VALUES:
            pass
        case ast.Call(func=ast.Name(id="isinstance" | "getattr" | "hasattr")):
            pass
        case ast.Compare(ops=[ast.Is() | ast.IsNot()]):
            pass
        case ast.Attribute(value=value, attr="weight", ctx=ast.Load()):
            path: list[str] = []
            while isinstance(value, ast.Attribute):
                path.insert(0, value.attr)
                value = value.value
            if path and isinstance(value, ast.Name) and value.id == "self":
                yield _Read(".".join(path), conditions)
        case _:
            for child in ast.iter_child_nodes(node):
                yield from _reads(child, conditions)


def _settled(test: ast.expr) -> Iterator[CodeType]:
    """The test, compiled, where it asks for plain attributes of ``self`` alone, and not whether it trains: Bloom reads
    weights only where its settings say that it was trained in slices."""
    parts = list(ast.walk(test))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    attributes = {part.attr for part in parts if isinstance(part, ast.Attribute)}
    if names == {"self"} and "training" not in attributes and not any(isinstance(part, ast.Call) for part in parts):
        yield compile(ast.Expression(test), "<condition>", "eval")


def _holds(condition: CodeType, module: nn.Module) -> bool:
    try:
        return bool(eval(condition, {"__builtins__": {}}, {"self": module}))
    except Exception:
        return True
