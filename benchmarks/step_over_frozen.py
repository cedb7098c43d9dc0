"""A LoRA or DoRA training step of SmolLM2-135M over that of the frozen model: layer by layer, in blocks, and PEFT's.

    python benchmarks/step_over_frozen.py [--rounds N] [--layers N] [--threads N] [--dtype float32] [--dora]

4 sequences of 256 tokens; all seven linears of each layer, R = 16. A step is forward and backward, without the
optimizer; the frozen model's makes the gradient of the embedded tokens and of nothing else. The models take turns, and
times are ratios to the frozen one's, medians of the rounds. "saved" is what autograd keeps in the decoder's forward,
the model's own tensors left out, in MiB.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
from cost_over_frozen import conditions

import lowrank_kernels as lk
from lowrank_kernels.integrations.peft import accelerate
from lowrank_kernels.integrations.transformers import load_language_model

sys.path.insert(0, str(Path(__file__).resolve().parent / "methods"))
from activations import saved_bytes

RESULTS = Path(__file__).resolve().parent / "results"
TARGETS = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
BATCH, TOKENS, RANK = 4, 256, 16


def models(base: Any, dora: bool) -> dict[str, Any]:
    """The models by name, each with weights of its own and factors that are not zero."""
    made = {"frozen": copy.deepcopy(base).requires_grad_(False)}
    config = (lk.DoRAConfig if dora else lk.LoRAConfig)(r=RANK, alpha=2.0 * RANK, target_modules=TARGETS)
    for name in ("ours", "ours, in blocks"):
        lk.adapt(made.setdefault(name, copy.deepcopy(base)), config)
    lk.fuse(made["ours, in blocks"])
    settings = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": TARGETS, "use_dora": dora}
    for name in ("PEFT", "PEFT accelerated", "PEFT accelerated, in blocks"):
        made[name] = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**settings))
    accelerate(made["PEFT accelerated"])
    accelerate(made["PEFT accelerated, in blocks"], blocks=True)
    for model in made.values():
        model.train()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.02)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="the first so many layers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--dora", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    base, _ = load_language_model("smollm2", getattr(torch, args.dtype))
    base.config.use_cache = False
    if args.layers:
        base.model.layers = base.model.layers[: args.layers]
    ids = torch.randint(0, base.config.vocab_size, (BATCH, TOKENS))
    embedded = base.get_input_embeddings()(ids).detach()
    made = models(base, args.dora)

    def step(model: Any) -> None:
        model.zero_grad(set_to_none=True)
        model(inputs_embeds=embedded.clone().requires_grad_(), labels=ids).loss.backward()

    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(args.rounds + 1):
        for name, model in made.items():
            start = time.perf_counter()
            step(model)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    frozen = statistics.median(seconds["frozen"])
    rows = []
    for name, model in made.items():
        inner = model.base_model.model if hasattr(model, "peft_config") else model
        x = embedded.clone().requires_grad_()
        saved = saved_bytes(lambda decoder=inner.model, x=x: decoder(inputs_embeds=x), model) / 2**20
        over = statistics.median(seconds[name]) / frozen
        rows.append({"model": name, "over_frozen": round(over, 4), "saved_mib": round(saved, 1)})
        print(f"| {name} | {over:.2f} | {saved:.0f} |", flush=True)
    kind = "dora" if args.dora else "lora"
    path = RESULTS / f"step_over_frozen_{kind}_{args.dtype}.json"
    found = {
        "conditions": conditions(),
        "layers": len(base.model.layers),
        "tokens": BATCH * TOKENS,
        "frozen_seconds": frozen,
        "rounds": args.rounds,
    }
    path.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
