#!/usr/bin/env bash
# PEFT: `adapter_names=[...]`, one adapter per sequence, picks adapters by position inside the sequence on XLNet.
#
# PEFT assigns the names along dimension 0 of each layer's input. Inside XLNet tensors have the shape (length, batch,
# width), so dimension 0 is the position. If length and batch size are equal, nothing is raised, and every sequence
# gets each adapter at some of its positions. Otherwise the call fails with an error about the number of inputs,
# though that number was right.
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
import transformers
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel, XLNetConfig, XLNetModel

warnings.simplefilter("ignore")
print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


names = ["first", "second", "first", "second"]


def two_adapters(base, targets):
    config = LoraConfig(r=2, lora_alpha=8, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(base.eval(), config, adapter_name="first")
    model.add_adapter("second", config)
    return model.eval()


@torch.no_grad()
def error_of_mixing(model, ids):
    """For each row, the largest difference between the mixed batch and the row alone with its adapter."""
    mixed = model(input_ids=ids, adapter_names=names).last_hidden_state
    errors = []
    for row, name in enumerate(names):
        model.set_adapter(name)
        errors.append((mixed[row] - model(input_ids=ids[row : row + 1]).last_hidden_state[0]).abs().max().item())
    return errors


torch.manual_seed(0)
small = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
bert = two_adapters(BertModel(small), ["query", "value"])
small = XLNetConfig(vocab_size=50, d_model=16, n_layer=2, n_head=2, d_inner=32)
xlnet = two_adapters(XLNetModel(small), ["layer_1", "layer_2"])

print("\nExpected: each row of a mixed batch is what that row gives alone with its adapter.")
errors = error_of_mixing(bert, torch.randint(0, 50, (4, 4)))
print(f"Seen, BERT (batch first), 4 rows of 4 tokens: differences {[f'{e:.2g}' for e in errors]}")
check(max(errors) < 1e-4, "the rows are right")
errors = error_of_mixing(xlnet, torch.randint(0, 50, (4, 4)))
print(f"Seen, XLNet (length first), 4 rows of 4 tokens: differences {[f'{e:.2g}' for e in errors]}")
check(min(errors) > 0.1, "every row is wrong, and nothing is raised")
try:
    error_of_mixing(xlnet, torch.randint(0, 50, (4, 6)))
    message = "no error"
except ValueError as error:
    message = str(error)
print(f"Seen, XLNet, 4 rows of 6 tokens: {message}")
check("got 4 and 6" in message, "4 names for 4 rows are refused: PEFT counted the 6 positions")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
