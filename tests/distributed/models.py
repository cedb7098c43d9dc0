"""Small models adapted by every method, and what two ranks have to agree on with one process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import nn

import lowrank_kernels as lk
from tests.distributed.two_ranks import mesh, whole
from tests.tiny_llama import SIZES, make_llama

IDS = torch.randint(0, 64, (4, 9), generator=torch.Generator().manual_seed(2))


def mixtral(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).to(dtype)


def blocks_of(model):
    """Two blocks of every linear in the layers."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    index = torch.tensor([[0, 0], [0, 1]], dtype=torch.int32)
    shapes = {n: tuple(m.weight.shape) for n, m in linears.items()}
    return lk.smt.BlockSelection(dict.fromkeys(linears, index), shapes, (16, 16))


def adapted(config: Callable[[Any], Any] | Any, *, base=make_llama, dtype=torch.float32, format=None, then=None):
    """A function that makes the model, adapted, with factors that are not at their start."""

    def make():
        model = base(dtype)
        if format:
            lk.quantize_(model, format)
        torch.manual_seed(4)
        lk.adapt(model, config(model) if callable(config) else config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p.dtype))
        if then:
            then(model)
        return model.train()

    return make


def with_vectors(model):
    lk.init.velora_(model, {"input_ids": IDS}, lambda m, batch: m(**batch))


LORA, DORA = lk.LoRAConfig(r=4), lk.DoRAConfig(r=4)
METHODS = {
    "LoRA": adapted(LORA),
    "LoRA in float32 over bfloat16": adapted(LORA, dtype=torch.bfloat16),
    "LoRA with gates": adapted(lk.LoRAConfig(r=4, gate=True)),
    "LoRA with a bias of B": adapted(lk.LoRAConfig(r=4, lora_bias=True)),
    "LoRA with VeLoRA": adapted(lk.LoRAConfig(r=4, velora=4), then=with_vectors),
    "LoRA, embeddings too": adapted(lk.LoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"])),
    "LoRA and a head that trains": adapted(lk.LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "LoRA in blocks": adapted(LORA, then=lk.fuse),
    "LoRA of experts": adapted(lk.LoRAConfig(r=4, target_parameters="all-experts"), base=mixtral),
    "LoRA over nf4": adapted(LORA, format="nf4"),
    "LoRA over int8": adapted(LORA, format="int8"),
    "LoRA over fp8": adapted(LORA, format="fp8"),
    "DoRA": adapted(DORA),
    "DoRA, norm differentiated": adapted(lk.DoRAConfig(r=4, detach_norm=False)),
    "DoRA in blocks": adapted(DORA, then=lk.fuse),
    "DoRA of experts": adapted(lk.DoRAConfig(r=4, target_parameters="all-experts"), base=mixtral),
    "DoRA over nf4": adapted(DORA, format="nf4"),
    "LaMDA": adapted(lk.LaMDAConfig(r=4)),
    "SMT": adapted(lambda model: lk.SMTConfig(selection=blocks_of(model))),
    "SVFT": adapted(lk.SVFTConfig(pattern="banded", band=1)),
    "SVFT over nf4": adapted(lk.SVFTConfig(pattern="banded", band=1), format="nf4"),
    "several adapters": adapted(lk.MultiLoRAConfig(ranks=[2, 4])),
    "VeLoRA": adapted(lk.VeLoRAConfig(velora=4), then=with_vectors),
}


def own_batch():
    rank = dist.get_rank()
    return IDS[2 * rank : 2 * rank + 2]


def loss_of(model, ids):
    """The loss, in the batch of adapters where the model has several."""
    several = any(isinstance(m, lk.nn.MultiLoRALinear) for m in model.modules())
    chosen = [0, 1, 1, 0][: len(ids)] if len(ids) == 4 or dist.get_rank() == 0 else [1, 0]
    with lk.nn.use_adapters(chosen) if several else contextlib.nullcontext():
        return model(input_ids=ids, labels=ids).loss


def shard(model, **settings):
    """Every decoder layer by itself, and the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh(), **settings)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def as_one_process(
    alone, parallel, *, steps=2, rtol=1e-4, fused=True, call=None, whole_batch=False, groups=list
) -> None:
    """Loss, gradients and parameters of ``steps`` steps are those of one process with all of the batch.

    ``rtol``: of the norm of each gradient, whose sums over tokens have another order. ``call``: what is called in the
    place of ``parallel``. ``whole_batch``: each rank gets all of it. ``groups``: makes parameter groups.
    """
    optimizers = [torch.optim.AdamW(groups(trained(m)), lr=1e-2, fused=fused) for m in (alone, parallel)]
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        expected, loss = (
            loss_of(alone, IDS),
            loss_of(parallel if call is None else call, IDS if whole_batch else own_batch()),
        )
        mean = loss.detach().clone() / dist.get_world_size()
        dist.all_reduce(mean)
        torch.testing.assert_close(mean, expected.detach(), rtol=2e-6, atol=0.0)
        expected.backward()
        loss.backward()
        pairs = itertools.zip_longest(alone.named_parameters(), parallel.parameters())
        for (name, ours), theirs in pairs:
            if ours.grad is None or not ours.requires_grad:
                assert theirs.grad is None or not ours.grad, name
                continue
            assert theirs.grad is not None, name
            error = (whole(theirs.grad) - ours.grad).norm() / ours.grad.norm()
            assert error < rtol, f"{name}, step {step}: {error:.1e}"
        for optimizer in optimizers:
            optimizer.step()
    for m in (alone, parallel):
        m.eval()
    with torch.no_grad():  # where DoRA keeps its g
        for model in (alone, parallel):
            loss_of(model, IDS)
        difference = (loss_of(parallel, IDS) - loss_of(alone, IDS)).abs()
    assert difference < 1e-4, difference
