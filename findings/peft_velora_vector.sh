#!/usr/bin/env bash
# PEFT: VeLoRA's projection vectors are in an adapter's file, and the first training step after loading replaces them.
#
# With init_type "batch_average_once" a layer makes its vector of the first batch that it trains on, and keeps it, as the
# method asks. save_pretrained writes the vector. That it has been made is kept in a plain dict beside it, which neither
# save_pretrained nor state_dict writes: a loaded model takes the vector from the file, and overwrites it with that of
# the first batch it sees. A run that is stopped and goes on so projects on other vectors from there. With "random" the
# vector of the file stays. (With the default, "batch_average", there is no fixed vector: each forward makes its own.)
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 peft==0.21.2 transformers==5.24.0

"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import peft
import torch
from torch import nn

warnings.filterwarnings("ignore")
print(f"torch {torch.__version__}, peft {version('peft')}, transformers {version('transformers')}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32))


def vector(model):
    return model.base_model.model[0].lora_velora_embed["default"].detach().clone()


def step(model, seed):
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) + 0.3
    model.train()(x).square().mean().backward()


found = {}
for kind in ("batch_average_once", "random"):
    config = peft.LoraConfig(
        r=4, target_modules=["0"], velora_config=peft.VeloraConfig(num_groups=8, init_type=kind)
    )
    model = peft.get_peft_model(base(), config)
    step(model, 1)
    made = vector(model)
    step(model, 2)
    check(torch.equal(vector(model), made), f"{kind}: a second batch leaves the vector as it is")
    folder = f"{sys.argv[1]}/{kind}"
    model.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(base(), folder, is_trainable=True)
    check(torch.equal(vector(again), made), f"{kind}: the file holds the vector")
    step(again, 2)
    found[kind] = float(nn.functional.cosine_similarity(vector(again), made, dim=-1).mean())
    print(f"  {kind}: cosine of the vector after a step of the loaded model with the one before: {found[kind]:.3f}")
check(found["random"] > 0.9999, "random: the loaded vector stays")
check(found["batch_average_once"] < 0.999, "batch_average_once: the loaded vector is replaced by that of the next batch")
sys.exit(1 if changed else 0)
PYTHON
