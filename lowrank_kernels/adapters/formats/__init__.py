"""Adapters in the formats of other engines: a file a format, and the table of them."""

from __future__ import annotations

from . import diffusers, gguf, kohya, mlx, onnx, openvino, peft
from .format import Format

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        peft.FORMAT,
        gguf.FORMAT,
        mlx.FORMAT,
        kohya.FORMAT,
        diffusers.FORMAT,
        onnx.FORMAT,
        openvino.FORMAT,
    )
}

__all__ = ["FORMATS", "Format"]
