#!/usr/bin/env bash
# PEFT accepts LoRA on dt_proj of transformers' Mamba, FalconMamba and Jamba, where the adapter has no effect.
#
# Unless quantized, the blocks compute `self.dt_proj.weight @ time_step` and never call the module. `.weight` of
# PEFT's wrapper is the frozen base weight, so the adapter gets no gradient and changes no output. Merging does add it
# to that weight, so the merged model's outputs differ from the adapted one's. PEFT refuses out_proj and conv1d in
# some Mamba models, but not dt_proj.
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
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

warnings.simplefilter("ignore")
print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")

changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, pad_token_id=0)
models = {
    "Mamba": lambda: MambaForCausalLM(MambaConfig(state_size=4, **small)),
    "FalconMamba": lambda: FalconMambaForCausalLM(FalconMambaConfig(state_size=4, **small)),
    "Jamba": lambda: JambaForCausalLM(
        JambaConfig(
            intermediate_size=32,
            num_attention_heads=2,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=1,
            mamba_d_state=4,
            use_mamba_kernels=False,
            **small,
        )
    ),
}
print("\nExpected: an adapter changes the logits and gets gradients, or it is refused; merging keeps the logits.")


def adapted(name, target):
    torch.manual_seed(0)
    base = models[name]().eval()
    ids = torch.randint(1, 50, (2, 9))
    before = base(input_ids=ids).logits.detach()
    # A large alpha, so that an adapter that takes part cannot be overlooked.
    config = LoraConfig(r=2, lora_alpha=4000, target_modules=[target], init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    logits = model(input_ids=ids).logits
    model.merge_adapter()
    merged = model(input_ids=ids).logits
    return logits, (logits - before).abs().max().item(), (merged - logits).abs().max().item()


for name in models:
    logits, by_adapter, _ = adapted(name, "in_proj")
    print(f"Seen, {name}, adapter on in_proj, for comparison: it changes the logits by {by_adapter:.3g}")
    check(by_adapter > 1e-3 and logits.requires_grad, "it changes the logits, and they carry a gradient")
    logits, by_adapter, by_merging = adapted(name, "dt_proj")
    changes = f"{by_adapter:.3g}, merging it by {by_merging:.3g}"
    print(f"Seen, {name}, adapter on dt_proj: it changes the logits by {changes}")
    check(by_adapter < 1e-5, "the adapter does not change the logits")
    check(not logits.requires_grad, "the logits need no gradient: there is nothing to train")
    check(by_merging > 100 * max(by_adapter, 1e-6), "merging changes the outputs")

if changed:
    sys.exit(f"{len(changed)} of the statements above no longer hold with these versions.")
PYTHON
