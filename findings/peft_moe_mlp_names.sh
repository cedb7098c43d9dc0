#!/usr/bin/env bash
# PEFT: the same three names of MLP projections adapt opposite halves of two mixtures of experts.
#
# target_modules=["gate_proj", "up_proj", "down_proj"] matches, by name, the dense MLPs and the shared experts of
# DeepSeek-V3 in transformers 5, whose routed experts are one 3-D parameter. For model types that PEFT knows to have been
# converted so, get_peft_model rewrites the names to target_parameters: the routed experts are adapted, gate and up as
# one weight at twice the rank asked for, and the linears that do have these names, in dense layers and shared experts,
# are not. On Qwen2-MoE nothing is rewritten: the shared experts are adapted, and the routed ones are not. Neither says
# so.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-compile \
  torch==2.14.1 numpy==2.4.6 peft==0.21.2 transformers==5.24.0

"$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings
from importlib.metadata import version

import peft
import torch
import transformers

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
print(f"torch {torch.__version__}, peft {version('peft')}, transformers {version('transformers')}")

NAMES = ["gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts_per_tok": 2,
}
changed = []


def check(holds, what):
    print(f"  [{'as stated' if holds else 'CHANGED'}] {what}")
    if not holds:
        changed.append(what)


def adapted(model):
    """{where an adapter sits: its ranks times experts}, of rank 4 asked for."""
    named = {name for name, _ in model.named_modules() if name.endswith(tuple(NAMES))}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=NAMES))
    ranks = {
        name.removeprefix("base_model.model.").split(".lora_A")[0]: len(p)
        for name, p in model.named_parameters()
        if ".lora_A." in name
    }
    print(f"  linears with these names: {len(named)}; adapted: {ranks}")
    return named, ranks


torch.manual_seed(0)
print("DeepSeek-V3, 4 experts:")
deepseek = transformers.DeepseekV3Config(
    **SIZES, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=8,
    kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
)
named, ranks = adapted(transformers.DeepseekV3ForCausalLM(deepseek))
check(len(named) == 6, "six linears have the names: of a dense MLP and of a shared expert")
check(not any(name in ranks for name in named), "none of them is adapted")
check(sorted(ranks.values()) == [16, 32], "the routed experts are: down at rank 4, gate and up as one at rank 8")

print("Qwen2-MoE, 4 experts:")
qwen = transformers.Qwen2MoeConfig(**SIZES, num_experts=4, shared_expert_intermediate_size=24)
named, ranks = adapted(transformers.Qwen2MoeForCausalLM(qwen))
check(named == set(ranks) and all("shared_expert" in name for name in named), "the shared experts are adapted, alone")
check(set(ranks.values()) == {4}, "at rank 4")
sys.exit(1 if changed else 0)
PYTHON
