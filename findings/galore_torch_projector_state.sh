#!/usr/bin/env bash
# galore-torch: an optimizer's state holds a Python object, so a saved run is refused by torch.load, and two optimizers
# that load one state are tied to each other.
#
# GaLoreAdamW keeps a GaLoreProjector, with the current directions, among the state of each projected matrix. A state
# dict is meant to hold tensors and numbers: torch.load, which since 2.6 allows nothing else unless told to, refuses the
# file, so that a checkpoint written with torch.save does not resume. And load_state_dict copies tensors, but hands on
# other objects as they are: the optimizer that a state came from and those that load it share one projector, and a step
# of one that takes new directions changes the directions of all.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 transformers==5.24.0 bitsandbytes==0.50.2
"$work/venv/bin/python" -m pip install --quiet --no-compile --no-deps galore-torch==1.0

"$work/venv/bin/python" - <<'PYTHON'
import copy
import importlib.metadata
import io
import sys

import torch
from galore_torch import GaLoreAdamW
from torch import nn

print(f"torch {torch.__version__}, galore-torch {importlib.metadata.version('galore-torch')}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


GROUP = {"rank": 2, "update_proj_gap": 3, "scale": 1.0, "proj_type": "std"}


def start():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 12))
    return weight, GaLoreAdamW([{"params": [weight], **GROUP}], lr=0.01)


def step(weight, optimizer, seed):
    weight.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


weight, optimizer = start()
for seed in range(5):
    step(weight, optimizer, seed)

print("\nExpected: a state that torch.save wrote is read by torch.load.")
file = io.BytesIO()
torch.save(optimizer.state_dict(), file)
file.seek(0)
try:
    torch.load(file)
    print("Seen: it was read")
    check(False, "refused")
except Exception as error:
    print(f"Seen: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    check("GaLoreProjector" in str(error), "refused, for the projector in it")

print("\nExpected: two optimizers that load one state go on independently.")
state = optimizer.state_dict()


def after_loading(state, others=0):
    """The weight after one more step, with the directions of step 3; others load the same state and go on to step 6."""
    mine, my_optimizer = start()
    mine.data.copy_(weight.data)
    my_optimizer.load_state_dict(state)
    for _ in range(others):
        theirs, their_optimizer = start()
        their_optimizer.load_state_dict(state)
        for seed in range(100, 102):  # the second takes new directions
            step(theirs, their_optimizer, seed)
    step(mine, my_optimizer, 5)
    return mine.detach().clone()


alone = after_loading(copy.deepcopy(state))
beside = after_loading(copy.deepcopy(state), others=1)
apart = (alone - beside).abs().max().item()
print(f"Seen: beside another that stepped, the weight is off by {apart:.3g} after one step at a rate of 0.01")
check(apart > 1e-3, "the other optimizer's directions were used")

sys.exit(1 if changed else 0)
PYTHON
