"""`lrk bench`: what each op costs here, beside plain PyTorch, PEFT's sequence of calls, and the frozen layer alone."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from ..bench.run import PROVIDERS
from . import arguments
from .doctor import Row, print_table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help=__doc__, description=__doc__)
    parser.add_argument("--op", action="append", help="an op; may be given again (default: all)")
    parser.add_argument(
        "--shapes", action="append", metavar="M=16,K=2048,...", help="instead of the op's own; may repeat"
    )
    parser.add_argument(
        "--providers", default="floor,plain,peft,ours", help=f"of {','.join(PROVIDERS)} (default without compile)"
    )
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of float32,bfloat16,float16")
    parser.add_argument("--modes", default="inference,training", help="of inference,training")
    parser.add_argument("--device", type=arguments.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--threads", type=arguments.threads, default=torch.get_num_threads(), help="of a CPU (default: torch's)"
    )
    parser.add_argument(
        "--seconds", type=arguments.number(), default=0.6, help="of timing a row of the table (default 0.6)"
    )
    parser.add_argument(
        "--budget",
        type=arguments.number(above=0.0),
        default=600.0,
        help="seconds in all; what does not fit is said (default 600)",
    )
    parser.add_argument("--csv", type=arguments.output_file, help="write every row with its conditions")
    parser.add_argument("--append", action="store_true", help="to what the CSV holds already")
    parser.add_argument("--json", type=arguments.output_file, help="the same as JSON")
    parser.add_argument(
        "--plot", type=arguments.picture_file, help="draw bars, and beside it the roof and what the shapes sweep"
    )


def one_of(option: str, given: str, known: Any) -> list[str]:
    """The names in ``given``, separated by commas, each of them known."""
    names = given.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def shape_of(words: str, like: dict[str, int], op: str) -> dict[str, int]:
    """{"M": 16, ...} of "M=16,..." with the names that ``like`` has."""
    try:
        shape = {k: int(v) for k, _, v in (pair.partition("=") for pair in words.split(","))}
    except ValueError:
        shape = {}
    if set(shape) != set(like) or min(shape.values(), default=0) < 1:
        raise ValueError(
            f"--shapes: expected {','.join(f'{k}={v}' for k, v in like.items())} or the like for {op}, got {words}"
        )
    return shape


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ..bench import OPS, Problem, keep_freed_memory, measure, measure_roofs, write_csv
    from ..bench.plot import draw_all
    from ..bench.run import conditions

    arguments.refuse_options(args.given, () if args.csv else ("--append",), "is for --csv, which is not given")
    arguments.refuse_one_place(args, "--csv", "--json", "--plot")
    providers = one_of("--providers", args.providers, PROVIDERS)
    dtypes = [DTYPES[name] for name in one_of("--dtypes", args.dtypes, DTYPES)]
    modes = one_of("--modes", args.modes, ("inference", "training"))
    ops = [OPS[name] for name in one_of("--op", ",".join(args.op or OPS), OPS)]
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    problems = []
    for bench in ops:
        own = bench.gpu_shapes if device.type == "cuda" else bench.shapes
        shapes = [shape_of(words, dict(own[0]), bench.name) for words in args.shapes] if args.shapes else own
        for shape in shapes:
            for dtype in dtypes:
                problems += [
                    (bench, Problem(shape, dtype, mode == "training"))
                    for mode in modes
                    if mode == "inference" or bench.trained
                ]
    start = time.monotonic()
    roofs = {dtype: measure_roofs(dtype, device) for dtype in dtypes}
    for dtype, roof in roofs.items():
        copied, product = f"{roof.bytes_per_s / 1e9:.1f} GB/s copied", f"{roof.flops_per_s / 1e12:.3g} TFLOP/s"
        print(f"measured roofs, {str(dtype).removeprefix('torch.')}: {copied}, {product}")
    rows, left = [], 0
    for bench, problem in tqdm(problems, unit="problem", disable=None, file=sys.stderr):
        if time.monotonic() - start > args.budget:
            left += 1
            continue
        rows += measure(bench, problem, providers, args.seconds, device, roofs[problem.dtype])
    _print(rows)
    where = conditions(device, "lrk " + " ".join(sys.argv[1:]))
    print("\n" + ", ".join(f"{k} {v}" for k, v in where.items() if v))
    if args.csv:
        write_csv(args.csv, rows, where, args.append)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"conditions": where, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    if args.plot:
        for file in draw_all(args.plot, rows, where):
            print(f"drawn: {file}")
    if left:
        print(f"{left} of {len(problems)} problems did not fit into {args.budget:g} s; see --budget", file=sys.stderr)
    return 1 if any(row.provider == "ours" and row.reason for row in rows) else 0


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}"


def _print(rows: list[Any]) -> None:
    table: list[Row] = [
        ("op", "shape", "dtype", "mode", "provider", "us", "spread", "/ floor", "/ roof", "error / plain's", "")
    ]
    for r in rows:
        spread = "-" if r.spread is None else f"±{r.spread:.0%}"
        figures = (_number(r.median_us), spread, _number(r.over_floor), _number(r.over_roof), _number(r.error))
        table.append((r.op, r.shape, r.dtype, r.mode, r.provider, *figures, r.reason))
    print_table(table, indent="")
