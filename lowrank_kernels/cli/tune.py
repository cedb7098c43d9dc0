"""`lrk tune`: settle on this device which way of running each op is right and fastest; `auto` then takes it."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from . import arguments
from .bench import DTYPES, one_of, shape_of
from .doctor import Row, print_table


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("tune", help=__doc__, description=__doc__)
    parser.add_argument("--op", action="append", help="an op; may be given again (default: all that have a choice)")
    parser.add_argument(
        "--shapes", action="append", metavar="M=16,K=2048,...", help="instead of the op's own; may repeat"
    )
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of float32,bfloat16,float16")
    parser.add_argument("--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=arguments.number(), default=0.15, help="of timing a candidate (default 0.15)")
    parser.add_argument(
        "--budget", type=arguments.number(above=0.0), default=600.0, help="seconds in all; run it again for the rest"
    )
    parser.add_argument(
        "--file", type=arguments.state_file, help="the table (default: LRK_TUNE_FILE, or the user's cache folder)"
    )
    parser.add_argument("--again", action="store_true", help="measure again what the table holds already")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from .. import tuned
    from ..bench import OPS, Problem, keep_freed_memory
    from ..bench.cases import tunables
    from ..bench.tune import Settled, shapes, tune

    path = args.file or tuned.table_path()
    if path is None:
        raise ValueError(f"tune: expected a file for the table, got an empty {tuned.FLAG}; give --file")
    try:
        arguments.state_file(str(path))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"tune: the table: {error}; give another --file") from None
    keep_freed_memory()
    device = torch.device(args.device)
    known = tunables(device.type)
    chosen = [known[name] for name in one_of("--op", ",".join(args.op or known), known)]
    dtypes = [DTYPES[name] for name in one_of("--dtypes", args.dtypes, DTYPES)]
    work = []
    for tunable in chosen:
        some = shapes(tunable, device.type)
        if args.shapes:
            some = [shape_of(words, dict(OPS[tunable.bench].shapes[0]), tunable.op) for words in args.shapes]
        work += [(tunable, Problem(shape, dtype, tunable.training)) for shape in some for dtype in dtypes]
    print(", ".join(f"{k} {v}" for k, v in tuned.conditions(device.type).items()))
    rows: list[Row] = [("class of shapes", "plan", "/ plain", "spread", "rule / plain", "")]
    left = 0
    found = tune(path, work, args.seconds, args.budget, device, again=args.again)
    for key, settled in tqdm(found, total=len(work), unit="class", disable=None, file=sys.stderr):
        if settled is None:
            left += 1
        elif isinstance(settled, Settled):
            rows.append((key, *cells(settled)))
        else:
            rows.append((key, "-", "-", "-", "-", settled))
    if len(rows) > 1:
        print_table(rows, indent="")
    print(f"{path}: {len(rows) - 1} classes settled now" + (", the others were there" if len(rows) == 1 else ""))
    if left:
        print(f"{left} classes did not fit into {args.budget:g} s: run it again for them", file=sys.stderr)
    return 0


def cells(settled: Any) -> Row:
    """Fields of the plan, ratios and remarks of one class."""
    from ..bench.tune import words

    remarks = [f"refused {name}: {why}" for name, why in settled.refused.items()]
    if settled.slower_than_plain:
        remarks.append("slower than plain PyTorch")
    rule = "refused" if settled.rule_over_plain is None else f"{settled.rule_over_plain:.2f}"
    return words(settled.plan), f"{settled.over_plain:.2f}", f"±{settled.spread:.0%}", rule, "; ".join(remarks)
