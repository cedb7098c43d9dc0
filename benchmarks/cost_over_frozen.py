"""What the correction costs: LoRA linear over the frozen linear alone, ours and PEFT's, interleaved in one run.

    python benchmarks/cost_over_frozen.py [--json FILE]

Each figure is the ratio of medians to `torch.nn.functional.linear` with the same frozen weight, forward alone
("inference") or forward and backward with a gradient for x ("training"). Each candidate takes turns with the frozen
linear and with nothing else: whatever else the machine does falls on both, and no third party empties the caches.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

import lowrank_kernels as lk
from lowrank_kernels.bench import interleaved


def frozen(x: torch.Tensor, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: torch.nn.functional.linear(value, weight)


def ours(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dropout_p: float) -> Callable:
    return lambda value: lk.lora_linear(value, weight, a, b, scaling=2.0, dropout_p=dropout_p)


def peft_like(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dropout_p: float) -> Callable:
    """The sequence of torch calls that PEFT's LoRA `Linear.forward` makes."""

    def call(value: torch.Tensor) -> torch.Tensor:
        result = torch.nn.functional.linear(value, weight)
        dropped = torch.nn.functional.dropout(value.to(a.dtype), dropout_p)
        down = torch.nn.functional.linear(dropped, a)
        return (result + torch.nn.functional.linear(down, b) * 2.0).to(value.dtype)

    return call


def dora(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, training: bool) -> Callable:
    """As the layer does it: in training it keeps the norm of W, in inference that of W + s B A."""
    norm, scale, sq_norm = lk.functional.dora_column_scale(weight, a, b, m, scaling=2.0)
    kept = {"weight_sq_norm": sq_norm} if training else {"norm_and_scale": (norm, scale)}
    return lambda value: lk.dora_linear(value, weight, a, b, m, scaling=2.0, **kept)


def peft_like_dora(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> Callable:
    """The sequence of torch calls that PEFT's DoRA makes, dense B A included."""

    def call(value: torch.Tensor) -> torch.Tensor:
        base = torch.nn.functional.linear(value, weight)
        identity = torch.eye(a.shape[1], dtype=value.dtype)
        dense = torch.nn.functional.linear(torch.nn.functional.linear(identity, a), b).T
        norm = torch.linalg.norm(weight + 2.0 * dense, dim=1).to(weight.dtype).detach()
        scale = (m / norm).view(1, -1)
        down = torch.nn.functional.linear(value, a)
        return base + (scale - 1) * base + scale * torch.nn.functional.linear(down, b) * 2.0

    return call


def measure(
    tokens: int, size: int, rank: int, dtype: torch.dtype, training: bool, dropout_p: float, seconds: float
) -> dict:
    x = torch.randn(tokens, size).to(dtype).requires_grad_(training)
    weight = (torch.randn(size, size) / size**0.5).to(dtype)
    a = (torch.randn(rank, size) / size**0.5).to(dtype).requires_grad_(training)
    b = torch.randn(size, rank).to(dtype).requires_grad_(training)
    grad_y = torch.randn(tokens, size).to(dtype)
    calls = {
        "frozen": frozen(x, weight),
        "ours": ours(weight, a, b, dropout_p),
        "peft-like": peft_like(weight, a, b, dropout_p),
    }
    m = weight.float().norm(dim=1).to(dtype).requires_grad_(training)
    if dropout_p == 0.0:
        calls["dora"] = dora(weight, a, b, m, training)
        calls["peft-like dora"] = peft_like_dora(weight, a, b, m)

    def run(call: Callable) -> Callable[[], object]:
        if training:
            return lambda: torch.autograd.grad(call(x), [x, a, b, m], grad_y, allow_unused=True)

        def inference() -> object:
            with torch.no_grad():
                return call(x)

        return inference

    baseline = run(calls.pop("frozen"))
    pairs = {}
    for name, call in calls.items():
        samples = interleaved({"frozen": baseline, name: run(call)}, seconds, torch.device("cpu"))
        pairs[name] = samples["frozen"].median, samples[name].median
    return {
        "tokens": tokens,
        "K": size,
        "N": size,
        "R": rank,
        "dtype": str(dtype).removeprefix("torch."),
        "mode": "training" if training else "inference",
        "dropout_p": dropout_p,
        "frozen_us": statistics.median(frozen for frozen, _ in pairs.values()) * 1e6,
        "over_frozen": {name: value / frozen for name, (frozen, value) in pairs.items()},
    }


def conditions() -> dict[str, str]:
    def command(*words: str) -> str:
        return subprocess.run(words, capture_output=True, text=True).stdout.strip()

    model = [line.split(":")[1].strip() for line in command("lscpu").splitlines() if line.startswith("Model name")]
    return {
        "device": f"{model[0] if model else platform.processor()}, {torch.get_num_threads()} threads",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": command("git", "rev-parse", "--short", "HEAD"),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="a candidate")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    columns = ("ours", "peft-like", "dora", "peft-like dora")
    print(f"{'dtype':9} {'tokens':>6} {'mode':10} {'p':>4} {'frozen us':>10} " + " ".join(f"{c:>14}" for c in columns))
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1024, 16):
            for training, dropout_p in ((True, 0.0), (False, 0.0), (True, 0.1)):
                row = measure(tokens, args.size, args.rank, dtype, training, dropout_p, args.seconds)
                rows.append(row)
                over = row["over_frozen"]
                print(
                    f"{row['dtype']:9} {tokens:6} {row['mode']:10} {dropout_p:4} {row['frozen_us']:10.0f} "
                    + " ".join(f"{over[c]:14.3f}" if c in over else f"{'-':>14}" for c in columns),
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
