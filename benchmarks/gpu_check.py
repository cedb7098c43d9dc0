"""What only a machine with a GPU can tell: correctness at full size, determinism, graph capture, and times.

    python benchmarks/gpu_check.py [--json FILE]

Exit code 0 when everything held, 1 when something did not, 2 where there is no CUDA device (nothing is checked then).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import lowrank_kernels as lk
from lowrank_kernels.kernels import lora as launchers
from lowrank_kernels.kernels.lora_tiles import lora_tiles
from lowrank_kernels.kernels.target import target_of

SHAPES = [
    (m, k, n) for k, n in ((4096, 4096), (4096, 14336), (14336, 4096), (4096, 1024)) for m in (1, 16, 64, 2048, 8192)
]
STRATEGIES = ("fused", "two_kernel", "library")


def operands(m: int, k: int, n: int, r: int, dtype: torch.dtype, factor_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    def normal(*shape: int, scale: float, of: torch.dtype) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(of)

    return {
        "x": normal(m, k, scale=1.0, of=dtype), "weight": normal(n, k, scale=k**-0.5, of=dtype),
        "lora_a": normal(r, k, scale=k**-0.5, of=factor_dtype), "lora_b": normal(n, r, scale=r**-0.5, of=factor_dtype),
    }  # fmt: skip


def eager(x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight) + 2.0 * (x @ lora_a.to(x.dtype).T @ lora_b.to(x.dtype).T)


def gradients(function: Callable, o: dict[str, torch.Tensor], grad_y: torch.Tensor) -> list[torch.Tensor]:
    leaves = {name: t.detach().requires_grad_(name != "weight") for name, t in o.items()}
    y = function(**leaves)
    return [y, *torch.autograd.grad(y, [leaves[n] for n in ("x", "lora_a", "lora_b")], grad_y.to(y.dtype))]


def errors(o: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest error of y, dX, dA, dB over eager PyTorch's own, both against float64."""
    grad_y = torch.randn(o["x"].shape[0], o["weight"].shape[0], device="cuda").to(o["x"].dtype)
    oracle = gradients(eager, {name: t.double() for name, t in o.items()}, grad_y)
    ours = gradients(lambda **t: lk.lora_linear(**t, scaling=2.0, backend="triton"), o, grad_y)
    theirs = gradients(eager, o, grad_y)
    ratios = {}
    for name, mine, plain, exact in zip(("y", "dX", "dA", "dB"), ours, theirs, oracle, strict=True):
        unit = torch.finfo(mine.dtype).eps * exact.abs().max()
        ratios[name] = float((mine.double() - exact).abs().max() / ((plain.double() - exact).abs().max() + unit))
    return ratios


def median_us(function: Callable[[], object], repeats: int = 30) -> float:
    for _ in range(5):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def check_graph_capture(o: dict[str, torch.Tensor]) -> bool:
    """A captured call replayed on other values gives what a plain call gives."""
    with torch.no_grad():
        for _ in range(3):
            lk.lora_linear(**o, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = lk.lora_linear(**o, backend="triton")
        o["x"].normal_()
        graph.replay()
        return torch.equal(y, lk.lora_linear(**o, backend="triton"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--seconds", type=float, default=420.0, help="stop starting new shapes after this time")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-check: no CUDA device here; nothing was checked", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    end = time.monotonic() + args.seconds
    failures: list[str] = []
    rows: list[dict[str, object]] = []

    for dtype, factor_dtype in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ):
        for m, k, n, r in ((1, 4096, 4096, 16), (70, 1000, 1352, 7), (2048, 4096, 4096, 64), (2048, 2048, 2048, 256)):
            name = f"{dtype} factors {factor_dtype} M={m} K={k} N={n} R={r}"
            try:
                ratios = errors(operands(m, k, n, r, dtype, factor_dtype))
                bad = {t: round(v, 2) for t, v in ratios.items() if v > (2.0 if t == "y" else 3.0)}
                shown = {t: round(v, 2) for t, v in ratios.items()}
                print(f"{'FAIL' if bad else 'ok':5} {name}: error over eager's {shown}")
                if bad:
                    failures.append(f"correctness: {name}: {bad}")
            except Exception as error:  # a compiler or launch error of one case must not hide the others
                failures.append(f"correctness: {name}: {type(error).__name__}: {str(error)[:300]}")
                print(f"FAIL  {name}: {error}")
    o = operands(256, 4096, 4096, 16, torch.bfloat16, torch.bfloat16)
    runs = [lk.lora_linear(**o, dropout_p=0.1, dropout_seed=1, backend="triton") for _ in range(20)]
    if any(not torch.equal(run, runs[0]) for run in runs):
        failures.append("determinism: 20 runs differ")
    if not check_graph_capture(o):
        failures.append("graph capture: a replay differs from a plain call")

    print(
        f"\n{'M':>5} {'K':>6} {'N':>6} {'frozen us':>10} {'eager':>6} "
        + " ".join(f"{s:>10}" for s in STRATEGIES)
        + "  chosen"
    )
    for m, k, n in SHAPES:
        if time.monotonic() > end:
            failures.append(f"time: stopped before M={m} K={k} N={n}")
            break
        o = operands(m, k, n, 16, torch.bfloat16, torch.bfloat16)
        with torch.no_grad():
            frozen = median_us(lambda o=o: torch.nn.functional.linear(o["x"], o["weight"]))
            row: dict[str, object] = {"M": m, "K": k, "N": n, "R": 16, "frozen_us": frozen,
                                      "eager": median_us(lambda o=o: eager(**o)) / frozen}  # fmt: skip
            target = target_of(o["x"].device)
            for strategy in STRATEGIES:
                tiles = lora_tiles(target, m, k, n, 16, torch.bfloat16, False, strategy)
                try:
                    arguments = (*o.values(), None, None, 2.0, 0.0, None, False, tiles)
                    row[strategy] = median_us(partial(launchers.lora_linear_fwd, *arguments)) / frozen
                except Exception as error:
                    failures.append(f"{strategy} M={m} K={k} N={n}: {type(error).__name__}: {str(error)[:300]}")
                    row[strategy] = float("nan")
            row["chosen"] = lora_tiles(target, m, k, n, 16, torch.bfloat16, False).strategy
        rows.append(row)
        print(
            f"{m:5} {k:6} {n:6} {frozen:10.1f} {row['eager']:6.2f} "
            + " ".join(f"{row[s]:10.2f}" for s in STRATEGIES)
            + f"  {row['chosen']}"
        )

    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({
        "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "unit": "times over the frozen linear alone", "rows": rows, "failures": failures,
    }, indent=1) + "\n")  # fmt: skip
    print("\nfailed:" if failures else "\nnothing failed")
    for failure in failures:
        print(f"  {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
