"""Trained parts beside a pretrained stack of layers, on disk: with what says over which base alone they are right.

A folder has ``<kind>_config.json`` (settings, fingerprints of each layer of the base and of all else in it, and the
SHA-256 of the factors' file, so that one that an earlier save left there is not taken for one of these),
``<kind>.safetensors`` (the parts, by their names in the model), and where the model has LoRA layers PEFT's two files.
It may come from anywhere: nothing in it is executed, and a model is changed only after the base and the settings have
been checked.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapt import config_of
from .adapters import load_adapter, save_adapter
from .adapters.folder import FILE_DTYPES, WEIGHTS_FILE, few, inside, is_folder, read_header, read_json, write_aside
from .finite import all_finite
from .layer_stack import find_stack
from .names import named_modules, named_parameters
from .report import Report, count_parameters
from .weights.fingerprint import fingerprint


def _format(kind: str) -> str:
    return f"lowrank_kernels {kind} 2"


def _own(model: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    return {name: p for name, p in named_parameters(model) if f".{kind}." in f".{name}"}


def base_fingerprints(model: nn.Module, kind: str, op: str) -> dict[str, str]:
    """SHA-256 of the weights of each layer, by its name, and of all outside of the layers, without what was trained
    beside them."""
    stack = find_stack(model, op)
    parts = {f"{stack.path}.{i}": dict(named_parameters(layer)) for i, layer in enumerate(stack.layers.children())}
    in_layers = {id(p) for part in parts.values() for p in part.values()}
    rest = {name: p for name, p in named_parameters(model) if id(p) not in in_layers}
    found = {}
    for part, parameters in (*parts.items(), (f"all but {stack.path}", rest)):
        digest = hashlib.sha256()
        for name, p in sorted((n.replace("base_layer.", ""), p) for n, p in parameters.items()):
            if ".lora_" not in name and f"{kind}." not in name:
                digest.update(f"{name} {p.dtype} {tuple(p.shape)} {fingerprint(p)};".encode())
        found[part] = digest.hexdigest()
    return found


def save_over_base(
    model: nn.Module, folder: str | os.PathLike[str], kind: str, settings: dict[str, Any], op: str
) -> Path:
    """Write the parameters named ``kind``, the LoRA factors, and the settings. Files are written aside and renamed.

    Raises:
        ValueError: other parameters train too, or LoRA factors of PEFT's are there, which the folder has no place for;
            layers that are merged, over which the base is another; a value that is not finite. Nothing is written then.
        ImportError: safetensors is not installed.
    """
    from safetensors.torch import save_file

    own = _own(model, kind)
    ids = set(map(id, own.values()))
    adapted = config_of(model) is not None
    theirs = [n for n, _ in named_parameters(model) if ".lora_" in n and not adapted]
    if theirs:
        raise ValueError(
            f"{op}: expected LoRA factors of lk.adapt, got others, {few(theirs)}; save model.state_dict() instead"
        )
    others = [n for n, p in named_parameters(model) if p.requires_grad and id(p) not in ids and ".lora_" not in n]
    if others:
        raise ValueError(
            f"{op}: expected only LoRA factors and {kind} to train, got {few(others)}; save model.state_dict() instead"
        )
    merged = [name for name, m in named_modules(model) if hasattr(m, "base_layer") and getattr(m, "merged", False)]
    if merged:
        raise ValueError(f"{op}: expected unmerged layers, got merged ones, {few(merged)}; call unmerge_() of each")
    broken = [name for name, p in own.items() if not all_finite(p)]
    if broken:
        raise ValueError(f"{op}: expected finite values, found NaN or Inf in {few(broken)}; nothing was written")
    config: dict[str, Any] = {"format": _format(kind), "settings": settings, "adapter": None}
    config["base"] = base_fingerprints(model, kind, op)
    folder = Path(folder)
    if adapted:
        with _frozen(own):  # or else the log would name them as left out
            save_adapter(model, folder)
        config["adapter"] = _sha256(folder / WEIGHTS_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in own.items()}
    write_aside(folder / f"{kind}.safetensors", lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=1) + "\n"
    write_aside(folder / f"{kind}_config.json", lambda path: path.write_text(text, encoding="utf-8"))
    return folder


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _frozen(parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    trained = [p for p in parameters.values() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in trained:
            p.requires_grad_(True)


def load_over_base(
    model: nn.Module,
    folder: str | os.PathLike[str],
    kind: str,
    change: Callable[[dict[str, Any]], Report],
    op: str,
    *,
    trainable: bool,
) -> Report:
    """Put what :func:`save_over_base` wrote on a model: its LoRA layers, what ``change(settings)`` puts in, and values.

    Returns:
        The report of ``change``; its ``undo()`` takes off the LoRA layers too.

    Raises:
        ValueError: a file that is missing, broken, or of another format; another base than the one that was trained
            over; settings or tensors that do not fit. The model is then as it was.
    """
    folder = Path(folder)
    if not is_folder(folder):
        raise ValueError(f"{op}: expected a folder, got {str(folder)!r:.500}")
    config = read_json(inside(folder, f"{kind}_config.json", op), op)
    settings, base = config.get("settings"), config.get("base")
    adapter = config.get("adapter")
    is_ours = config.get("format") == _format(kind) and isinstance(adapter, (str, type(None)))
    if not is_ours or not isinstance(settings, dict) or not isinstance(base, dict):
        raise ValueError(f"{op}: expected the format {_format(kind)!r} in {folder}, got {config.get('format')!r:.100}")
    here = base_fingerprints(model, kind, op)
    if here != base:
        other = [name for name in here if here[name] != base.get(name)] or sorted(set(base) - set(here))
        raise ValueError(f"{op}: expected the base that was trained over, got other weights or layers: {few(other)}")
    if adapter is not None and _sha256(inside(folder, WEIGHTS_FILE, op)) != adapter:
        raise ValueError(f"{op}: expected the {WEIGHTS_FILE} that was saved with {kind} in {folder}, got another one")
    undo: list[Callable[[], None]] = []
    trained = [(p, p.requires_grad) for p in model.parameters()]

    def restore() -> None:
        for p, trains in trained:
            p.requires_grad_(trains)

    undo.append(restore)
    try:
        if adapter is not None:
            undo.append(load_adapter(model, folder, trainable=True).undo)
        try:
            report = change(settings)
        except TypeError as error:  # a setting that there is not
            raise ValueError(f"{op}: expected settings of {kind} in {folder}, got {error}") from None
        undo.append(report.undo)
        own = _own(model, kind)
        tensors = _read(inside(folder, f"{kind}.safetensors", op), own, op)
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(tensors[name])
        for name, p in model.named_parameters():
            p.requires_grad_(trainable and (".lora_" in name or name in own))
    except BaseException:
        while undo:
            undo.pop()()
        raise
    trains, total = count_parameters(model)
    return Report(report.title, report.replaced, report.skipped, trains, total, report.notes, _undo=undo)


def _read(path: Path, own: dict[str, nn.Parameter], op: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    header = read_header(path, len(own), op)
    if header.keys() != own.keys():
        raise ValueError(f"{op}: expected the tensors {few(sorted(own))} in {path}, got {few(sorted(header))}")
    for name, p in own.items():
        if header[name].shape != tuple(p.shape) or header[name].dtype not in FILE_DTYPES:
            raise ValueError(f"{op}: expected {name} of shape {tuple(p.shape)}, got {header[name]} in {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in own}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{op}: expected {path} to be a whole safetensors file: {error}") from None
    broken = [name for name, t in tensors.items() if not all_finite(t)]
    if broken:
        raise ValueError(f"{op}: expected finite values, found NaN or Inf in {few(broken)} of {path}")
    return tensors
