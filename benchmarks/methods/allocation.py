"""Where a budget of ranks goes: LoRA of one rank, SoRA, ALoRA, HeteroLoRA, and PEFT's AdaLoRA beside them.

    python benchmarks/methods/allocation.py            # what is missing in the CSV, then the table and the picture

SmolLM2-135M on the docstring task, the seven linears of its last ten layers, float32, 60 steps of 2 short functions,
three seeds of factors and batches; every method sees the same batches. The budget is that of LoRA of rank 4. SoRA
starts at rank 8, and λ is the one of three whose ranks on seed 0 come nearest to the budget; HeteroLoRA has rank 8 in
half; ALoRA moves a fifth of the ranks once; AdaLoRA starts at 6 and ends at 4 on average. LoRA and AdaLoRA have the
best of some rates on seed 0, the others LoRA's. SoRA's path over λ is at 2e-3. The CSV grows run by run, and a run that
is in it is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from plots import RESULTS

import lowrank_kernels as lk
from lowrank_kernels.allocate import ALoRA, HeteroLoRA, SoRA, sora_groups
from lowrank_kernels.cli import docstrings
from lowrank_kernels.cli.batches import batches, in_order
from lowrank_kernels.cli.evaluation import held_out_loss
from lowrank_kernels.cli.loop import Run, adamw
from lowrank_kernels.integrations.transformers import answer_loss, load_language_model

CSV = RESULTS / "allocation.csv"
FIELDS = ("method", "rate", "penalty", "seed", "held_out_before", "held_out_after", "parameters", "seconds_per_step")
TARGETS = r"model\.layers\.2\d\.(self_attn|mlp)\.\w+_proj"
PENALTIES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4, 1.2e-3, 1.6e-3, 2.4e-3)
STRONGER = (1.2e-3, 2.4e-3, 3.2e-3)
"""For the rate of the table, at which gates have larger gradients."""
RATES = {"lora": (2e-3, 4e-3, 8e-3), "adalora": (2e-3, 4e-3, 8e-3, 1.6e-2)}
RANK, GATE_RATE = 4, 100.0
Key = tuple[str, float, float, int]
Row = dict[str, str]


def read() -> list[Row]:
    return list(csv.DictReader(CSV.open())) if CSV.exists() else []


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rows = args, read()
        self.model, self.tokenizer = load_language_model("smollm2", torch.float32)
        self.pristine = {name: t.clone() for name, t in self.model.state_dict().items()}
        training, held_out = (
            [e for e in part if len(e.prompt) + len(e.target) < args.characters]
            for part in docstrings.split(docstrings.collect())
        )
        self.validation = list(in_order(self.tokenizer, training[: args.validation], args.validation, "cpu"))
        self.examples, self.held_out = training[args.validation :], held_out[:: max(1, len(held_out) // 48)][:48]

    def once(self, method: str, rate: float, penalty: float = 0.0, seed: int = 0) -> Row:
        """The row of a run, which is made if it is not there."""
        for row in self.rows:
            if key_of(row) == (method, rate, penalty, seed):
                return row
        before, after, parameters, seconds = self.run(method, rate, penalty, seed)
        values = (method, rate, penalty, seed, f"{before:.5f}", f"{after:.5f}", parameters, f"{seconds:.3f}")
        row = dict(zip(FIELDS, map(str, values), strict=True))
        self.rows.append(row)
        with CSV.open("w", newline="") as file:
            out = csv.DictWriter(file, FIELDS, lineterminator="\n")
            out.writeheader()
            out.writerows(self.rows)
        print(*row.values(), flush=True)
        return row

    def run(self, method: str, rate: float, penalty: float, seed: int) -> tuple[float, float, int, float]:
        torch.manual_seed(seed)
        steps = self.args.steps
        stream = batches(self.tokenizer, self.examples, self.args.batch_size, seed, "cpu")
        if method == "adalora":
            return self.measure(*self.adalora(rate), stream)
        gated, rank = method != "lora", 2 * RANK if method in ("sora", "heterolora") else RANK
        lk.adapt(self.model, lk.LoRAConfig(r=rank, alpha=2.0 * rank, target_modules=TARGETS, gate=gated))
        optimizer = {"sora": lambda model, lr: torch.optim.AdamW(sora_groups(model, lr, GATE_RATE))}.get(method, adamw)
        run = Run(method, self.model, rate, steps, optimizer)
        rider: Any = None
        if method == "sora":
            rider = SoRA(self.model, run.optimizer, penalty)
        elif method == "alora":
            moves = RANK * 70 // 5
            settings = {"every": steps // 3, "moves": moves, "rounds": 1, "seed": seed}
            rider = ALoRA(self.model, run.optimizer, self.validation, loss_of, **settings)
        elif method == "heterolora":
            rider = HeteroLoRA(self.model, run.optimizer, self.validation, loss_of, budget=0.5, warmup=steps // 10)
        return self.measure(run, rider, stream)

    def adalora(self, rate: float) -> tuple[Run, Any]:
        from peft import AdaLoraConfig, get_peft_model

        steps = self.args.steps
        config = AdaLoraConfig(
            init_r=RANK * 3 // 2,
            target_r=RANK,
            lora_alpha=3 * RANK,
            tinit=steps // 10,
            tfinal=steps // 3,
            deltaT=2,
            total_step=steps,
            target_modules=TARGETS,
        )
        model: Any = get_peft_model(self.model, config)
        run = Run("adalora", model, rate, steps)
        run.optimizer.register_step_post_hook(lambda *_: model.base_model.update_and_allocate(len(run.losses)))
        return run, None

    def measure(self, run: Run, rider: Any, stream: Iterator[Any]) -> tuple[float, float, int, float]:
        def held_out() -> float:
            return held_out_loss(run.model, self.tokenizer, self.held_out, self.args.batch_size, "cpu")

        before = held_out()
        for _ in range(self.args.steps):
            run.step(next(stream))
        if rider is not None:
            rider.finish()
        after, parameters = held_out(), self.factor_parameters(run.model)
        self.reset(run.model)
        return before, after, parameters, run.median_seconds()

    def factor_parameters(self, model: Any) -> int:
        """Elements of A and B; of AdaLoRA's, those of the ranks whose singular value is not zero."""
        total = 0
        for module in model.modules():
            if isinstance(module, lk.nn.LoRALinear):
                total += sum(p.numel() for p in module.factor_parameters())
            elif hasattr(module, "lora_E"):
                a, b, e = (part["default"] for part in (module.lora_A, module.lora_B, module.lora_E))
                total += int(e.count_nonzero()) * (a.shape[1] + b.shape[0])
        return total

    def reset(self, model: Any) -> None:
        if hasattr(model, "peft_config"):
            self.model = model.unload()
        else:
            lk.merge_and_unload(self.model)
        self.model.load_state_dict(self.pristine)


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    loss: torch.Tensor = answer_loss(model, **batch)
    return loss


def key_of(row: Row) -> Key:
    return row["method"], float(row["rate"]), float(row["penalty"]), int(row["seed"])


def table(rows: list[Row], chosen: dict[str, tuple[float, float]]) -> str:
    lines = ["| method | rate | held-out loss, seeds 0 to 2 | mean | parameters | step |", "|---|---|---|---|---|---|"]
    for method, (rate, penalty) in chosen.items():
        own = [row for row in rows if key_of(row)[:3] == (method, rate, penalty)]
        losses = [float(r["held_out_after"]) for r in own]
        spread = ", ".join(f"{loss:.3f}" for loss in losses)
        parameters = statistics.fmean(int(r["parameters"]) for r in own)
        seconds = statistics.median(float(r["seconds_per_step"]) for r in own)
        mean = statistics.fmean(losses)
        lines.append(f"| {method} | {rate:g} | {spread} | {mean:.3f} | {parameters:,.0f} | {seconds:.2f} s |")
    return "\n".join(lines)


def draw_path(rows: list[Row]) -> None:
    """λ against parameters kept and held-out loss, of the runs on seed 0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = {key_of(row): row for row in rows}
    path = [(penalty, keys["sora", 2e-3, penalty, 0]) for penalty in PENALTIES]
    penalties = [penalty for penalty, _ in path]
    figure, (kept, loss) = plt.subplots(2, 1, sharex=True, figsize=(5, 5), layout="constrained")
    kept.plot(penalties, [int(r["parameters"]) / 1000 for _, r in path], marker="o")
    kept.set_ylabel("parameters kept, thousands")
    loss.plot(penalties, [float(r["held_out_after"]) for _, r in path], marker="o")
    loss.set_ylabel("held-out loss, nats a token")
    loss.set_xlabel("penalty λ")
    loss.set_xscale("log")
    for axes in (kept, loss):
        axes.grid(alpha=0.3)
    figure.savefig(RESULTS / "sora_path.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--characters", type=int, default=200, help="longest function, prompt and docstring together")
    parser.add_argument("--validation", type=int, default=2, help="examples that ALoRA and HeteroLoRA score by")
    parser.add_argument("--seeds", type=int, default=3)
    bench = Bench(parser.parse_args())
    best = {
        method: min(rates, key=lambda rate: float(bench.once(method, rate)["held_out_after"]))
        for method, rates in RATES.items()
    }
    rate, budget = best["lora"], int(bench.once("lora", best["lora"])["parameters"])
    for penalty in PENALTIES:
        bench.once("sora", 2e-3, penalty)
    path = {penalty: bench.once("sora", rate, penalty) for penalty in STRONGER}
    penalty = min(path, key=lambda p: abs(int(path[p]["parameters"]) - budget))
    chosen = {method: (rate, 0.0) for method in ("lora", "alora", "heterolora")}
    chosen |= {"sora": (rate, penalty), "adalora": (best["adalora"], 0.0)}
    for seed in range(bench.args.seeds):
        for method, settings in chosen.items():
            bench.once(method, *settings, seed)
    print(table(bench.rows, chosen))
    draw_path(bench.rows)


if __name__ == "__main__":
    main()
