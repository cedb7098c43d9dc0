"""Adapted models under what training code does to models."""

import copy
import os

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lowrank_kernels.adapt import adapt
from lowrank_kernels.config import LoRAConfig
from lowrank_kernels.nn import LoRALinear


def make_model(dropout=0.0, **settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 6))
    adapt(model, LoRAConfig(r=3, dropout=dropout, **settings))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.weight.data.normal_(std=0.3)
    return model


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


X = torch.linspace(-1, 1, 8 * 12).reshape(8, 12)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_repeats_the_same_mask(use_reentrant, dropout):
    model = make_model(dropout)
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    plain = gradients(model, model(x).square().sum())
    grad_x, x.grad = x.grad, None
    torch.manual_seed(1)
    recomputed = gradients(model, checkpoint(model, x, use_reentrant=use_reentrant).square().sum())
    assert len(plain) == 6
    for name, g in plain.items():
        assert torch.equal(recomputed[name], g), name
    assert torch.equal(x.grad, grad_x)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_as_one_graph(dropout):
    model = make_model(dropout)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = gradients(model, model(X).square().sum())
    torch.manual_seed(1)
    got = gradients(model, compiled(X).square().sum())
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(X), model.eval()(X), rtol=2e-6, atol=2e-6)


def test_compiled_model_sees_merging():
    model = make_model().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    y = compiled(X)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.merge_()
    torch.testing.assert_close(compiled(X), y, rtol=5e-6, atol=5e-6)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, LoRALinear))


def test_functional_call():
    model = make_model()
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(factors):
        return functional_call(model, factors, (X,)).square().sum()

    expected = gradients(model, model(X).square().sum())
    got = torch.autograd.grad(loss({n: t.requires_grad_() for n, t in trained.items()}), list(trained.values()))
    for name, g in zip(trained, got, strict=True):
        torch.testing.assert_close(g, expected[name], rtol=2e-5, atol=2e-5)
    zeros = {n: torch.zeros_like(t) for n, t in trained.items()}
    base = copy.deepcopy(model)
    for layer in base.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.weight.data.zero_()
    assert torch.equal(functional_call(model, zeros, (X,)), base(X))


def test_one_factor_shared_by_two_layers_gets_both_gradients():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    adapt(model, LoRAConfig(r=3))
    for layer in model:
        layer.lora_B.weight.data.normal_()
    model[1].lora_A = model[0].lora_A
    a = model[0].lora_A.weight
    got = gradients(model, model(X).square().sum())
    apart = copy.deepcopy(model)
    apart[1].lora_A = copy.deepcopy(model[0].lora_A)
    gradients(apart, apart(X).square().sum())
    torch.testing.assert_close(got["0.lora_A.weight"], apart[0].lora_A.weight.grad + apart[1].lora_A.weight.grad)
    assert sum(p is a for p in model.parameters()) == 1
    assert model.state_dict()["1.lora_A.weight"].data_ptr() == a.data_ptr()


def test_gradient_accumulation_is_the_gradient_of_the_sum():
    model = make_model()
    whole = gradients(model, model(X).square().sum())
    model.zero_grad()
    for part in X.split(2):
        model(part).square().sum().backward()
    for name, p in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(p.grad, whole[name], rtol=2e-5, atol=2e-5)


def test_autocast_keeps_float32_factors_and_gradients():
    model = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X)
    assert y.dtype == torch.bfloat16
    grads = gradients(model, y.float().square().sum())
    assert {g.dtype for g in grads.values()} == {torch.float32}
    exact = gradients(model, model(X).square().sum())
    for name, g in exact.items():
        assert (grads[name] - g).norm() <= 0.05 * g.norm(), name


def test_training_lowers_the_loss_and_moves_nothing_else():
    model = make_model(init="orthonormal")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = torch.sin(3 * X[:, :6])
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name


def _ddp_worker(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(make_model())
    (model(X[rank::2]).square().sum() / 4).backward()
    if rank == 0:
        torch.save(
            {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}, f"{folder}/gradients.pt"
        )
    torch.distributed.barrier()
    # gloo's threads may still let go of tensors, for which they take the interpreter's lock: one that is being
    # torn down ends them, and the process, by SIGABRT (pytorch/pytorch#179291).
    os._exit(0)


def test_ddp_averages_the_factors_gradients(tmp_path):
    torch.multiprocessing.spawn(_ddp_worker, (str(tmp_path),), nprocs=2)
    model = make_model()
    expected = gradients(model, model(X).square().sum() / 8)
    got = torch.load(tmp_path / "gradients.pt")
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=2e-5, atol=2e-6)
