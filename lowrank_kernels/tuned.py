"""What `lrk tune` settled for this device: fields of plans, by class of shapes.

The table is a JSON file, read when an op first needs it and never at import. It holds, by device type, the conditions
that it was made under and, for each class of shapes, the fields of the op's plan (``ops.planning.Plan``) that were
found faster than the rule's. Under any other conditions it is ignored, with one line in the log, and so is a file that
is no table. Without a table every op follows its own rule.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

import torch

from . import _extension

FLAG = "LRK_TUNE_FILE"
VERSION = 2
"""Of the table's form. Version 1 held words such as "own_product", which say less than a plan."""
logger = logging.getLogger("lowrank_kernels")

Fields = Mapping[str, str | int | bool]
"""Fields of a plan: {"base": "own"}, or {"strategy": "two_kernel", "BLOCK_M": 64}. None of them: the rule's plan."""

# Fields that stand above the table, by op: what `lrk tune` runs its candidates with.
_forced: dict[str, Fields] = {}
_listeners: list[Callable[[bool], None]] = []


def table_path() -> Path | None:
    """Where the table is: what LRK_TUNE_FILE names (nowhere, if that is empty), or the user's cache folder."""
    given = os.environ.get(FLAG)
    if given is not None:
        return Path(given) if given else None
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # no home directory
        return None
    return cache / "lowrank_kernels" / "tune.json"


def shape_class(op: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> str:
    """The class that a shape belongs to: "lora_linear bfloat16 M=16 K=2048 N=2048", each size rounded up to a power
    of two."""
    words = [f"{name}={1 << (size - 1).bit_length() if size > 1 else size}" for name, size in sizes.items()]
    return " ".join([op, str(dtype).removeprefix("torch."), *words])


def settled(op: str, device_type: str, dtype: torch.dtype, sizes: Mapping[str, int]) -> tuple[Fields, str]:
    """(the fields settled for this op on such operands, where they come from); no fields: the op's own rule."""
    if op in _forced:
        return _forced[op], "forced"
    entries = _table(device_type)[0]
    return (entries.get(shape_class(op, dtype, sizes), {}) if entries else {}), "table of lrk tune"


def forced() -> str:
    """What is forced now, as a key."""
    return repr(_forced)


def on_change(listener: Callable[[bool], None]) -> None:
    """Call ``listener(anew)`` whenever what is settled may have changed; ``anew``: not only what is forced."""
    _listeners.append(listener)


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


@contextmanager
def forcing(op: str) -> Iterator[Callable[[Fields | None], None]]:
    """Inside, ``op`` is planned with the fields last given to the function that this yields, whatever the table says;
    at first, and for None, by its own rule."""

    def force(fields: Fields | None) -> None:
        _forced[op] = fields or {}
        _changed(anew=False)

    force(None)
    try:
        yield force
    finally:
        del _forced[op]
        _changed(anew=False)


def _changed(anew: bool) -> None:
    for listener in _listeners:
        listener(anew)


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
    """The file's parts by device type; nothing where there is no file, or an older version of it (said in the log).

    Raises:
        ValueError: the file is no table.
    """
    try:
        found = json.loads(path.read_text())
        version = found.pop("version", 1)
        for part in found.values():
            if not isinstance(part["conditions"], dict) or not isinstance(part["entries"], dict):
                raise TypeError
            for entry in part["entries"].values() if version == VERSION else ():
                if not all(isinstance(value, (str, int)) for value in entry["plan"].values()):
                    raise TypeError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of lrk tune; delete it, or name another with {FLAG}") from error
    if version != VERSION:
        logger.warning("%s is of version %s, here %s: ignored; lrk tune makes it anew", path, version, VERSION)
        return {}
    return dict(found)


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write the parts by device type, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(json.dumps({"version": VERSION, **table}, indent=1) + "\n")
    part.replace(path)


@cache
def _table(device_type: str) -> tuple[dict[str, Fields], str]:
    """(class -> fields of the plan, one line about the table for people)."""
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
    entries = {key: entry["plan"] for key, entry in part["entries"].items()}
    unlike = sum(bool(fields) for fields in entries.values())
    return entries, f"{path}: {len(entries)} classes of shapes, {unlike} of them unlike the rule"


def describe(device_type: str) -> str:
    """One line for people: which table is used on such devices, or why none."""
    return _table(device_type)[1]


def forget() -> None:
    """Read the table again at the next plan, and make all plans anew."""
    _table.cache_clear()
    _changed(anew=True)
