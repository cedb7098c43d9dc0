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
    parser.add_argument(
        "--explain", metavar='"OP M=16 ..."', help="what a call of an op with these sizes does, and why; runs nothing"
    )
    parser.add_argument("--dtype", help="of the call to explain (default float32)")
    parser.add_argument("--base", metavar="FORMAT", help="that the call's frozen weight is stored in, as nf4")
    parser.add_argument("--training", action="store_true", help="the call to explain records gradients")
    parser.add_argument(
        "--device", metavar="DEVICE", help="of the call to explain: cpu, cuda, or cuda:sm_90 for any GPU without one"
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
    from ..families import NAMES
    from ..inspect.registry import family
    from ..kernels.target import TARGETS, target_of

    target = target_of(torch.device("cuda", 0)) if torch.cuda.is_available() else TARGETS["sm_90"]
    for name in NAMES:
        for shape, choice in family(name).choices(target):
            yield target.arch, name, shape, choice


def _call_of(words: str) -> tuple[str, dict[str, int]]:
    """("lora_linear", {"M": 16, ...}) of "lora_linear M=16 ..."; commas do for spaces."""
    from ..ops.examples import EXAMPLES

    op, *pairs = words.replace(",", " ").split() or [""]
    if op not in EXAMPLES:
        raise ValueError(f"--explain: expected one of {', '.join(EXAMPLES)}, got {op!r}")
    names = EXAMPLES[op].sizes.split()
    try:
        sizes = {name: int(value) for name, _, value in (pair.partition("=") for pair in pairs)}
    except ValueError:
        sizes = {}
    if sorted(sizes) != sorted(names) or len(sizes) != len(pairs) or min(sizes.values()) < 1:
        raise ValueError(f"--explain: expected {op} with {' '.join(f'{name}=...' for name in names)}, got {words!r}")
    return op, sizes


def _target_of(device: str) -> tuple[torch.device, Any]:
    """(device, target) of "cpu", "cuda" or "cuda:sm_90"; the target is None where the device says it."""
    from ..kernels.target import TARGETS

    kind, _, arch = device.partition(":")
    archs = [name for name in TARGETS if name != "interpreter"]
    if kind not in ("cpu", "cuda") or (arch and (kind == "cpu" or arch not in archs)):
        raise ValueError(f"--device: expected cpu, cuda, or cuda: with one of {', '.join(archs)}, got {device!r}")
    if kind == "cuda" and not arch and not torch.cuda.is_available():
        raise ValueError(f"--device: this machine has no GPU; name one, as in cuda:sm_90, of {', '.join(archs)}")
    return torch.device(kind), TARGETS[arch] if arch else None


def _plan_rows(plan: Any, indent: str = "") -> Iterator[Row]:
    for field, value, why in plan.reasons:
        yield indent + field, value, why
        if field == "norm" and not isinstance(plan.norm, str):
            yield from _plan_rows(plan.norm, indent + "  ")


def _stored(call: Any, base: str | None) -> Any:
    """The call over a weight that is stored in a format."""
    if base is None:
        return call
    if "weight" not in call._fields:
        raise ValueError("--base: this op has no frozen weight")
    return call._replace(weight=call.weight._replace(format=base, coded=True))


def _explain(
    words: str, dtype: torch.dtype, base: str | None, training: bool, device: torch.device, target: Any
) -> None:
    """Print the plan of a call, and of its backward where it trains, made by the function that the op calls."""
    from ..ops.examples import EXAMPLES
    from ..ops.planning import plan

    op, sizes = _call_of(words)
    example = EXAMPLES[op]
    if training and example.backward is None:
        raise ValueError(f"--training: {op} records no gradients of its own")
    shape = " ".join(f"{name}={sizes[name]}" for name in example.sizes.split())
    where = str(device) if target is None else f"{target.arch} (not this machine)"
    over = "" if base is None else f", over {base}"
    print(f"{op} {shape}, {str(dtype).removeprefix('torch.')}{over}, {where}")
    call = _stored(example.call(sizes, dtype, device), base)
    print_table(list(_plan_rows(plan(op, call, records=training, target=target))))
    if training:
        print("backward")
        call = _stored(example.call(sizes, dtype, device, backward=True), base)
        print_table(list(_plan_rows(plan(f"{op}_backward", call, target=target))))
    if device.type == "cuda":
        _predict(op if base is None else f"{op}_{base}", sizes, dtype, target)


def _predict(op: str, sizes: dict[str, int], dtype: torch.dtype, target: Any) -> None:
    """Print what the Triton kernels of a forward move and multiply, and the time that a roofline gives them."""
    from ..bench import OPS
    from ..kernels.roofline import seconds
    from ..kernels.target import target_of

    launches_of = OPS[op].launches if op in OPS else None
    if launches_of is None:
        return
    target = target or target_of(torch.device("cuda", 0))
    words, launches = launches_of(target, sizes, dtype)
    moved, flops = sum(work.nbytes for work in launches), sum(work.flops for work in launches)
    count = f"{len(launches)} launch{'es' if len(launches) > 1 else ''}"
    print(
        f"  predicted for Triton's kernels{f' ({words})' if words else ''}, forward: {count}, "
        f"{moved / 1e6:.2f} MB, {flops / 1e9:.2f} GFLOP, {1e6 * seconds(target, launches):.1f} µs"
    )


def run(args: argparse.Namespace) -> int:
    if args.explain is not None:
        from ..weights import FORMATS, CodedWeight
        from .bench import DTYPES, one_of

        device, target = _target_of(args.device or "cpu")
        dtype = DTYPES[one_of("--dtype", args.dtype or "float32", DTYPES)[0]]
        if args.base is not None:
            one_of("--base", args.base, [name for name, kind in FORMATS.items() if issubclass(kind, CodedWeight)])
        _explain(args.explain, dtype, args.base, args.training, device, target)
        return 0
    for option in ("--dtype", "--base", "--training", "--device"):
        if option in args.given:
            raise ValueError(f"{option}: it goes with --explain")
    from ..families import OPS

    rows = [*_versions(), ("GPU", _gpu()), *_extension_rows()]
    print_table(rows)
    have_triton = importlib.util.find_spec("triton") is not None
    print("\nbackend='auto' runs")
    print_table(list(_path_rows(OPS)))
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
