#!/usr/bin/env bash
# torch: an optimizer with fused=True changes parameters without raising their `_version`.
#
# `tensor._version` counts in-place changes: autograd compares it to notice overwritten saved tensors, and caches use
# it as a key. The plain and the foreach steps raise it; the fused steps of SGD, Adam, AdamW and Adagrad do not (a CPU
# shows it as well). So a backward pass through a graph recorded before a plain step is refused; after a fused step it
# runs and silently mixes old activations with new weights. transformers' Trainer uses adamw_torch_fused by default.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0

"$work/venv/bin/python" - <<'PYTHON'
import sys
import tempfile

import torch
import transformers
from torch import nn
from transformers import TrainingArguments

print(f"torch {torch.__version__}, transformers {transformers.__version__}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


WAYS = {"plain": dict(foreach=False, fused=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}

print("\nExpected: a step that changes a parameter raises its _version.")
for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad):
    raised = {}
    for way, options in WAYS.items():
        weight = nn.Parameter(torch.ones(4))
        weight.grad = torch.ones(4)
        version = weight._version
        optimizer([weight], lr=0.1, **options).step()
        assert not torch.equal(weight.detach(), torch.ones(4))
        raised[way] = weight._version - version
    print(f"Seen, {optimizer.__name__}: the weight changed, _version was raised by {raised}")
    check(raised["plain"] > 0 and raised["foreach"] > 0 and raised["fused"] == 0, "all but the fused step raise it")

print("\nExpected: a backward pass through a graph whose weights were overwritten is refused.")


def gradient_after_step(options):
    torch.manual_seed(0)
    first, second, x = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(3, 3)), torch.randn(2, 3)
    output = ((x @ first) @ second).sum()
    (right,) = torch.autograd.grad(output, first, retain_graph=True)
    optimizer = torch.optim.SGD([first, second], lr=0.5, **options)
    first.grad, second.grad = torch.ones(3, 3), torch.ones(3, 3)
    optimizer.step()
    (seen,) = torch.autograd.grad(output, first)
    return right, seen


for way, options in WAYS.items():
    try:
        right, seen = gradient_after_step(options)
        error, largest, message = (seen - right).abs().max().item(), right.abs().max().item(), ""
        print(f"Seen, {way} step: no error; the gradient is off by {error:.3g} (largest entry {largest:.3g})")
    except RuntimeError as refusal:
        error, message = 0.0, str(refusal)
        print(f"Seen, {way} step: {message.split(':')[0]}")
    if way == "fused":
        check(not message and error > 0.1, "not refused, and wrong")
    else:
        check("modified by an inplace operation" in message, "refused")

with tempfile.TemporaryDirectory() as folder:
    name = TrainingArguments(output_dir=folder, use_cpu=True, report_to=[]).optim.value
print(f"\nSeen, default optimizer of transformers' TrainingArguments: {name}")
check(name.endswith("_fused"), "it is a fused one")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
