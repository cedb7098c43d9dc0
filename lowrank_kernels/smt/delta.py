"""A tuned selection on disk: a folder with ``smt_config.json`` and ``smt_delta.safetensors``.

The tensors are ``<module>.blocks`` (n, bm, bn), what W holds there after tuning, and ``<module>.block_index`` (n, 2).
The config says the block size and, of each module, its shape, dtype and fingerprint before tuning. A folder may come
from anywhere: nothing in it is executed, and a model is changed only after everything in it has been checked.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import adapt
from ..adapters.folder import few, write_aside
from ..finite import all_finite
from ..functional import write_blocks_
from ..names import named_modules, submodule
from ..nn.block_sparse import BlockSparseLinear
from ..nn.sharded import whole
from ..report import Report, count_parameters
from .config import SMTConfig
from .selection import BlockSelection

CONFIG_FILE = "smt_config.json"
WEIGHTS_FILE = "smt_delta.safetensors"
FORMAT = "lowrank_kernels sparse delta 1"
_MAX_CONFIG_BYTES = 8 << 20
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def fingerprint(weight: Tensor) -> str:
    """SHA-256 of a matrix's values, row by row, as they lie in memory on the CPU."""
    plain = weight.detach().cpu().contiguous()
    digest = hashlib.sha256()
    if plain.numel():
        digest.update((ctypes.c_char * plain.nbytes).from_address(plain.data_ptr()))
    return digest.hexdigest()


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
    config = _read_config(folder / CONFIG_FILE)
    modules: dict[str, dict[str, Any]] = config["modules"]
    tensors = _read_tensors(folder / WEIGHTS_FILE, modules, tuple(config["block_size"]))
    try:
        selection = BlockSelection(
            {name: tensors[f"{name}.block_index"] for name in modules},
            {name: tuple(module["shape"]) for name, module in modules.items()}, tuple(config["block_size"]),
        )  # fmt: skip
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


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"load_delta: expected {path.name} in {path.parent}, found none")
    if path.stat().st_size > _MAX_CONFIG_BYTES:
        raise ValueError(f"load_delta: expected {path} of at most {_MAX_CONFIG_BYTES} bytes")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_delta: expected {path} to hold JSON: {error}") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"load_delta: expected {path} to be of the format {FORMAT!r}")
    size, modules = config.get("block_size"), config.get("modules")
    modules = modules if isinstance(modules, dict) else {}
    fits = isinstance(size, list) and len(size) == 2 and all(type(b) is int and b > 0 for b in size) and bool(modules)
    for module in modules.values():
        shape = module.get("shape") if isinstance(module, dict) else None
        fits = fits and isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
        fits = fits and module.get("dtype") in _DTYPES and isinstance(module.get("sha256"), str)
    if not fits:
        raise ValueError(
            f"load_delta: expected {path} to give a block size and, of each module, shape, dtype and sha256"
        )
    return config


def _read_tensors(path: Path, modules: Mapping[str, Any], size: tuple[int, ...]) -> dict[str, Tensor]:
    """The file's tensors, once they are known to be just those of the config."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"load_delta: expected {path.name} in {path.parent}, found none")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            found = set(file.keys())
            wanted = {f"{name}.{key}" for name in modules for key in ("blocks", "block_index")}
            if found != wanted:
                raise ValueError(
                    f"load_delta: expected {path} to hold the {len(wanted)} tensors of its config; missing: "
                    f"{few(sorted(wanted - found))}; unexpected: {few(sorted(found - wanted))}"
                )
            tensors = {name: file.get_tensor(name) for name in sorted(found)}
    except SafetensorError as error:
        raise ValueError(f"load_delta: expected {path} to be a whole safetensors file: {error}") from None
    dtypes = {tensors[f"{name}.blocks"].dtype for name in modules}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES.values()):
        raise ValueError(f"load_delta: expected blocks of one float dtype in {path}, got {sorted(map(str, dtypes))}")
    for name in modules:
        blocks, index = tensors[f"{name}.blocks"], tensors[f"{name}.block_index"]
        if index.dtype != torch.int32 or index.dim() != 2 or index.shape[1] != 2 or not len(index):
            raise ValueError(
                f"load_delta: expected {name}.block_index of shape (n, 2), int32, got {tuple(index.shape)}"
            )
        if tuple(blocks.shape) != (len(index), *size):
            raise ValueError(
                f"load_delta: expected {name}.blocks of shape {(len(index), *size)}, got {tuple(blocks.shape)}"
            )
        if not all_finite(blocks):
            raise ValueError(f"load_delta: expected finite blocks, found NaN or Inf in {name}.blocks of {path}")
    return tensors


def _check_base(model: nn.Module, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Whether the weights are those that were tuned."""
    there = dict(named_modules(model))
    for name, module in modules.items():
        weight = getattr(there.get(name), "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"load_delta: expected a linear at {name}, found none: a delta for another model")
        given = tuple(weight.shape), str(weight.dtype).removeprefix("torch.")
        wanted = tuple(module["shape"]), module["dtype"]
        if given != wanted or fingerprint(weight) != module["sha256"]:
            raise ValueError(
                f"load_delta: expected the base that was tuned, whose {name} is {wanted[0]} {wanted[1]} with "
                f"fingerprint {module['sha256'][:12]}, got {given[0]} {given[1]} {fingerprint(weight)[:12]}; "
                f"force=True puts the blocks in all the same"
            )
