"""The demo's task: the first line of a docstring from a function's module, name and signature.

The text is that of the installed numpy, scipy, scikit-learn and torch; nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass

MODULES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.ma", "numpy.polynomial.polynomial"),
    "scipy": (
        "scipy.linalg",
        "scipy.stats",
        "scipy.signal",
        "scipy.optimize",
        "scipy.special",
        "scipy.sparse",
        "scipy.sparse.linalg",
        "scipy.ndimage",
        "scipy.interpolate",
        "scipy.integrate",
        "scipy.spatial.distance",
        "scipy.fft",
        "scipy.cluster.hierarchy",
    ),
    "sklearn": (
        "sklearn.metrics",
        "sklearn.preprocessing",
        "sklearn.datasets",
        "sklearn.model_selection",
        "sklearn.utils",
        "sklearn.metrics.pairwise",
        "sklearn.linear_model",
        "sklearn.cluster",
        "sklearn.decomposition",
        "sklearn.ensemble",
        "sklearn.feature_selection",
        "sklearn.covariance",
    ),
    "torch": ("torch", "torch.nn", "torch.nn.functional", "torch.linalg", "torch.special", "torch.fft", "torch.Tensor"),
}

_SIGNATURE_LINE = re.compile(r"^[\w.]+\((?P<arguments>.*)\)\s*(->.*)?$")
_MAX_SIGNATURE = 120
_MAX_LINE = 110


@dataclass(frozen=True)
class Example:
    """One function: what the model reads (``prompt``) and what it is to write (``target``)."""

    library: str
    name: str
    prompt: str
    target: str


def _resolve(path: str) -> object:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, attribute = path.rpartition(".")
        return getattr(importlib.import_module(parent), attribute)


def _signature(value: object) -> str | None:
    try:
        parameters = inspect.signature(value).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    return ", ".join(str(p.replace(annotation=inspect.Parameter.empty)) for p in parameters if p.name != "self")


def _describe(value: object) -> tuple[str, str] | None:
    """(arguments, first line), or None for what has no usable docstring."""
    lines = [line.strip() for line in (inspect.getdoc(value) or "").splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return None
    arguments = _signature(value)
    stated = _SIGNATURE_LINE.match(lines[0])
    if stated:
        # Compiled functions state their signature in the first line of the docstring.
        arguments = arguments if arguments is not None else stated["arguments"]
        lines = lines[1:]
    if arguments is None or not lines:
        return None
    line = lines[0]
    says_something = len(line.split()) >= 3 and line[0].isalpha() and not line.startswith(("See ", "Alias "))
    fits = len(line) <= _MAX_LINE and len(arguments) <= _MAX_SIGNATURE
    return (arguments, line) if says_something and fits and " at 0x" not in arguments else None


def _functions(library: str) -> Iterator[Example]:
    for path in MODULES[library]:
        module = _resolve(path)
        for name in sorted(vars(module)):
            value = getattr(module, name)
            if name.startswith("_") or not callable(value):
                continue
            described = _describe(value)
            if described is not None:
                arguments, line = described
                prompt = f'# {path}\ndef {name}({arguments}):\n    """'
                yield Example(library, name, prompt, line + '"""')


def collect(libraries: tuple[str, ...] = tuple(MODULES)) -> list[Example]:
    """Every usable function of the libraries, each description once, in a fixed order."""
    seen: set[str] = set()
    examples = []
    for library in libraries:
        for example in _functions(library):
            if example.target not in seen:
                seen.add(example.target)
                examples.append(example)
    return examples


def split(examples: list[Example], held_out: float = 0.15) -> tuple[list[Example], list[Example]]:
    """(training, held-out), by function name: ``add`` of numpy and ``add`` of torch fall on the same side."""

    def is_held_out(example: Example) -> bool:
        digest = hashlib.sha256(example.name.rstrip("_").lower().encode()).digest()
        return int.from_bytes(digest[:4], "big") < held_out * 2**32

    training = [e for e in examples if not is_held_out(e)]
    return training, [e for e in examples if is_held_out(e)]
