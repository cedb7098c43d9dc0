"""`lrk demo`: fine-tune SmolLM2 to write docstrings, side by side with PEFT on the same steps."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import arguments
from .factors import adapter_config
from .method import TARGETS
from .methods import METHODS
from .smt import select_blocks
from .train import add_training_arguments, load_task


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("demo", help=__doc__, description=__doc__)
    add_training_arguments(parser, steps=20, warmup_steps=4)
    parser.add_argument("--serve", action="store_true", help="four adapters trained in one pass, served in one batch")
    parser.add_argument(
        "--output", type=arguments.output_folder, default="runs/demo", help="folder for results (default runs/demo)"
    )


def peft_twin(model: Any, ours: Any, args: argparse.Namespace, dora: bool = False) -> Any:
    """PEFT's LoRA or DoRA in ``model``, which it changes in place, started from our factors."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
        use_rslora=args.rslora,
        target_modules=list(TARGETS),
        task_type="CAUSAL_LM",
        use_dora=dora,
    )
    twin = get_peft_model(model, config)
    mine = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in theirs.items():
            own = name.removeprefix("base_model.model.").replace(".default.", ".")
            parameter.copy_(mine[own.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")])
    return twin


def weight_bytes(model: torch.nn.Module) -> int:
    """Of parameters and buffers, each once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.nbytes for t in tensors.values())


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for number, row in enumerate(rows):
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
        if number == 0:
            print("  ".join("-" * w for w in widths))


def _plot(path: Path, runs: list[Any], before: float, after: dict[str, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(7, 4.2))
    styles: tuple[dict[str, Any], ...] = (
        {"linewidth": 3.5, "alpha": 0.55},
        {"linewidth": 1.2, "color": "black", "linestyle": "--"},
        {"linewidth": 1.5, "color": "tab:orange", "linestyle": ":"},
        {"linewidth": 1.5, "color": "tab:green"},
        {"linewidth": 1.5, "color": "tab:purple", "linestyle": "-."},
    )
    for run, style in zip(runs, styles, strict=False):
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=f"{run.name}: training loss", **style)
    steps = len(runs[0].losses)
    axes.plot(
        [0, steps],
        [before, after[runs[0].name]],
        "o",
        color="tab:red",
        label="held-out loss, before and after",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title("SmolLM2-135M learns to write docstrings, the same steps for all")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def run(args: argparse.Namespace) -> int:
    if args.serve:
        arguments.refuse_options(
            args.given, ("--block-size", "--warmup-steps"), "is not an option of --serve, which has no SMT"
        )
        from . import demo_serve

        return demo_serve.run(args)
    from tqdm import tqdm

    import lowrank_kernels as lk

    from .batches import batches
    from .environment import environment
    from .evaluation import held_out_loss, write_docstrings
    from .loop import Run
    from .peak_memory import peak_allocated

    model, tokenizer, examples, held_out = load_task(args)
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    shown = held_out[:: max(1, len(held_out) // 4)][:4]
    print("evaluating the untrained model", file=sys.stderr)
    before = held_out_loss(model, tokenizer, held_out, args.batch_size, device)
    texts_before = write_docstrings(model, tokenizer, shown, device)

    adapted = {}
    for method, config in (("lora", lk.LoRAConfig), ("dora", lk.DoRAConfig), ("qlora", lk.LoRAConfig)):
        torch.manual_seed(args.seed)
        adapted[method] = copy.deepcopy(model)
        if method == "qlora":
            lk.quantize_(adapted[method], "nf4")
        report = lk.adapt(adapted[method], adapter_config(args, config))
        print(f"{method}: {len(report.replaced)} modules run on lowrank_kernels", file=sys.stderr)
    ours = adapted["lora"]
    # As many blocks as come nearest to LoRA's trainable parameters from below.
    blocks = sum(p.numel() for p in ours.parameters() if p.requires_grad) // args.block_size**2
    picture = args.output / "blocks.png"
    others = batches(tokenizer, examples, args.batch_size, args.seed + 1, device)
    selection = select_blocks(model, others, args, TARGETS, blocks=blocks)
    selection.plot(picture)
    adapted["smt"] = copy.deepcopy(model)
    lk.adapt(adapted["smt"], lk.SMTConfig(selection=selection))
    twin = peft_twin(model, ours, args)  # last: it changes the model in place
    rate = {name: args.learning_rate or row.learning_rate for name, row in METHODS.items()}
    runs = [
        Run("lowrank_kernels LoRA", ours, rate["lora"], args.steps),
        Run("PEFT LoRA", twin, rate["lora"], args.steps),
        Run("lowrank_kernels DoRA", adapted["dora"], rate["dora"], args.steps),
        Run("lowrank_kernels SMT", adapted["smt"], rate["smt"], args.steps, lk.optim.BlockAdamW),
        Run("lowrank_kernels QLoRA, NF4", adapted["qlora"], rate["lora"], args.steps),
    ]
    untrained = {run.name: before for run in runs}
    print("evaluating the base in 4 bits", file=sys.stderr)
    untrained[runs[-1].name] = held_out_loss(runs[-1].model, tokenizer, held_out, args.batch_size, device)
    stream = batches(tokenizer, examples, args.batch_size, args.seed, device)
    with tqdm(total=args.steps, unit="step") as bar:
        for step in range(args.steps):
            batch = next(stream)
            tokens = int(batch["attention_mask"].sum())
            # The order alternates, so that neither always runs on warm caches.
            for run in runs if step % 2 == 0 else runs[::-1]:
                run.step(batch)
            rates = " / ".join(f"{tokens / run.seconds[-1]:.0f}" for run in runs)
            bar.set_postfix_str(f"loss {runs[0].losses[-1]:.3f} (PEFT {runs[1].losses[-1]:.3f}), {rates} tokens/s")
            bar.update()

    batch = next(stream)
    rows: list[tuple[str, ...]] = [
        ("", "held-out before", "held-out after", "trainable", "s/step", "weights MiB", "peak MiB"),
    ]
    after: dict[str, float] = {}
    results: list[dict[str, Any]] = []
    for run in runs:
        print(f"evaluating {run.name}", file=sys.stderr)
        after[run.name] = held_out_loss(run.model, tokenizer, held_out, args.batch_size, device)
        peak = peak_allocated(partial(run.forward_backward, batch), device)
        run.optimizer.zero_grad(set_to_none=True)
        rows.append(
            (
                run.name,
                f"{untrained[run.name]:.4f}",
                f"{after[run.name]:.4f}",
                f"{run.trainable}",
                f"{run.median_seconds():.3f}",
                f"{weight_bytes(run.model) / 2**20:.0f}",
                f"{peak / 2**20:.0f}",
            )
        )
        results.append(
            {
                "name": run.name,
                "held_out_before": untrained[run.name],
                "held_out_after": after[run.name],
                "losses": run.losses,
                "trainable_parameters": run.trainable,
                "seconds_per_step": run.median_seconds(),
                "weight_bytes": weight_bytes(run.model),
                "peak_bytes": peak,
            }
        )
    texts_after = write_docstrings(ours, tokenizer, shown, device)

    curve_difference = max(abs(a - b) for a, b in zip(runs[0].losses, runs[1].losses, strict=True))
    folder = args.output / "adapter"
    lk.save_adapter(ours, folder)
    logit_difference = _peft_logit_difference(ours, runs[1].model.unload(), folder, batch)

    print(f"\nrank {args.rank}, {args.steps} steps of {args.batch_size} functions; losses in nats a target token\n")
    _print_table(rows)
    print(f"\nlargest difference between the two LoRA loss curves: {curve_difference:.2e}")
    print(f"adapter written to {folder}; loaded back by PEFT, largest difference of logits: {logit_difference:.2e}\n")
    for example, old, new in zip(shown, texts_before, texts_after, strict=True):
        print(example.prompt.splitlines()[1])
        print(f"    before:  {old}\n    after:   {new}\n    library: {example.target.removesuffix(chr(34) * 3)}")

    _plot(args.output / "loss.png", runs, before, after)
    result = {
        "settings": {key: str(value) for key, value in vars(args).items() if not callable(value)},
        "runs": results,
        "curve_difference": curve_difference,
        "logit_difference": logit_difference,
        "generations": [
            {"prompt": e.prompt, "before": old, "after": new}
            for e, old, new in zip(shown, texts_before, texts_after, strict=True)
        ],
        "environment": environment(),
    }
    (args.output / "demo.json").write_text(json.dumps(result, indent=1))
    print(f"\nloss curve: {args.output / 'loss.png'}; SMT's blocks: {picture}; JSON: {args.output / 'demo.json'}")
    return 0


@torch.no_grad()
def _peft_logit_difference(ours: Any, base: Any, folder: Path, batch: dict[str, torch.Tensor]) -> float:
    """Largest difference between our logits and those of PEFT with the adapter that we saved."""
    from peft import PeftModel

    ours.eval()
    theirs = PeftModel.from_pretrained(base, str(folder)).eval()
    inputs = {name: batch[name][:4] for name in ("input_ids", "attention_mask")}
    return float((ours(**inputs).logits - theirs(**inputs).logits).abs().max())
