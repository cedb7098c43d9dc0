"""One adapter, every engine: from any format on disk to any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .adapter import Adapter, check_adapter
from .base import read_base
from .formats import FORMATS, Format
from .formats.format import Options


def convert(
    source: str | os.PathLike[str] | Adapter,
    target: str | os.PathLike[str],
    *,
    to: str,
    portable: bool = False,
    base: Any = None,
    names: str | None = None,
) -> Path:
    """Write an adapter in another format, computing the same.

    Args:
        source: a folder of PEFT's or MLX-LM's, or a file of another format, told by its content; or an
            :class:`Adapter`.
        target: a folder for "peft" and "mlx"; else a file, which ends in .gguf ("gguf"), .onnx_adapter ("onnx") or
            .safetensors ("kohya", "diffusers", "openvino").
        to: the format.
        portable: write s = 1 (s B in the place of B), ``lora_alpha`` = r, and one rank, padded with zeros: what readers
            that know neither rsLoRA nor patterns take for the same.
        base: what the adapter belongs to: a model, its config, its folder with config.json, or its GGUF file. "gguf"
            needs it, to write and for models of the Llama family to read; so does reading kohya's names. Without it,
            the folder that a PEFT config names is asked, if it is there.
        names: for "onnx": what the graph calls its inputs, with {path} and {factor}.

    Returns:
        The target.

    Tensors keep their bits, but where a format has no word for a scaling: then B holds s B, in B's dtype where that
    is exact and otherwise in float32, rounded once. GGUF's factors are float32, and so are its scalings.

    Raises:
        ValueError: a source that is no adapter, or not whole, or not finite; settings that change the base; a target of
            another suffix; what the format cannot say, by name, with what would work. Nothing is written then.
        TypeError: factors that are not floats.
        ImportError: "gguf" without the package gguf.
    """
    op = "convert"
    row = _format(to)
    given = read_base(base, op)
    options = Options(given) if names is None else Options(given, names)
    adapter = source if isinstance(source, Adapter) else _read(source, options)
    if options.base is None:
        options = options._replace(base=_base_of(adapter))
    target = Path(target)
    if row.suffix and target.suffix != row.suffix:
        raise ValueError(f"{op}: expected a target that ends in {row.suffix} for {to!r}, got {target}")
    if not row.suffix and target.exists() and not target.is_dir():
        raise ValueError(f"{op}: expected a folder as target for {to!r}, got {target}")
    check_adapter(adapter, op)
    if why := row.refusal(adapter):
        raise ValueError(f"{op}: {why}")
    row.write(adapter.portable() if portable else adapter, target, options)
    return target


def read(source: str | os.PathLike[str], *, base: Any = None, names: str | None = None) -> Adapter:
    """An adapter of any format that :func:`convert` reads, without a model.

    Args:
        source, base, names: as for :func:`convert`.

    Raises:
        ValueError, TypeError: as :func:`convert` for a source.
    """
    return check_adapter(read_unchecked(source, base=base, names=names), "read")


def read_unchecked(source: str | os.PathLike[str], *, base: Any = None, names: str | None = None) -> Adapter:
    """As :func:`read`, without a look at the values: they may be NaN."""
    given = read_base(base, "read")
    return _read(source, Options(given) if names is None else Options(given, names))


def format_of(source: str | os.PathLike[str]) -> str | None:
    """The name of the format that a folder or a file has; None where it has none of them."""
    path = Path(source)
    try:
        return next((name for name, row in FORMATS.items() if row.is_one(path)), None)
    except (OSError, ValueError):  # a name that no file can have, or one that may not be read
        return None


def _read(source: str | os.PathLike[str], options: Options) -> Adapter:
    path = Path(source)
    name = format_of(path)
    if name is None:
        raise ValueError(
            f"convert: expected an adapter of a known format ({', '.join(FORMATS)}), got {str(path)[:300]!r}"
        )
    row = FORMATS[name]
    assert row.read is not None
    return row.read(path, options)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(f"convert: expected to= to be one of {', '.join(FORMATS)}, got {name!r}")
    return FORMATS[name]


def _base_of(adapter: Adapter) -> Any:
    """What a PEFT config names as the base, if it is a folder here."""
    named = adapter.settings.get("base_model_name_or_path")
    if isinstance(named, str) and named and (Path(named) / "config.json").is_file():
        return read_base(named, "convert")
    return None
