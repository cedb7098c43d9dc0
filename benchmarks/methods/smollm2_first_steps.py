"""Loss over the first steps on SmolLM2-135M: LoRA, LoRA-GA, LoRA+, LoRA-Pro, LoRA-RITE at tuned learning rates.

    python benchmarks/methods/smollm2_first_steps.py

Every method gets the same grid of four rates, a factor 4 apart, about its default; it goes on where the best of them is
the last on its side. The best, by the mean loss of the last fifth of the steps on seed 0, is run on two more seeds.
All methods see the same batches. Scaled to a shared CPU: 100 steps of 2 short functions, where the papers' figures
show large batches. Batches differ far more than methods, so the plot shows differences from LoRA on the same ones. The
CSV grows run by run, and a run that is in it is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import statistics

import torch
from plots import RESULTS, lines_with_spread

import lowrank_kernels as lk
from lowrank_kernels.cli import docstrings
from lowrank_kernels.cli.batches import batches
from lowrank_kernels.cli.factors import adapter_config
from lowrank_kernels.cli.loop import Run
from lowrank_kernels.cli.methods import METHODS
from lowrank_kernels.init import estimate_gradients, lora_ga_
from lowrank_kernels.integrations.transformers import answer_loss, load_language_model

COMPARED = ("lora", "lora-ga", "lora-plus", "lora-pro", "lora-rite")
GRID = (0.0625, 0.25, 1.0, 4.0)
WINDOW = 10
CSV = RESULTS / "smollm2_first_steps.csv"
Key = tuple[str, float, int]


def read() -> dict[Key, list[float]]:
    found: dict[Key, list[float]] = {}
    if CSV.exists():
        for row in csv.DictReader(CSV.open()):
            found.setdefault((row["method"], float(row["lr"]), int(row["seed"])), []).append(float(row["loss"]))
    return found


def write(runs: dict[Key, list[float]]) -> None:
    with CSV.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["method", "lr", "seed", "step", "loss"])
        for (method, lr, seed), losses in runs.items():
            out.writerows([method, lr, seed, step + 1, f"{loss:.5f}"] for step, loss in enumerate(losses))


def last_steps(losses: list[float]) -> float:
    """Mean of the last fifth; infinite for a run that broke off."""
    return statistics.fmean(losses[-max(1, len(losses) // 5) :])


def running_mean(values: list[float]) -> list[float]:
    return [statistics.fmean(values[i - WINDOW : i]) for i in range(WINDOW, len(values) + 1)]


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_language_model("smollm2", torch.float32)
        self.pristine = {name: t.clone() for name, t in self.model.state_dict().items()}
        examples, _ = docstrings.split(docstrings.collect())
        # Short functions, so that a step takes a second on two cores.
        self.examples = [e for e in examples if len(e.prompt) + len(e.target) < args.characters]
        self.gradients: dict[int, dict[str, torch.Tensor]] = {}

    def batches(self, size: int, seed: int):  # type: ignore[no-untyped-def]
        return batches(self.tokenizer, self.examples, size, seed, "cpu")

    def run(self, method: str, lr: float, seed: int) -> list[float]:
        args, row = self.args, METHODS[method]
        config = adapter_config(args)
        if method == "lora-ga" and seed not in self.gradients:
            linears = lk.plan_adaptation(self.model, config).targets
            some = (b for _, b in zip(range(args.gradient_batches), self.batches(2, seed + 100), strict=False))
            self.gradients[seed] = estimate_gradients(self.model, some, lambda m, b: answer_loss(m, **b), linears)
        torch.manual_seed(seed)
        report = lk.adapt(self.model, config)
        if method == "lora-ga":
            lora_ga_(self.model, self.gradients[seed], seed=seed)
        training = Run(method, self.model, lr, args.steps, lambda model, lr: row.optimizer(model, lr, args))
        stream = self.batches(args.batch_size, seed)
        losses: list[float] = []
        try:
            for _ in range(args.steps):
                losses.append(training.step(next(stream)))
        except ValueError:  # the loss is not a number any more
            losses += [float("inf")] * (args.steps - len(losses))
        report.undo()
        self.model.load_state_dict(self.pristine)
        return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--characters", type=int, default=250)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--gradient-batches", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.dropout, args.rslora = 0.0, False
    bench, runs = None, read()

    def losses_of(key: Key) -> list[float]:
        nonlocal bench
        if key not in runs:
            bench = bench or Bench(args)
            runs[key] = bench.run(*key)
            write(runs)
            print(*key, f"{last_steps(runs[key]):.4f}", flush=True)
        return runs[key]

    best: dict[str, float] = {}
    for method in COMPARED:
        rates = [factor * METHODS[method].learning_rate for factor in GRID]
        while method not in best:
            finals = [last_steps(losses_of((method, lr, 0))) for lr in rates]
            found = rates[finals.index(min(finals))]
            if found == rates[0]:
                rates.insert(0, found / 4)
            elif found == rates[-1]:
                rates.append(found * 4)
            else:
                best[method] = found
    losses = {method: [losses_of((method, lr, seed)) for seed in range(args.seeds)] for method, lr in best.items()}
    curves: dict[str, list[list[float]]] = {}
    for method, lr in best.items():
        pairs = list(zip(losses[method], losses["lora"], strict=True))
        finals = [last_steps(ours) for ours, _ in pairs]
        apart = ", ".join(f"{last_steps(ours) - last_steps(lora):+.3f}" for ours, lora in pairs)
        print(f"{method:10} lr {lr:<11g} {statistics.fmean(finals):.3f}; from LoRA, a seed each: {apart}")
        differences = [[o - t for o, t in zip(ours, lora, strict=True)] for ours, lora in pairs]
        curves[f"{method}, lr {lr:g}"] = [running_mean(d) for d in differences]
    lines_with_spread(
        curves,
        RESULTS / "smollm2_first_steps.png",
        "optimizer step",
        "training loss beyond LoRA's (nats a token)",
        f"SmolLM2-135M, R = {args.rank}, same batches; means of {WINDOW} steps; {args.seeds} seed(s)",
        first=WINDOW,
    )


if __name__ == "__main__":
    main()
