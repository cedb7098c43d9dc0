"""What `lrk tune` settled for this device: the one place where ``auto`` looks a choice up.

The table is a JSON file, read when an op first needs it and never at import. It holds, by device type, the conditions
that it was made under and a choice for each class of shapes; under any other conditions it is ignored, with one line in
the log, and so is a file that is no table. Without a table every op follows its own rule.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import _extension

FLAG = "LRK_TUNE_FILE"
_CHOICE = re.compile(r"\w+( \w+=\d+)*")
logger = logging.getLogger("lowrank_kernels")

Sizes = Callable[..., Mapping[str, int]]

# Choices that stand above the table, by op, None for the rule's: what `lrk tune` runs its candidates with.
forced: dict[str, str | None] = {}
TABLE = "what the table says"  # in place of such a choice, where there is none
_memories: list[Callable[[], None]] = []
F = TypeVar("F", bound=Callable[..., Any])


def table_path() -> Path | None:
    """Where the table is: what LRK_TUNE_FILE names (nowhere, if that is empty), or the user's cache folder."""
    given = os.environ.get(FLAG)
    if given is not None:
        return Path(given) if given else None
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # nobody's home
        return None
    return cache / "lowrank_kernels" / "tune.json"


def shape_class(op: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """The class that a shape belongs to: "lora_linear bfloat16 M=16 K=2048 N=2048", each size rounded up to a power
    of two."""
    words = [f"{name}={1 << (size - 1).bit_length() if size > 1 else size}" for name, size in sizes.items()]
    return " ".join([op, str(dtype).removeprefix("torch."), *words])


def choice(op: str, like: Tensor, sizes: Sizes, *of: Hashable) -> str | None:
    """What was settled for this op on operands like this tensor; None: the op's own rule.

    ``sizes(*of)`` names the class. It is asked once for the same ``of``, shapes as a rule, and only where there is a
    table.
    """
    if op in forced:
        return forced[op]
    return settled(op, "cuda" if like.is_cuda else "cpu", like.dtype, sizes, *of)


def settled(op: str, device_type: str, dtype: torch.dtype, sizes: Sizes, *of: Hashable) -> str | None:
    """The same of the table alone, for operands on such a device."""
    return _find(op, device_type, dtype, sizes, *of) if _table(device_type)[0] else None


def remembered(function: F) -> F:
    """``function`` with a memory for its results, until the table is read again."""
    cached = lru_cache(maxsize=4096)(function)
    _memories.append(cached.cache_clear)
    return cast(F, cached)


def product_sizes(rows: Sequence[int], weight: Sequence[int], rank: int | None = None) -> dict[str, int]:
    """Of x (..., K), or dY (..., N), with the frozen weight (N, K), from their shapes; and of the rank, where given."""
    sizes = {"M": prod(rows[:-1]), "K": weight[1], "N": weight[0]}
    return sizes if rank is None else {**sizes, "R": rank}


def factor_sizes(weight: Sequence[int], lora_a: Sequence[int]) -> dict[str, int]:
    """Of the weight (N, K) and its factors alone, from the shapes of W and A."""
    return {"K": weight[1], "N": weight[0], "R": lora_a[0]}


def block_sizes(tokens: int, blocks: int, block_size: tuple[int, int]) -> dict[str, int]:
    """Of the gradients of so many blocks of a weight."""
    return {"M": tokens, "blocks": blocks, "size": max(block_size)}


def parse(chosen: str | None) -> tuple[str | None, dict[str, int]]:
    """("two_kernel", {"BLOCK_M": 64}) of "two_kernel BLOCK_M=64"."""
    if chosen is None:
        return None, {}
    name, *tiles = chosen.split()
    return name, {key: int(value) for key, _, value in (tile.partition("=") for tile in tiles)}


@contextmanager
def forcing(op: str) -> Iterator[Callable[[str | None], None]]:
    """Inside, ``op`` runs what was last given to the function that this yields, whatever the table says; at first, and
    for None, its own rule."""
    forced[op] = None
    try:
        yield partial(forced.__setitem__, op)
    finally:
        del forced[op]


# --------------------------------------------------------------------------------------------------------- conditions


@cache
def cpu_model() -> str:
    """The processor's name as Linux has it, else as Python has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def conditions(device_type: str) -> dict[str, str]:
    """What a table must have been made under to be used: the device and the versions."""
    if device_type == "cuda":
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    else:
        device = f"{cpu_model()}, {torch.get_num_threads()} threads, {_extension.cpu_isa() or 'no C++ ops'}"
    versions = {"lowrank_kernels": sys.modules[__package__].__version__, "torch": torch.__version__}
    try:
        versions["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        versions["triton"] = "none"
    return {"device": device, **versions}


# -------------------------------------------------------------------------------------------------------------- table


def read_table(path: Path) -> dict[str, Any]:
    """The file's content by device type; nothing where there is no file.

    Raises:
        ValueError: the file is no table.
    """
    try:
        found = json.loads(path.read_text())
        for part in found.values():
            chosen = [entry["choice"] for entry in part["entries"].values()]
            if not isinstance(part["conditions"], dict) or not all(c is None or _CHOICE.fullmatch(c) for c in chosen):
                raise TypeError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of lrk tune; delete it, or name another with {FLAG}") from error
    return dict(found)


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write the whole, or leave the file as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(path)


@cache
def _table(device_type: str) -> tuple[dict[str, str | None], str]:
    """(class -> choice, what is to be said of the table)."""
    path = table_path()
    if path is None:
        return {}, f"none: {FLAG} is empty, or there is no home folder"
    try:
        part = read_table(path).get(device_type)
    except ValueError as error:
        logger.warning("%s: ignored", error)
        return {}, f"ignored: {error}"
    if part is None:
        return {}, f"none at {path}"
    now = conditions(device_type)
    other = [
        f"{key} {part['conditions'].get(key)}, here {now[key]}"
        for key in now
        if part["conditions"].get(key) != now[key]
    ]
    if other:
        why = f"{path} was made under other conditions ({'; '.join(other)})"
        logger.warning("%s: ignored; lrk tune makes one for these", why)
        return {}, f"ignored: {why}"
    entries = {key: entry["choice"] for key, entry in part["entries"].items()}
    settled = sum(chosen is not None for chosen in entries.values())
    return entries, f"{path}: {len(entries)} classes of shapes, {settled} of them unlike the rule"


def describe(device_type: str) -> str:
    """One line for people: which table is used on such devices, or why none."""
    return _table(device_type)[1]


@remembered
def _find(op: str, device_type: str, dtype: torch.dtype, sizes: Sizes, *of: Hashable) -> str | None:
    return _table(device_type)[0].get(shape_class(op, dtype, sizes(*of)))


def forget() -> None:
    """Read the table again at the next lookup."""
    _table.cache_clear()
    for clear in _memories:
        clear()
