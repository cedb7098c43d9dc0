"""After the first backward the log names the layers that got no gradient, once."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk

X = torch.randn(3, 8, requires_grad=True)


class Model(nn.Module):
    def __init__(self, call=lambda layer, x: layer(x)):
        super().__init__()
        self.first, self.unused, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.call = call

    def forward(self, x):
        return self.call(self.last, self.call(self.first, x))


def reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=True)


def not_reentrant(layer, x):
    return checkpoint(layer, x, use_reentrant=False)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if "got no gradient" in r.getMessage()]


@pytest.fixture(autouse=True)
def listen(caplog):
    caplog.set_level(logging.WARNING, "lowrank_kernels")


@pytest.mark.parametrize("config", [lk.LoRAConfig(r=2), lk.DoRAConfig(r=2), lk.LoRAConfig(r=2, train="b")])
def test_a_layer_that_never_ran_is_named_once(config, caplog):
    model = Model()
    lk.adapt(model, config)
    assert not warnings(caplog)
    for _ in range(3):
        model(X).sum().backward()
    (message,) = warnings(caplog)
    assert message.startswith("adapt: 1 of the replaced layers got no gradient in the first backward: unused;")


@pytest.mark.parametrize("call", [reentrant, not_reentrant])
def test_recomputation_in_parts_names_no_layer_that_ran(call, caplog):
    model = Model(call)
    lk.adapt(model, lk.LoRAConfig(r=2))
    for _ in range(3):
        model(X).sum().backward()
    (message,) = warnings(caplog)
    assert ": unused;" in message


def test_a_model_whose_layers_all_run_says_nothing(caplog):
    model = Model()
    lk.adapt(model, lk.LoRAConfig(r=2, exclude_modules=("unused",)))
    model(X).sum().backward()
    assert not warnings(caplog)


def test_a_compiled_model_is_watched_as_well(caplog):
    model = Model()
    lk.adapt(model, lk.LoRAConfig(r=2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(X).sum().backward()
    assert len(warnings(caplog)) == 1


def test_nothing_is_left_on_the_parameters_afterwards():
    model = Model()
    lk.adapt(model, lk.LoRAConfig(r=2))
    assert model.first.lora_A.weight._post_accumulate_grad_hooks
    model(X).sum().backward()
    hooks = [p._post_accumulate_grad_hooks for p in model.parameters()]
    assert not any(hooks)


def test_undo_and_copies_carry_no_hooks(caplog):
    model = Model()
    report = lk.adapt(model, lk.LoRAConfig(r=2))
    twin, factor = copy.deepcopy(model), model.first.lora_A.weight
    assert not twin.first.lora_A.weight._post_accumulate_grad_hooks
    report.undo()
    assert not factor._post_accumulate_grad_hooks
    twin(X).sum().backward()
    assert not warnings(caplog)
