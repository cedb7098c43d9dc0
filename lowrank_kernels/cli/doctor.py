"""`lrk doctor`: what of this package runs on this machine, which path each op takes, and why."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

import torch

_OPTIONAL = (
    ("peft", "lrk demo, lowrank_kernels.integrations.peft"),
    ("transformers", "lrk train, lrk demo"),
    ("safetensors", "checkpoints"),
    ("gguf", "the demo's model"),
    ("matplotlib", "plots"),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Row = tuple[str, ...]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("doctor", help=__doc__, description=__doc__)
    parser.add_argument(
        "--selftest", action="store_true", help="run every op once here: is it right, is it faster than plain PyTorch?"
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Row]:
    yield "lowrank_kernels", str(_version("lowrank_kernels") or "not installed (run from its source tree)")
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    cuda, rocm = torch.version.cuda, torch.version.hip
    built_for = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPUs"
    yield "torch", f"{torch.__version__}, built for {built_for}; {torch.get_num_threads()} threads"
    triton = _version("triton")
    yield "triton", f"{triton} (written for 3.5 to 3.8)" if triton else "missing: no GPU kernels (pip install triton)"
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        yield "", "TRITON_INTERPRET=1: its kernels run in the interpreter, on a CPU, slowly"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    properties = torch.cuda.get_device_properties(0)
    size = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} processors"
    return f"{torch.cuda.device_count()}, the first: {properties.name}, {size}"


def _extension_rows() -> Iterator[Row]:
    from .. import _extension

    info = _extension.build_info()
    if not info["available"]:
        yield "C++ ops", f"not loaded: {info['reason']}"
        yield "", "costs: CPU tensors run the plain PyTorch reference, which is right and slower"
        return
    yield "C++ ops", f"loaded: {info['path']}"
    yield "", f"{info.get('compiler', 'unknown compiler')}; runs here as {info.get('cpu_isa')}"
    if info.get("cuda"):
        yield "CUDA C++", f"built for sm_{', sm_'.join(info.get('cuda_archs', ()))}"
    else:
        yield "CUDA C++", f"not built: {info.get('cuda_note') or 'the build says no more'}"
        yield "", "costs: nothing on a CPU; on a GPU the Triton kernels run, which compile at first use"


def _path(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """(what `auto` runs, why)."""
    from ..ops.backend import automatic

    path, reason = automatic(op, device_type, dtype)
    return path, reason or "the kernels for such tensors"


def _path_rows(ops: tuple[str, ...]) -> Iterator[Row]:
    for device_type in ("cpu", "cuda"):
        # Dtypes that go one way share a line, and so do ops.
        lines: dict[Row, list[str]] = {}
        for op in ops:
            groups: dict[tuple[str, str], list[str]] = {}
            for dtype in _DTYPES:
                groups.setdefault(_path(op, device_type, dtype), []).append(str(dtype).removeprefix("torch."))
            for (path, why), dtypes in groups.items():
                lines.setdefault((", ".join(dtypes), path, why), []).append(op)
        for (dtypes_, path, why), alike in lines.items():
            which = "every op" if len(alike) == len(ops) else ", ".join(alike)
            yield device_type.upper(), dtypes_, path, which
            yield "", "", "", f"({why})"


def _table_rows() -> Iterator[Row]:
    from ..tuned import describe

    yield "CPU", describe("cpu")
    if torch.cuda.is_available():
        yield "CUDA", describe("cuda")


def _verdicts(seconds: float = 0.3) -> Iterator[tuple[bool, Row]]:
    """(whether it is right, a line) of every op at its first shape, in two dtypes."""
    from ..bench import OPS, Problem, keep_freed_memory, measure

    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for op, bench in OPS.items():
        shape = (bench.gpu_shapes if device.type == "cuda" else bench.shapes)[0]
        for dtype in (torch.float32, torch.bfloat16):
            _, row = measure(bench, Problem(shape, dtype, False), ("plain", "ours"), seconds, device)
            words = row.reason or "right"
            speed = ""
            if row.over_floor is not None and row.spread is not None:
                verdict = "as fast as" if abs(1 - row.over_floor) <= row.spread else "faster than"
                verdict = "slower than" if row.over_floor > 1 + row.spread else verdict
                speed = (
                    f"{verdict} plain PyTorch ({row.over_floor:.2f} ± {row.over_floor * row.spread:.2f} of its time)"
                )
            yield not row.reason, (op, row.shape, row.dtype, words, speed)


def print_table(rows: list[Row], indent: str = "  ") -> None:
    """Left-aligned columns, as wide as they need; the last as it comes."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(w) for cell, w in zip(row[:-1], widths, strict=True)]
        print(indent + "  ".join([*cells, row[-1]]).rstrip())


def _strategies() -> Iterator[Row]:
    """What the tile rules choose for common shapes: on this GPU or, without one, on an H100."""
    from ..inspect.registry import family, family_names
    from ..kernels.target import TARGETS, target_of

    target = target_of(torch.device("cuda", 0)) if torch.cuda.is_available() else TARGETS["sm_90"]
    for name in family_names():
        for shape, choice in family(name).choices(target):
            yield target.arch, name, shape, choice


def run(args: argparse.Namespace) -> int:
    rows = [*_versions(), ("GPU", _gpu()), *_extension_rows()]
    print_table(rows)
    have_triton = importlib.util.find_spec("triton") is not None
    if have_triton:
        from ..inspect.registry import family, family_names

        ops = tuple(op for name in family_names() for op in family(name).ops)
    else:
        ops = ("lora_linear",)
    print("\nbackend='auto' runs")
    print_table(list(_path_rows(ops)))
    print("\nTable of lrk tune")
    print_table(list(_table_rows()))
    choices = list(_strategies()) if have_triton else []
    if choices:
        where = "" if torch.cuda.is_available() else " (no GPU here: for sm_90)"
        print(f"\nTriton's strategy, by predicted time{where}")
        print_table(choices)
    print("\nOptional packages")
    print_table([(name, _version(name) or "missing", f"for {use}") for name, use in _OPTIONAL])
    if args.selftest:
        found = list(_verdicts())
        print("\nSelf-test: every op against float64, then beside plain PyTorch")
        print_table([line for _, line in found])
        return 0 if all(right for right, _ in found) else 1
    return 0
