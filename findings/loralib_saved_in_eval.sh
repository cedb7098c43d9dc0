#!/usr/bin/env bash
# loralib: saving or loading a state dict in eval mode silently gives a different model.
#
# `model.eval()` adds the LoRA product to the weight in place. That it has done so is known to an attribute of the
# layer, not to the state dict. So "evaluate, then save the whole model" writes the merged weight beside A and B, and
# a fresh model that loads all of them adds the product a second time. In the other direction, a model in eval mode
# that loads weights still believes that they are merged: the adapter has no effect in eval mode, and train()
# subtracts a product that was never added. Save and load in train mode, and call eval() after loading.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 loralib==0.1.2

"$work/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import loralib
import torch
from torch import nn

print(f"torch {torch.__version__}, loralib {version('loralib')}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


def fresh():
    torch.manual_seed(0)
    return nn.Sequential(loralib.Linear(8, 8, r=2), nn.ReLU(), loralib.Linear(8, 4, r=2))


def copy_of(state):
    return {name: tensor.clone() for name, tensor in state.items()}


@torch.no_grad()
def difference(model, outputs):
    return (model(x) - outputs).abs().max().item()


trained = fresh()
pretrained = {n: t for n, t in copy_of(trained.state_dict()).items() if "lora_" not in n}
torch.manual_seed(1)
x = torch.randn(3, 8)
for name, parameter in trained.named_parameters():  # stands for training
    if "lora_" in name:
        nn.init.normal_(parameter, std=0.5)
with torch.no_grad():
    outputs = trained(x)
saved_in_train = copy_of(trained.state_dict())
trained.eval()
print(f"\nThe trained model's outputs in train and eval mode differ by {difference(trained, outputs):.2g} (rounding).")
saved_in_eval = copy_of(trained.state_dict())

print("\nExpected: a model that loads all keys of a saved one, strictly, computes what it computed.")
for mode, state in (("train", saved_in_train), ("eval", saved_in_eval)):
    model = fresh()
    keys = model.load_state_dict(state)
    off = difference(model.eval(), outputs)
    print(f"Seen, saved in {mode} mode, loaded into a fresh model ({keys}): off by {off:.3g}")
    check(
        off < 1e-4 if mode == "train" else off > 0.1,
        "right" if mode == "train" else "wrong: the adapter is added twice",
    )

print("\nExpected: loading in eval mode gives the same model as loading in train mode.")
trained.train()
adapter = copy_of(loralib.lora_state_dict(trained))
with torch.no_grad():
    base_outputs = fresh()(x)
model = fresh().eval()
model.load_state_dict(pretrained, strict=False)
model.load_state_dict(adapter, strict=False)
off, off_base = difference(model, outputs), difference(model, base_outputs)
print(
    f"Seen, pretrained weights and adapter loaded in eval mode: off by {off:.3g}; from the base model by {off_base:.2g}"
)
check(off > 0.1 and off_base < 1e-4, "the adapter has no effect")
off = difference(model.train(), outputs)
print(f"Seen, the same model, now in train mode: off by {off:.3g}")
check(off > 0.1, "train() subtracted a product that was never added: the weights stay wrong")
off = (model[0].weight - pretrained["0.weight"]).abs().max().item()
print(f"Seen, its first frozen weight: off from the pretrained one by {off:.3g}")
check(off > 0.1, "the frozen weight has changed")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
