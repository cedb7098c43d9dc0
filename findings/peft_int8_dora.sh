#!/usr/bin/env bash
# PEFT with bitsandbytes: DoRA over an 8-bit linear runs one forward on a CPU, and raises at the next.
#
# Making a DoRA layer reads the weight's norm, and for that copies the row scales of the 8-bit weight from the parameter
# into the linear's state. The first forward of the linear moves what the state does not have yet, and drops the scales
# from the parameter. The second forward then moves "the parameter's scales" again, which are gone, over those in the
# state. LoRA without DoRA over the same linear is not touched: nothing reads the state before its first forward.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 peft==0.21.2 transformers==5.24.0 bitsandbytes==0.50.2

"$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import bitsandbytes as bnb
import peft
import torch
from torch import nn

warnings.filterwarnings("ignore")
print(f"torch {torch.__version__}, " + ", ".join(f"{p} {version(p)}" for p in ("peft", "transformers", "bitsandbytes")))

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


def model(dora):
    torch.manual_seed(0)
    linear = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False)
    linear.load_state_dict(nn.Linear(64, 32).state_dict())
    base = nn.Sequential(linear.to("cpu"))
    base.is_loaded_in_8bit = True
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["0"], use_dora=dora))


def forwards(adapted):
    """What two forwards give: "runs", or the error's name."""
    found = []
    for _ in range(2):
        try:
            adapted(torch.randn(3, 64))
            found.append("runs")
        except AttributeError as error:
            found.append(type(error).__name__)
    return found


without, with_dora = forwards(model(False)), forwards(model(True))
print(f"  LoRA: {without}; DoRA: {with_dora}")
check(without == ["runs", "runs"], "LoRA over the 8-bit linear runs twice")
check(with_dora == ["runs", "AttributeError"], "DoRA over it runs once, and raises AttributeError at the second forward")
sys.exit(1 if changed else 0)
PYTHON
