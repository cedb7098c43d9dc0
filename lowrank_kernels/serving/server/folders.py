"""Adapters by the name of their folder."""

from __future__ import annotations

from pathlib import Path

from ...adapters import format_of
from ...adapters.folder import CONFIG_FILE
from ..engine import Engine


def adapter_folder(root: Path, folder: str) -> Path:
    """The folder of that name below ``root``, or the file of an adapter in another format than PEFT's.

    Raises:
        ValueError: there is none, or it lies elsewhere (absolute, "..", a link that leads out).
    """
    try:
        top = root.resolve(strict=True)
        found = (top / folder).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        found = None
    there = found is not None and found != top and found.is_relative_to(top)
    if found is None or not there or not (found.is_dir() or format_of(found)):
        raise ValueError(f"expected the name of a folder below the folder of adapters, got {folder!r}")
    return found


def load_all(engine: Engine, root: Path, model_name: str) -> dict[str, str]:
    """Load each adapter in ``root`` under its folder's name, or its file's without the suffix; why others could not be.

    Where ``root`` is itself an adapter's folder, that one is loaded, under its name.
    """
    failed = {}
    own = is_adapter(root)
    for name, path in named(root):
        try:
            if name == model_name:
                raise ValueError("that is the name of the base model")
            if name in engine.bank.names():
                raise ValueError(f"{path.name} has the name of another adapter")
            engine.load(name, path if own else adapter_folder(root, path.name))
        except Exception as error:
            failed[name] = str(error)
    return failed


def named(root: Path) -> list[tuple[str, Path]]:
    """The names and paths of the adapters in ``root``, or of the one that it is."""
    paths = [root.resolve()] if is_adapter(root) else sorted(p for p in root.iterdir() if is_adapter(p))
    return [(path.name if path.is_dir() else path.stem, path) for path in paths]


def is_adapter(path: Path) -> bool:
    """True for what looks like an adapter, sound or not: a folder with a config, or a file of a known format."""
    return (path / CONFIG_FILE).is_file() or format_of(path) is not None
