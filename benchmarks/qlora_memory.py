"""The memory of a QLoRA step on SmolLM2-135M, beside PEFT's LoRA over bitsandbytes ``Linear4bit``.

    python benchmarks/qlora_memory.py [--json FILE] [--dtype float32] [--tokens 256] [--batch-size 2] [--rank 16]

NF4 in blocks of 64 without double quantisation, all linears but the output head, forward and backward. The peak is what
torch's allocator held at one time during the step, beyond the model; once of the whole step, and once of the decoder
alone, since the logits and their loss are most of it. The extension's own scratch, some hundred KiB a
thread, is not torch's and not counted.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.cli.demo import weight_bytes
from lowrank_kernels.cli.environment import environment
from lowrank_kernels.cli.peak_memory import peak_allocated
from lowrank_kernels.integrations.transformers import load_language_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def over_bitsandbytes(model: Any, rank: int, dtype: torch.dtype) -> Any:
    """PEFT's LoRA over the model with its linears as ``Linear4bit``."""
    import bitsandbytes as bnb
    import peft

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in TARGETS:
            linear = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                compress_statistics=False,
                quant_type="nf4",
            )
            linear.load_state_dict(module.state_dict())
            model.set_submodule(name, linear.to("cpu"))
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=TARGETS, task_type="CAUSAL_LM"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    dense, _ = load_language_model("smollm2", dtype)
    ours = copy.deepcopy(dense)
    lk.quantize_(ours, "nf4")
    lk.adapt(ours, lk.LoRAConfig(r=options.rank, target_modules=TARGETS))
    adapted = copy.deepcopy(dense)
    lk.adapt(adapted, lk.LoRAConfig(r=options.rank, target_modules=TARGETS))
    models = {"dense, lowrank_kernels": adapted, "nf4, lowrank_kernels": ours}
    models["nf4, PEFT over bitsandbytes"] = over_bitsandbytes(dense, options.rank, dtype)
    ids = torch.randint(0, 1000, (options.batch_size, options.tokens), generator=torch.Generator().manual_seed(0))
    rows = []
    for name, model in models.items():
        model.train()

        def step(model: Any = model) -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad(set_to_none=True)

        def decoder(model: Any = model) -> None:
            core = model.get_base_model() if hasattr(model, "get_base_model") else model
            core.model(input_ids=ids).last_hidden_state.sum().backward()
            model.zero_grad(set_to_none=True)

        step()  # what a first call makes for good is not a step's
        peak, inside = (peak_allocated(call, torch.device("cpu")) for call in (step, decoder))
        # bitsandbytes' scales are no buffers of its modules.
        states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
        scales = sum(state.absmax.nbytes + state.code.nbytes for state in states)
        row = {
            "name": name,
            "weight_bytes": weight_bytes(model) + scales,
            "peak_bytes": peak,
            "decoder_peak_bytes": inside,
        }
        rows.append(row)
        print(
            f"{name:30} weights {row['weight_bytes'] / 2**20:6.0f} MiB, peak {peak / 2**20:7.1f} MiB, "
            f"without the head and the loss {inside / 2**20:7.1f} MiB",
            flush=True,
        )
    if options.json:
        where = {**environment(), "command": " ".join(["python", *sys.argv])}
        settings = {k: str(v) for k, v in vars(options).items() if k != "json"}
        options.json.write_text(json.dumps({"environment": where, "settings": settings, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
