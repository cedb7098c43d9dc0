"""The two files of an adapter's folder: named, found, read and written with care.

A folder may come from anywhere: nothing in it is executed, and sizes are looked at before anything is read.
"""

from __future__ import annotations

import os
import secrets
import struct
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..finite import all_finite
from ..report import Skipped

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."

_MAX_HEADER_BYTES = 16 << 20  # some hundred thousand tensors
_FILE_DTYPES = ("F32", "BF16", "F16", "F64")


def inside(folder: Path, name: str) -> Path:
    """The real path of a regular file of the folder. Links may stay in it, or go to a Hub cache's blobs."""
    path = folder / name
    real = path.resolve()
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    if not real.exists():
        raise ValueError(f"load_adapter: expected {name} in {folder}, found none")
    if not real.is_file():
        raise ValueError(f"load_adapter: expected {path} to be a regular file")
    if not any(real.is_relative_to(root) for root in roots):
        raise ValueError(f"load_adapter: expected {path} to be in its folder, got a link to {real}")
    return real


def read_tensors(
    path: Path,
    expected: Mapping[str, tuple[int, ...]],
    base: Mapping[str, Tensor],
    skipped: Sequence[Skipped] = (),
    *,
    replaceable: Collection[str] = (),
    ignored: Container[str] = (),
) -> dict[str, Tensor]:
    """The file's tensors by parameter, once they are known to be just the expected ones, and finite.

    PEFT also writes the base weights of adapted or resized embeddings and heads. Those must be the model's own, or
    have names that are ``replaceable``: then those that differ are among the tensors. Names that are ``ignored`` may be
    there.
    """
    from safetensors import SafetensorError, safe_open

    with open(path, "rb") as file:
        start = file.read(8)
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    available = path.stat().st_size - 8
    if not 0 < header <= min(available, _MAX_HEADER_BYTES):
        raise ValueError(
            f"load_adapter: expected {path} to start with a safetensors header that is within the file and of at "
            f"most {_MAX_HEADER_BYTES} bytes, got {header} of {max(available, 0)}; it is truncated or not safetensors"
        )
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a dict
            names = {key: key.removeprefix(PREFIX) for key in found}
            copies = {key: base[name] for key, name in names.items() if name in base and name not in expected}
            changed = {key: own for key, own in copies.items() if not same_values(file.get_tensor(key), own)}
            for key, own in changed.items():
                _check_replaceable(path, key, tuple(found[key].get_shape()), own, replaceable)
            expected = {**expected, **{names[key]: tuple(own.shape) for key, own in changed.items()}}
            integers = {PREFIX + name for name in expected if name in base and not base[name].is_floating_point()}
            headers = {
                key: (tuple(t.get_shape()), t.get_dtype())
                for key, t in found.items()
                if key in changed or (key not in copies and names[key] not in ignored)
            }
            _check_tensors(path, headers, expected, skipped, integers)
            tensors = {name: file.get_tensor(PREFIX + name) for name in expected}
    except SafetensorError as error:
        raise ValueError(f"load_adapter: expected {path} to be a whole safetensors file: {error}") from None
    broken = [name for name, t in tensors.items() if not all_finite(t)]
    if broken:
        raise ValueError(f"load_adapter: expected finite values, found NaN or Inf in {few(broken)} of {path}")
    return tensors


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in the narrower of their dtypes: a copy may have been rounded on its way."""
    floats = a.is_floating_point() and b.is_floating_point()
    narrow = max(a.dtype, b.dtype, key=lambda dtype: torch.finfo(dtype).eps) if floats else b.dtype
    return torch.equal(a.to("cpu", narrow), b.detach().to("cpu", narrow))


def _check_replaceable(path: Path, key: str, shape: tuple[int, ...], own: Tensor, replaceable: Collection[str]) -> None:
    if key not in {PREFIX + name for name in replaceable}:
        raise ValueError(
            f"load_adapter: expected {key} to be the model's own value, got another in {path}; "
            f"changed base weights are not supported"
        )
    if shape != own.shape:
        raise ValueError(
            f"load_adapter: expected {key} of shape {tuple(own.shape)} as the model's, got {shape} in {path}; "
            f"call model.resize_token_embeddings({shape[0] if shape else 0}) first"
        )


def _check_tensors(
    path: Path,
    found: Mapping[str, tuple[tuple[int, ...], str]],
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
    for name, (shape, dtype) in found.items():
        if shape != wanted[name]:
            raise ValueError(f"load_adapter: expected {name} of shape {wanted[name]}, got {shape} in {path}")
        if dtype not in _FILE_DTYPES and name not in integers:
            raise TypeError(f"load_adapter: expected {name} of {', '.join(_FILE_DTYPES)}, got {dtype} in {path}")


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
