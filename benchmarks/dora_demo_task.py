"""DoRA, ours and PEFT's, on the same steps of the demo's task, from the same factors.

python benchmarks/dora_demo_task.py [--steps N] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from cost_over_frozen import conditions

import lowrank_kernels as lk
from lowrank_kernels.cli.batches import batches
from lowrank_kernels.cli.demo import peft_twin
from lowrank_kernels.cli.evaluation import held_out_loss
from lowrank_kernels.cli.factors import adapter_config
from lowrank_kernels.cli.loop import Run
from lowrank_kernels.cli.methods import METHODS
from lowrank_kernels.cli.train import add_training_arguments, load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_training_arguments(parser, steps=10, warmup_steps=1)
    parser.set_defaults(held_out=64, batch_size=8, learning_rate=METHODS["dora"].learning_rate)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    base, tokenizer, examples, held_out = load_task(args)
    torch.manual_seed(args.seed)
    ours = copy.deepcopy(base)
    lk.adapt(ours, adapter_config(args, lk.DoRAConfig))
    runs = [
        Run("ours", ours, args.learning_rate, args.steps),
        Run("PEFT", peft_twin(base, ours, args, dora=True), args.learning_rate, args.steps),
    ]
    before = held_out_loss(runs[0].model, tokenizer, held_out, args.batch_size, args.device)
    stream = batches(tokenizer, examples, args.batch_size, args.seed, args.device)
    for _ in range(args.steps):
        batch = next(stream)
        print("  ".join(f"{run.name} {run.step(batch):.6f}" for run in runs), flush=True)
    after = [held_out_loss(run.model, tokenizer, held_out, args.batch_size, args.device) for run in runs]
    difference = max(abs(a - b) for a, b in zip(*(run.losses for run in runs), strict=True))
    print(f"held-out loss {before:.4f} -> ours {after[0]:.6f}, PEFT {after[1]:.6f}; curves differ by {difference:.1e}")
    if args.json:
        result = {
            "conditions": conditions(),
            "steps": args.steps,
            "batch_size": args.batch_size,
            "rank": args.rank,
            "before": before,
            "after": {run.name: loss for run, loss in zip(runs, after, strict=True)},
            "curve_difference": difference,
            "losses": {run.name: run.losses for run in runs},
            "seconds_per_step": {run.name: run.median_seconds() for run in runs},
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
