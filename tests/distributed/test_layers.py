"""Adapted layers under DDP, FSDP1, FSDP2 and tensor parallelism: two processes run every check, each reported alone."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

import lowrank_kernels as lk
from tests.distributed.two_ranks import close, mesh, on_two_ranks, refuses

CONFIGS = [lk.LoRAConfig(r=4), lk.LoRAConfig(r=4, lora_bias=True), lk.DoRAConfig(r=4)]
FACTORS = [lk.LoRAConfig(r=4), lk.DoRAConfig(r=4)]


def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 33), nn.ReLU(), nn.Linear(33, 31))  # rows that two ranks cannot share equally


def build(config, model=None):
    model = plain() if model is None else model
    lk.adapt(model, config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name and "magnitude" not in name:
                p.normal_(std=0.3)
    return model


def layers(model):
    return [m for m in model.modules() if isinstance(m, lk.nn.LoRALinear)]


def batch():
    """A batch of this rank's own, and all ranks'."""
    torch.manual_seed(1)
    whole = torch.randn(2, 3, 32)
    return whole[dist.get_rank()], whole


def reference_gradients(model, whole):
    """Of the mean of the ranks' losses."""
    (sum(model(x).square().sum() for x in whole) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ----------------------------------------------------------------------------------------------------------------- DDP


def adapt_refuses_a_model_that_ddp_holds():
    model = nn.ModuleDict({"body": plain(), "head": nn.Linear(31, 5)})
    wrapper = nn.parallel.DistributedDataParallel(model)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for held in (wrapper, model, model["body"]):
        refuses("before DistributedDataParallel.*then wrap it", lk.adapt, held, CONFIGS[0])
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert not layers(model)
    lk.adapt(plain(), CONFIGS[0])


def adapt_before_ddp_keeps_the_ranks_together():
    model = build(CONFIGS[0])
    wrapper = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    torch.manual_seed(dist.get_rank())
    for _ in range(3):
        wrapper(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    factors = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "lora" in name])
    everyones = [torch.zeros_like(factors) for _ in range(2)]
    dist.all_gather(everyones, factors)
    assert torch.equal(*everyones)
    refuses("give its module", lk.merge_and_unload, wrapper)
    lk.merge_and_unload(model)


def ranks_of_ddp_share_the_vectors_of_velora():
    for config in (lk.LoRAConfig(r=4, velora=1), lk.VeLoRAConfig(velora=1)):
        model = build(config)
        wrapper = nn.parallel.DistributedDataParallel(model)
        own, _ = batch()
        for _ in range(2):  # each makes vectors of its own part; rank 0's come with the second forward
            wrapper(own).square().sum().backward()
        values = torch.cat(
            [layer.velora_vector for layer in (model[0], model[2])]
            + [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        )
        everyones = [torch.zeros_like(values) for _ in range(2)]
        dist.all_gather(everyones, values)
        assert torch.equal(*everyones)


# --------------------------------------------------------------------------------------------------------------- FSDP1


def fsdp1(model, **settings):
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)


def fsdp1_with_original_parameters_trains_and_merges():
    from torch.distributed.fsdp import FullyShardedDataParallel

    x, whole = batch()
    for config in CONFIGS:
        reference, model = build(config), build(config)
        wanted = reference_gradients(reference, whole)
        wrapper = fsdp1(model, use_orig_params=True)
        y = wrapper(x)
        close(y, reference(x))
        y.square().sum().backward()
        refuses("it is a shard|view for a forward", layers(model)[0].merge_)
        refuses("a shard; call it in FullyShardedDataParallel", lk.save_adapter, wrapper, tempfile.mkdtemp())
        with FullyShardedDataParallel.summon_full_params(wrapper, with_grads=True):
            got = {name: p.grad for name, p in wrapper.named_parameters()}
            for name, grad in wanted.items():
                close(got[name], grad)
            folder = lk.save_adapter(wrapper, tempfile.mkdtemp())
            for layer in layers(model):
                layer.merge_()
        assert all(layer.merged for layer in layers(model))
        close(wrapper(x), reference(x))
        again = plain()
        lk.load_adapter(again, folder)
        close(again(x), reference(x))


def fsdp1_around_the_trained_linears_alone_trains_or_is_refused():
    from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

    x, _ = batch()
    policy = partial(lambda_auto_wrap_policy, lambda_fn=lambda m: isinstance(m, nn.Linear) and m.weight.requires_grad)
    for use_orig_params in (False, True):
        reference, model = build(CONFIGS[0]), build(CONFIGS[0])
        wrapper = fsdp1(model, use_orig_params=use_orig_params, auto_wrap_policy=policy)
        y = wrapper(x)
        close(y, reference(x))
        y.square().sum().backward()
    wrapper = fsdp1(build(lk.DoRAConfig(r=4)), use_orig_params=True, auto_wrap_policy=policy)
    refuses("whole weight of lora_A at hand", wrapper, x)


# --------------------------------------------------------------------------------------------------------------- FSDP2


def fsdp2_around_whole_layers_trains_saves_and_merges():
    from torch.distributed.fsdp import fully_shard

    x, whole = batch()
    for config in CONFIGS:
        reference, model = build(config), build(config)
        wanted = reference_gradients(reference, whole)
        for layer in layers(model):
            fully_shard(layer, mesh=mesh())
        fully_shard(model, mesh=mesh())
        y = model(x)
        close(y, reference(x))
        y.square().sum().backward()
        for name, p in model.named_parameters():
            if name in wanted:
                close(p.grad.full_tensor(), wanted[name])
        again = plain()
        lk.load_adapter(again, lk.save_adapter(model, tempfile.mkdtemp()))
        close(again(x), reference(x))
        refuses("its weight is sharded", lk.merge_and_unload, model)
        for layer in layers(model):
            layer.merge_()
        close(model(x), reference(x))
        state = model.state_dict()
        close(state["0.base_layer.weight"].full_tensor(), reference[0].base_layer.weight)
        for layer in layers(model):
            layer.unmerge_()
        close(model(x), reference(x))


def fsdp2_merging_that_one_rank_refuses_is_refused_by_all():
    from torch.distributed.fsdp import fully_shard

    for config in FACTORS:
        model = build(config)
        model[0].lora_B.weight.data[0] = torch.nan  # a row of the first rank
        for layer in layers(model):
            fully_shard(layer, mesh=mesh())
        refuses("finite factors", model[0].merge_)
        assert not model[0].merged


def fsdp2_merging_into_the_gathered_copy_is_refused():
    from torch.distributed.fsdp import fully_shard

    x, _ = batch()
    for config in FACTORS:
        reference, model = build(config), build(config)
        fully_shard(model, mesh=mesh())
        model(x)  # the root's parameters stay gathered
        refuses(r"FSDP's gathered copy.*reshard\(\)", model[0].merge_)
        assert not model[0].merged
        model.reshard()
        model[0].merge_()
        close(model(x), reference(x))


def fsdp2_around_the_linears_inside_runs_or_is_refused():
    from torch.distributed.fsdp import fully_shard

    x, whole = batch()
    for config in CONFIGS:
        reference, model = build(config), build(config)
        wanted = reference_gradients(reference, whole)
        for layer in layers(model):
            for inside in (layer.base_layer, layer.lora_A, layer.lora_B):
                fully_shard(inside, mesh=mesh())
        if isinstance(config, lk.DoRAConfig):
            refuses("whole weight of base_layer at hand.*shard or offload the layer as a whole", model, x)
            continue
        y = model(x)
        close(y, reference(x))
        y.square().sum().backward()
        for name, p in model.named_parameters():
            if name in wanted:
                close(p.grad.full_tensor(), wanted[name])


def fsdp2_trains_blocks_as_one_process_does():
    """The backward gathers W anew where it was let go of, and has to find the blocks in it."""
    from torch.distributed.fsdp import fully_shard

    def model():
        torch.manual_seed(0)
        index = torch.tensor([[0, 0], [0, 1], [1, 0]])
        return nn.Sequential(*(lk.nn.BlockSparseLinear(nn.Linear(32, 32), index, 16) for _ in range(3)))

    torch.manual_seed(1)
    x, y = torch.randn(8, 32), torch.randn(8, 32)
    for fused, let_go in ((True, True), (True, False), (False, True)):
        alone, sharded = model(), model()
        for layer in sharded:
            fully_shard(layer, mesh=mesh(), reshard_after_forward=let_go)
        fully_shard(sharded, mesh=mesh())
        optimizers = [
            torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.03, fused=fused)
            for m in (alone, sharded)
        ]
        folders = tempfile.mkdtemp(), tempfile.mkdtemp()
        for _ in range(3):
            losses = [(m(x) - y).square().mean() for m in (alone, sharded)]
            close(losses[1], losses[0])
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
            for ours, theirs in zip(sharded, alone, strict=True):
                close(ours.blocks.grad.full_tensor(), theirs.blocks.grad)
            for optimizer in optimizers:
                optimizer.step()
        for m, folder in zip((alone, sharded), folders, strict=True):
            lk.smt.save_delta(m, folder)
        expected, found = (load_file(Path(folder) / "smt_delta.safetensors") for folder in folders)
        assert found.keys() == expected.keys()
        for name, t in expected.items():
            close(found[name], t)


def a_chain_over_shards_is_refused():
    from torch.distributed.fsdp import fully_shard

    model = build(lk.LoRAConfig(r=4))
    for layer in layers(model):
        fully_shard(layer, mesh=mesh())
    fully_shard(model, mesh=mesh())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    refuses("weight is sharded", lk.chain.cola, model, optimizer, 2)


def fsdp2_evaluates_dora_from_the_shards_there_are():
    from torch.distributed.fsdp import fully_shard

    model = build(CONFIGS[2]).eval()
    fully_shard(model, mesh=mesh())
    x = batch()[1][0]
    with torch.no_grad():
        for change in (0.0, 0.5, -0.25):  # as an average of weights, or a checkpoint read into the shards
            for name, p in model.named_parameters():
                if "lora" in name:
                    p.add_(change)
            kept = model(x)
            for layer in layers(model):
                layer.scale_cache.clear()
            close(kept, model(x))
            model.reshard()


def adapt_refuses_weights_that_fsdp_shards():
    from torch.distributed.fsdp import fully_shard

    for wrap in (lambda m: fully_shard(m, mesh=mesh()), partial(fsdp1, use_orig_params=True)):
        model = plain()
        wrap(model)
        model(torch.randn(3, 32)) if hasattr(model, "reshard") else None  # gathered, and still FSDP's
        refuses("its weight is sharded already", lk.adapt, model, CONFIGS[0])
        assert not layers(model)


# --------------------------------------------------------------------------------------------------- tensor parallelism


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.down(self.up(x).relu())


def block(config):
    torch.manual_seed(0)
    return build(config, Block())


def tensor_parallel_layers_split_with_their_factors_are_right():
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x = batch()[1][0]
    for config in CONFIGS[:2]:
        reference, model = block(config), block(config)
        want = reference(x)
        want.square().sum().backward()
        plan = {
            "up.base_layer": ColwiseParallel(),
            "up.lora_B": ColwiseParallel(),
            "down.base_layer": RowwiseParallel(),
            "down.lora_A": RowwiseParallel(),
        }
        parallelize_module(model, mesh(), plan)
        y = model(x)
        close(y, want)
        y.square().sum().backward()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            if q.grad is not None:
                close(p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad, q.grad)
        model.up.merge_()
        close(model(x), want)
        refuses(r"sharded by \(Shard\(dim=1\),\), not by rows", model.down.merge_)


def tensor_parallel_layers_split_without_their_factors_are_refused():
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x = batch()[1][0]
    cols, rows = ColwiseParallel, RowwiseParallel
    for plan, message in (
        ({"up.base_layer": cols()}, "ColwiseParallel, lora_B has to be, too"),
        ({"up.lora_B": cols()}, "split alike"),
        (
            {"up.base_layer": cols(), "up.lora_B": cols(), "down.base_layer": rows()},
            "RowwiseParallel, lora_A has to be, too",
        ),
    ):
        model = block(CONFIGS[0])
        parallelize_module(model, mesh(), plan)
        refuses(message, model, x)
    model = block(lk.DoRAConfig(r=4))
    parallelize_module(model, mesh(), {"up.base_layer": cols()})
    refuses("whole weight of base_layer at hand", model, x)


def ddp_gives_all_ranks_the_masks_of_the_averaged_gradients():
    from lowrank_kernels.prune import LoRAPrune
    from tests.tiny_llama import make_llama, randomise

    model = make_llama()
    lk.adapt(model, lk.LoRAConfig(r=2))
    randomise(model, size=0.02)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    prune = LoRAPrune(model, optimizer, ratio=0.3, steps=2)
    held = nn.parallel.DistributedDataParallel(model)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(dist.get_rank()))
    for _ in range(2):
        optimizer.zero_grad()
        held(input_ids=ids, labels=ids).loss.backward()
        expected = {id(p): p.grad.clone() for p in model.parameters() if p.requires_grad}
        assert all(torch.equal(prune._gradients[key], grad) for key, grad in expected.items())
        optimizer.step()
    of_all: list = [None, None]
    dist.all_gather_object(of_all, {path: mask.tolist() for path, mask in prune.masks.items()})
    assert of_all[0] == of_all[1] and prune.masked


def riders_that_need_whole_factors_refuse_shards():
    from torch.distributed.fsdp import fully_shard

    from lowrank_kernels.allocate import ALoRA, HeteroLoRA, SoRA
    from lowrank_kernels.prune import LoRAPrune
    from tests.tiny_llama import make_llama

    model = build(lk.LoRAConfig(r=4, gate=True))
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for ride in (
        lambda: SoRA(model, optimizer, 0.1),
        lambda: ALoRA(model, optimizer, [0], lambda m, b: 0.0, every=1, moves=1),
        lambda: HeteroLoRA(model, optimizer, [0], lambda m, b: 0.0, budget=0.5),
    ):
        with pytest.raises(ValueError, match="expected whole factors, got shards in 0; allocate ranks before sharding"):
            ride()
    llama = make_llama()
    lk.adapt(llama, lk.LoRAConfig(r=2))
    fully_shard(llama)
    with pytest.raises(ValueError, match="prune before sharding"):
        LoRAPrune(llama, torch.optim.SGD(llama.parameters(), lr=0.1), ratio=0.3, steps=2)


def galore_keeps_replicas_equal_and_refuses_hooks_and_shards():
    from torch.distributed.fsdp import fully_shard

    from lowrank_kernels.optim import GaLore, galore_groups

    model = nn.parallel.DistributedDataParallel(plain())
    groups = galore_groups(model, "all-linear", 4)
    optimizer = GaLore(groups, lr=1e-2, update_proj_gap=2)
    before = model.module[0].weight.detach().clone()
    for _ in range(5):
        optimizer.zero_grad()
        model(batch()[0]).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model.module[0].weight, before)
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    every = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(every, own)
    assert torch.equal(*every)
    with pytest.raises(ValueError, match="expected per_layer=False among several processes"):
        GaLore(groups, per_layer=True)
    sharded = plain()
    fully_shard(sharded, mesh=mesh())
    with pytest.raises(TypeError, match="is a DTensor: P would be of a shard alone"):
        GaLore(galore_groups(sharded, "all-linear", 4))


CHECKS = [
    ddp_gives_all_ranks_the_masks_of_the_averaged_gradients,
    riders_that_need_whole_factors_refuse_shards,
    adapt_refuses_a_model_that_ddp_holds,
    adapt_before_ddp_keeps_the_ranks_together,
    ranks_of_ddp_share_the_vectors_of_velora,
    fsdp1_with_original_parameters_trains_and_merges,
    fsdp1_around_the_trained_linears_alone_trains_or_is_refused,
    fsdp2_around_whole_layers_trains_saves_and_merges,
    fsdp2_merging_that_one_rank_refuses_is_refused_by_all,
    fsdp2_merging_into_the_gathered_copy_is_refused,
    fsdp2_around_the_linears_inside_runs_or_is_refused,
    fsdp2_trains_blocks_as_one_process_does,
    a_chain_over_shards_is_refused,
    fsdp2_evaluates_dora_from_the_shards_there_are,
    adapt_refuses_weights_that_fsdp_shards,
    tensor_parallel_layers_split_with_their_factors_are_right,
    tensor_parallel_layers_split_without_their_factors_are_refused,
    galore_keeps_replicas_equal_and_refuses_hooks_and_shards,
]


test_on_two_ranks = on_two_ranks(CHECKS)
