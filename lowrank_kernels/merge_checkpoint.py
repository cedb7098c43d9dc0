"""Adapters and deltas merged into a checkpoint on disk, a tensor at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapters import Adapter, Factors, format_of, read
from .adapters.base import Base, checkpoint_files, read_base
from .adapters.folder import FileTensor, read_header, write_aside
from .finite import all_finite
from .functional import write_blocks_
from .smt.delta import CONFIG_FILE as SMT_CONFIG
from .smt.delta import Delta, read_delta
from .weights.fingerprint import fingerprint

_OP = "merge_checkpoint"
_MAX_TENSORS = 1 << 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# Models whose linears are transformers' Conv1D, with W (K, N).
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


class Merged(NamedTuple):
    """What :func:`merge_checkpoint` wrote."""

    folder: Path
    changed: tuple[str, ...]
    """Names of the tensors that a correction changed."""
    shards: int


def merge_checkpoint(
    sources: str | os.PathLike[str] | Adapter | Sequence[str | os.PathLike[str] | Adapter],
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
) -> Merged:
    """Write a plain model: W + s B A, or DoRA's m (W + s B A) / ‖W + s B A‖, or W with tuned blocks.

    Args:
        sources: an adapter of any format that :func:`lowrank_kernels.adapters.convert` reads, or an SMT delta; or
            several, which are put in one after another, as the links of a chain were.
        base: the folder of a safetensors checkpoint, in one file or several.
        out: a folder that is not the base; its files have the base's names.
        dtype: of all float tensors of the model; None keeps each tensor's own.

    Sums are accumulated in float32 (float64 for float64), and rounded once, after the last source. A tensor that no
    source changes keeps its bits. One tensor of the model is in memory at a time, however large the model is; the
    sources are. Files are written aside and renamed.

    Raises:
        ValueError: a base without safetensors, or quantised; a source whose modules the base does not have, in other
            shapes, or that changes one of two tied weights; a delta of another base; a bias where the base has none; a
            merged value that is not finite. No file is then left half written.
    """
    home, out = Path(base), Path(out)
    files = checkpoint_files(home) if home.is_dir() else []
    if not files:
        raise ValueError(f"{_OP}: expected the folder of a safetensors checkpoint as base, got {home}")
    if out.exists() and (not out.is_dir() or out.resolve() == home.resolve()):
        raise ValueError(f"{_OP}: expected a folder that is not the base's to write to, got {out}")
    if dtype is not None and dtype not in _CODES:
        raise ValueError(f"{_OP}: expected dtype to be one of {', '.join(map(str, _CODES))}, got {dtype}")
    about = read_base(home, _OP)
    assert about is not None
    if about.settings.get("quantization_config"):
        raise ValueError(f"{_OP}: expected a base of plain floats, got a quantised one; merge into the model it is of")
    headers = {path: read_header(path, _MAX_TENSORS, _OP) for path in files}
    there = {name: entry for header in headers.values() for name, entry in header.items()}
    given = [sources] if isinstance(sources, (str, os.PathLike, Adapter)) else list(sources)
    changes: dict[str, list[_Change]] = {}
    for source in given:
        for name, change in _changes(source, about, there).items():
            changes.setdefault(name, []).append(change)
    out.mkdir(parents=True, exist_ok=True)
    for path, header in headers.items():
        _write_shard(path, out / path.name, header, changes, dtype)
    _copy_the_rest(home, out, dtype)
    return Merged(out, tuple(sorted(changes)), len(files))


_Change = Callable[[Tensor], Tensor]
"""From the tensor in float32 (or float64) to what it becomes."""


def _changes(source: Any, base: Base, there: Mapping[str, FileTensor]) -> dict[str, _Change]:
    """What a source does to each tensor that it changes, after a check that the base has it."""
    if not isinstance(source, Adapter) and (Path(source) / SMT_CONFIG).is_file() and format_of(source) is None:
        return {f"{name}.weight": _block_writer(name, delta) for name, delta in read_delta(source).items()}
    adapter = source if isinstance(source, Adapter) else read(source, base=base)
    found: dict[str, _Change] = {}
    for path, f in adapter.modules.items():
        name = f"{path}.weight"
        _check_fits(adapter, name, _shape_of(f, base), there)
        found[name] = _correction(f, base)
        if f.lora_bias is not None:
            if f"{path}.bias" not in there:
                raise ValueError(
                    f"{_OP}: {adapter.origin} has a lora_bias of {path[:200]}, which has no bias to add to"
                )
            found[f"{path}.bias"] = _adding(f.scaling * f.lora_bias)
    for name, tensor in adapter.others.items():
        plain = name.replace(".base_layer.", ".")
        _check_fits(adapter, plain, tuple(tensor.shape), there)
        found[plain] = _replacing(tensor)
    _check_ties(adapter, base, there)
    return found


def _check_fits(adapter: Adapter, name: str, shape: tuple[int, ...], there: Mapping[str, FileTensor]) -> None:
    if name not in there:
        raise ValueError(f"{_OP}: expected {name[:200]} in the base, which {adapter.origin} changes; it is not there")
    if there[name].dtype not in _DTYPES:
        raise ValueError(f"{_OP}: expected {name} of floats in the base, got {there[name].dtype}")
    if math.prod(there[name].shape) != math.prod(shape) or there[name].shape[0] != shape[0]:
        raise ValueError(
            f"{_OP}: expected {name} of shape {shape} in the base, as {adapter.origin} has it, got {there[name].shape}"
        )


def _check_ties(adapter: Adapter, base: Base, there: Mapping[str, FileTensor]) -> None:
    if base.settings.get("tie_word_embeddings") and not {"lm_head.weight", "embed_out.weight"} & there.keys():
        ends = [path for path, f in adapter.modules.items() if f.embedding]
        if ends:
            raise ValueError(
                f"{_OP}: {adapter.origin} changes {ends[0]}, which is also the head of this base; untie the base's "
                f"weights first, so that the head stays as it is"
            )


def _is_transposed(base: Base) -> bool:
    return base.settings.get("model_type") in _CONV1D


def _shape_of(f: Factors, base: Base) -> tuple[int, ...]:
    n, k = f.shape
    return (k, n) if f.embedding or (_is_transposed(base) and not f.convolution) else (n, k)


def _correction(f: Factors, base: Base) -> _Change:
    turned = f.embedding or (_is_transposed(base) and not f.convolution)

    def change(weight: Tensor) -> Tensor:
        delta = f.delta(weight.dtype)
        matrix = weight.T if turned else weight.reshape(delta.shape)
        merged = matrix + delta
        if f.magnitude is not None:
            norm = merged.norm(dim=1, keepdim=True)
            merged = merged * (f.magnitude.to(merged.dtype).reshape(-1, 1) / norm)
        return merged.T if turned else merged.reshape(weight.shape)

    return change


def _adding(bias: Tensor) -> _Change:
    return lambda own: own + bias.to(own.dtype)


def _replacing(tensor: Tensor) -> _Change:
    return lambda own: tensor.to(own.dtype)


def _block_writer(name: str, delta: Delta) -> _Change:
    def change(weight: Tensor) -> Tensor:
        stored = weight.to(delta.dtype)
        if tuple(weight.shape) != delta.shape or fingerprint(stored) != delta.sha256:
            raise ValueError(f"{_OP}: expected the base that was tuned, whose {name} has another content or shape")
        return write_blocks_(weight.clone(), delta.blocks.to(weight.dtype), delta.block_index)

    return change


def _write_shard(
    source: Path,
    target: Path,
    header: Mapping[str, FileTensor],
    changes: Mapping[str, Sequence[_Change]],
    dtype: torch.dtype | None,
) -> None:
    from safetensors import safe_open

    kinds = {name: _kind(entry.dtype, dtype) for name, entry in header.items()}
    with safe_open(source, framework="pt", device="cpu") as file:

        def tensor(name: str) -> Tensor:
            found = file.get_tensor(name)
            for i, change in enumerate(changes.get(name, ())):
                found = change(found.to(torch.promote_types(found.dtype, torch.float32)) if i == 0 else found)
            if kinds[name] in _DTYPES:
                found = found.to(_DTYPES[kinds[name]])
            if name in changes and not all_finite(found):
                raise ValueError(f"{_OP}: expected finite merged values in {kinds[name]}, found NaN or Inf in {name}")
            return found

        shapes = {name: entry.shape for name, entry in header.items()}
        metadata = file.metadata()
        write_aside(target, lambda place: stream_safetensors(place, shapes, kinds, tensor, metadata))


def _kind(stored: str, dtype: torch.dtype | None) -> str:
    return _CODES[dtype] if dtype is not None and stored in _DTYPES else stored


def stream_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, str],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None,
) -> None:
    """A safetensors file whose tensors are asked for one after another, each forgotten before the next."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    place = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * _ITEM_BYTES[kinds[name]]
        header[name] = {"dtype": kinds[name], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            found = tensor(name).contiguous().view(-1)
            if found.numel():
                file.write(found.view(torch.uint8).numpy().data)
            del found


_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_ITEM_BYTES |= dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1)


def _copy_the_rest(home: Path, out: Path, dtype: torch.dtype | None) -> None:
    """The base's config, tokenizer and index beside the weights; the config names the new dtype."""
    for path in sorted(home.iterdir()):
        if path.is_file() and path.suffix not in (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".msgpack"):
            shutil.copyfile(path, out / path.name)
    config = out / "config.json"
    if dtype is not None and config.is_file():
        settings = json.loads(config.read_text())
        key = "torch_dtype" if "torch_dtype" in settings else "dtype"
        settings[key] = str(dtype).removeprefix("torch.")
        config.write_text(json.dumps(settings, indent=2) + "\n")
    index = out / "model.safetensors.index.json"
    if dtype is not None and index.is_file():
        found = json.loads(index.read_text())
        size = sum(path.stat().st_size for path in checkpoint_files(out))
        found.setdefault("metadata", {})["total_size"] = size
        index.write_text(json.dumps(found, indent=2) + "\n")
