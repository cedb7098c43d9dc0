"""Options and the kinds of values they take, each checked before a command does anything."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

OptionGroup = Mapping[str, Mapping[str, Any]]
"""Options that belong together: what ``add_argument`` is given, by the option's name."""

_PICTURES = (".png", ".svg", ".pdf", ".jpg")


def refuse_options(given: Iterable[str], options: Iterable[str], why: str) -> None:
    """Raise ValueError if one of ``options`` is given, which would be ignored."""
    for option in options:
        if option in given:
            raise ValueError(f"{option}: {why}")


def refuse_one_place(args: argparse.Namespace, *options: str) -> None:
    """Raise ValueError if two outputs are to be written to one place."""
    places: dict[str, str] = {}
    for option in options:
        path = getattr(args, option.removeprefix("--").replace("-", "_"))
        if path is not None and (other := places.setdefault(os.path.realpath(path), option)) != option:
            raise ValueError(f"{option}: expected another place than that of {other}, got {path}")


def whole(least: int, most: int = 2**31 - 1, multiple_of: int = 1) -> Callable[[str], int]:
    """An integer from ``least`` to ``most``."""
    wanted = f"an integer from {least} to {most}" + (f", a multiple of {multiple_of}" if multiple_of > 1 else "")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _expected(wanted, text) from None
        if not least <= value <= most or value % multiple_of:
            raise _expected(wanted, text)
        return value

    return read


def number(least: float = 0.0, below: float = math.inf, *, above: float | None = None) -> Callable[[str], float]:
    """A finite number of at least ``least``, or of more than ``above``, and below ``below``."""
    wanted = f"a number of at least {least:g}" if above is None else f"a number above {above:g}"
    wanted += "" if below == math.inf else f" and below {below:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _expected(wanted, text) from None
        if not math.isfinite(value) or not (value >= least if above is None else value > above) or value >= below:
            raise _expected(wanted, text)
        return value

    return read


def share(text: str) -> float:
    """A number above 0 and of at most 1."""
    value = number(above=0.0)(text)
    if value > 1.0:
        raise _expected("a number above 0 and of at most 1", text)
    return value


count = whole(1)
seed = whole(0, 2**32 - 1)
port = whole(0, 65535)
threads = whole(1, os.cpu_count() or 1)


def device(text: str) -> str:
    """A device that tensors can be on here."""
    try:
        found = torch.device(text)
        if found.type == "meta":
            raise _expected("a device that holds values", text)
        if found.type == "cuda" and not torch.cuda.is_available():
            raise _expected("a device that is here, and torch finds no GPU", text)
        if found.type == "cpu" and found.index:
            raise _expected("a device that is here", text)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _expected(f"a device that is here ({str(error).splitlines()[0][:80]})", text) from None
    return text


def folder(text: str) -> Path:
    """An existing folder."""
    try:
        there = bool(text) and Path(text).is_dir()
    except (OSError, ValueError):
        there = False
    if not there:
        raise _expected("a folder", text)
    return Path(text)


def existing(text: str) -> Path:
    """A file or folder that is there."""
    try:
        there = bool(text) and Path(text).exists()
    except (OSError, ValueError):
        there = False
    if not there:
        raise _expected("a file or a folder", text)
    return Path(text)


def output_folder(text: str) -> Path:
    """A folder that files can be written to; it may not be there yet."""
    return _writable(text, Path(text))


def output_file(text: str) -> Path:
    """A file that can be written; it and its folder may not be there yet."""
    path = _writable(text, Path(text).parent)
    if path.is_dir():
        raise _expected("a file, not a folder", text)
    if path.exists() and not os.access(path, os.W_OK):
        raise _expected("a file that may be written", text)
    return path


def state_file(text: str) -> Path:
    """An output file that is read again: no device or pipe."""
    path = output_file(text)
    if path.exists() and not path.is_file():
        raise _expected("a regular file", text)
    return path


def picture_file(text: str) -> Path:
    """An output file that matplotlib can draw."""
    path = output_file(text)
    if path.suffix.lower() not in _PICTURES:
        raise _expected(f"a name that ends in {', '.join(_PICTURES)}", text)
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib, which is not installed")
    return path


def _writable(text: str, home: Path) -> Path:
    """The path, after a check that a file can be made in its folder, or in the nearest existing one above it."""
    if not text:
        raise _expected("a path", text)
    try:
        there = next(path for path in (home, *home.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=there), suppress(FileNotFoundError):
            os.stat(text)  # a name that no file can have is another error
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise _expected("a place that can be written", f"{text[:200]}: {why}") from None
    return Path(text)


def api_key(text: str) -> str:
    """A key as a header can bring it."""
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise argparse.ArgumentTypeError("expected a key of printable ASCII without spaces")
    return text


def host_name(text: str) -> str:
    """A name that a request may be for, without a port."""
    if text != "*" and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})", text):
        raise _expected("a host's name without a port, or '*'", text)
    return text


def origin(text: str) -> str:
    """Where a page comes from, as browsers say it."""
    if text != "*" and not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]{1,260}", text):
        raise _expected("an origin such as https://example.com, or '*'", text)
    return text.lower()


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound to this address, and does not listen yet.

    Raises:
        ValueError: nothing can listen there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--host, --port: expected an address to listen on, got {host}:{port}: {why}") from None
    return bound


def _expected(wanted: str, got: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"expected {wanted}, got {got[:300]!r}")
