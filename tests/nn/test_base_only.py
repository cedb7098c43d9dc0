"""``lk.base_only``: the base model's own numbers, from the adapted model."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk

CONFIGS = {
    "lora": lk.LoRAConfig(r=4, dropout=0.3),
    "dora": lk.DoRAConfig(r=4),
    "dora, dropped base": lk.DoRAConfig(r=4, dropout=0.3, dropout_base=True),
    "blocks": None,
    "many": lk.MultiLoRAConfig(ranks=(2, 3)),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(method: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """(an adapted model whose correction is not zero, the base model)"""
    torch.manual_seed(0)
    model = Net().to(dtype)
    base = copy.deepcopy(model)
    if method == "blocks":
        index = torch.tensor([[0, 0]], dtype=torch.int32)
        model.up = lk.nn.BlockSparseLinear.from_linear(model.up, index, 16)
        model.down = lk.nn.BlockSparseLinear.from_linear(model.down, index, 16)
    else:
        lk.adapt(model, CONFIGS[method])
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model, base


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with lk.nn.use_adapters([0, 1, -1]):
        return model(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", CONFIGS)
def test_outputs_are_the_base_models_and_the_adapter_is_back_afterwards(method, dtype):
    model, base = adapted(method, dtype)
    x = torch.randn(3, 5, 16, dtype=dtype)
    model.eval()
    before = run(model, x)
    with lk.base_only(model), lk.base_only(model):
        assert torch.equal(run(model, x), base(x))
    assert not torch.equal(before, base(x))
    assert torch.equal(run(model, x), before)
    model.train()
    with lk.base_only(model):
        assert torch.equal(run(model, x), base(x))  # no dropout either


@pytest.mark.parametrize("method", ["dora", "blocks", "many"])  # with dropout, two runs would differ
def test_a_step_with_reference_logits_has_the_gradients_of_one_with_a_second_model(method):
    model, base = adapted(method)
    x = torch.randn(3, 5, 16)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(reference):
        with lk.nn.use_adapters([0, 1, -1]):
            policy = model(x)  # before the reference: what it saved must not change
            loss = -torch.nn.functional.logsigmoid((policy - reference()).sum(-1)).mean()
            return torch.autograd.grad(loss, trained)

    def of_this_model():
        with lk.base_only(model), torch.no_grad():
            return model(x)

    for ours, expected in zip(gradients(of_this_model), gradients(lambda: base(x).detach()), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("kind", [lk.LoRAConfig, lk.DoRAConfig])
def test_embeddings_and_convolutions_run_their_base(kind):
    model = nn.Sequential(nn.Embedding(9, 16), nn.Conv1d(16, 8, 3), nn.Linear(6, 5))
    base = copy.deepcopy(model)
    lk.adapt(model, kind(r=2, target_modules=["0", "1", "2"]))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))

    def run_all(of):
        return of[2](of[1](of[0](torch.arange(8)[None]).mT))

    with lk.base_only(model):
        assert torch.equal(run_all(model), run_all(base))
    assert not torch.equal(run_all(model), run_all(base))


def test_only_the_named_model_is_meant():
    model, base = adapted("lora")
    other, _ = adapted("dora")
    x = torch.randn(2, 16)
    other.eval()
    expected = other(x)
    with lk.base_only(model):
        assert torch.equal(other(x), expected)
        with lk.base_only(other):
            assert torch.equal(model(x), base(x))


def test_a_thread_started_inside_runs_the_base_and_an_older_one_raises():
    model, base = adapted("dora")
    x, found, opened = torch.randn(2, 16), {}, threading.Event()

    def in_a_thread(name: str, *, after: threading.Event) -> threading.Thread:
        def call() -> None:
            after.wait(60)
            try:
                found[name] = model(x)
            except RuntimeError as error:
                found[name] = str(error)

        thread = threading.Thread(target=call)
        thread.start()
        return thread

    older = in_a_thread("older", after=opened)
    with lk.base_only(model):
        opened.set()
        younger = in_a_thread("younger", after=opened)
        older.join()
        younger.join()
    in_a_thread("afterwards", after=opened).join()
    assert torch.equal(found["younger"], base(x))
    assert torch.equal(found["afterwards"], model(x))
    assert found["older"].startswith("base_only: expected a layer in thread")


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_repeats_what_ran(reentrant):
    model, base = adapted("dora")
    x = torch.randn(2, 16, requires_grad=True)
    with lk.base_only(model):
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        (ours,) = torch.autograd.grad(loss, x) if not reentrant else (_backward(loss, x),)
        expected = torch.autograd.grad(base(x).square().sum(), x)[0]
        assert torch.equal(ours, expected)
        loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    with pytest.raises(RuntimeError, match="base_only"):
        loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_in_the_context_of_a_forward_before_it_trains_the_adapter(reentrant):
    model, _ = adapted("dora")
    x = torch.randn(2, 16, requires_grad=True)
    model(x).square().sum().backward()
    expected = model.up.lora_A.weight.grad.clone()
    model.zero_grad()
    loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
    with lk.base_only(model):
        loss.backward()
    assert torch.equal(model.up.lora_A.weight.grad, expected)


def _backward(loss, x):
    x.grad = None
    loss.backward()
    return x.grad.clone()


def test_a_compiled_model_follows():
    model, base = adapted("lora")
    model.eval()
    x = torch.randn(2, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = compiled(x)
    for _ in range(2):
        with lk.base_only(model):
            torch.testing.assert_close(compiled(x), base(x))
        torch.testing.assert_close(compiled(x), expected)


def test_an_error_ends_the_context():
    model, _ = adapted("lora")
    model.eval()
    x = torch.randn(2, 16)
    expected = model(x)
    with pytest.raises(KeyError), lk.base_only(model):
        raise KeyError
    assert torch.equal(model(x), expected)


def test_what_has_no_base_at_hand_is_refused():
    model, _ = adapted("lora")
    with pytest.raises(TypeError, match="base_only"), lk.base_only(model.forward):
        pass
    with pytest.raises(ValueError, match="base_only: expected a model with layers"), lk.base_only(nn.Linear(2, 2)):
        pass
    model.up.merge_()
    with pytest.raises(ValueError, match="up merged"), lk.base_only(model):
        pass
    model.up.unmerge_()
    model.down.weight_changed_by = "something"
    with pytest.raises(ValueError, match="down was changed by something"), lk.base_only(model):
        pass
    other = Net()
    lk.adapt(other, lk.LoRAConfig(bias="all"))
    with pytest.raises(ValueError, match="base's own biases"), lk.base_only(other):
        pass


def test_modules_to_save_are_refused():
    model = Net()
    lk.adapt(model, lk.LoRAConfig(target_modules=["up"], modules_to_save=["down"]))
    with pytest.raises(ValueError, match="modules_to_save, got down"), lk.base_only(model):
        pass


def test_biases_of_the_adapter_are_refused_loaded_and_frozen_too(tmp_path):
    model = Net()
    lk.adapt(model, lk.LoRAConfig(target_modules=["up"], bias="all"))
    lk.save_adapter(model, tmp_path)
    loaded = Net()
    lk.load_adapter(loaded, tmp_path)
    for m in (model, loaded, nn.Sequential(loaded)):
        with pytest.raises(ValueError, match="base's own biases"), lk.base_only(m):
            pass


def test_a_copy_made_in_the_context_is_in_none():
    model, base = adapted("lora")
    model.eval()
    x = torch.randn(2, 16)
    with lk.base_only(model):
        inside = copy.deepcopy(model)
    assert not torch.equal(inside(x), base(x))
    torch.testing.assert_close(torch.compile(inside, backend="eager")(x), model(x))


def test_what_was_merged_is_the_base_of_the_next_adapter():
    model = Net()
    lk.adapt(model, lk.LoRAConfig(target_modules=["up"], modules_to_save=["down"]))
    lk.merge_and_unload(model)
    base = copy.deepcopy(model)
    lk.adapt(model, lk.LoRAConfig(target_modules=["up"]))
    with lk.base_only(model):
        assert torch.equal(model(torch.ones(1, 16)), base(torch.ones(1, 16)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_of_another_model_in_the_context_trains_it(reentrant):
    model, _ = adapted("lora")
    other, _ = adapted("dora")
    x = torch.randn(2, 16, requires_grad=True)
    other(x).square().sum().backward()
    expected = other.up.lora_A.weight.grad.clone()
    other.zero_grad()
    with lk.base_only(other):  # its layers ask from now on
        pass
    with lk.base_only(model):
        checkpoint(other, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(other.up.lora_A.weight.grad, expected)
