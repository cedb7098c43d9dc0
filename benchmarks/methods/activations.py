"""What a step of SmolLM2-135M keeps for backward, and how long it takes: LoRA, with checkpointing, MEFT, SHERL.

    python benchmarks/methods/activations.py [--threads N] [--rounds N] [NAME ...]

Sequences of 256 tokens, 2 at once, float32, R = 8 on all seven linears, of the late layers alone under SHERL. Saved
bytes are those of all storages that autograd saves in forward, parameters left out: in the decoder alone, and with head
and loss, whose logits are the same for all. The peak is that of forward and backward together. Times are of the
process, medians over rounds in which all take turns. MEFT's gradients are compared with those of the same model with
its activations stored: ‖a − b‖ / ‖b‖.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plots import RESULTS

import lowrank_kernels as lk
from lowrank_kernels.cli.method import TARGETS
from lowrank_kernels.cli.peak_memory import peak_allocated
from lowrank_kernels.integrations.transformers import load_language_model
from lowrank_kernels.reversible import MEFTConfig, meft
from lowrank_kernels.side import SHERLConfig, late_targets, sherl

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cost_over_frozen import conditions


def checkpointed(model: Any) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False})


def reversible(**settings: Any) -> Callable[[Any], Any]:
    return lambda model: meft(model, MEFTConfig(**settings))


def with_side_path(late_layers: int) -> Callable[[Any], Any]:
    return lambda model: sherl(model, SHERLConfig(late_layers))


COMPARED: dict[str, Callable[[Any], Any]] = {
    "lora": lambda model: None,
    "lora, checkpointed": checkpointed,
    "meft1, every 2nd kept": reversible(keep_every=2),
    "meft1, every 3rd kept": reversible(keep_every=3),
    "meft1, every 4th kept": reversible(keep_every=4),
    "meft2, every 2nd kept": reversible(variant=2, keep_every=2),
    "meft3, every 2nd kept": reversible(variant=3, keep_every=2),
    "sherl, 4 late layers": with_side_path(4),
}


def saved_bytes(function: Callable[[], Any], model: Any) -> int:
    """Of the storages that a function's graph saves, the model's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    held = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(t)  # so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(found.values())


class Trainee:
    def __init__(self, name: str, base: Any) -> None:
        self.model = copy.deepcopy(base, {id(p): p for p in base.parameters()})  # sharing the weights
        torch.manual_seed(0)
        targets = late_targets(base, SHERLConfig(4), TARGETS) if name.startswith("sherl") else TARGETS
        lk.adapt(self.model, lk.LoRAConfig(r=8, alpha=16, target_modules=targets))
        COMPARED[name](self.model)
        with torch.no_grad():  # off the start, where half of the gradients are zero
            for key, p in self.model.named_parameters():
                if "lora_B" in key or key.endswith(("meft.up", "sherl.out")):
                    p.normal_(0.0, 0.01)
        self.model.train()
        self.ids = torch.randint(0, 49152, (2, 256), generator=torch.Generator().manual_seed(0))

    def decoder(self) -> Any:
        return self.model.model(input_ids=self.ids, use_cache=False)

    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        return loss

    def step(self) -> float:
        start = time.process_time()
        self.loss().backward()
        self.model.zero_grad()
        return time.process_time() - start

    def gradient(self) -> torch.Tensor:
        self.loss().backward()
        found = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad()
        return found

    def gradient_error(self) -> float | None:
        stacks = [m for m in self.model.modules() if isinstance(m, lk.reversible.ReversibleStack)]
        if not stacks:
            return None
        mine = self.gradient()
        stacks[0].recompute = False
        stored = self.gradient()
        stacks[0].recompute = True
        return float((mine - stored).norm() / stored.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {'; '.join(COMPARED)}; default: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base, _ = load_language_model("smollm2", torch.float32, "cpu")
    trainees = {name: Trainee(name, base) for name in args.names or COMPARED}
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    for _ in range(1 + args.rounds):
        for name, trainee in trainees.items():
            seconds[name].append(trainee.step())
    rows = []
    for name, trainee in trainees.items():
        row: dict[str, Any] = {"method": name}
        row["decoder MiB"] = saved_bytes(trainee.decoder, trainee.model) / 2**20
        row["with head and loss MiB"] = saved_bytes(trainee.loss, trainee.model) / 2**20
        row["peak MiB"] = peak_allocated(lambda t=trainee: t.step(), torch.device("cpu")) / 2**20
        ratios = [a / b for a, b in zip(seconds[name][1:], seconds[next(iter(trainees))][1:], strict=True)]
        row["step over the first"] = statistics.median(ratios)
        row["gradient error"] = trainee.gradient_error()
        rows.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
        print(json.dumps(rows[-1]), flush=True)
    if not args.names:
        result = {"conditions": conditions(), "rounds": args.rounds, "rows": rows}
        (RESULTS / "activations.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
