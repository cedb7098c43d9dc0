"""What a conversion has to know of the base model: its architecture, and the names and shapes of its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..names import named_parameters
from .folder import read_header, read_json

_MAX_TENSORS = 1 << 20


class Base(NamedTuple):
    """Settings by the names of a config.json, and {path of a module: shape of its weight} (empty: not known)."""

    settings: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def number(self, *names: str) -> int | None:
        """The first of these settings that is a number of things."""
        return next((n for name in names if type(n := self.settings.get(name)) is int and n > 0), None)


def read_base(base: Any, op: str) -> Base | None:
    """The base that a user names: a model, its config, a folder with config.json, or a GGUF file; None of None.

    Raises:
        ValueError: something else, or a folder without config.json.
    """
    if base is None or isinstance(base, Base):
        return base
    if isinstance(base, nn.Module):
        config = getattr(base, "config", None)
        return Base(_settings(config), _shapes((n, tuple(p.shape)) for n, p in named_parameters(base)))
    if isinstance(base, (str, os.PathLike)):
        path = Path(base)
        if path.is_file() and path.suffix == ".gguf":
            return _of_gguf(path)
        if not (path / "config.json").is_file():
            raise ValueError(f"{op}: expected the base to be a folder with config.json or a .gguf file, got {path}")
        settings = read_json(path / "config.json", op)
        return Base(_text(settings), _shapes(checkpoint_shapes(path, op).items()))
    if isinstance(base, Mapping) or hasattr(base, "to_dict"):
        return Base(_settings(base), {})
    raise TypeError(f"{op}: expected the base to be a model, a config or a path, got {type(base).__name__}")


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order."""
    return sorted(folder.glob("*.safetensors"))


def checkpoint_shapes(folder: Path, op: str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every tensor of a checkpoint, from the headers alone."""
    found: dict[str, tuple[int, ...]] = {}
    for path in checkpoint_files(folder):
        found |= {name: entry.shape for name, entry in read_header(path, _MAX_TENSORS, op).items()}
    return found


def _shapes(named: Any) -> dict[str, tuple[int, ...]]:
    return {name.removesuffix(".weight"): shape for name, shape in named if name.endswith(".weight")}


def _settings(config: Any) -> dict[str, Any]:
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    return _text(dict(config)) if isinstance(config, Mapping) else {}


def _text(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the language model, where those of several parts stand in one config."""
    inner = settings.get("text_config")
    return {**settings, **inner} if isinstance(inner, dict) else settings


def _of_gguf(path: Path) -> Base:
    from .formats.gguf import open_gguf

    reader = open_gguf(path)
    architecture = reader.text("general.architecture")
    settings = {
        "gguf_architecture": architecture,
        "num_attention_heads": reader.number(f"{architecture}.attention.head_count"),
        "num_key_value_heads": reader.number(f"{architecture}.attention.head_count_kv"),
        "num_hidden_layers": reader.number(f"{architecture}.block_count"),
        "tie_word_embeddings": "output.weight" not in reader.tensors,
    }
    return Base({key: value for key, value in settings.items() if value is not None}, {})
