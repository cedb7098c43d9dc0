#!/usr/bin/env bash
# PEFT: with overlapping keys in alpha_pattern or rank_pattern, the loaded adapter is not the saved one.
#
# Where two keys match a module, the first key in the dictionary wins. `save_pretrained` sorts the keys of
# adapter_config.json, nested dictionaries included, so after loading the alphabetically first key wins. With
# alpha_pattern the loaded adapter silently has another scaling; with rank_pattern loading fails because shapes
# differ. Keys that happen to be in alphabetical order survive, so a small test may well pass.
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
import tempfile

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
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
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.v_proj(torch.tanh(self.q_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.layers(x)


torch.manual_seed(0)
base, x = Model(), torch.randn(4, 8)


def round_trip(**patterns):
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **patterns)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    return model, loaded


def scalings(model):
    return {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if hasattr(module, "scaling")
    }


print("\nExpected: the loaded adapter computes what the saved one computed.")
general_last = {r"layers\.1\.v_proj": 32, "v_proj": 8}
model, loaded = round_trip(alpha_pattern=general_last)
print(f"Seen, alpha_pattern={general_last} (specific key first, and in alphabetical order):")
print(f"  scalings as trained {scalings(model)}\n  scalings as loaded  {scalings(loaded)}")
check(torch.equal(model(x), loaded(x)), "the outputs are the same")

general_last = {r"layers\.1\.v_proj": 32, r".*_proj": 8}
model, loaded = round_trip(alpha_pattern=general_last)
print(f"Seen, alpha_pattern={general_last} (specific key first, not in alphabetical order):")
print(f"  scalings as trained {scalings(model)}\n  scalings as loaded  {scalings(loaded)}")
print(f"  largest difference of the outputs {(model(x) - loaded(x)).abs().max().item():.3g}")
check(scalings(model)["layers.1.v_proj"] == 8.0, "as trained, the specific key applies to layers.1.v_proj: 32 / 4 = 8")
check(scalings(loaded)["layers.1.v_proj"] == 2.0, "as loaded, the general key applies: 8 / 4 = 2")
check((model(x) - loaded(x)).abs().max().item() > 0.1, "the outputs differ, and nothing is raised")

print("Seen, the same two keys in rank_pattern with ranks 8 and 2:")
try:
    round_trip(rank_pattern={r"layers\.1\.v_proj": 8, r".*_proj": 2})
    message = ""
except RuntimeError as error:
    message = str(error)
print("  " + next((line.strip() for line in message.splitlines() if "size mismatch" in line), "no error"))
check("size mismatch" in message, "the adapter that was just saved cannot be loaded")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
