"""What a training step of LoRA on a block of experts costs, beside the frozen block and PEFT's ``ParamWrapper``.

    python benchmarks/experts.py [--json FILE] [--dtypes float32,bfloat16] [--experts 8] [--top-k 2] [--tokens 1024]

A Mixtral block of transformers'. "frozen" is that block by its own forward, "grouped_mm" (transformers' choice) and
"eager", frozen, with a gradient for x and the router's weights alone; "base" is the frozen block by this package's
forward, without corrections. Steps are forward and backward and take turns; medians. Memory is the most that torch's
allocator holds at one time in a step, beyond what was held before it. Before anything is timed, the outputs and
gradients of ours are compared with PEFT's.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_kernels.cli.environment import environment
from lowrank_kernels.cli.peak_memory import peak_allocated
from lowrank_kernels.nn import LoRAExperts
from lowrank_kernels.nn.experts import from_peft, run_experts

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def block(experts: int, hidden: int, inner: int, dtype: torch.dtype, implementation: str) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = implementation
    made = MixtralExperts(config)
    for p in made.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    return made.to(dtype).requires_grad_(False)


def with_peft(base: nn.Module, rank: int) -> Any:
    import peft

    config = peft.LoraConfig(r=rank, target_modules=[], target_parameters=PARAMETERS, init_lora_weights=False)
    return peft.get_peft_model(nn.ModuleDict({"experts": base}), config).base_model.model["experts"]  # type: ignore[arg-type]


def like_peft(layer: LoRAExperts, wrapper: Any) -> None:
    """Give the layer PEFT's factors."""
    for name in reversed(list(layer.adapters)):
        of: Any = layer.adapters[name]
        a, b = (getattr(wrapper, key)["default"].weight.detach() for key in ("lora_A", "lora_B"))
        of.lora_A.data = a.clone()
        of.lora_B.data = from_peft(b, of.experts).clone()
        wrapper = wrapper.base_layer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"experts": 8, "top-k": 2, "tokens": 1024, "hidden": 512, "inner": 1792, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measured(dtype, options) for dtype in options.dtypes.split(",")]
    if options.json:
        said = {"environment": {**environment(), "command": " ".join(["python", *sys.argv])}}
        sizes = {k: getattr(options, k) for k in ("experts", "top_k", "tokens", "hidden", "inner", "rank", "threads")}
        options.json.write_text(json.dumps({**said, **sizes, "rows": rows}, indent=1) + "\n")
    return 0


def measured(name: str, options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    dtype = getattr(torch, name)
    sizes = options.experts, options.hidden, options.inner, dtype
    base = block(*sizes, "grouped_mm")
    eager = block(*sizes, "eager")
    eager.load_state_dict(base.state_dict())
    wrapper = with_peft(copy.deepcopy(base), options.rank)
    layer = LoRAExperts(copy.deepcopy(base), options.rank, alpha=8.0)
    like_peft(layer, wrapper)
    dora = LoRAExperts(copy.deepcopy(base), options.rank, alpha=8.0, dora=True)
    x = torch.randn(options.tokens, options.hidden).to(dtype).requires_grad_()
    weights, index = torch.rand(options.tokens, options.experts).topk(options.top_k)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    grad = torch.randn(options.tokens, options.hidden).to(dtype)

    def step(call: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            x.grad = weights.grad = None
            call(x, index, weights).backward(grad)

        return run

    calls = {
        "frozen": base,
        "frozen, eager": eager,
        "base": lambda *given: run_experts(base, {}, *given),
        "LoRA": layer,
        "DoRA": dora,
        "PEFT": wrapper,
    }
    results = {}
    for which in ("LoRA", "PEFT"):
        step(calls[which])()
        results[which] = calls[which](x, index, weights).detach().float(), x.grad.float()  # type: ignore[union-attr]
    off = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(results["LoRA"], results["PEFT"], strict=True)]
    assert max(off) < (1e-4 if dtype == torch.float32 else 0.1), off
    steps = {key: step(call) for key, call in calls.items()}
    times: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(options.turns + 1):
        for key, run in steps.items():
            start = time.perf_counter()
            run()
            if turn:
                times[key].append(time.perf_counter() - start)
    memory = {key: peak_allocated(run, torch.device("cpu")) for key, run in steps.items()}
    medians = {key: statistics.median(t) for key, t in times.items()}
    print(f"{name}: off PEFT's by {max(off):.1e}\n{'':14}{'ms':>9}{'over frozen':>13}{'over PEFT':>11}{'peak MiB':>10}")
    for key, t in medians.items():
        over = f"{t / medians['frozen']:13.2f}{t / medians['PEFT']:11.2f}"
        print(f"{key:14}{t * 1e3:9.1f}{over}{memory[key] / 2**20:10.1f}", flush=True)
    return {"dtype": name, "seconds": medians, "peak_bytes": memory, "off_peft": max(off)}


if __name__ == "__main__":
    raise SystemExit(main())
