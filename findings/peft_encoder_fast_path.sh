#!/usr/bin/env bash
# PEFT's LoRA on torch.nn.TransformerEncoderLayer(batch_first=True) trains, and has no effect in eval mode.
#
# In eval mode the layer takes torch's fast path, which passes linear1.weight and linear2.weight to one fused function
# and never calls the two modules. `.weight` of PEFT's wrapper is the frozen base weight, so the fused function
# computes the base model. Neither library warns. Torch avoids the fast path while gradients are on and a weight
# requires one, but under LoRA the base weights are frozen, so the fast path is taken even outside torch.no_grad().
# With batch_first=False, or after torch.backends.mha.set_fastpath_enabled(False), the adapter has its effect.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2

"$work/venv/bin/python" - <<'PYTHON'
import copy
import sys

import peft
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

print(f"torch {torch.__version__}, peft {peft.__version__}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


def encoder(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=64, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)


def largest_difference(a, b):
    return (a - b).abs().max().item()


def train(batch_first):
    base = encoder(batch_first)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, target_modules=["linear1", "linear2"]))
    torch.manual_seed(1)
    x, target = torch.randn(4, 5, 16), torch.randn(4, 5, 16)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(300):
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return base, model, x, target


print("\nExpected: without dropout, train mode and eval mode give the same outputs, so the same loss.")
base, model, x, target = train(batch_first=True)
base.eval()
before = (base(x) - target).square().mean().item()
trained = (model.train()(x) - target).square().mean().item()
output = model.eval()(x)
evaluated = (output - target).square().mean().item()
print("Seen, batch_first=True:")
print(f"  loss of the base model {before:.4f}; trained adapter, train mode {trained:.4f}; eval mode {evaluated:.4f}")
check(trained < 0.8 * before, "the adapter trains: its loss in train mode is well below the base model's")
check(largest_difference(output, base(x)) < 1e-5, "in eval mode the outputs are the base model's")
with torch.no_grad():
    check(largest_difference(model(x), base(x)) < 1e-5, "the same under torch.no_grad()")

torch.backends.mha.set_fastpath_enabled(False)
slow = (model(x) - target).square().mean().item()
print(f"  loss in eval mode with the fast path switched off {slow:.4f}")
check(abs(slow - trained) < 1e-4, "with the fast path switched off, eval mode agrees with train mode")
torch.backends.mha.set_fastpath_enabled(True)
model.merge_adapter()
merged = (model(x) - target).square().mean().item()
print(f"  loss in eval mode after merge_adapter() {merged:.4f}")
check(abs(merged - trained) < 1e-4, "merged into the weights, the adapter has its effect in eval mode too")

_, model, x, target = train(batch_first=False)
trained = (model.train()(x) - target).square().mean().item()
evaluated = (model.eval()(x) - target).square().mean().item()
print("Seen, batch_first=False:")
print(f"  loss of the trained adapter, train mode {trained:.4f}; eval mode {evaluated:.4f}")
check(abs(evaluated - trained) < 1e-4, "without batch_first both modes agree")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
