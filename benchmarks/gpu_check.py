"""What only a machine with a GPU can tell: correctness at full size, determinism, graph capture, and times.

    python benchmarks/gpu_check.py [--dry] [--seconds S] [--results FOLDER]

Exit code 0 when everything held, 1 when something did not, 2 where there is no CUDA device (nothing is checked then).
With --dry the whole script runs on a CPU, at small sizes, so that it is known to run before a GPU is at hand; what it
then writes says nothing about one.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import lowrank_kernels as lk
from lowrank_kernels.bench import OPS, Problem, Roofs, Row, interleaved, measure, measure_roofs, write_csv
from lowrank_kernels.bench.cases import tunables
from lowrank_kernels.bench.run import conditions
from lowrank_kernels.bench.tune import Settled, shapes, tune, words
from lowrank_kernels.kernels import lora as launchers
from lowrank_kernels.kernels.lora_tiles import lora_tiles
from lowrank_kernels.kernels.target import target_of
from lowrank_kernels.weights import encoders

STRATEGIES = ("fused", "two_kernel", "library")
CHECKED = {
    "M": (1, 70, 2048),
    "K": (4096, 1000, 2048),
    "N": (4096, 1352, 4096),
    "R": (16, 7, 256),
    "G": (1, 5, 64),
    "blocks": (3, 7, 41),
    "size": (64, 16, 128),
    "E": (100, 8192, 65536),
}
"""The sizes of three problems: one token, odd widths, a large one."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def problems(op: str, dry: bool) -> Iterator[Problem]:
    for i in range(3):
        sizes = {name: values[i] for name, values in CHECKED.items()}
        if dry:
            sizes |= {"K": min(sizes["K"], 192), "N": min(sizes["N"], 160), "M": min(sizes["M"], 70), "size": 16}
            sizes["E"] = min(sizes["E"], 400)
        elif op == "block_sparse_weight_grad":
            sizes |= {"K": 4096, "N": 2048}  # plain's gathering wants whole blocks
        if op == "block_sparse_weight_grad" and dry:
            sizes |= {"K": 192, "N": 160, "blocks": min(sizes["blocks"], 41)}
        shape = {name: sizes[name] for name in OPS[op].shapes[0]}
        for dtype in DTYPES:
            for training in {False, bool(OPS[op].trained)}:
                yield Problem(shape, dtype, training)


def check_values(device: torch.device, dry: bool) -> Iterator[str]:
    """Every op, forward and backward, against float64."""
    for op, bench in OPS.items():
        for problem in problems(op, dry):
            rows = measure(bench, problem, ["ours"], 0.0, device)
            for row in rows:
                ok = not row.reason
                words = f"{op} {row.shape} {row.dtype} {row.mode}"
                error = "" if row.error is None else f": error over plain PyTorch's {row.error:.2f}"
                print(f"{'ok' if ok else 'FAIL':5} {words}{error} {row.reason}", flush=True)
                if not ok:
                    yield f"values: {words}: {row.reason}{error}"


def check_codes(device: torch.device, dry: bool) -> Iterator[str]:
    """Products with weights of few bits, and what they decode to, against float64 and PyTorch's decoding."""
    n, k = (72, 160) if dry else (1024, 4096)
    # One rounding of the result; in float32 the sum over K as well, whose error grows with its root.
    bounds = {dtype: torch.finfo(dtype).eps * (k**0.5 if dtype == torch.float32 else 2.0) for dtype in DTYPES}
    for name, kind in encoders().items():
        for dtype in DTYPES:
            weight: Any = kind.from_dense((torch.randn(n, k, device=device) / k**0.5).to(dtype))
            dense = weight.decode(0, n)
            for m in (1, 70):
                x, grad_y = (torch.randn(m, width, device=device).to(dtype) for width in (k, n))
                for what, ours, exact in (
                    ("y", weight.product(x, None), x.double() @ dense.double().T),
                    ("dX", weight.grad_product(grad_y), grad_y.double() @ dense.double()),
                ):
                    error = float((ours.double() - exact).abs().max() / exact.abs().max())
                    ok = error <= bounds[dtype]
                    words = f"codes {name} M={m} {str(dtype).removeprefix('torch.')} {what}"
                    print(f"{'ok' if ok else 'FAIL':5} {words}: relative error {error:.2e}", flush=True)
                    if not ok:
                        yield f"{words}: relative error {error:.2e}"
                yield from _check_lora_over(weight, dense, m, name)
            if not torch.equal(weight.product(torch.eye(k, dtype=dtype, device=device), None).T, dense):
                yield f"codes {name} {dtype}: decodes to other bits"


def _check_lora_over(weight: Any, dense: torch.Tensor, m: int, name: str) -> Iterator[str]:
    """LoRA and DoRA over codes, and their gradients, beside the formula in float64; bounds as of P and Q rounded."""
    n, k = weight.shape
    sizes = {"x": (m, k), "lora_a": (16, k), "lora_b": (n, 16), "magnitude": (n,)}
    drawn = {what: torch.randn(*size, device=dense.device) / size[-1] ** 0.5 for what, size in sizes.items()}
    grad_y = torch.randn(m, n, device=dense.device).to(dense.dtype)
    for op in ("lora_linear", "dora_linear"):
        results = []
        for over, dtype, backend in ((weight, dense.dtype, "auto"), (dense.double(), torch.float64, "reference")):
            given = {what: t.to(dense.dtype).to(dtype).requires_grad_() for what, t in drawn.items()}
            if op == "lora_linear":
                del given["magnitude"]
            y = getattr(lk, op)(weight=over, scaling=2.0, backend=backend, **given)
            grads = torch.autograd.grad(y, list(given.values()), grad_y.to(dtype))
            results.append(dict(zip(("y", *(f"d{what}" for what in given)), (y.detach(), *grads), strict=True)))
        ours, exact = results
        bound = torch.finfo(dense.dtype).eps * (k**0.5 if dense.dtype == torch.float32 else 8.0)
        worst = max(float((ours[w].double() - exact[w]).abs().max() / exact[w].abs().max()) for w in ours)
        words = f"{op} over {name} M={m} {str(dense.dtype).removeprefix('torch.')}"
        print(f"{'ok' if worst <= bound else 'FAIL':5} {words}: relative error {worst:.2e}", flush=True)
        if worst > bound:
            yield f"{words}: relative error {worst:.2e}"


def check_determinism(device: torch.device, dry: bool) -> Iterator[str]:
    """20 runs of every op give the same bits."""
    for op, bench in OPS.items():
        shape = list(problems(op, dry))[-1].shape
        torch.manual_seed(0)
        inputs = bench.make(shape, torch.bfloat16, device)
        with torch.no_grad():
            runs = [bench.providers["ours"](inputs) for _ in range(20)]
        if any(not torch.equal(run, runs[0]) for run in runs):
            yield f"determinism: 20 runs of {op} differ"


def check_graph_capture(device: torch.device) -> Iterator[str]:
    """A captured call replayed on other values gives what a plain call gives."""
    for op in ("lora_linear", "dora_linear"):
        inputs = OPS[op].make({"M": 256, "K": 4096, "N": 4096, "R": 16}, torch.bfloat16, device)
        call: Callable[[], torch.Tensor] = partial(OPS[op].providers["ours"], inputs)
        with torch.no_grad():
            for _ in range(3):
                call()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = call()
            inputs["x"].normal_()
            graph.replay()
            if not torch.equal(y, call()):
                yield f"graph capture: a replay of {op} differs from a plain call"


def check_streams(device: torch.device) -> Iterator[str]:
    """A call on a side stream waits for what that stream did before it, and for nothing else."""
    inputs = OPS["lora_linear"].make({"M": 512, "K": 4096, "N": 4096, "R": 16}, torch.bfloat16, device)
    with torch.no_grad():
        expected = OPS["lora_linear"].providers["ours"]({**inputs, "x": inputs["x"] * 2})
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)
            y = OPS["lora_linear"].providers["ours"]({**inputs, "x": inputs["x"] * 2})
        side.synchronize()
    if not torch.equal(y, expected):
        yield "streams: a call on a side stream differs"


def sanitize() -> Iterator[str]:
    """compute-sanitizer over each kernel of the CUDA C++ norm, where it is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer is not installed here: not run")
        return
    script = (
        "import torch, lowrank_kernels as lk; w = torch.randn(257, 1000, device='cuda').bfloat16()\n"
        "for r in (7, 16, 48, 100):\n"
        "    a, b = torch.randn(r, 1000, device='cuda'), torch.randn(257, r, device='cuda')\n"
        "    print(lk.dora_weight_norm(w, a, b, backend='cuda').sum().item())"
    )
    done = subprocess.run([tool, "--error-exitcode", "9", sys.executable, "-c", script], capture_output=True, text=True)
    if done.returncode:
        yield f"compute-sanitizer: exit code {done.returncode}: {done.stdout[-300:]}"


def _cublas(x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    """cuBLAS alone: two thin products, the main one, and `addmm_`."""
    return torch.nn.functional.linear(x, weight).addmm_(x @ lora_a.T, lora_b.T, alpha=2.0)


def time_strategies(device: torch.device, end: float) -> tuple[list[dict[str, object]], list[str]]:
    """Each strategy of the LoRA forward over the frozen linear, and what the analytic rule chose."""
    rows: list[dict[str, object]] = []
    failures: list[str] = []
    target = target_of(device)
    for shape in OPS["lora_linear"].gpu_shapes:
        if shape["R"] != 16:
            continue
        if time.monotonic() > end:
            failures.append(f"time: strategies stopped before {dict(shape)}")
            break
        o = OPS["lora_linear"].make(shape, torch.bfloat16, device)
        calls: dict[str, Callable[[], object]] = {"frozen": partial(torch.nn.functional.linear, o["x"], o["weight"])}
        calls["cublas"] = partial(_cublas, *o.values())
        M, K, N, R = (shape[k] for k in "MKNR")
        for strategy in STRATEGIES:
            tiles = lora_tiles(target, M, K, N, R, torch.bfloat16, False, strategy=strategy)
            call = partial(launchers.lora_linear_fwd, *o.values(), tiles, scaling=2.0, store_p=False)
            try:
                call()
                calls[strategy] = call
            except Exception as error:
                failures.append(f"{strategy} {dict(shape)}: {type(error).__name__}: {str(error)[:300]}")
        with torch.no_grad():
            samples = interleaved(calls, 0.2, device)
        row: dict[str, object] = {**shape, "frozen_us": samples["frozen"].median * 1e6}
        row |= {name: sample.median / samples["frozen"].median for name, sample in samples.items() if name != "frozen"}
        row["chosen"] = lora_tiles(target, M, K, N, R, torch.bfloat16, False).strategy
        rows.append(row)
        print("  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows, failures


def time_ops(device: torch.device, dry: bool, end: float) -> tuple[list[Row], list[str]]:
    """Every op beside plain PyTorch and PEFT's calls until the time is up, the first shape of each op first.

    torch.compile takes part in the first two shapes of an op alone: it takes longer to compile than to measure.
    """
    providers = ["floor", "plain", "peft", "ours"]
    dtype = torch.bfloat16
    roofs: Roofs = measure_roofs(dtype, device, 0.2)
    print(f"measured roofs: {roofs.bytes_per_s / 1e12:.2f} TB/s copied, {roofs.flops_per_s / 1e12:.0f} TFLOP/s")
    waiting = []
    for op, bench in OPS.items():
        shapes = [problem.shape for problem in problems(op, dry)][::6] if dry else bench.gpu_shapes
        for place, shape in enumerate(shapes):
            for training in {False, bool(bench.trained)}:
                waiting.append((place, op, Problem(shape, dtype, training)))
    rows: list[Row] = []
    left = 0
    for place, op, problem in sorted(waiting, key=lambda item: item[0]):
        if time.monotonic() > end:
            left += 1
            continue
        names = providers if dry or place > 1 else [*providers, "compile"]
        rows += measure(OPS[op], problem, names, 0.0 if dry else 0.15, device, roofs)
    return rows, [f"time: {left} of {len(waiting)} benchmark problems were left out"] if left else []


def tune_ops(path: Path, device: torch.device, dry: bool, end: float) -> list[str]:
    """What `lrk tune` does, until the time is up, for half precision, a shape of each op before the next of any."""
    path.unlink(missing_ok=True)
    work = []
    for tunable in tunables(device.type).values():
        some = [problem.shape for problem in problems(tunable.bench, dry)][:1] if dry else shapes(tunable, device.type)
        work += [(place, tunable, Problem(shape, torch.bfloat16, tunable.training)) for place, shape in enumerate(some)]
    work.sort(key=lambda item: item[0])
    found = list(tune(path, [item[1:] for item in work], 0.0 if dry else 0.1, end - time.monotonic(), device))
    settled = [(key, what) for key, what in found if isinstance(what, Settled)]
    for key, what in settled:
        refused = "".join(f"; refused {name}: {why}" for name, why in what.refused.items())
        print(f"{key}: {words(what.plan)}, {what.over_plain:.2f} of plain PyTorch's time{refused}", flush=True)
    print(f"tuned {len(settled)} of {len(found)} classes of shapes; the table: {path}")
    return [f"tune: {key}: {what}" for key, what in found if isinstance(what, str)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="the same script on a CPU, at small sizes")
    parser.add_argument("--seconds", type=float, default=360.0, help="stop starting new shapes after this time")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; nothing was checked", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.dry else "cuda")
    start = time.monotonic()
    failures = [*check_values(device, args.dry), *check_codes(device, args.dry), *check_determinism(device, args.dry)]
    strategies: list[dict[str, object]] = []
    if not args.dry:
        failures += [*check_graph_capture(device), *check_streams(device), *sanitize()]
        strategies, more = time_strategies(device, start + 0.6 * args.seconds)
        failures += more
    rows, more = time_ops(device, args.dry, start + args.seconds)
    failures += more
    failures += [f"{r.op} {r.shape} {r.mode}: {r.reason}" for r in rows if r.provider == "ours" and r.reason]
    where = conditions(device, " ".join(["python", *sys.argv]))
    args.results.mkdir(parents=True, exist_ok=True)
    name = "dry" if args.dry else "gpu"
    failures += tune_ops(args.results / f"{name}_tune.json", device, args.dry, start + args.seconds + 75)
    write_csv(args.results / f"{name}_bench.csv", rows, where)
    found = {"conditions": where, "strategies_over_frozen": strategies, "failures": failures}
    (args.results / f"{name}_check.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{len(rows)} rows in {args.results / f'{name}_bench.csv'}; {time.monotonic() - start:.0f} s")
    if args.dry:
        print("a dry run on a CPU: graph capture, streams, compute-sanitizer and strategies were left out")
    print("failed:" if failures else "nothing failed")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
