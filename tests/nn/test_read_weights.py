"""Which ways of reading a linear's weight, in the modules above it, count."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import lowrank_kernels as lk


class Base(nn.Module):
    switch, training_only = False, True

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.a.weight.data.zero_()

    def reset_parameters(self):
        self.a.weight.data = self.a.weight * 2

    def fuse_projections(self):
        return torch.cat([self.a.weight, self.b.weight])

    def forward(self, x):
        return self.b(self.a(x))


def twice(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Multiplied(Base):
    def forward(self, x):
        return self.b(x @ self.a.weight.T)


class HandedToAFunction(Base):
    def forward(self, x):
        return nn.functional.linear(self.b(x), self.a.weight, self.a.bias)


class InAnotherMethod(Base):
    def forward(self, x):
        return self._kernel(x)

    @twice
    def _kernel(self, x):
        return self.b(x) @ self.a.weight.T.contiguous()


class InAClosure(Base):
    def forward(self, x):
        return (lambda t: t @ self.a.weight)(self.b(x))


class Inherited(Multiplied):
    pass


class WhileTraining(Base):
    def forward(self, x):
        if self.training:
            return nn.functional.linear(x, self.a.weight)
        return self.b(self.a(x))


class ByAnArgument(Base):
    def forward(self, x, fused=False):
        return nn.functional.linear(x, self.a.weight) if fused else self.b(self.a(x))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.middle = Base()

    def forward(self, x):
        return x @ self.middle.a.weight


class Overridden(Multiplied):
    forward = Base.forward


class OnlyItsKind(Base):
    def forward(self, x):
        if isinstance(self.a.weight, torch.Tensor) and self.a.weight is not None and self.a.weight.shape[0] == 4:
            x = x.to(self.a.weight.dtype).to(self.a.weight.device)
        return self.b(self.a(x))


class Tied(Base):
    def tie(self):
        self.b.weight = self.a.weight

    def set(self, weight):
        self.a.weight = weight


class SwitchedOff(Base):
    def forward(self, x):
        if self.switch:
            return nn.functional.linear(x, self.a.weight)
        return self.b(self.a(x))


READ = [Multiplied, HandedToAFunction, InAnotherMethod, InAClosure, Inherited, WhileTraining, ByAnArgument]
NOT_READ = [Base, Overridden, OnlyItsKind, Tied, SwitchedOff]


@pytest.mark.parametrize("kind", READ, ids=lambda k: k.__name__)
def test_a_linear_that_its_parent_reads_is_refused(kind):
    report = lk.adapt(kind(), lk.LoRAConfig(r=2))
    assert {s.name: s.reason for s in report.skipped} == {
        "a": f"its parent, {kind.__name__}, reads its weight instead of calling it"
    }
    assert [r.name for r in report.replaced] == ["b", "inner.0"]


def test_a_linear_that_a_module_further_above_reads_is_refused():
    report = lk.adapt(Outer(), lk.LoRAConfig(r=2))
    assert {s.name: s.reason for s in report.skipped} == {
        "middle.a": "a module above it, Outer, reads its weight instead of calling it"
    }


@pytest.mark.parametrize("kind", NOT_READ, ids=lambda k: k.__name__)
def test_what_only_looks_at_a_weight_or_sets_it_does_not_count(kind):
    report = lk.adapt(kind(), lk.LoRAConfig(r=2))
    assert not report.skipped and len(report.replaced) == 3


def test_a_setting_of_the_instance_decides():
    model = SwitchedOff()
    model.switch = True
    assert [s.name for s in lk.adapt(model, lk.LoRAConfig(r=2)).skipped] == ["a"]


@pytest.mark.parametrize("kind", ["embedding", "convolution"])
def test_other_modules_whose_weight_is_read_are_refused_too(kind):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.conv = nn.Embedding(9, 8), nn.Conv1d(8, 8, 1)

        def forward(self, ids):
            h = self.wte(ids) + self.conv.weight.sum()
            return nn.functional.linear(h, self.wte.weight)

    target = {"embedding": "wte", "convolution": "conv"}[kind]
    with pytest.raises(ValueError, match=rf"{target} \(its parent, Tied, reads its weight instead of calling it\)"):
        lk.adapt(Tied(), lk.LoRAConfig(r=2, target_modules=[target]))
