"""`lrk adapters`: what adapters are, which engines read them rightly, and what differs between two."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments
from .convert import add_base

if TYPE_CHECKING:
    from ..adapters import Inspection


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "adapters",
        help=__doc__,
        description=__doc__,
        epilog="Exit code 1: an adapter holds NaN, does not fit the base, or cannot be read; with diff: two differ.",
    )
    parser.add_argument(
        "sources",
        type=_word,
        nargs="+",
        metavar="ADAPTER",
        help="folders and files of any format; 'diff' first compares two of them",
    )
    add_base(parser)
    parser.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write what was found as JSON")


def _word(text: str) -> str | Path:
    return text if text == "diff" else arguments.existing(text)


def run(args: argparse.Namespace) -> int:
    if args.sources[0] == "diff":
        return _diff(args)
    from ..adapters import inspect_adapter
    from ..adapters.base import read_base

    base = read_base(args.base, "adapters")
    found: list[dict[str, Any]] = []
    failed = False
    for source in args.sources:
        try:
            inspection = inspect_adapter(source, base=base)
        except (ValueError, TypeError) as error:
            print(f"lrk: {error}", file=sys.stderr)
            found.append({"source": str(source), "faults": [str(error)]})
            failed = True
            continue
        print(inspection)
        found.append(_entry(inspection))
        failed |= bool(inspection.faults)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed)


def _entry(inspection: Inspection) -> dict[str, Any]:
    modules = inspection.adapter.modules
    return {
        "source": str(inspection.source),
        "format": inspection.format,
        "kind": inspection.kind,
        "content_hash": inspection.content_hash,
        "modules": {path: {"rank": f.rank, "scaling": f.scaling, "shape": f.shape} for path, f in modules.items()},
        "readers": inspection.readers,
        "faults": list(inspection.faults),
    }


def _diff(args: argparse.Namespace) -> int:
    from ..adapters import differences, read

    if len(args.sources) != 3:
        raise ValueError(f"adapters diff: expected two adapters, got {len(args.sources) - 1}")
    lines = differences(*(read(source, base=args.base) for source in args.sources[1:]))
    print("\n".join(lines) if lines else "the same content")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(lines, indent=1) + "\n")
    return int(bool(lines))
