#!/usr/bin/env bash
# PEFT: add_weighted_adapter with the name of an existing adapter silently does nothing.
#
# A search over mixing weights that reuses one name for the mix measures the first mix every time. load_adapter, on
# the other hand, overwrites an adapter of the same name. Delete the mix first, or use a new name each time.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2

"$work/venv/bin/python" - <<'PYTHON'
import sys
import tempfile
import warnings

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


torch.manual_seed(0)
config = LoraConfig(r=2, lora_alpha=2, target_modules=["0"], init_lora_weights=False)
model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config, adapter_name="one")
model.add_adapter("two", config)
layer = model.base_model.model[0]


def off(weights, name="mix"):
    """How far the mix is from the weighted sum of both deltas, relative to that sum."""
    right = sum(w * layer.get_delta_weight(n) for w, n in zip(weights, ("one", "two"), strict=True))
    return ((layer.get_delta_weight(name) - right).norm() / right.norm()).item()


def mix(weights, name="mix"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.add_weighted_adapter(["one", "two"], weights, name, combination_type="cat")
    return [str(w.message) for w in caught]


print('\nExpected: after add_weighted_adapter(..., weights, "mix"), "mix" has these weights, or there is an error.')
print(f"Seen, [0.9, 0.1], a new name: {mix([0.9, 0.1]) or 'no warning'}; off by {off([0.9, 0.1]):.2g}")
check(off([0.9, 0.1]) < 1e-5, "the first mix is right")
said = mix([0.1, 0.9])
print(f"Seen, [0.1, 0.9], the same name: {said or 'no warning'}; off by {off([0.1, 0.9]):.2g}")
check(not said and off([0.1, 0.9]) > 0.5 and off([0.9, 0.1]) < 1e-5, "the second call changes nothing and says nothing")
mix([0.1, 0.9], "another name")
check(off([0.1, 0.9], "another name") < 1e-5, "another name: right")
model.delete_adapter("mix")
mix([0.1, 0.9])
check(off([0.1, 0.9]) < 1e-5, "the same name after delete_adapter: right")

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder, selected_adapters=["one"])
    model.load_adapter(f"{folder}/one", adapter_name="two")
same = torch.equal(layer.get_delta_weight("two"), layer.get_delta_weight("one"))
check(same, "for comparison: load_adapter overwrites an adapter of the same name")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
