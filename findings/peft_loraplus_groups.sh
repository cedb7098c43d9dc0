#!/usr/bin/env bash
# PEFT: create_loraplus_optimizer gives the high rate to more than the B matrices, and splits a trained head in two.
#
# LoRA+ trains B at a higher rate than A. PEFT gives the high rate to every parameter that has lora_B in its name or
# has one dimension. So in modules_to_save a head's bias gets it and the head's weight does not, and a layer norm gets
# it; DoRA's magnitudes get it on a linear layer, but not on a convolution, where they have three dimensions or more.
# The factors of an adapted embedding get a third rate, 1e-6 by default, whatever `lr` is.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2

"$work/venv/bin/python" - <<'PYTHON'
import sys

import peft
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

print(f"torch {torch.__version__}, peft {peft.__version__}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.convolution = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Conv1d(8, 8, 1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids):
        x = self.linear(self.embedding(ids))
        return self.head(self.norm(self.convolution(x.transpose(1, 2)).transpose(1, 2)))


torch.manual_seed(0)
targets, whole = ["embedding", "linear", "convolution"], ["norm", "head"]
model = get_peft_model(Model(), LoraConfig(r=2, target_modules=targets, modules_to_save=whole, use_dora=True))
lr = 1e-3
optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
short = {id(p): n.removeprefix("base_model.model.").replace(".default", "") for n, p in model.named_parameters()}
rate = {}
print(f"\nExpected with lr={lr} and ratio 16: B at 16 * lr = {16 * lr}, all else at lr.")
print("Seen:")
for group in optimizer.param_groups:
    for parameter in group["params"]:
        rate[short[id(parameter)]] = group["lr"]
        print(f"  rate {group['lr']:<7g} weight decay {group['weight_decay']:<4g} {short[id(parameter)]}")

check(rate["linear.lora_A.weight"] == lr and rate["linear.lora_B.weight"] == 16 * lr, "A and B are as expected")
head = rate["head.modules_to_save.weight"], rate["head.modules_to_save.bias"]
check(head == (lr, 16 * lr), "one head has two rates: its weight lr, its bias 16 * lr")
check(rate["norm.modules_to_save.weight"] == 16 * lr, "a layer norm in modules_to_save has 16 * lr")
magnitudes = rate["linear.lora_magnitude_vector.weight"], rate["convolution.lora_magnitude_vector.weight"]
check(magnitudes == (16 * lr, lr), "DoRA's magnitudes: 16 * lr on the linear layer, lr on the convolution")
embedding = {r for n, r in rate.items() if n.startswith("embedding.lora_embedding_")}
check(embedding == {1e-6}, "both factors of the adapted embedding have 1e-6, a thousandth of lr")

before = {n: p.detach().clone() for n, p in model.named_parameters()}
model(torch.randint(0, 10, (4, 6))).square().sum().backward()
for group in optimizer.param_groups:
    group["weight_decay"] = 0.0
optimizer.step()
moved = {
    short[id(p)]: (p.detach() - before[n]).abs().max().item() for n, p in model.named_parameters() if p.requires_grad
}
weight, bias = moved["head.modules_to_save.weight"], moved["head.modules_to_save.bias"]
print(f"One AdamW step without decay moves the head's weight by {weight:.3g}, its bias by {bias:.3g}.")
check(15 < bias / weight < 17, "the head's bias moves 16 times as far as its weight")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
