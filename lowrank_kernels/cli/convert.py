"""`lrk convert`: write an adapter in the format of another engine, computing the same."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import arguments

FORMATS = ("peft", "gguf", "mlx", "kohya", "diffusers", "onnx", "openvino")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help=__doc__,
        description=__doc__,
        epilog="What a format has no words for is refused by name, and nothing is written: docs/adapters.md.",
    )
    parser.add_argument("source", type=arguments.existing, metavar="IN", help="a folder, or a file, of any format")
    parser.add_argument("target", type=Path, metavar="OUT", help="a folder for peft and mlx, else a file")
    parser.add_argument("--to", choices=FORMATS, required=True, help="the format to write")
    parser.add_argument(
        "--portable", action="store_true", help="write s = 1 into B and one rank, which every reader takes alike"
    )
    add_base(parser)
    parser.add_argument(
        "--names",
        type=_pattern,
        metavar="PATTERN",
        help="for onnx: the graph's inputs, with {path} and {factor} (default: PEFT's)",
    )


def _pattern(text: str) -> str:
    """A name with {path} and {factor} in it."""
    if "{path}" not in text or "{factor}" not in text:
        raise argparse.ArgumentTypeError(f"expected a name with {{path}} and {{factor}}, got {text[:200]!r}")
    return text


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        type=arguments.existing,
        metavar="MODEL",
        help="the base: a folder with config.json, or a .gguf file (gguf needs it; default: what a PEFT config names)",
    )


def run(args: argparse.Namespace) -> int:
    from ..adapters import convert, read

    adapter = read(args.source, base=args.base, names=args.names)
    convert(adapter, args.target, to=args.to, portable=args.portable, base=args.base, names=args.names)
    ranks = sorted({f.rank for f in adapter.modules.values()})
    print(f"{args.target}: {len(adapter.modules)} modules, ranks {', '.join(map(str, ranks))}, as {args.to}")
    return 0
