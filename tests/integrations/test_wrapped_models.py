"""Compiled and wrapped models: files with the plain model's names, and layers that run in the place of all linears."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import lowrank_kernels as lk

LORA = lk.LoRAConfig(r=4, target_modules=["up", "down"], rank_pattern={"0.up": 2})


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def compiled(module):
    return torch.compile(module, backend="eager")


def each_block(wrap):
    def wrapped(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model

    return wrapped


def one_linear(wrap):
    def wrapped(model):
        model.blocks[1].up = wrap(model.blocks[1].up)
        return model

    return wrapped


WRAPS = {
    "compiled": compiled,
    "compiled blocks": each_block(compiled),
    "checkpointed blocks": each_block(checkpoint_wrapper),
    "checkpointed, then compiled blocks": each_block(lambda block: compiled(checkpoint_wrapper(block))),
    "compiled twice": lambda model: compiled(each_block(compiled)(model)),
    "a checkpointed linear": one_linear(checkpoint_wrapper),
    "DataParallel": nn.DataParallel,
}
KEPT = [name for name in WRAPS if name != "DataParallel"]  # it copies the model to GPUs, not its patched layers' state


def filled(model, config=LORA):
    lk.adapt(model, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def keys(path):
    with safe_open(path, framework="pt") as file:
        return sorted(file.keys())


@pytest.fixture
def expected(tmp_path):
    """(x, y, the folder) of a plain model with an adapter."""
    model, x = filled(Model()), torch.randn(3, 16)
    lk.save_adapter(model, tmp_path / "plain")
    return x, model(x), tmp_path / "plain"


@pytest.mark.parametrize("wrap", WRAPS)
def test_an_adapter_is_written_under_the_plain_names(wrap, expected, tmp_path):
    lk.save_adapter(WRAPS[wrap](filled(Model())), tmp_path / "wrapped")
    assert keys(tmp_path / "wrapped" / "adapter_model.safetensors") == keys(expected[2] / "adapter_model.safetensors")


@pytest.mark.parametrize("wrap", KEPT)
def test_an_adapter_is_loaded_and_taken_off_again(wrap, expected):
    x, y, folder = expected
    model = WRAPS[wrap](Model())
    base = model(x)
    report = lk.load_adapter(model, folder)
    assert [r.name for r in report.replaced] == [f"blocks.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
    torch.testing.assert_close(model(x), y)
    report.undo()
    torch.testing.assert_close(model(x), base)


@pytest.mark.parametrize("wrap", KEPT)
def test_modules_that_train_whole_are_found_and_written(wrap, tmp_path):
    config = lk.LoRAConfig(r=4, target_modules=["up"], modules_to_save=["1.down"])
    plain, wrapped = Model(), WRAPS[wrap](Model())
    for name, model in (("plain", plain), ("wrapped", wrapped)):
        assert "blocks.1.down trains whole, by modules_to_save" in lk.adapt(model, config).notes
        with torch.no_grad():
            for n, p in model.named_parameters():
                if p.requires_grad:
                    p.fill_(0.1 if "lora" in n else 0.2)
        lk.save_adapter(model, tmp_path / name)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("plain", "wrapped")]
    assert keys(files[0]) == keys(files[1]) and any("blocks.1.down.weight" in key for key in keys(files[0]))
    x, other = torch.randn(3, 16), WRAPS[wrap](Model())
    lk.load_adapter(other, tmp_path / "plain")
    torch.testing.assert_close(other(x), plain(x))


@pytest.mark.parametrize("wrap", KEPT)
def test_a_wrapped_model_is_adapted_by_the_plain_names(wrap, expected, tmp_path):
    model = WRAPS[wrap](Model())
    report = lk.adapt(model, LORA)
    assert {r.name: r.rank for r in report.replaced} == {
        "blocks.0.up": 2,
        "blocks.0.down": 4,
        "blocks.1.up": 4,
        "blocks.1.down": 4,
    }
    lk.save_adapter(model, tmp_path / "wrapped")
    assert keys(tmp_path / "wrapped" / "adapter_model.safetensors") == keys(expected[2] / "adapter_model.safetensors")


@pytest.mark.parametrize("wrap", KEPT)
def test_a_bank_serves_a_wrapped_model(wrap, expected):
    x, y, folder = expected
    model = WRAPS[wrap](Model())
    base = model(x)
    with lk.serving.AdapterBank(model) as bank:
        bank.load("a", folder)
        with bank.batch(["a", None, "a"]):
            torch.testing.assert_close(model(x), torch.stack([y[0], base[1], y[2]]))
    torch.testing.assert_close(model(x), base)
    assert not any(isinstance(m, lk.serving.bank.BankLinear) for m in model.modules())


@pytest.mark.parametrize("wrap", KEPT)
def test_merging_puts_back_what_trained_before(wrap, expected):
    x, y, _ = expected
    model = filled(Model())
    wrapped = lk.merge_and_unload(WRAPS[wrap](model))
    torch.testing.assert_close(wrapped(x), y)
    assert all(p.requires_grad for p in wrapped.parameters())


@pytest.mark.parametrize("wrap", KEPT)
def test_a_delta_goes_from_a_wrapped_model_to_another(wrap, tmp_path):
    blocks = {f"blocks.{i}.{name}": [[0, 0]] for i in (0, 1) for name in ("up", "down")}
    shapes = {name: (32, 16) if name.endswith("up") else (16, 32) for name in blocks}
    selection = lk.smt.BlockSelection(
        {n: torch.tensor(b, dtype=torch.int32) for n, b in blocks.items()}, shapes, (16, 16)
    )
    model, x = filled(Model(), lk.SMTConfig(selection=selection)), torch.randn(3, 16)
    y = model(x)
    lk.smt.save_delta(WRAPS[wrap](model), tmp_path)
    assert keys(tmp_path / "smt_delta.safetensors") == sorted(
        f"{name}.{key}" for name in blocks for key in ("blocks", "block_index")
    )
    other = WRAPS[wrap](Model())
    lk.smt.load_delta(other, tmp_path)
    torch.testing.assert_close(other(x), y)


@pytest.mark.parametrize("wrap", KEPT)
def test_a_chain_resumes_on_a_model_that_is_wrapped(wrap):
    def chain_of(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        return optimizer, lk.chain.cola(model, optimizer, 1, master=True)

    model, other = Model().bfloat16(), Model().bfloat16()
    for m in (model, other):
        lk.adapt(m, lk.LoRAConfig(r=4))
    optimizer, chain = chain_of(model)
    model(torch.randn(3, 16, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    other.load_state_dict(model.state_dict())
    _, resumed = chain_of(WRAPS[wrap](other))
    resumed.load_state_dict(copy.deepcopy(chain.state_dict()))
    assert resumed.master.keys() == chain.master.keys()
    assert all(torch.equal(t, chain.master[path]) for path, t in resumed.master.items())


def test_a_layer_in_a_wrapper_is_reported_as_adapted_already():
    model = Model()
    model.blocks[0].up = checkpoint_wrapper(lk.nn.LoRALinear(model.blocks[0].up, 4))
    report = lk.adapt(model, LORA)
    assert [s.reason for s in report.skipped if s.name == "blocks.0.up"] == ["already adapted (LoRALinear)"]
    assert len(report.replaced) == 3


def test_a_linear_compiled_by_itself_is_refused_by_name(expected):
    model = one_linear(compiled)(Model())
    with pytest.raises(ValueError, match=r"blocks\.1\.up: compiled by itself, .* adapt the model, then compile"):
        lk.load_adapter(model, expected[2])
    report = lk.adapt(model, LORA)
    assert any(s.name == "blocks.1.up" and "compiled by itself" in s.reason for s in report.skipped)


def test_a_module_to_save_that_is_compiled_by_itself_is_refused(tmp_path):
    config = lk.LoRAConfig(r=4, target_modules=["0.up"], modules_to_save=["1.up"])
    model = Model()
    lk.adapt(model, config)
    lk.save_adapter(model, tmp_path)
    for call in (lambda m: lk.adapt(m, config), lambda m: lk.load_adapter(m, tmp_path)):
        with pytest.raises(ValueError, match=r"got blocks\.1\.up: it is compiled by itself"):
            call(one_linear(compiled)(Model()))


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_model_can_be_adapted_again_after_undo(wrap):
    model = WRAPS[wrap](Model())
    for _ in range(2):
        report = lk.adapt(model, LORA)
        assert not any(getattr(m, "weight_shared_with", ()) for m in model.modules())
        report.undo()
