#!/usr/bin/env bash
# PEFT's disable_adapter() with reentrant activation checkpointing: backward after the context is of another function.
#
# Checkpointing runs the forward again in backward. disable_adapter() is a switch in the layers, which is back on by
# then, so what runs again is the adapted model: the gradient of the input is not that of the base model's output,
# and the adapter gets a gradient from a loss that it had no part in. Nothing is said. Non-reentrant checkpointing
# raises a CheckpointError, since other tensors are saved than in the forward. Call backward inside of the context,
# or run the base model without checkpointing.
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
from torch import nn
from torch.utils.checkpoint import checkpoint

print(f"torch {torch.__version__}, peft {peft.__version__}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


torch.manual_seed(0)
config = peft.LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False)
model = peft.get_peft_model(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), config)
factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
prompt = torch.randn(3, 16)


def gradients(forward, inside):
    """Of the base model's loss: (the prompt's, how many factors got one)."""
    model.zero_grad(set_to_none=True)
    x = prompt.clone().requires_grad_()
    with model.disable_adapter():
        loss = forward(x).square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return x.grad, sum(p.grad is not None and bool(p.grad.any()) for p in factors.values())


exact, none = gradients(model, inside=False)
print(f"\nWithout checkpointing, {none} of {len(factors)} factors get a gradient from the base model's loss.")


def off(gradient):
    return float((gradient - exact).norm() / exact.norm())


print("\nExpected: activation checkpointing saves memory and changes no gradient.")
found, trained = gradients(lambda x: checkpoint(model, x, use_reentrant=True), inside=False)
print(f"Seen, use_reentrant=True: the prompt's gradient is off by {off(found):.3g} of its norm; {trained} factors got one")
check(off(found) > 0.1, "the gradient is wrong, without a word")
check(trained > 0, "the disabled adapter is trained by a loss that it had no part in")

found, trained = gradients(lambda x: checkpoint(model, x, use_reentrant=True), inside=True)
print(f"Seen, backward inside of the context: off by {off(found):.3g}; {trained} factors got one")
check(off(found) < 1e-6 and trained == 0, "right")

try:
    gradients(lambda x: checkpoint(model, x, use_reentrant=False), inside=False)
    said = "nothing"
except Exception as error:
    said = type(error).__name__
print(f"Seen, use_reentrant=False: raises {said}")
check(said == "CheckpointError", "an error")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
