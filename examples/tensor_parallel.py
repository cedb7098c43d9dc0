"""Tensor parallelism: `torchrun --nproc-per-node 2 examples/tensor_parallel.py [--model NAME] [--save FOLDER]`.

The linears of a DoRA model are cut over the ranks by the model's own plan. All ranks see the same batch, and compute
the loss and the gradients of one process. Without --model it trains a two-layer Llama of random weights to continue a
counting sequence, in seconds on CPUs with gloo; with "smollm2" or a folder, a real one; under nccl, on GPUs.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_kernels as lk


def base_model(name: str | None) -> nn.Module:
    if name:
        from lowrank_kernels.integrations.transformers import load_language_model

        return load_language_model(name, torch.float32)[0]
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def batch(step: int) -> torch.Tensor:
    """Sequences that count up from a random start: the same on all ranks."""
    start = torch.randint(0, 64, (16, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(16)) % 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save", help="folder for the adapter")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank = dist.get_rank()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))

    model = base_model(args.model).to(device)
    lk.adapt(model, lk.DoRAConfig(r=8, alpha=16))
    report = lk.distributed.parallelize(model, mesh["tp"])
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    if rank == 0:
        print(report)

    for step in range(args.steps):
        ids = batch(step).to(device)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and (step % 10 == 0 or step == args.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    if args.save:
        lk.save_adapter(model, args.save)  # every rank: the factors are gathered
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
