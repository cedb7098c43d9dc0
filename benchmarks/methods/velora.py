"""VeLoRA beside LoRA and plain training: time of forward and backward, and what is kept between them, in turns.

    python benchmarks/methods/velora.py [--threads N] [--rounds N]

Two decoder layers of SmolLM2's shape with random weights, all seven linears adapted at R = 8 or trained whole, 8 × 64
tokens, float32, 32 sub-tokens. PEFT's VeLoRA makes its vector once, as ours does. Writes results/methods/velora.json.
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
from peft.tuners.lora.config import VeloraConfig
from plots import RESULTS
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_kernels as lk
from lowrank_kernels.cli.method import TARGETS
from lowrank_kernels.cli.peak_memory import peak_allocated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from cost_over_frozen import conditions

R, G = 8, 32
IDS = torch.arange(8 * 64).reshape(8, 64) * 7 % 1024


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3))


def adapted(config: lk.AdapterConfig) -> Any:
    model = llama()
    lk.adapt(model, config)
    return model


def of_peft(**settings: Any) -> Any:
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=list(TARGETS), **settings)
    return peft.get_peft_model(llama(), config)


def dense() -> Any:
    model = llama().requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(name.removesuffix(".weight").rpartition(".")[2] in TARGETS)
    return model


def trainees() -> dict[str, Any]:
    lora = {"r": R, "alpha": 2 * R, "target_modules": TARGETS}
    velora = VeloraConfig(num_groups=G, init_type="batch_average_once")
    pefts = of_peft(velora_config=velora)
    accelerated = copy.deepcopy(pefts)
    lk.integrations.peft.accelerate(accelerated)
    return {
        "LoRA": adapted(lk.LoRAConfig(**lora)),
        "LoRA with velora": adapted(lk.LoRAConfig(**lora, velora=G)),
        "PEFT's LoRA": of_peft(),
        "PEFT's VeLoRA": pefts,
        "PEFT's VeLoRA, accelerated": accelerated,
        "all of W": dense(),
        "all of W with velora": adapted(lk.VeLoRAConfig(velora=G, target_modules=TARGETS)),
    }


def kept_bytes(model: nn.Module) -> int:
    """Bytes of all storages that autograd keeps between forward and backward, without parameters and buffers."""
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
    ):
        model(input_ids=IDS, labels=IDS)
    return sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in there)


def seconds(model: Any) -> float:
    """Of one forward and backward."""
    start = time.perf_counter()
    model(input_ids=IDS, labels=IDS).loss.backward()
    took = time.perf_counter() - start
    model.zero_grad()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = trainees()

    for model in models.values():
        seconds(model.train())
    rounds = [{name: seconds(model) for name, model in models.items()} for _ in range(args.rounds)]
    result: dict[str, Any] = {"conditions": conditions() | {"peft": peft.__version__}, "rounds": args.rounds}
    for name, model in models.items():
        base = "all of W" if name.startswith("all") else "LoRA"
        result[name] = {
            f"time over {base}": round(statistics.median(r[name] / r[base] for r in rounds), 3),
            "kept for backward, MiB": round(kept_bytes(model) / 2**20, 2),
            "peak, MiB": round(peak_allocated(lambda model=model: seconds(model), torch.device("cpu")) / 2**20, 1),
        }
        print(name, result[name])
    (RESULTS / "velora.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
