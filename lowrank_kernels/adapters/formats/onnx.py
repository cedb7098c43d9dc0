"""ONNX Runtime's .onnx_adapter: a FlatBuffer (identifier TORT) of named tensors, inputs of the graph.

A graph multiplies x by A (K, R) and B (R, N), and has no input for s, which stands in B. What its inputs are called is
the graph's: ``names`` says it, with {path} and {factor} (A or B).

The buffer, by FlatBuffers' rules: an offset to the root table and the identifier; tables, each of which begins with the
distance back to its table of field offsets; vectors and strings with their lengths before them.

    table Parameter { name: string; dims: [int64]; data_type: int32; raw_data: [uint8]; }
    table Adapter { format_version: int32; adapter_version: int32; model_version: int32; parameters: [Parameter]; }
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, Factors
from ..folder import write_aside
from .format import FACTORS_OF_LINEARS, MAX_TENSORS, Format, Options, is_file, paired

_IDENTIFIER = b"TORT"
_FORMAT_VERSION = 1
_TYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}  # of TensorProto.DataType
_CODES = {dtype: code for code, dtype in _TYPES.items()}


def write(adapter: Adapter, path: Path, options: Options) -> None:
    tensors = {}
    for name, f in adapter.modules.items():
        whole = f.folded()
        tensors[options.names.format(path=name, factor="A")] = whole.lora_a.T
        tensors[options.names.format(path=name, factor="B")] = whole.lora_b.T
    if len(tensors) != 2 * len(adapter.modules):
        raise ValueError(f"convert: expected names with {{path}} and {{factor}}, got {options.names[:200]!r}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda place: place.write_bytes(flatbuffer(tensors)))


def read(path: Path, options: Options) -> Adapter:
    try:
        tensors = read_flatbuffer(path.read_bytes())
    except (struct.error, ValueError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"convert: expected {path} to be a whole ONNX adapter: {str(error)[:200]}") from None
    pattern = re.compile(
        "(?P<path>.+)".join(re.escape(options.names.replace("{factor}", "\0")).split(re.escape("{path}"))).replace(
            re.escape("\0"), "(?P<factor>[AB])"
        )
    )
    named = {}
    for name, t in tensors.items():
        match = pattern.fullmatch(name)
        if match is None:
            raise ValueError(
                f"convert: expected names like {options.names!r} in {path}, got {name[:200]!r}; "
                f"names= says what they are"
            )
        named[f"{match['path']}\0{match['factor']}"] = t
    modules = {
        name: Factors(own["a"].T.contiguous(), own["b"].T.contiguous(), 1.0)
        for name, own in paired(path, named, {"\0A": "a", "\0B": "b"}).items()
    }
    return Adapter(modules, origin=str(path))


def flatbuffer(tensors: dict[str, Tensor]) -> bytes:
    """The file of these tensors, of float32, float16 or bfloat16; raw data at multiples of 8 bytes."""
    out = bytearray(struct.pack("<I4s", 0, _IDENTIFIER))
    root = _table(out, [("i", _FORMAT_VERSION), ("i", 1), ("i", 1), ("o", 0)])
    struct.pack_into("<I", out, 0, root.start)
    vector = _vector(out, 4, len(tensors), bytes(4 * len(tensors)))
    root.point(3, vector)
    for i, (name, tensor) in enumerate(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        entry = _table(out, [("o", 0), ("o", 0), ("i", _CODES[plain.dtype]), ("o", 0)])
        struct.pack_into("<I", out, vector + 4 + 4 * i, entry.start - (vector + 4 + 4 * i))
        text = name.encode()
        entry.point(0, _vector(out, 1, len(text), text + b"\0"))
        entry.point(1, _vector(out, 8, plain.dim(), struct.pack(f"<{plain.dim()}q", *plain.shape)))
        data = plain.view(-1).view(torch.uint8).numpy().tobytes()
        entry.point(3, _vector(out, 8, len(data), data))
    return bytes(out)


class _Table:
    """A table of fields of 4 bytes each, numbers or offsets, in a buffer that grows."""

    def __init__(self, out: bytearray, start: int) -> None:
        self.out, self.start = out, start

    def point(self, field: int, place: int) -> None:
        at = self.start + 4 + 4 * field
        struct.pack_into("<I", self.out, at, place - at)


def _table(out: bytearray, fields: list[tuple[str, int]]) -> _Table:
    out += bytes(-len(out) % 4)
    size = 4 + 4 * len(fields)
    offsets = struct.pack(f"<{2 + len(fields)}H", 4 + 2 * len(fields), size, *(4 + 4 * i for i in range(len(fields))))
    places = len(out)
    out += offsets + bytes(-len(offsets) % 4)
    start = len(out)
    out += struct.pack("<i", start - places)
    for kind, value in fields:
        out += struct.pack("<i", value if kind == "i" else 0)
    return _Table(out, start)


def _vector(out: bytearray, item: int, length: int, content: bytes) -> int:
    """Append a vector whose first item is aligned; its place is that of its length."""
    align = max(4, item)
    out += bytes(-(len(out) + 4) % align)
    place = len(out)
    out += struct.pack("<I", length) + content
    return place


def read_flatbuffer(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file. Raises ValueError or struct.error where an offset leaves it."""
    if data[4:8] != _IDENTIFIER:
        raise ValueError(f"the identifier {_IDENTIFIER.decode()} is not there")
    (root,) = struct.unpack_from("<I", data, 0)
    version = _field(data, root, 0, "<i", 0)
    if version != _FORMAT_VERSION:
        raise ValueError(f"format version {version}, and {_FORMAT_VERSION} is read")
    vector = _pointed(data, root, 3)
    if vector is None:
        return {}
    (length,) = struct.unpack_from("<I", data, vector)
    if length > min(MAX_TENSORS, len(data) // 4):
        raise ValueError(f"{length} tensors")
    found: dict[str, Tensor] = {}
    for at in range(vector + 4, vector + 4 + 4 * length, 4):
        entry = at + struct.unpack_from("<I", data, at)[0]
        name = _bytes(data, _pointed(data, entry, 0), 1).decode()
        shape = (
            struct.unpack(f"<{len(dims) // 8}q", dims) if (dims := _bytes(data, _pointed(data, entry, 1), 8)) else ()
        )
        code = _field(data, entry, 2, "<i", 0)
        raw = _bytes(data, _pointed(data, entry, 3), 1)
        if code not in _TYPES:
            raise ValueError(f"{name[:200]} is of type {code}, and floats of 16 and 32 bits are read")
        if any(n < 0 for n in shape) or math.prod(shape) * _TYPES[code].itemsize != len(raw) or name in found:
            raise ValueError(f"{name[:200]} of shape {str(shape)[:80]} in {len(raw)} bytes, or twice")
        found[name] = torch.frombuffer(bytearray(raw), dtype=_TYPES[code]).reshape(shape) if raw else torch.empty(shape)
    return found


def _place(data: bytes, table: int, field: int) -> int | None:
    """Where a table's field is; None where it has its default."""
    places = table - struct.unpack_from("<i", data, table)[0]
    if places < 0:
        raise ValueError("an offset leaves the file")
    (size,) = struct.unpack_from("<H", data, places)
    if size < 4 + 2 * (field + 1):
        return None
    (offset,) = struct.unpack_from("<H", data, places + 4 + 2 * field)
    return table + offset if offset else None


def _field(data: bytes, table: int, field: int, kind: str, default: Any) -> Any:
    place = _place(data, table, field)
    return default if place is None else struct.unpack_from(kind, data, place)[0]


def _pointed(data: bytes, table: int, field: int) -> int | None:
    place = _place(data, table, field)
    return None if place is None else place + struct.unpack_from("<I", data, place)[0]


def _bytes(data: bytes, vector: int | None, item: int) -> bytes:
    if vector is None:
        return b""
    (length,) = struct.unpack_from("<I", data, vector)
    end = vector + 4 + length * item
    if end > len(data):
        raise ValueError("a vector leaves the file")
    return data[vector + 4 : end]


def is_one(path: Path) -> bool:
    """True for a file with the suffix and the identifier."""
    if not is_file(path, ".onnx_adapter"):
        return False
    with open(path, "rb") as file:
        return file.read(8)[4:] == _IDENTIFIER


FORMAT = Format(
    "onnx",
    ".onnx_adapter",
    is_one,
    write,
    read,
    FACTORS_OF_LINEARS,
    "ONNX Runtime",
)
