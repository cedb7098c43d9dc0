"""Memory and time of a training step of SmolLM2-135M: full fine-tuning, LoRA, and what trains with less.

    python benchmarks/methods/step_memory.py [--threads N] [--rounds N] [NAME ...]

Sequences of 256 tokens, 2 at once, float32; ranks and other settings are those of `lrk train`. Per row, in MiB: what
the optimizer keeps between steps ("state"); the most that torch's allocator holds during a whole step besides that and
the weights ("peak"); the sum of both with the weights ("all"); and what autograd saves in the decoder's forward, the
model's own tensors left out ("saved"). A step is forward, backward and optimizer; its time is a ratio to LoRA's, the
two in turns, medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from activations import saved_bytes
from plots import RESULTS

from lowrank_kernels.cli.galore import train_weights_
from lowrank_kernels.cli.method import TARGETS
from lowrank_kernels.cli.methods import METHODS, add_method_arguments
from lowrank_kernels.cli.peak_memory import peak_allocated
from lowrank_kernels.integrations.transformers import load_language_model
from lowrank_kernels.optim import GaLore, galore_groups

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cost_over_frozen import conditions

ROWS: dict[str, tuple[str, ...]] = {
    "full": (),
    "full, linears and vectors": (),
    "lora": (),
    "smt": ("--warmup-steps", "1"),
    "galore": (),
    "galore, per layer": (),
    "gmt": (),
    "svft": (),
    "lamda": (),
    "velora": (),
    "velora, dense": ("--velora-form", "dense", "--learning-rate", "1e-5"),
    "deft": (),
    "meft": (),
    "sherl": (),
}
MIB = 2**20


def arguments_of(method: str, words: tuple[str, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--learning-rate", type=float)
    add_method_arguments(parser)
    args = parser.parse_args(words)
    args.given = {word for word in words if word.startswith("--")}
    args.seed, args.steps, args.batch_size, args.device = 0, 100, 2, torch.device("cpu")
    for name, value in METHODS[method].defaults.items():
        setattr(args, name, value)
    return args


class Trainee:
    def __init__(self, name: str) -> None:
        self.model, _ = load_language_model("smollm2", torch.float32, "cpu")
        torch.manual_seed(0)
        self.ids = torch.randint(0, 49152, (2, 256), generator=torch.Generator().manual_seed(0))
        method = name.partition(",")[0]
        self.rider = None
        if method == "full":
            if "," in name:
                train_weights_(self.model)
            self.optimizer = self.adamw()
        elif name == "galore, per layer":
            train_weights_(self.model)
            self.optimizer = GaLore(galore_groups(self.model, TARGETS, 64), lr=1e-5, per_layer=True)
        else:
            row, args = METHODS[method], arguments_of(method, ROWS[name])
            batch = {"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), "labels": self.ids}
            row.prepare(self.model, args, lambda size: iter(lambda: batch, None), None)
            self.optimizer = row.optimizer(self.model, 1e-5, args)
            self.rider = row.ride and row.ride(self.model, self.optimizer, args, [batch])
        self.model.train()

    def adamw(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)

    def decoder(self) -> Any:
        return self.model.model(input_ids=self.ids, use_cache=False)

    def step(self) -> float:
        start = time.perf_counter()
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def state(self) -> int:
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    def weights(self) -> int:
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors()}
        return sum(own.values())

    def tensors(self) -> list[torch.Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def trained(self) -> int:
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {'; '.join(ROWS)}; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lora, rows = Trainee("lora"), []
    lora.step()
    for name in args.names or ROWS:
        trainee = lora if name == "lora" else Trainee(name)
        trained = trainee.trained()
        saved = saved_bytes(trainee.decoder, trainee.model)
        trainee.step()
        ratios = []
        for _ in range(args.rounds):
            base = lora.step()
            ratios.append((trainee.step() if trainee is not lora else base) / base)
        peak, state, weights = peak_allocated(trainee.step, torch.device("cpu")), trainee.state(), trainee.weights()
        row: dict[str, Any] = {"method": name, "trained": trained}
        sizes = {"saved": saved, "state": state, "peak": peak, "all": weights + state + peak}
        row |= {key: round(value / MIB, 1) for key, value in sizes.items()}
        row["step over LoRA"] = round(statistics.median(ratios), 2)
        rows.append(row)
        print(json.dumps(row), flush=True)
        del trainee
        gc.collect()
    if not args.names:
        result = {"conditions": conditions(), "rounds": args.rounds, "rows": rows}
        (RESULTS / "step_memory.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
