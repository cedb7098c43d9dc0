"""`lrk demo --serve`: four adapters trained in one pass, then served in one batch, each row as its adapter alone."""

from __future__ import annotations

import argparse
import copy
import json
import random
import sys
from typing import Any

import torch

import lowrank_kernels as lk

from ..serving import AdapterBank, Engine, Generation
from .batches import encode
from .docstrings import MODULES, Example
from .environment import environment
from .evaluation import held_out_loss
from .loop import Run
from .method import TARGETS
from .methods import METHODS
from .train import load_task

LIBRARIES = tuple(MODULES)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # of logits, over their largest


def _by_library(examples: list[Example]) -> list[list[Example]]:
    return [[e for e in examples if e.library == library] for library in LIBRARIES]


def _train(
    model: Any, tokenizer: Any, examples: list[list[Example]], args: argparse.Namespace, device: torch.device
) -> Run:
    """Train all adapters at once: each step is one batch, with functions of its own library for each adapter."""
    from tqdm import tqdm

    training = Run("four adapters", model, args.learning_rate or METHODS["lora"].learning_rate, args.steps)
    order, each = random.Random(args.seed), max(1, args.batch_size // len(LIBRARIES))
    ids = torch.arange(len(LIBRARIES)).repeat_interleave(each)
    for _ in (bar := tqdm(range(args.steps), unit="step")):
        drawn = [example for of_library in examples for example in order.sample(of_library, each)]
        with lk.nn.use_adapters(ids):
            loss = training.step(encode(tokenizer, drawn, device))
        bar.set_postfix_str(f"loss {loss:.3f}")
    return training


def _merged(base: Any, folder: Any) -> Any:
    """A copy of the model with one adapter merged into plain linears."""
    model = copy.deepcopy(base)
    lk.load_adapter(model, folder)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, lk.nn.LoRALinear):
            layer.merge_()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
    return model


@torch.no_grad()
def _last_logits(model: Any, tokenizer: Any, prompts: list[list[int]], device: torch.device) -> torch.Tensor:
    length = max(len(prompt) for prompt in prompts)
    tokens = [[tokenizer.pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    positions = torch.tensor(mask, device=device).cumsum(1).sub(1).clamp_min(0)
    inputs = {"input_ids": torch.tensor(tokens, device=device), "attention_mask": torch.tensor(mask, device=device)}
    return model(**inputs, position_ids=positions).logits[:, -1].float()


def _answers(engine: Engine, names: list[str | None], prompts: list[list[int]]) -> list[str]:
    jobs = [Generation(name, prompt, 40, stop=('"""',)) for name, prompt in zip(names, prompts, strict=True)]
    engine.submit(jobs)
    return [job.future.result().text for job in jobs]


def run(args: argparse.Namespace) -> int:
    model, tokenizer, examples, held_out = load_task(args)
    device, args.output = torch.device(args.device), args.output / "serve"
    training, evaluated = _by_library(examples), _by_library(held_out)
    if any(not of_library for of_library in evaluated):
        raise ValueError(f"--held-out: {args.held_out} functions leave a library without any; give more")
    torch.manual_seed(args.seed)
    report = lk.adapt(
        model,
        lk.MultiLoRAConfig(
            ranks=[args.rank] * len(LIBRARIES),
            alpha=2 * args.rank,
            dropout=args.dropout,
            rslora=args.rslora,
            target_modules=TARGETS,
        ),
    )
    before = [held_out_loss(model, tokenizer, of_library, args.batch_size, device) for of_library in evaluated]
    trained = _train(model, tokenizer, training, args, device)
    after = []
    for i, library in enumerate(LIBRARIES):
        with lk.nn.use_adapters([i]):
            after.append(held_out_loss(model, tokenizer, evaluated[i], args.batch_size, device))
        lk.save_adapter(model, args.output / "adapters" / library, adapter=i)
    report.undo()
    model.eval()

    print(
        f"\n{args.steps} steps of {trained.median_seconds():.2f} s (median), four adapters of rank {args.rank} in each"
    )
    for library, old, new in zip(LIBRARIES, before, after, strict=True):
        print(f"  {library:8} held-out loss {old:.4f} -> {new:.4f} nats a token")

    # Two functions of each library with its adapter, and one with none, in one batch.
    rows = [(library, e) for library, of_library in zip(LIBRARIES, evaluated, strict=True) for e in of_library[:2]]
    names: list[str | None] = [*(library for library, _ in rows), None]
    shown = [*(example for _, example in rows), evaluated[0][0]]
    prompts = [list(tokenizer(example.prompt)["input_ids"]) for example in shown]
    base = copy.deepcopy(model)
    with AdapterBank(model) as bank:
        for library in LIBRARIES:
            bank.load(library, args.output / "adapters" / library)
        engine = Engine(bank, tokenizer, max_rows=len(names))
        texts = _answers(engine, names, prompts)
        engine.close()
        with bank.batch(names):
            mixed = _last_logits(model, tokenizer, prompts, device)
    steps = engine.counts["steps"]
    print(f"\n{len(names)} requests, {len({*names})} different models, answered in {steps} steps", file=sys.stderr)

    difference, same = 0.0, []
    for name in dict.fromkeys(names):
        of_name = [row for row, other in enumerate(names) if other == name]
        with AdapterBank(base if name is None else _merged(base, args.output / "adapters" / name)) as bank:
            engine = Engine(bank, tokenizer, max_rows=1)
            for row in of_name:
                same.append(_answers(engine, [None], [prompts[row]])[0] == texts[row])
                alone = _last_logits(bank.model, tokenizer, [prompts[row]], device)[0]
                difference = max(difference, float((mixed[row] - alone).abs().max() / alone.abs().max()))
            engine.close()
    for name, example, text, equal in zip(names, shown, texts, same, strict=True):
        print(f"{example.prompt.splitlines()[1]}\n    {name or 'base'}: {' '.join(text.split())}")
        print(f"    {'as' if equal else 'NOT as'} its model alone says")
    print(
        f"\n{sum(same)} of {len(same)} rows say what their adapter, merged alone, says; logits within {difference:.1e}"
    )
    result = {
        "held_out": {n: {"before": b, "after": a} for n, b, a in zip(LIBRARIES, before, after, strict=True)},
        "rows": [
            {"model": n, "prompt": e.prompt, "text": t, "same": s}
            for n, e, t, s in zip(names, shown, texts, same, strict=True)
        ],
        "logit_difference": difference,
        "seconds_per_step": trained.median_seconds(),
        "environment": environment(),
    }
    (args.output / "demo.json").write_text(json.dumps(result, indent=1))
    print(f"adapters and JSON in {args.output}; lrk serve --adapters {args.output / 'adapters'} serves them")
    return 0 if difference <= TOLERANCE[base.dtype] else 1
