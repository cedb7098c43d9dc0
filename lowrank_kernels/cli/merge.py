"""`lrk merge`: merge adapters and deltas into a checkpoint, a tensor at a time."""

from __future__ import annotations

from typing import Any

from . import arguments
from .train import DTYPES


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("merge", help=__doc__, description=__doc__)
    parser.add_argument(
        "sources",
        type=arguments.existing,
        nargs="+",
        metavar="IN",
        help="adapters of any format that lrk convert reads, or SMT deltas, put in one after another",
    )
    parser.add_argument(
        "--base", type=arguments.folder, required=True, metavar="DIR", help="the model's safetensors checkpoint"
    )
    parser.add_argument("--out", type=arguments.output_folder, required=True, metavar="DIR", help="of the merged model")
    parser.add_argument("--dtype", choices=DTYPES, help="of the merged model (default: each tensor's own)")


def run(args: Any) -> int:
    from ..merge_checkpoint import merge_checkpoint

    dtype = None if args.dtype is None else DTYPES[args.dtype]
    merged = merge_checkpoint(args.sources, args.base, args.out, dtype=dtype)
    print(f"{merged.folder}: {len(merged.changed)} tensors changed, in {merged.shards} files")
    return 0
