"""`lrk inspect`: what the compiler makes of every kernel, for any GPU, without one."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments

if TYPE_CHECKING:
    from ..inspect.compile import Compiled
    from ..inspect.registry import OpFamily

_HEADER = ("case", "tile", "w", "st", "regs", "spill", "KiB", "occ", "matrix", "TMA", "cp.async", "MB", "GFLOP", "µs")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "inspect",
        help=__doc__,
        description=__doc__,
        epilog="docs/inspect.md explains the columns. Exit code 1: a variant is refused, spills or does not fit.",
    )
    parser.add_argument("--op", action="append", metavar="FAMILY", help="this op family (repeatable; default: all)")
    parser.add_argument("--arch", action="append", help="this target, as sm_90 or gfx942 (repeatable; default: all)")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--json", type=arguments.output_file, metavar="FILE", help="write all figures as JSON")
    parser.add_argument(
        "--save-cubins", type=arguments.output_folder, metavar="DIR", help="write the binaries, for a disassembler"
    )
    parser.add_argument(
        "--write-budget", type=arguments.output_file, metavar="FILE", help="write the budget that the tests hold to"
    )
    parser.add_argument("--workers", type=arguments.whole(1, 256), default=2, help="processes that compile (default 2)")


def _progress(label: str) -> Any:
    """A callback that redraws one line of progress on a terminal and prints nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda done, total: None

    def show(done: int, total: int) -> None:
        filled = 30 * done // max(total, 1)
        end = "\n" if done == total else ""
        sys.stderr.write(f"\r{label}  [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}{end}")
        sys.stderr.flush()

    return show


def _cells(family: OpFamily, compiled: Compiled) -> tuple[str, ...]:
    from ..inspect.compile import predict

    launch, prediction = compiled.launch, predict(family, compiled.launch)
    options = launch.options
    if compiled.error is not None:
        figures: tuple[str, ...] = ("-",) * 7
    else:
        figures = (
            str(compiled.registers),
            str(compiled.spills),
            f"{compiled.shared_bytes / 1024:.0f}",
            f"{compiled.occupancy:.2f}",
            compiled.matrix,
            str(compiled.count("TMA")),
            str(compiled.count("cp.async")),
        )
    return (
        launch.case,
        launch.tile,
        str(options.get("num_warps", "")),
        str(options.get("num_stages", "")),
        *figures,
        f"{prediction.nbytes / 1e6:.1f}",
        f"{prediction.flops / 1e9:.2f}",
        f"{prediction.seconds * 1e6:.1f}",
    )


def _print_table(rows: list[tuple[str, ...]], widths: list[int]) -> None:
    for row in rows:
        cells = zip(_HEADER, row, widths, strict=True)
        aligned = (cell.ljust(w) if name in ("case", "tile", "matrix") else cell.rjust(w) for name, cell, w in cells)
        print("  " + " ".join(aligned).rstrip())


def _print_arch(arch: str, results: list[tuple[OpFamily, Compiled]]) -> None:
    from ..kernels.target import TARGETS

    target = TARGETS[arch]
    print(f"\n{arch}: {target.num_sms} processors, {target.shared_bytes // 1024} KiB of shared memory a program")
    bandwidth, flops = target.copy_bytes_per_s / 1e12, target.matrix_flops_per_s / 1e12
    print(f"  times: a roofline at {bandwidth:.1f} TB/s and {flops:.0f} TFLOP/s in half precision, and 4 µs a launch")
    rows = [_cells(family, compiled) for family, compiled in results]
    widths = [max(len(row[i]) for row in [_HEADER, *rows]) for i in range(len(_HEADER))]
    _print_table([_HEADER], widths)
    by_kernel = sorted(zip(results, rows, strict=True), key=lambda r: (r[0][0].name, r[0][1].launch.kernel))
    for kernel, group in groupby(by_kernel, key=lambda r: r[0][1].launch.kernel):
        print(f" {kernel.strip('_').removesuffix('_kernel')}")
        _print_table([row for _, row in group], widths)


def json_entries(results: Iterable[tuple[OpFamily, Compiled]]) -> Iterator[dict[str, Any]]:
    """What `--json` holds: one entry a launch."""
    from ..inspect.compile import predict

    for family, compiled in results:
        launch, prediction = compiled.launch, predict(family, compiled.launch)
        yield {
            "name": launch.name,
            "op": family.name,
            "arch": launch.arch,
            "kernel": launch.kernel,
            "case": launch.case,
            "tile": launch.tile,
            "grid": list(launch.grid),
            "options": dict(launch.options),
            "registers": compiled.registers,
            "spills": compiled.spills,
            "shared_bytes": compiled.shared_bytes,
            "tensor_memory": compiled.tensor_memory,
            "occupancy": compiled.occupancy,
            "instructions": compiled.instructions,
            "bytes": prediction.nbytes,
            "flops": prediction.flops,
            "roofline_seconds": prediction.seconds,
            "error": compiled.error,
        }


def _save_binaries(folder: Path, results: Iterable[tuple[OpFamily, Compiled]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for _, compiled in results:
        suffix = ".hsaco" if compiled.launch.arch.startswith("gfx") else ".cubin"
        (folder / (re.sub(r"[^\w.=]+", "_", compiled.launch.name) + suffix)).write_bytes(compiled.binary)


def run(args: argparse.Namespace) -> int:
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise ValueError("inspect: expected TRITON_INTERPRET to be off, got 1; the interpreter compiles nothing")
    from ..families import NAMES
    from ..inspect.budget import write_budget
    from ..inspect.compile import compile_launches, faults
    from ..inspect.launches import recorded_launches
    from ..inspect.registry import ARCHITECTURES, family
    from ..kernels.target import TARGETS

    known = [arch for arch in TARGETS if arch != "interpreter"]
    archs, families = args.arch or ARCHITECTURES, [family(name) for name in args.op or NAMES]
    for arch in archs:
        if arch not in known:
            raise ValueError(f"inspect: expected --arch to be one of {', '.join(known)}, got {arch!r}")
    arguments.refuse_one_place(args, "--json", "--save-cubins", "--write-budget")
    if args.write_budget and (args.arch or args.op or args.kernel):
        raise ValueError("inspect: expected --write-budget without --op, --arch and --kernel: a budget holds it all")

    everything: list[tuple[OpFamily, Compiled]] = []
    found: list[str] = []
    for arch in archs:
        launches = [
            (f, launch)
            for f in families
            for launch in recorded_launches(f, arch)
            if not args.kernel or args.kernel in launch.kernel
        ]
        compiled = compile_launches([launch for _, launch in launches], args.workers, _progress(arch))
        results = [(f, result) for (f, _), result in zip(launches, compiled, strict=True)]
        if results:
            _print_arch(arch, results)
        found += [fault for f, result in results for fault in faults(f, result)]
        everything += results
    if not everything:
        raise ValueError(f"inspect: no kernel's name contains {args.kernel!r}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(list(json_entries(everything)), indent=1) + "\n")
    if args.save_cubins:
        _save_binaries(args.save_cubins, everything)
    if args.write_budget:
        args.write_budget.parent.mkdir(parents=True, exist_ok=True)
        write_budget(args.write_budget, [compiled for _, compiled in everything])
    for fault in found:
        print(f"lrk: {fault}", file=sys.stderr)
    return 1 if found else 0
