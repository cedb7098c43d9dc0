"""Every method under Hugging Face's Trainer: `python examples/hf_trainer_methods.py [--method NAME] [--model NAME]`.

Trainer is given the optimizer and the schedule; that is all that the methods need. A chain, or what allocates ranks or
prunes, rides on the optimizer, and its state is in the optimizer's, so `resume_from_checkpoint` resumes it. Without
--model it trains a two-layer Llama of random weights to continue a repeating sequence, in seconds on a CPU; with
"smollm2" or a folder, a real one.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, get_cosine_schedule_with_warmup

import lowrank_kernels as lk
from lowrank_kernels.allocate import ALoRA, HeteroLoRA, LaMDA, SoRA, sora_groups
from lowrank_kernels.chain import cola, rac_lora, xgblora
from lowrank_kernels.init import estimate_gradients, lora_ga_
from lowrank_kernels.losses import Density
from lowrank_kernels.optim import GMT, GaLore, LoRAPro, LoRARITE, factor_groups, galore_groups, lora_plus
from lowrank_kernels.prune import LoRAPrune
from lowrank_kernels.reversible import meft
from lowrank_kernels.side import SHERLConfig, late_targets, sherl

METHODS = ("lora", "dora", "rac-lora", "cola", "xgblora", "lora-ga", "lora-plus", "lora-pro", "lora-rite", "sora")
METHODS += ("alora", "heterolora", "lamda", "loraprune", "galore", "gmt", "svft", "velora", "meft", "deft", "sherl")
CHAINS = {"rac-lora": rac_lora, "cola": cola, "xgblora": xgblora}
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")


def base_model(name: str | None) -> nn.Module:
    if name:
        from lowrank_kernels.integrations.transformers import load_language_model

        return load_language_model(name, torch.float32)[0]
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


class Sequences(torch.utils.data.Dataset):
    """Counting up from a random start, over and over."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(24) + index) % 8 + 8 * (index % 4)
        return {"input_ids": ids, "labels": ids}


def setup(model: nn.Module, method: str, data: Sequences, steps: int) -> torch.optim.Optimizer:
    """Adapt the model and make its optimizer: the whole difference between the methods."""
    if method == "galore":  # no layers: the model's own weights train
        return GaLore(galore_groups(model, TARGETS, rank=8, update_proj_gap=max(1, steps // 4)), lr=1e-2)
    if method == "gmt":
        for name, p in model.named_parameters():
            p.requires_grad_(any(target in name for target in TARGETS))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        GMT(model, optimizer, share=0.2, window=3)
        return optimizer
    if method == "svft":
        print(lk.adapt(model, lk.SVFTConfig(target_modules=TARGETS, pattern="banded", band=4)))
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    one_sided = {"train": "b", "init": "orthonormal"} if method == "rac-lora" else {}
    r = 1 if method == "xgblora" else 8
    kind = {"dora": lk.DoRAConfig, "lamda": lk.LaMDAConfig}.get(method, lk.LoRAConfig)
    gate = method in ("sora", "alora", "heterolora")
    velora = 16 if method == "velora" else None  # sub-tokens of a token; the first batch makes the vectors
    config = kind(r=r, alpha=2 * r, target_modules=TARGETS, gate=gate, velora=velora, **one_sided)
    batches = [{k: v[None] for k, v in data[i].items()} for i in range(16)]
    if method == "lora-ga":
        linears = lk.plan_adaptation(model, config).targets
        gradients = estimate_gradients(model, batches, loss, linears)
    if method == "sherl":
        late = SHERLConfig(late_layers=1, width=16)
        config = dataclasses.replace(config, target_modules=late_targets(model, late, TARGETS))
    print(lk.adapt(model, config))
    if method == "sherl":
        print(sherl(model, late))
    if method == "meft":
        print(meft(model))
    if method == "lora-ga":
        lora_ga_(model, gradients)
    if method == "lora-plus":
        return lora_plus(model, lr=2e-3)
    if method == "lora-pro":
        return LoRAPro(factor_groups(model), lr=0.5)
    if method == "lora-rite":
        return LoRARITE(factor_groups(model), lr=5e-3)
    if method == "sora":
        optimizer = torch.optim.AdamW(sora_groups(model, lr=1e-2, gate_lr=1.0))
        SoRA(model, optimizer, penalty=0.01)
        return optimizer
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if method in CHAINS:
        CHAINS[method](model, optimizer, max(1, steps // 4), warmup=2)
    if method == "alora":
        ALoRA(model, optimizer, batches[:2], loss, every=max(1, steps // 4), moves=6)
    if method == "heterolora":
        HeteroLoRA(model, optimizer, batches[:2], loss, budget=0.5, warmup=max(1, steps // 4), every=max(1, steps // 4))
    if method == "lamda":
        LaMDA(model, optimizer, steps)
    if method == "deft":
        Density(model, alpha=0.1, eps=1e-2, into_loss=True)
    if method == "loraprune":
        LoRAPrune(model, optimizer, ratio=0.2, warmup=steps // 4, steps=max(1, steps // 2))
    return optimizer


def loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def train(method: str, model_name: str | None = None, steps: int = 40) -> tuple[float, float]:
    """(loss before, loss after)."""
    model, data = base_model(model_name), Sequences(256)
    optimizer = setup(model, method, data, steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            max_steps=steps,
            logging_steps=10,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            model, arguments, train_dataset=data, eval_dataset=Sequences(32), optimizers=(optimizer, schedule)
        )
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        return before, trainer.evaluate()["eval_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, help="default: all of them")
    parser.add_argument("--model", help="'smollm2' or a folder that transformers wrote")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    for method in (args.method,) if args.method else METHODS:
        before, after = train(method, args.model, args.steps)
        print(f"{method}: loss {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
