"""SVFT, as `lrk train` runs it: its options, its layers, and what is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import lowrank_kernels as lk

from ..adapters.svft import basis_of, set_basis_
from ..nn.svft import PATTERNS
from . import arguments
from .method import TARGETS, Batches, Prepared

PLACES: arguments.OptionGroup = {
    "--pattern": {
        "choices": PATTERNS,
        "default": "banded",
        "help": "{methods}: which places of M train (default banded)",
    },
    "--band": {
        "type": arguments.whole(0),
        "default": 4,
        "help": "{methods}: diagonals on each side, with --pattern banded (default 4)",
    },
    "--places": {
        "type": arguments.count,
        "default": 4096,
        "help": "{methods}: how many places of each M, with --pattern random or top (default 4096)",
    },
}
_TAKES = {"banded": ("--band",), "random": ("--places",), "top": ("--places",)}


def between_singular_vectors(model: Any, args: argparse.Namespace, batches: Batches, start: Any) -> Prepared:
    """Layers that train a sparse M (SVFT); a resumed run keeps the singular vectors."""
    taken = _TAKES.get(args.pattern, ())
    others = [option for option in ("--band", "--places") if option not in taken]
    arguments.refuse_options(args.given, others, f"is not an option of --pattern {args.pattern}")
    config = lk.SVFTConfig(
        target_modules=TARGETS,
        pattern=args.pattern,
        band=args.band if "--band" in taken else None,
        k=args.places if "--places" in taken else None,
        seed=args.seed,
    )
    report = lk.adapt(model, config)
    if start is None:
        return Prepared(report, basis_of(model))
    set_basis_(model, start)
    return Prepared(report, start)


def write_svft(model: Any, tokenizer: Any, prepared: Prepared, folder: Path) -> str:
    """Write M, and what fixes the singular vectors."""
    lk.save_svft(model, folder)
    return f"SVFT's M written to {folder}"
