"""The file in which `lrk train` keeps a run, to go on from it."""

from __future__ import annotations

import os
from typing import Any

import torch

_ANYWHERE = ("checkpoint", "stop_after", "save_every", "output", "json", "debug", "given", "held_out", "command")
"""Options that may differ between the parts of one run."""


def _settings(args: Any) -> dict[str, str]:
    return {name: str(value) for name, value in vars(args).items() if name not in _ANYWHERE}


def write_checkpoint(args: Any, state: dict[str, Any]) -> None:
    """Write the run's state aside and rename it, so that the file is never half there."""
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    aside = args.checkpoint.with_name(f".{args.checkpoint.name}.{os.getpid()}")
    try:
        torch.save({"settings": _settings(args), **state}, aside)
        os.replace(aside, args.checkpoint)
    finally:
        aside.unlink(missing_ok=True)


def read_checkpoint(args: Any) -> dict[str, Any] | None:
    """The state in ``--checkpoint``; None where there is none yet.

    Raises:
        ValueError: the file is of a run with other settings, which it names, or is no checkpoint.
    """
    if args.checkpoint is None or not args.checkpoint.exists():
        return None
    try:
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        given = state["settings"]
    except Exception as error:
        raise ValueError(f"--checkpoint: expected {args.checkpoint} to be one of `lrk train`: {error}") from None
    other = [f"{k}={given.get(k)}" for k, v in _settings(args).items() if given.get(k) != v]
    if other:
        raise ValueError(f"--checkpoint: {args.checkpoint} is of a run with {', '.join(other)}; give another file")
    return dict(state)
