"""The two files of an adapter's folder: named, found, read and written with care.

A folder may come from anywhere: nothing in it is executed, and sizes are looked at before anything is read.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import struct
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from ..finite import all_finite
from ..report import Skipped

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_MAX_CONFIG_BYTES = 2 << 20
_HEADER_BYTES = 1 << 20  # of a safetensors header, and so many more for each tensor that a model asks for:
_ENTRY_BYTES = 512
FILE_DTYPES = ("F32", "BF16", "F16", "F64")


def inside(folder: Path, name: str, op: str = "load_adapter") -> Path:
    """The real path of a regular file of the folder. Links may stay in it, or go to a Hub cache's blobs."""
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
        exists, regular = real.exists(), real.is_file()
    except (OSError, RuntimeError) as error:  # links that go round, names that are too long
        raise ValueError(f"{op}: expected {path} to be a file, got {error}") from None
    roots = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if not exists:
        raise ValueError(f"{op}: expected {name} in {folder}, found none")
    if not regular:
        raise ValueError(f"{op}: expected {path} to be a regular file")
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"{op}: expected {path} to be in its folder, got a link to {real}")
    return real


def is_folder(path: Path) -> bool:
    """True if a path is a folder that may be looked at."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_json(path: Path, op: str = "load_adapter", limit: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds: UTF-8, each key once, numbers that are finite.

    Raises:
        ValueError: anything else, or a file of more than ``limit`` bytes.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise ValueError(f"{op}: expected {path} of at most {limit} bytes, got {size}")
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{op}: expected {path} to be readable: {error.strerror}") from None
    return _parsed(content, path, op)


def _parsed(content: bytes, path: Path, op: str, what: str = "JSON") -> dict[str, Any]:
    try:
        found = json.loads(content.decode(), object_pairs_hook=_each_once, parse_constant=_refused_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{op}: expected {path} to hold {what}: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{op}: expected {path} to hold {what}, a JSON object, got {type(found).__name__}")
    return found


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _refused_number(word: str) -> float:
    raise ValueError(f"{word} is not a number")


class FileTensor(NamedTuple):
    """What a safetensors header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path, tensors: int, op: str = "load_adapter") -> dict[str, FileTensor]:
    """dtype, shape and place of each tensor of a safetensors file, by name, without reading the tensors.

    Args:
        tensors: how many the reader knows, which says how large the header may be.

    Raises:
        ValueError: a header that is larger, that is not safetensors', or whose tensors are not, one after another and
            to the last byte, what follows it.
    """
    limit = _HEADER_BYTES + _ENTRY_BYTES * tensors
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            available = path.stat().st_size - 8
            if not 0 < length <= min(available, limit):
                raise ValueError(
                    f"{op}: expected {path} to start with a safetensors header that is within the file and of at most "
                    f"{limit} bytes, got {length} of {max(available, 0)}; it is truncated or not safetensors"
                )
            content = file.read(length)
    except OSError as error:
        raise ValueError(f"{op}: expected {path} to be readable: {error.strerror}") from None
    header = _parsed(content, path, op, "a whole safetensors file")
    if not isinstance(header.pop("__metadata__", None), (dict, type(None))):  # MLX writes null
        raise ValueError(f"{op}: expected __metadata__ of {path} to be an object")
    found, places = {}, []
    for name, entry in header.items():
        dtype, shape, place = (entry.get(key) if isinstance(entry, dict) else None for key in _ENTRY)
        if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(place) and len(place) == 2):
            raise ValueError(
                f"{op}: expected dtype, shape and data_offsets of {name[:200]} in {path}, got {str(entry)[:200]}"
            )
        begin, end = place
        if dtype not in _ITEM_BYTES:
            raise ValueError(f"{op}: expected a dtype that is known of {name[:200]} in {path}, got {dtype[:80]!r}")
        if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
            raise ValueError(
                f"{op}: expected {path} to be a whole safetensors file: {name[:200]} is {dtype} of shape "
                f"{str(shape)[:200]} in {end - begin} bytes"
            )
        found[name] = FileTensor(dtype, tuple(shape))
        places.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(places):
        if begin != last or end < begin:
            raise ValueError(
                f"{op}: expected {path} to be a whole safetensors file, one tensor after another: {name[:200]} is at "
                f"{begin} to {end}, and {last} was next"
            )
        last = end
    if last != available - length:
        raise ValueError(
            f"{op}: expected {path} to be a whole safetensors file: its tensors have {last} bytes, and "
            f"{available - length} follow the header"
        )
    return found


_ENTRY = ("dtype", "shape", "data_offsets")
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def read_tensors(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    base: Mapping[str, Tensor],
    skipped: Sequence[Skipped] = (),
    *,
    replaceable: Collection[str] = (),
    ignored: Container[str] = (),
) -> dict[str, Tensor]:
    """The file's tensors by parameter, after a check that they are exactly the expected ones, and finite.

    PEFT also writes the base weights of adapted or resized embeddings and heads. Those must be the model's own, or
    have names that are ``replaceable``: then those that differ are among the tensors. Names that are ``ignored`` may be
    there.
    """
    from safetensors import SafetensorError, safe_open

    header = read_header(path, len(expected) + len(base))
    names = {key: key.removeprefix(PREFIX) for key in header}
    copies = {key: base[name] for key, name in names.items() if name in base and name not in expected}
    for key, own in copies.items():  # shapes first: a file may be larger than the memory
        if header[key].shape != tuple(own.shape):
            _check_replaceable(path, key, header[key].shape, own, replaceable)
    integers = {PREFIX + name for name in expected if name in base and not base[name].is_floating_point()}
    others = {key: t for key, t in header.items() if key not in copies and names[key] not in ignored}
    _check_tensors(path, others, expected, skipped, integers)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            changed = []
            for key, own in copies.items():
                found = file.get_tensor(key)
                if not same_values(found, own):
                    _check_dtype(path, key, header[key].dtype)
                    off = float((found.double() - own.detach().cpu().double()).abs().max())
                    _check_replaceable(path, key, header[key].shape, own, replaceable, f", up to {off:.3g} from it,")
                    changed.append(key)
            tensors = {name: file.get_tensor(PREFIX + name) for name in (*expected, *map(names.get, changed)) if name}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_adapter: expected {path} to be a whole safetensors file: {error}") from None
    broken = [name for name, t in tensors.items() if not all_finite(t)]
    if broken:
        raise ValueError(f"load_adapter: expected finite values, found NaN or Inf in {few(broken)} of {path}")
    return tensors


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in the narrower of their dtypes: a copy may have been rounded on its way."""
    if not (a.is_floating_point() and b.is_floating_point()):
        return a.dtype == b.dtype and torch.equal(a.cpu(), b.detach().cpu())
    narrow = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.equal(a.to("cpu", narrow), b.detach().to("cpu", narrow))


def _check_replaceable(
    path: Path, key: str, shape: tuple[int, ...], own: Tensor, replaceable: Collection[str], off: str = ""
) -> None:
    if key.removeprefix(PREFIX) not in replaceable:
        raise ValueError(
            f"load_adapter: expected {key} to be the model's own value, got another{off} in {path}; changed base "
            f"weights are not supported"
        )
    if shape != own.shape:
        raise ValueError(
            f"load_adapter: expected {key} of shape {tuple(own.shape)} as the model's, got {shape} in {path}; "
            f"call model.resize_token_embeddings({shape[0] if shape else 0}) first"
        )


def _check_dtype(path: Path, key: str, dtype: str) -> None:
    if dtype not in FILE_DTYPES:
        raise TypeError(f"load_adapter: expected {key} of {', '.join(FILE_DTYPES)}, got {dtype} in {path}")


def _check_tensors(
    path: Path,
    found: Mapping[str, FileTensor],
    expected: Mapping[str, tuple[int, ...]],
    skipped: Sequence[Skipped],
    integers: Container[str] = (),
) -> None:
    wanted = {PREFIX + name: shape for name, shape in expected.items()}
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    if missing or unexpected:
        why = [f"{s.name}: {s.reason}" for s in skipped if any(n.startswith(f"{PREFIX}{s.name}.") for n in unexpected)]
        raise ValueError(
            f"load_adapter: expected {path} to hold the {len(wanted)} tensors of its config on this model; "
            f"missing: {few(missing)}; unexpected: {few(unexpected)}"
            + (f"; modules that take no adapter: {few(why)}; change the model, or let PEFT run it" if why else "")
        )
    for name, (dtype, shape) in found.items():
        if shape != wanted[name]:
            raise ValueError(f"load_adapter: expected {name} of shape {wanted[name]}, got {shape} in {path}")
        if name not in integers:
            _check_dtype(path, name, dtype)


def write_aside(path: Path, write: Callable[[Path], Any]) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        write(aside)
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(name[:200] for name in names[:5]) or "none") + more
