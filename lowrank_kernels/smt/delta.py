"""A tuned selection on disk: a folder with ``smt_config.json`` and ``smt_delta.safetensors``.

The tensors are ``<module>.blocks`` (n, bm, bn), what W holds there after tuning, and ``<module>.block_index`` (n, 2).
The config says the block size and, of each module, its shape, dtype and fingerprint before tuning. A folder may come
from anywhere: nothing in it is executed, and a model is changed only after everything in it has been checked.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapt import adapt
from ..adapters.folder import FILE_DTYPES, few, inside, is_folder, read_header, read_json, write_aside
from ..finite import all_finite
from ..functional import write_blocks_
from ..names import named_modules, submodule
from ..nn.block_sparse import BlockSparseLinear
from ..nn.sharded import whole
from ..report import Report, count_parameters
from ..weights.fingerprint import fingerprint
from .config import SMTConfig
from .selection import BlockSelection

CONFIG_FILE = "smt_config.json"
WEIGHTS_FILE = "smt_delta.safetensors"
FORMAT = "lowrank_kernels sparse delta 1"
_MAX_CONFIG_BYTES = 8 << 20
_ANY_BLOCK = 1024  # rows or columns of a block over a matrix of any size
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def save_delta(model: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write the tuned blocks of a model that ``adapt(model, SMTConfig(...))`` made.

    The model may be compiled or wrapped; where FSDP2 shards it, every rank has to call this, and each writes the files.
    Blocks keep their dtype (float32 master copies stay so). Files are written aside and renamed.

    Returns:
        The folder, made if missing.

    Raises:
        ValueError: no BlockSparseLinear in the model; a value that is not finite, or not at hand: on the meta device, a
            shard. Nothing is written then.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save_file

    layers = {name: m for name, m in named_modules(model) if isinstance(m, BlockSparseLinear)}
    if not layers:
        raise ValueError(f"save_delta: expected BlockSparseLinear layers in the model, got {type(model).__name__}")
    blocks = {name: whole(layer.blocks.detach()) for name, layer in layers.items()}
    for name, layer in layers.items():
        for part, t, shape in (
            ("the blocks", blocks[name], (len(layer.block_index), *layer.block_size)),
            ("the weight", layer.base_layer.weight, (layer.out_features, layer.in_features)),
        ):
            if t.is_meta or tuple(t.shape) != shape:
                raise ValueError(
                    f"save_delta: expected {part} of {name} of shape {shape} at hand, got {tuple(t.shape)} on "
                    f"{t.device}: a shard, or offloaded; gather the model first; nothing was written"
                )
    broken = [name for name, t in blocks.items() if not all_finite(t)]
    if broken:
        raise ValueError(f"save_delta: expected finite blocks, found NaN or Inf in {few(broken)}; nothing was written")
    sizes = {layer.block_size for layer in layers.values()}
    if len(sizes) > 1:
        raise ValueError(f"save_delta: expected blocks of one size, got {sorted(sizes)}")
    tensors, modules = {}, {}
    for name, layer in layers.items():
        tensors[f"{name}.blocks"] = blocks[name].cpu().clone()
        tensors[f"{name}.block_index"] = layer.block_index.cpu().clone()
        before = write_blocks_(
            whole(layer.base_layer.weight.detach()).clone(), layer.original_blocks, layer.block_index
        )
        dtype = str(before.dtype).removeprefix("torch.")
        modules[name] = {"shape": list(before.shape), "dtype": dtype, "sha256": fingerprint(before)}
    config = {"format": FORMAT, "block_size": list(sizes.pop()), "modules": modules}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=1) + "\n"
    write_aside(folder / CONFIG_FILE, lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def load_delta(
    model: nn.Module, folder: str | os.PathLike[str], *, force: bool = False, trainable: bool = False
) -> Report:
    """Put tuned blocks, written by :func:`save_delta`, into a model, in place.

    Args:
        model: the base that they were tuned on, not adapted yet.
        folder: local, with smt_config.json and smt_delta.safetensors.
        force: put them into another base all the same; shapes must still fit.
        trainable: whether the blocks train afterwards. False freezes everything.

    Returns:
        The report of ``adapt``; its ``undo()`` puts the base back, bit for bit.

    Raises:
        ValueError: a missing, unreadable or truncated file; a config of another format; tensors that are missing,
            unexpected, of another shape or dtype, or not finite; blocks out of range or there twice; modules that the
            model does not have; another base than the one that was tuned. The model is then as it was.
        ImportError: safetensors is not installed.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise ValueError(f"load_delta: expected a folder, got {str(folder)!r:.500}")
    config = _read_config(inside(folder, CONFIG_FILE, "load_delta"))
    modules: dict[str, dict[str, Any]] = config["modules"]
    _check_shapes(model, modules)
    tensors = _read_tensors(inside(folder, WEIGHTS_FILE, "load_delta"), modules, tuple(config["block_size"]))
    try:
        selection = BlockSelection(
            {name: tensors[f"{name}.block_index"] for name in modules},
            {name: tuple(module["shape"]) for name, module in modules.items()},
            tuple(config["block_size"]),
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"load_delta: {folder}: {error}") from None
    (dtype,) = {tensors[f"{name}.blocks"].dtype for name in modules}
    if not force:
        _check_base(model, modules)
    report = adapt(model, SMTConfig(selection=selection, dtype=dtype))
    try:
        for name in modules:
            layer = submodule(model, name)
            assert isinstance(layer, BlockSparseLinear)
            # The layer keeps its blocks in ascending order; those of a file can have any.
            order = sorted(range(len(layer.block_index)), key=tensors[f"{name}.block_index"].tolist().__getitem__)
            with torch.no_grad():
                layer.blocks.copy_(tensors[f"{name}.blocks"][order])
            layer.write_back_()
        if not trainable:
            model.requires_grad_(False)
    except BaseException:
        report.undo()
        raise
    trains, total = count_parameters(model)
    return Report(f"{folder.name}: SMT", report.replaced, report.skipped, trains, total, _undo=report._undo)


class Delta(NamedTuple):
    """The tuned blocks of one linear, and the weight (N, K) that they belong to, before tuning."""

    blocks: Tensor
    block_index: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    sha256: str


def read_delta(folder: str | os.PathLike[str]) -> dict[str, Delta]:
    """{path: blocks} of a folder that :func:`save_delta` wrote, without a model. Raises as :func:`load_delta`."""
    folder = Path(folder)
    if not is_folder(folder):
        raise ValueError(f"load_delta: expected a folder, got {str(folder)!r:.500}")
    config = _read_config(inside(folder, CONFIG_FILE, "load_delta"))
    modules: dict[str, dict[str, Any]] = config["modules"]
    tensors = _read_tensors(inside(folder, WEIGHTS_FILE, "load_delta"), modules, tuple(config["block_size"]))
    return {
        name: Delta(
            tensors[f"{name}.blocks"],
            tensors[f"{name}.block_index"],
            tuple(said["shape"]),
            _DTYPES[said["dtype"]],
            said["sha256"],
        )
        for name, said in modules.items()
    }


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path, "load_delta", _MAX_CONFIG_BYTES)
    if config.get("format") != FORMAT:
        raise ValueError(f"load_delta: expected {path} to be of the format {FORMAT!r}")
    size, modules = config.get("block_size"), config.get("modules")
    modules = modules if isinstance(modules, dict) else {}
    fits = _is_pair(size) and bool(modules)
    for module in modules.values():
        fits = fits and isinstance(module, dict) and _is_pair(module.get("shape"))
        fits = fits and isinstance(module.get("dtype"), str) and module["dtype"] in _DTYPES
        fits = fits and isinstance(module.get("sha256"), str)
    if not fits:
        raise ValueError(
            f"load_delta: expected {path} to give a block size and, of each module, shape, dtype and sha256"
        )
    largest = [max(module["shape"][side] for module in modules.values()) for side in (0, 1)]
    if any(block > max(_ANY_BLOCK, side + 15) for block, side in zip(config["block_size"], largest, strict=True)):
        raise ValueError(f"load_delta: expected block_size in {path} within the largest matrix, got {str(size)[:80]}")
    return config


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def _read_tensors(path: Path, modules: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Tensor]:
    """The file's tensors, once they are known to be just those of the config, and no larger than its modules."""
    from safetensors import SafetensorError, safe_open

    header = read_header(path, 2 * len(modules), "load_delta")
    wanted = {f"{name}.{key}" for name in modules for key in ("blocks", "block_index")}
    if header.keys() != wanted:
        raise ValueError(
            f"load_delta: expected {path} to hold the {len(wanted)} tensors of its config; missing: "
            f"{few(sorted(wanted - header.keys()))}; unexpected: {few(sorted(header.keys() - wanted))}"
        )
    dtypes = {header[f"{name}.blocks"].dtype for name in modules}
    if len(dtypes) != 1 or not dtypes <= set(FILE_DTYPES):
        raise ValueError(f"load_delta: expected blocks of one float dtype in {path}, got {sorted(dtypes)}")
    for name, module in modules.items():
        blocks, index = header[f"{name}.blocks"], header[f"{name}.block_index"]
        most = math.prod(-(-length // block) for length, block in zip(module["shape"], size, strict=True))
        n = index.shape[0] if len(index.shape) == 2 else 0
        if index.dtype != "I32" or index.shape != (n, 2) or not 0 < n <= most:
            raise ValueError(
                f"load_delta: expected {name}.block_index of shape (n, 2), I32, n from 1 to {most}, got {index.shape}, "
                f"{index.dtype}, in {path}"
            )
        if blocks.shape != (n, *size):
            raise ValueError(f"load_delta: expected {name}.blocks of shape {(n, *size)}, got {blocks.shape} in {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in sorted(wanted)}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"load_delta: expected {path} to be a whole safetensors file: {error}") from None
    for name in modules:
        if not all_finite(tensors[f"{name}.blocks"]):
            raise ValueError(f"load_delta: expected finite blocks, found NaN or Inf in {name}.blocks of {path}")
    return tensors


def _check_shapes(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the model has the linears that were tuned."""
    there = dict(named_modules(model))
    for name, module in modules.items():
        weight = getattr(there.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"load_delta: expected a linear at {name[:200]}, found none: a delta for another model")
        shape = tuple(module["shape"])
        if tuple(weight.shape) != shape:
            raise ValueError(
                f"load_delta: expected the base that was tuned, whose {name} has the shape {str(shape)[:80]}, got "
                f"{tuple(weight.shape)}"
            )


def _check_base(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the weights are those that were tuned."""
    for name, module in modules.items():
        weight = submodule(model, name).weight
        assert isinstance(weight, Tensor)
        dtype = str(weight.dtype).removeprefix("torch.")
        if dtype != module["dtype"] or fingerprint(weight) != module["sha256"]:
            raise ValueError(
                f"load_delta: expected the base that was tuned, whose {name} is {module['dtype']} with "
                f"fingerprint {module['sha256'][:12]!r}, got {dtype} {fingerprint(weight)[:12]}; "
                f"force=True puts the blocks in all the same"
            )
