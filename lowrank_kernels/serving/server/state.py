"""Which adapters are loaded, in a file that outlives the process."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import NamedTuple

from ...adapters.folder import read_json
from ..engine import Engine
from .folders import adapter_folder, load_all, named

_MOST_BYTES = 64 << 20


class Noted(NamedTuple):
    """An adapter that was loaded: its folder below the folder of adapters, and whether it is pinned."""

    folder: str
    pin: bool


class State:
    """The adapters that are loaded, by name, in a JSON file; each change is on the disk before its request is answered.

    Args:
        path: of the file; it need not be there.

    Raises:
        ValueError: a file that is not one of these.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.there = path, path.exists()
        self._lock = threading.Lock()
        try:
            given = read_json(path, limit=_MOST_BYTES)["adapters"] if self.there else {}
            self.adapters = {str(name): Noted(str(one["folder"]), bool(one["pin"])) for name, one in given.items()}
        except (KeyError, TypeError, AttributeError, ValueError):
            raise ValueError(f"--state: expected {path} to be a file that lrk serve wrote") from None

    def note(self, name: str, folder: str, pin: bool) -> None:
        """An adapter was loaded."""
        with self._lock:
            self.adapters[name] = Noted(folder, pin)
            self._write()

    def forget(self, name: str) -> None:
        """An adapter was unloaded."""
        with self._lock:
            self.adapters.pop(name, None)
            self._write()

    def load(self, engine: Engine, root: Path, model_name: str) -> dict[str, str]:
        """Load the adapters that the file has, or else all in ``root`` as :func:`load_all`; why some could not be.

        What could not be loaded stays in a file that was there.
        """
        if not self.there:
            failed = load_all(engine, root, model_name)
            loaded = engine.bank.names()
            self.adapters = {name: Noted(path.name, False) for name, path in reversed(named(root)) if name in loaded}
            self._write()
            return failed
        failed = {}
        for name, noted in self.adapters.items():
            try:
                engine.load(name, adapter_folder(root, noted.folder), pin=noted.pin)
            except Exception as error:
                failed[name] = str(error)
        return failed

    def _write(self) -> None:
        """Replace the file in one step: whenever the process ends, the old or the new one is there, whole."""
        new = self.path.with_name(f"{self.path.name}.new")
        with open(new, "w", encoding="utf-8") as file:
            json.dump({"adapters": {name: noted._asdict() for name, noted in self.adapters.items()}}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
