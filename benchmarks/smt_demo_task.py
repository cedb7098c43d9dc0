"""SMT, LoRA, DoRA and full fine-tuning on the demo's task: held-out loss over seeds, with its spread.

    python benchmarks/smt_demo_task.py [--seeds 3] [--steps 15] [--json FILE]

SMT and LoRA train as many parameters (SMT: whole blocks, rounded down; DoRA: LoRA's and the magnitudes). A seed is one
order of the examples and one initialisation, and for SMT one warm-up, which is not counted as steps: it makes no
updates. SMT's rate is the better of two on a seed that the table does not use; LoRA's and DoRA's are those of the
demo, and that of full fine-tuning is a usual one, untuned. --sweep compares rates on such a seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from cost_over_frozen import conditions

import lowrank_kernels as lk
from lowrank_kernels.cli.batches import batches
from lowrank_kernels.cli.evaluation import held_out_loss
from lowrank_kernels.cli.factors import adapter_config
from lowrank_kernels.cli.loop import Run, adamw
from lowrank_kernels.cli.method import TARGETS
from lowrank_kernels.cli.smt import select_blocks
from lowrank_kernels.cli.train import add_training_arguments, load_task

RATES = {"SMT": 3e-4, "LoRA": 2e-3, "DoRA": 2e-3, "full": 1e-4}
SWEEP = {"SMT": (3e-4, 1e-3, 3e-3), "LoRA": (1e-3, 2e-3, 5e-3), "full": (3e-5, 1e-4, 3e-4)}


def trained(method: str, rate: float, task: tuple[Any, ...], args: argparse.Namespace, config: Any) -> dict[str, Any]:
    """One run: held-out loss after the steps."""
    base, tokenizer, examples, held_out = task
    model, optimizer = copy.deepcopy(base), adamw
    torch.manual_seed(args.seed)
    if method == "SMT":
        lk.adapt(model, config)
        optimizer = lk.optim.BlockAdamW
    elif method != "full":
        lk.adapt(model, adapter_config(args, lk.DoRAConfig if method == "DoRA" else lk.LoRAConfig))
    run = Run(method, model, rate, args.steps, optimizer)
    stream = batches(tokenizer, examples, args.batch_size, args.seed, args.device)
    for _ in range(args.steps):
        run.step(next(stream))
    loss = held_out_loss(model, tokenizer, held_out, args.batch_size, args.device)
    print(f"seed {args.seed} {method:5} rate {rate:g}: {loss:.4f} ({run.trainable} parameters)", flush=True)
    return {"method": method, "rate": rate, "seed": args.seed, "held_out": loss, "trainable": run.trainable}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_training_arguments(parser, steps=15, warmup_steps=8)
    parser.set_defaults(held_out=64)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sweep", action="store_true", help="compare rates on a seed that the table does not use")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    task = load_task(args)
    runs = []
    for seed in [1000] if args.sweep else range(args.seeds):
        args.seed = seed
        probe = copy.deepcopy(task[0])
        trainable = lk.adapt(probe, adapter_config(args)).trainable
        del probe
        others = batches(task[1], task[2], args.batch_size, seed + 1, args.device)
        selection = select_blocks(task[0], others, args, TARGETS, blocks=trainable // args.block_size**2)
        config = lk.SMTConfig(selection=selection)
        for method, rate in RATES.items():
            for tried in SWEEP.get(method, ()) if args.sweep else (rate,):
                runs.append(trained(method, tried, task, args, config))
    if args.sweep:
        return
    before = held_out_loss(task[0], task[1], task[3], args.batch_size, args.device)
    rows = []
    for method in RATES:
        losses = [r["held_out"] for r in runs if r["method"] == method]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        trainable = next(r["trainable"] for r in runs if r["method"] == method)
        rows.append(
            {
                "method": method,
                "rate": RATES[method],
                "trainable": trainable,
                "losses": losses,
                "mean": statistics.mean(losses),
                "standard_deviation": spread,
            }
        )
        print(f"{method:5} {trainable:>10} {statistics.mean(losses):.4f} ± {spread:.4f}")
    if args.json:
        settings = {
            "steps": args.steps,
            "batch_size": args.batch_size,
            "rank": args.rank,
            "held_out": args.held_out,
            "block_size": args.block_size,
            "warmup_steps": args.warmup_steps,
            "seeds": args.seeds,
        }
        result = {"conditions": conditions(), "settings": settings, "before": before, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
