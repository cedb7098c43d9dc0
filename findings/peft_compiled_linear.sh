#!/usr/bin/env bash
# PEFT's "all-linear" puts LoRA into a linear that torch.compile has wrapped by itself, where it is never run.
#
# torch.compile(linear) is a module whose forward was made from the linear it was given. PEFT finds that linear at
# `_orig_mod`, puts its layer in the place of it, and lists and counts its parameters; the compiled forward goes on with
# the linear alone. So the adapter has no effect and gets no gradient, and nothing is said. Named explicitly
# (target_modules=["up"]) the same module is refused with a ValueError. Compiled blocks are fine: their forward looks
# their linears up at each call. Make the PeftModel first, and compile then.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2

"$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import peft
import torch
from torch import nn

print(f"torch {torch.__version__}, peft {peft.__version__}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x):
        return x + self.up(x)


def adapted(prepare):
    """(a block with an adapter that is not zero, its base model's outputs, what was warned of)"""
    torch.manual_seed(0)
    model = nn.Sequential(Block())
    with torch.no_grad():
        base = model(x)
    prepare(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    return model, base, [str(w.message) for w in warned]


def compile_linear(model):
    model[0].up = torch.compile(model[0].up, backend="eager")


def compile_block(model):
    model[0] = torch.compile(model[0], backend="eager")


torch.manual_seed(1)
x = torch.randn(3, 16)
print("\nExpected: an adapter that is listed among the parameters changes the outputs and gets a gradient.")
for what, prepare, works in (
    ("nothing compiled", lambda model: None, True),
    ("the block compiled", compile_block, True),
    ("the linear compiled by itself", compile_linear, False),
):
    model, base, warned = adapted(prepare)
    y = model(x)
    if y.requires_grad:
        y.sum().backward()
    factors = [p for name, p in model.named_parameters() if "lora_" in name]
    effect, trained = float((y - base).abs().max()), sum(p.grad is not None for p in factors)
    print(f"Seen, {what}: {len(factors)} factors, {trained} with a gradient, effect {effect:.3g}, warnings {warned}")
    check(
        len(factors) == 2 and not warned and (effect > 0.1) == works and (trained == 2) == works,
        "as expected" if works else "no effect and no gradient, without a word",
    )

torch.manual_seed(0)
model = nn.Sequential(Block())
compile_linear(model)
try:
    peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["up"]))
    said = "nothing"
except ValueError as error:
    said = str(error).splitlines()[0]
print(f"Seen, named explicitly: {said}")
check("OptimizedModule" in said, "refused")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
