"""DistributedDataParallel over every method: gradients of one process, and one decision on all ranks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lowrank_kernels as lk
from lowrank_kernels.allocate import HeteroLoRA
from lowrank_kernels.optim import BlockAdamW, LoRAPro, LoRARITE, factor_groups
from tests.distributed.models import IDS, METHODS, as_one_process, loss_of, own_batch, trained
from tests.distributed.two_ranks import on_two_ranks

DAILY = ["LoRA with gates", "DoRA", "SMT", "SVFT", "LoRA in blocks", "LoRA of experts", "LoRA over nf4", "VeLoRA"]


def methods_train_as_in_one_process():
    for name in DAILY:
        as_one_process(METHODS[name](), DistributedDataParallel(METHODS[name]()), steps=1)


def all_methods_do():
    for name in METHODS:  # gloo broadcasts no 8-bit floats
        as_one_process(METHODS[name](), DistributedDataParallel(METHODS[name](), init_sync=name != "LoRA over fp8"))


def accumulated_gradients_are_those_of_one_process():
    for name in ("DoRA", "SMT"):
        alone, model = METHODS[name](), METHODS[name]()
        held = DistributedDataParallel(model)
        loss_of(alone, IDS).backward()
        first, second = own_batch()
        with held.no_sync():
            (loss_of(held, first[None]) / 2).backward()
        (loss_of(held, second[None]) / 2).backward()
        for ours, theirs in zip(trained(alone), trained(model), strict=True):
            torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-5)


def steps(name, ride, *, count=4, optimizer=None, **ddp):
    """Both ranks' parameters after some steps on their own batches, which are equal; and the rider."""
    model = METHODS[name]()
    held = DistributedDataParallel(model, **ddp)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2) if optimizer is None else optimizer(model)
    torch.manual_seed(dist.get_rank())
    rider = ride(model, optimizer) if ride else None
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(held, own_batch()).backward()
        optimizer.step()
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyones = [torch.empty_like(values) for _ in range(2)]
    dist.all_gather(everyones, values)
    assert torch.equal(*everyones)
    return rider


def chains_restart_alike():
    assert steps("LoRA", lambda m, o: lk.chain.cola(m, o, 2)).link == 2
    rider = steps("LoRA", lambda m, o: lk.chain.xgblora(m, o, 2), find_unused_parameters=True)
    assert rider.link == 2


def optimizers_of_factors_and_blocks_step_alike():
    for optimizer in (LoRAPro, LoRARITE):
        steps("LoRA", None, count=2, optimizer=lambda model, kind=optimizer: kind(factor_groups(model)))
    steps("SMT", None, count=2, optimizer=partial(BlockAdamW, lr=1e-2))


def modules_are_chosen_by_the_scores_of_all_ranks():
    def loss(model, batch):
        return model(input_ids=batch, labels=batch).loss

    def ride(model, optimizer):
        return HeteroLoRA(model, optimizer, [own_batch()], loss, budget=0.4, warmup=1)

    rider = steps("LoRA with gates", ride, find_unused_parameters=True)
    chosen: list = [None, None]
    dist.all_gather_object(chosen, sorted(rider.enabled))
    assert chosen[0] == chosen[1] and 0 < len(chosen[0]) < 14


CHECKS = [
    methods_train_as_in_one_process,
    accumulated_gradients_are_those_of_one_process,
    chains_restart_alike,
    optimizers_of_factors_and_blocks_step_alike,
    modules_are_chosen_by_the_scores_of_all_ranks,
]
test_on_two_ranks = on_two_ranks(CHECKS)
# methods_train_as_in_one_process shows the same of some methods
test_of_all_methods_on_two_ranks = pytest.mark.nightly(on_two_ranks([all_methods_do], limit=1200))
