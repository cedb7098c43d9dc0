"""Training several adapters in one batch, over training them one after another: SmolLM2 on a CPU.

    python benchmarks/train_many_adapters.py [--json FILE] [--tokens 16 64 256] [--adapters 8]

A step is forward, backward and AdamW for every adapter, each with one sequence of its own. "together": one batch of all
sequences, one backward, one optimizer. "apart": a LoRA model per adapter (`lk.LoRAConfig`, the base shared), a step
each. The two take turns. Losses are compared over the first steps, from the same factors.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cost_over_frozen import conditions

import lowrank_kernels as lk
from lowrank_kernels.integrations.transformers import load_language_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def losses_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def together(model: Any, optimizer: Any, tokens: torch.Tensor) -> list[float]:
    with lk.nn.use_adapters(torch.arange(len(tokens))):
        losses = losses_of(model, tokens)
        losses.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return losses.tolist()


def apart(models: list[Any], optimizers: list[Any], tokens: torch.Tensor) -> list[float]:
    found = []
    for row, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
        losses = losses_of(model, tokens[row : row + 1])
        losses.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found += losses.tolist()
    return found


def models(base: Any, adapters: int, rank: int) -> tuple[Any, list[Any]]:
    """One model that trains all adapters, and a model for each, from the same factors over the same base."""
    shared = {id(p): p for p in base.parameters()}
    batched = copy.deepcopy(base, dict(shared))
    lk.adapt(batched, lk.MultiLoRAConfig(ranks=[rank] * adapters, target_modules=TARGETS))
    single = []
    for i in range(adapters):
        model = copy.deepcopy(base, dict(shared))
        lk.adapt(model, lk.LoRAConfig(r=rank, target_modules=TARGETS))
        with torch.no_grad():
            for name, layer in batched.named_modules():
                if isinstance(layer, lk.nn.MultiLoRALinear):
                    model.get_submodule(name).lora_A.weight.copy_(layer.stack.factors(i)[0])
        single.append(model)
    return batched, single


def optimizer(model: Any) -> Any:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="results; those of other numbers of tokens in it are kept")
    parser.add_argument("--tokens", type=int, nargs="*", default=[16, 64, 256])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="steps after the first; 0: the first alone")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    base, _ = load_language_model("smollm2", torch.float32)
    base.requires_grad_(False)
    found = []
    for count in args.tokens:
        batched, single = models(base, args.adapters, args.rank)
        of_batched, of_single = optimizer(batched), [optimizer(model) for model in single]
        tokens = torch.randint(0, 40000, (args.adapters, count), generator=torch.Generator().manual_seed(count))
        steps: dict[str, Callable[[], list[float]]] = {
            "together": partial(together, batched, of_batched, tokens),
            "apart": partial(apart, single, of_single, tokens),
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        difference = 0.0
        for step in range(args.rounds + 1):
            losses = {}
            for name, call in steps.items():
                start = time.perf_counter()
                losses[name] = call()
                if step or not args.rounds:  # 0: one step, the first
                    times[name].append(time.perf_counter() - start)
            apart_now = losses["apart"]
            difference = max(difference, *(abs(a - b) / b for a, b in zip(losses["together"], apart_now, strict=True)))
        seconds = {name: statistics.median(values) for name, values in times.items()}
        found.append(
            {
                "tokens": count,
                "adapters": args.adapters,
                "R": args.rank,
                "seconds": seconds,
                "ratio": seconds["together"] / seconds["apart"],
                "largest_relative_loss_difference": difference,
            }
        )
        print(
            f"{args.adapters} adapters x {count} tokens: together {seconds['together']:.3f} s, "
            f"apart {seconds['apart']:.3f} s, ratio {found[-1]['ratio']:.2f}, losses within {difference:.1e}",
            flush=True,
        )
    if args.json:
        there = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        found = [row for row in there if row["tokens"] not in args.tokens] + found
        args.json.write_text(json.dumps({"conditions": conditions(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
