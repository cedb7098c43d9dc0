"""Adapters by the name of their folder."""

from __future__ import annotations

from pathlib import Path

from ...adapters.folder import CONFIG_FILE
from ..batcher import Batcher


def adapter_folder(root: Path, folder: str) -> Path:
    """The folder of that name below ``root``.

    Raises:
        ValueError: there is none, or it lies elsewhere (absolute, "..", a link that leads out).
    """
    try:
        top = root.resolve(strict=True)
        found = (top / folder).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):
        found = None
    if found is None or found == top or not found.is_relative_to(top) or not found.is_dir():
        raise ValueError(f"expected the name of a folder below the folder of adapters, got {folder!r}")
    return found


def load_all(batcher: Batcher, root: Path, model_name: str) -> dict[str, str]:
    """Load each adapter in a folder of ``root`` under that folder's name; why others could not be, by name.

    Where ``root`` is itself an adapter's folder, that one is loaded, under its name.
    """
    failed = {}
    own = (root / CONFIG_FILE).is_file()
    for folder in [root.resolve()] if own else sorted(p for p in root.iterdir() if (p / CONFIG_FILE).is_file()):
        try:
            if folder.name == model_name:
                raise ValueError("that is the name of the base model")
            batcher.load(folder.name, folder if own else adapter_folder(root, folder.name))
        except Exception as error:
            failed[folder.name] = str(error)
    return failed
