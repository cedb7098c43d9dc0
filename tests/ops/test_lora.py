"""lora_linear as a citizen of torch: opcheck, compile, checkpointing, functional_call, autocast, DDP, sharing."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk


def operands(m=10, k=24, n=18, r=5, dtype=torch.float32, factor_dtype=None):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator).to(dtype)

    factor_dtype = factor_dtype or dtype
    return {
        "x": normal(2, m // 2, k).requires_grad_(),
        "weight": normal(n, k),
        "lora_a": normal(r, k, dtype=factor_dtype).requires_grad_(),
        "lora_b": normal(n, r, dtype=factor_dtype).requires_grad_(),
        "bias": normal(n).requires_grad_(),
        "gate": normal(r, dtype=factor_dtype).requires_grad_(),
    }


class Listener(TorchDispatchMode):
    """Notes the ops of this package that pass through torch's dispatcher."""

    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lowrank_kernels":
            self.heard.append(func.__name__)
        return func(*args, **(kwargs or {}))


def step(o):
    names = ("x", "lora_a", "lora_b", "bias", "gate")
    y = lk.lora_linear(**o, scaling=0.5, dropout_p=0.3, dropout_seed=4, backend="reference")
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [o[name] for name in names])]


def test_who_listens_to_the_dispatcher_hears_the_op_and_changes_nothing():
    o = operands()
    alone = step(o)
    with Listener() as listener:
        heard = step(o)
    assert listener.heard == ["lora_linear.default", "lora_linear_backward.default"]
    for a, b in zip(alone, heard, strict=True):
        assert torch.equal(a, b)


def test_a_profile_names_the_op():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(operands())
    assert {"lowrank_kernels::lora_linear", "lowrank_kernels::lora_linear_backward"} <= {
        e.key for e in profile.key_averages()
    }


def test_a_subclass_of_tensor_keeps_its_own_dispatch():
    class Logged(torch.Tensor):
        heard: list[str] = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.heard.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs)

    o = operands()
    plain = lk.lora_linear(**o)
    o["x"] = o["x"].detach().as_subclass(Logged)
    y = lk.lora_linear(**o)
    assert "lora_linear.default" in Logged.heard
    assert torch.equal(plain, y.as_subclass(torch.Tensor))


class Correction(nn.Module):
    """A frozen linear with factors, straight on the op."""

    def __init__(self, k=24, n=18, r=5, dropout_p=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, k), requires_grad=False)
        self.lora_a = nn.Parameter(torch.randn(r, k))
        self.lora_b = nn.Parameter(torch.randn(n, r))
        self.dropout_p = dropout_p

    def forward(self, x):
        return lk.lora_linear(x, self.weight, self.lora_a, self.lora_b, dropout_p=self.dropout_p)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(dtype, dropout_p, backend):
    o = operands(dtype=dtype, factor_dtype=torch.float32)
    seed = torch.tensor(3) if dropout_p else None
    forward = torch.ops.lowrank_kernels.lora_linear.default
    torch.library.opcheck(forward, (*o.values(), 1.5, dropout_p, seed, True, backend))
    p = torch.randn(10, 5, dtype=dtype)
    backward = torch.ops.lowrank_kernels.lora_linear_backward.default
    arguments = (
        torch.randn(2, 5, 18, dtype=dtype),
        o["x"].detach(),
        o["weight"],
        o["lora_a"].detach(),
        o["lora_b"].detach(),
        o["gate"].detach(),
        p,
        1.5,
        dropout_p,
        seed,
        [True] * 5,
        backend,
    )
    torch.library.opcheck(backward, arguments)


def test_gradcheck_in_float64():
    o = operands(m=6, k=7, n=5, r=3, dtype=torch.float64)

    def call(x, lora_a, lora_b, bias, gate):
        return lk.lora_linear(
            x,
            o["weight"],
            lora_a,
            lora_b,
            bias,
            scaling=1.3,
            gate=gate,
            dropout_p=0.4,
            dropout_seed=7,
            backend="reference",
        )

    assert torch.autograd.gradcheck(call, tuple(o[name] for name in ("x", "lora_a", "lora_b", "bias", "gate")))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compile_fullgraph(dropout_p):
    def loss(x, weight, lora_a, lora_b, bias, gate):
        y = lk.lora_linear(x, weight, lora_a, lora_b, bias, gate=gate, dropout_p=dropout_p, dropout_seed=11)
        return y.square().sum()

    o = operands()
    eager = torch.autograd.grad(loss(**o), [o[n] for n in ("x", "lora_a", "lora_b", "bias", "gate")])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again = torch.autograd.grad(compiled(**o), [o[n] for n in ("x", "lora_a", "lora_b", "bias", "gate")])
    for a, b in zip(eager, again, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_with_dynamic_token_count():
    compiled = torch.compile(
        lambda x, o: lk.lora_linear(x, o["weight"], o["lora_a"], o["lora_b"]), fullgraph=True, dynamic=True
    )
    o = operands()
    for tokens in (3, 7, 1):
        x = torch.randn(tokens, 24)
        torch.testing.assert_close(compiled(x, o), lk.lora_linear(x, o["weight"], o["lora_a"], o["lora_b"]))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputes_the_same_dropout(use_reentrant):
    model = Correction(dropout_p=0.5)
    x = torch.randn(8, 24, requires_grad=True)
    wanted = {}
    for way in ("plain", "checkpointed"):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        y = model(x) if way == "plain" else checkpoint(model, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
        got = [x.grad.clone(), model.lora_a.grad.clone(), model.lora_b.grad.clone()]
        for name, value in zip("xab", got, strict=True):
            if way == "plain":
                wanted[name] = value
            else:
                assert torch.equal(value, wanted[name])


def test_functional_call_uses_the_given_factors():
    model = Correction()
    x = torch.randn(4, 24)
    other = {"lora_a": torch.randn(5, 24), "lora_b": torch.randn(18, 5)}
    y = torch.func.functional_call(model, other, (x,))
    wanted = x @ model.weight.T + x @ other["lora_a"].T @ other["lora_b"].T
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_dtype_of_the_region(dtype):
    o = operands()
    with torch.autocast("cpu", dtype):
        y = lk.lora_linear(**o)
    assert y.dtype == dtype
    y.sum().backward()
    assert o["x"].grad.dtype == o["lora_a"].grad.dtype == o["bias"].grad.dtype == torch.float32


def test_autocast_mixes_a_float32_input_with_a_bfloat16_weight():
    o = operands()
    o["weight"] = o["weight"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert lk.lora_linear(**o).dtype == torch.bfloat16


def test_one_factor_shared_by_two_calls_sums_its_gradients():
    o = operands()
    separate = [o["lora_a"].detach().clone().requires_grad_() for _ in range(2)]
    inputs = [torch.randn(3, 24), torch.randn(4, 24)]
    sum(lk.lora_linear(x, o["weight"], o["lora_a"], o["lora_b"]).sum() for x in inputs).backward()
    for x, a in zip(inputs, separate, strict=True):
        lk.lora_linear(x, o["weight"], a, o["lora_b"].detach()).sum().backward()
    torch.testing.assert_close(o["lora_a"].grad, separate[0].grad + separate[1].grad)


def test_two_backward_passes_over_one_graph_agree():
    o = operands()
    y = lk.lora_linear(**o).square().sum()
    first = torch.autograd.grad(y, [o["x"], o["lora_a"], o["lora_b"]], retain_graph=True)
    second = torch.autograd.grad(y, [o["x"], o["lora_a"], o["lora_b"]])
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_gradients_are_refused_by_name():
    o = operands()
    (gradient,) = torch.autograd.grad(lk.lora_linear(**o).square().sum(), o["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"lora_linear: gradients of gradients"):
        gradient.sum().backward()


def test_a_saved_operand_changed_in_place_is_noticed():
    o = operands()
    y = lk.lora_linear(**o).sum()
    with torch.no_grad():
        o["weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("trained", [("lora_a",), ("lora_b",), ("x",), ("gate",), ("bias",), ("x", "lora_b")])
def test_only_what_is_trained_gets_a_gradient_and_it_is_the_same(trained, backend):
    everything = operands()
    some = {name: t.detach().clone().requires_grad_(name in trained) for name, t in operands().items()}
    lk.lora_linear(**everything, backend=backend).square().sum().backward()
    lk.lora_linear(**some, backend=backend).square().sum().backward()
    for name, tensor in some.items():
        if name in trained:
            # Sums may run in another order where less is asked for, and add up to another last bit.
            together = everything[name].grad
            assert (tensor.grad - together).abs().max() <= 16 * torch.finfo(tensor.dtype).eps * together.abs().max()
        else:
            assert tensor.grad is None


def saved_shapes(function):
    """(result, shapes of what autograd saved during the call)."""
    shapes = []

    def pack(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return function(), shapes


def test_with_a_frozen_the_input_is_not_saved():
    o = operands(m=64)
    o["lora_a"].requires_grad_(False)
    y, shapes = saved_shapes(lambda: lk.lora_linear(o["x"], o["weight"], o["lora_a"], o["lora_b"]))
    assert (64, 5) in shapes and (2, 32, 24) not in shapes
    y.sum().backward()
    assert o["lora_b"].grad is not None and o["x"].grad is not None


def test_nothing_is_saved_beyond_the_inputs_and_p():
    o = operands(m=64)
    _, shapes = saved_shapes(lambda: lk.lora_linear(o["x"], o["weight"], o["lora_a"], o["lora_b"], dropout_p=0.1))
    assert sorted(shapes) == sorted([(2, 32, 24), (18, 24), (5, 24), (18, 5), (64, 5), ()])


def test_dropout_follows_torchs_generator_and_an_explicit_seed():
    o = operands()

    def draw(**options):
        return lk.lora_linear(o["x"], o["weight"], o["lora_a"], o["lora_b"], dropout_p=0.5, **options)

    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(first, draw()) and not torch.equal(first, second)
    assert torch.equal(draw(dropout_seed=3), draw(dropout_seed=torch.tensor(3)))
    assert not torch.equal(draw(dropout_seed=3), draw(dropout_seed=2**40 + 3))


def test_meta_tensors_give_shapes():
    o = {name: t.detach().to("meta") for name, t in operands().items()}
    o["lora_a"].requires_grad_()
    y = lk.lora_linear(o["x"], o["weight"], o["lora_a"], o["lora_b"], dropout_p=0.5)
    assert y.is_meta and y.shape == (*o["x"].shape[:-1], o["weight"].shape[0])
    assert torch.autograd.grad(y.sum(), o["lora_a"])[0].shape == o["lora_a"].shape
    magnitude = o["weight"].new_empty(o["weight"].shape[0])
    assert lk.lora_linear(o["x"], o["weight"], o["lora_a"], o["lora_b"]).shape == y.shape
    assert lk.dora_linear(o["x"], o["weight"], o["lora_a"], o["lora_b"], magnitude).shape == y.shape
