"""What a LoRA step over a base of few bits costs on a CPU, beside PEFT over bitsandbytes and beside our own dense step.

    python benchmarks/qlora_cost.py [--json FILE] [--formats nf4,int8,fp8,mxfp4] [--size 2048] [--rank 16]

bfloat16, K = N. Ours takes turns with the dense call, and apart from that with PEFT's; medians; forward and backward
with a gradient for x ("step"), and forward alone ("inference"). Before it is timed, each result of ours is compared
with the same call over the dense weight that the codes stand for. Without bitsandbytes, PEFT's column is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.cli.environment import environment
from lowrank_kernels.weights import FORMATS, of

TOKENS = (1, 16, 256, 1024)


def in_turns(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """The median time of each call, which take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while len(times[next(iter(calls))]) < 5 or time.perf_counter() < end:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def peft_over_bitsandbytes(size: int, rank: int) -> tuple[Any, Any] | None:
    """PEFT's LoRA over a ``Linear4bit``, and the weight that it holds; None where a package is missing."""
    try:
        import bitsandbytes as bnb
        import peft
    except ImportError:
        return None
    linear = bnb.nn.Linear4bit(size, size, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    linear.load_state_dict(nn.Linear(size, size, bias=False).bfloat16().state_dict())
    base = nn.Sequential(linear.to("cpu"))
    weight: Any = of(base[0])
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False))
    return model.bfloat16(), weight.to(torch.bfloat16)


def timed(call: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor, mode: str) -> Callable[[], Any]:
    return (lambda: call(x).backward(grad)) if mode == "step" else (lambda: call(x))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="nf4,int8,fp8,mxfp4")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a row")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    size, rank = options.size, options.rank
    torch.manual_seed(0)
    peft = peft_over_bitsandbytes(size, rank)
    a = (torch.randn(rank, size) / size**0.5).bfloat16().requires_grad_()
    b = torch.randn(size, rank).bfloat16().requires_grad_()
    dense = (torch.randn(size, size) / size**0.5).bfloat16()
    print(f"{'format':8}{'tokens':>7} {'mode':10}{'dense us':>10}{'ours us':>10}{'over dense':>12}{'over PEFT':>11}")
    rows = []
    for name in options.formats.split(","):
        kind: Any = FORMATS[name]
        weight = kind.from_dense(dense)
        if name == "nf4" and peft is not None:
            weight = peft[1]
        for tokens in TOKENS:
            x = torch.randn(tokens, size).bfloat16().requires_grad_()
            grad = torch.randn(tokens, size).bfloat16()
            exact = lk.lora_linear(x, weight.dense(), a, b, backend="cpu")
            torch.testing.assert_close(lk.lora_linear(x, weight, a, b), exact, rtol=0.02, atol=0.1)
            ours, known = (lambda x, w=w: lk.lora_linear(x, w, a, b) for w in (weight, dense))
            for mode in ("step", "inference"):
                with torch.set_grad_enabled(mode == "step"):
                    pair = {"ours": timed(ours, x, grad, mode), "dense": timed(known, x, grad, mode)}
                    found = in_turns(pair, options.seconds)
                    if name == "nf4" and peft is not None and mode == "step":
                        # Step alone: its evaluation lays the weight out anew, from which there is no way back.
                        beside = in_turns(
                            {"ours": pair["ours"], "peft": timed(peft[0], x, grad, mode)}, options.seconds
                        )
                        found |= {"peft": beside["peft"], "ours_beside_peft": beside["ours"]}
                row = {"format": name, "tokens": tokens, "mode": mode, **{f"{n}_us": t * 1e6 for n, t in found.items()}}
                rows.append(row)
                over = f"{found['ours_beside_peft'] / found['peft']:11.2f}" if "peft" in found else f"{'-':>11}"
                print(
                    f"{name:8}{tokens:>7} {mode:10}{found['dense'] * 1e6:>10.0f}{found['ours'] * 1e6:>10.0f}"
                    f"{found['ours'] / found['dense']:>12.2f}{over}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(
            json.dumps(
                {
                    "environment": {**environment(), "command": " ".join(["python", *sys.argv])},
                    "size": size,
                    "rank": rank,
                    "rows": rows,
                },
                indent=1,
            )
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
