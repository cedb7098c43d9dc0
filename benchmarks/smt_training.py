"""What training SmolLM2-135M takes: full fine-tuning, LoRA and SMT, memory and time a step.

    python benchmarks/smt_training.py memory [--json FILE]
    python benchmarks/smt_training.py time [--methods LoRA SMT] [--json FILE]

Sequence 256, batch 2, float32, gradient checkpointing in all, SMT with 0.86% of all parameters in blocks of 64
chosen by the gradients of two batches, LoRA of the rank whose parameters come nearest. Tokens are random, and every
token is predicted: neither memory nor time depends on their values.

memory: each method in a process of its own. The peak is what torch's allocator holds at most: the model and the
optimizer's state, and what a step (the third) allocates beyond, by the profiler; the resident set at its highest stands
beside it, libraries included. SMT's warm-up, which needs dense gradients one by one, is no part of the training
phase: the selection comes from a process of its own.
time: all in one process, taking turns; medians.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cost_over_frozen import conditions
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk
from lowrank_kernels.cli.method import TARGETS
from lowrank_kernels.cli.peak_memory import peak_allocated
from lowrank_kernels.integrations.transformers import answer_loss, load_language_model

BUDGET, BLOCK, SEQUENCE, BATCH = 0.0086, 64, 256, 2
METHODS = ("full", "LoRA", "SMT")


def batch_of(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40_000, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def base_model() -> Any:
    model, _ = load_language_model("smollm2", torch.float32)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def select(path: Path) -> None:
    """The selection, to a file."""
    scores = lk.smt.warm_up(
        base_model(),
        [batch_of(s) for s in (1, 2)],
        lambda m, b: answer_loss(m, **b),
        block_size=BLOCK,
        target_modules=TARGETS,
    )
    save_file(dict(scores.select(BUDGET, of="parameters").blocks), path)


def selection_of(model: Any, path: Path) -> lk.smt.BlockSelection:
    blocks = load_file(path)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in blocks}
    return lk.smt.BlockSelection(blocks, shapes, BLOCK)


def trained(method: str, model: Any, path: Path) -> tuple[Any, Any]:
    """(model, optimizer), ready for a step."""
    if method == "full":
        return model, torch.optim.AdamW(model.parameters(), lr=1e-5)
    selection = selection_of(model, path)
    if method == "SMT":
        lk.adapt(model, lk.SMTConfig(selection=selection))
        return model, lk.optim.BlockAdamW(model, lr=1e-4)
    sizes = [(m.in_features + m.out_features) for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in TARGETS]
    lk.adapt(model, lk.LoRAConfig(r=max(1, round(selection.elements / sum(sizes))), target_modules=TARGETS))
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)


def step(model: Any, optimizer: Any, batch: dict[str, torch.Tensor]) -> None:
    answer_loss(model, **batch).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tensor_bytes(tensors: Any) -> int:
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in tensors}.values())


def one_memory(method: str, path: Path) -> dict[str, Any]:
    model, optimizer = trained(method, base_model(), path)
    batch = batch_of(0)
    for _ in range(2):
        step(model, optimizer, batch)
    held = tensor_bytes([*model.parameters(), *model.buffers()])
    state = tensor_bytes(t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor))
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    extra = peak_allocated(lambda: step(model, optimizer, batch), torch.device("cpu"))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "method": method,
        "trainable": trainable,
        "model_bytes": held,
        "optimizer_bytes": state,
        "step_bytes": extra,
        "peak_bytes": held + state + extra,
        "resident_bytes": highest,
    }


def memory(path: Path) -> list[dict[str, Any]]:
    rows = []
    for method in METHODS:
        found = subprocess.run(
            [sys.executable, __file__, "one", "--method", method, "--selection", str(path)],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        )
        rows.append(json.loads(found.stdout.splitlines()[-1]))
    full = rows[0]
    for row in rows:
        for name in ("peak", "resident", "optimizer"):
            row[f"{name}_over_full"] = row[f"{name}_bytes"] / full[f"{name}_bytes"]
        print(
            f"{row['method']:5} {row['trainable']:>10} trainable; peak {row['peak_bytes'] / 2**20:7.0f} MiB "
            f"({row['peak_over_full']:.3f} of full), resident {row['resident_bytes'] / 2**20:7.0f} MiB "
            f"({row['resident_over_full']:.3f}), optimizer {row['optimizer_bytes'] / 2**20:7.1f} MiB "
            f"({row['optimizer_over_full']:.4f})"
        )
    return rows


def times(path: Path, methods: list[str], rounds: int) -> list[dict[str, Any]]:
    base = base_model()
    ready = {method: trained(method, copy.deepcopy(base), path) for method in methods}
    del base
    batch = batch_of(0)
    for pair in ready.values():
        step(*pair, batch)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for turn in range(rounds):
        for method in methods if turn % 2 == 0 else methods[::-1]:
            start = time.perf_counter()
            step(*ready[method], batch)
            seconds[method].append(time.perf_counter() - start)
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    rows = []
    for method, (model, _) in ready.items():
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        row = {"method": method, "trainable": trainable, "seconds": medians[method]}
        rows.append({**row, "over_first": medians[method] / medians[methods[0]]})
        over = f"{rows[-1]['over_first']:.3f} of {methods[0]}"
        print(f"{method:5} {trainable:>10} trainable: {medians[method]:.3f} s a step, {over}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("memory", "time", "one", "select"))
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--selection", type=Path, help="keep the selection here, and take it from here if it is there")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["LoRA", "SMT"], help="of time")
    parser.add_argument("--rounds", type=int, default=7, help="of time")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = args.selection or Path(folder) / "selection.safetensors"
        if not path.exists():
            if args.what == "select":
                return select(path)
            subprocess.run([sys.executable, __file__, "select", "--selection", str(path)], check=True)
        if args.what == "one":
            return print(json.dumps(one_memory(args.method, path)))
        rows = memory(path) if args.what == "memory" else times(path, args.methods, args.rounds)
    if args.json:
        settings = {"sequence": SEQUENCE, "batch": BATCH, "budget": BUDGET, "block_size": BLOCK}
        args.json.write_text(
            json.dumps({"conditions": conditions(), "settings": settings, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    sys.exit(main())
