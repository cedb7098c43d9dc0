"""What each method costs beyond plain LoRA: time of a step, memory of forward and backward, optimizer state, extras.

    python benchmarks/methods/costs.py [METHOD ...]

Four decoder layers of SmolLM2's shape with random weights, all seven linears adapted at R = 16, 8 × 64 tokens, float32.
The methods take turns within each round; times are ratios of each one's fastest round to plain LoRA's. With methods
named, only those are measured beside LoRA, and the result is printed and not written.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path

import torch
from plots import RESULTS
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_kernels as lk
from lowrank_kernels.allocate import ALoRA, HeteroLoRA
from lowrank_kernels.chain import Chain
from lowrank_kernels.cli.method import TARGETS
from lowrank_kernels.cli.methods import METHODS, add_method_arguments
from lowrank_kernels.cli.peak_memory import peak_allocated
from lowrank_kernels.init import estimate_gradients, lora_ga_

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cost_over_frozen import conditions

COMPARED = (
    "lora",
    "rac-lora",
    "cola",
    "xgblora",
    "sora",
    "alora",
    "heterolora",
    "lamda",
    "loraprune",
    "lora-plus",
    "lora-pro",
)
COMPARED += ("lora-rite",)
R = 16


def method_arguments() -> argparse.Namespace:
    """What the methods' own options say: R, and no merge or reallocation before it is asked for; half of HeteroLoRA's
    modules are off, and a fifth of LoRAPrune's parameters is masked, after the first step."""
    parser = argparse.ArgumentParser()
    add_method_arguments(parser)
    never = str(10**6)
    options = {"--rank": str(R), "--steps-per-link": never, "--link-warmup": "0", "--steps-per-round": never}
    options |= {"--score-after": "1", "--prune-warmup": "0", "--prune-steps": "1"}
    args = parser.parse_args([word for option in options.items() for word in option])
    args.seed, args.steps = 0, 1  # LaMDA's B is frozen after the first step
    return args


class Trainee:
    def __init__(self, method: str) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=1024,
                hidden_size=576,
                intermediate_size=1536,
                num_hidden_layers=4,
                num_attention_heads=9,
                num_key_value_heads=3,
            )
        )
        row = METHODS[method]
        args = method_arguments()
        row.prepare(self.model, args, None, None)  # none of those compared starts from batches
        self.optimizer = row.optimizer(self.model, 1e-5, args)
        self.ids = torch.randint(0, 1024, (8, 64))
        validation = [{"input_ids": self.ids, "attention_mask": torch.ones_like(self.ids), "labels": self.ids}]
        self.rider = row.ride(self.model, self.optimizer, args, validation) if row.ride else None

    def forward_backward(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_bytes(self) -> int:
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in tensors)


def seconds(function) -> float:  # type: ignore[no-untyped-def]
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(COMPARED)}; default: all")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    measured = [method for method in COMPARED if not args.methods or method in ("lora", *args.methods)]
    trainees = {method: Trainee(method) for method in measured}
    for trainee in trainees.values():
        trainee.step()
    times: dict[str, list[float]] = {method: [] for method in measured}
    for _ in range(args.rounds):
        for method, trainee in trainees.items():
            times[method].append(seconds(trainee.step))
    fastest = {method: min(values) for method, values in times.items()}
    rows = []
    for method, trainee in trainees.items():
        peak = peak_allocated(trainee.forward_backward, torch.device("cpu"))
        trainee.optimizer.zero_grad()
        rows.append(
            {
                "method": method,
                "step over LoRA": f"{fastest[method] / fastest['lora']:.2f}",
                "peak MiB": f"{peak / 2**20:.0f}",
                "optimizer state MiB": f"{trainee.state_bytes() / 2**20:.1f}",
            }
        )
    extras = {}
    for method, trainee in trainees.items():
        chain = trainee.rider
        if isinstance(chain, ALoRA):
            extras[f"{method}: a reallocation over a step"] = seconds(chain.reallocate) / fastest["lora"]
        if isinstance(chain, HeteroLoRA):
            extras[f"{method}: a choice over a step"] = seconds(chain.choose) / fastest["lora"]
        if not isinstance(chain, Chain):
            continue
        links = []
        for _ in range(5):
            trainee.step()  # so that there is something to merge
            links.append(seconds(chain.next_link))
        extras[f"{method}: a link over a step"] = min(links) / fastest["lora"]
    if args.methods:
        print(json.dumps({"conditions": conditions(), "rounds": args.rounds, "rows": rows, "extras": extras}, indent=1))
        return
    torch.manual_seed(0)
    plain = LlamaForCausalLM(trainees["lora"].model.config)
    config = lk.LoRAConfig(r=R, target_modules=TARGETS)
    linears, ids = lk.plan_adaptation(plain, config).targets, trainees["lora"].ids
    found: dict[str, torch.Tensor] = {}

    def estimate() -> None:
        found.update(estimate_gradients(plain, [ids], lambda m, batch: m(input_ids=batch, labels=batch).loss, linears))

    extras["lora-ga: a gradient batch over a step"] = min(seconds(estimate) for _ in range(3)) / fastest["lora"]
    found.clear()
    extras["lora-ga: a gradient batch with the mean gradients, MiB"] = peak_allocated(estimate, ids.device) / 2**20
    lk.adapt(plain, config)
    extras["lora-ga: the 28 SVDs over a step"] = seconds(lambda: lora_ga_(plain, found)) / fastest["lora"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "costs.csv").open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    result = {
        "conditions": conditions(),
        "rounds": args.rounds,
        "rows": rows,
        "extras": {name: round(value, 2) for name, value in extras.items()},
    }
    (RESULTS / "costs.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
