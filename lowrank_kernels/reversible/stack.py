"""A stack of reversible layers: what its backward needs of them is computed back from their outputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..layer_stack import WholeStack, filled_cache, is_cache, without_caches
from ..nn.sharded import is_dtensor
from .halves import Call, Half, Halves


class ReversibleStack(WholeStack):
    """Layers as one reversible function of hidden states h:

        x1 = x2 = h;  for each layer: y1 = λ x1 + F(x2),  y2 = β x2 + G(y1);  (x1, x2) = (y2, y1) or (y1, y2)
        output (x1 + x2) / 2

    The inverse of a layer is x2 = (y2 − G(y1)) / β, x1 = (y1 − F(x2)) / λ. Where a gradient is needed, the inputs of
    every ``keep_every``-th layer are kept, and the output of the last; inputs in between are computed back in backward,
    from above. Each layer runs once more there, with the random numbers, under the autocast and in the training or
    evaluation mode of its forward.

    The halves are of h's dtype, of float32 over half precision. Gradients go to h, to tensors among the other arguments
    and to parameters of the layers, whichever require one; a second derivative is refused. Under ``model.train()`` with
    gradients on, layers get no cache of keys and values; a cache that holds tokens is refused then.

    Args:
        layers: of the model; shared, not copied.
        halves: makes F and G.
        lam, beta: λ and β, not 0.
        switch: whether the halves change places after each layer.
        keep_every: 1 keeps all inputs, and inverts nothing.
        check: None, or the relative error of a half up to which backward goes on. It compares the last input that it
            computed back below each kept one with what the kept one says. ``largest_error`` is the largest so far.

    ``recompute = False`` stores all activations as plain autograd does, for comparison.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        halves: Halves,
        lam: float,
        beta: float,
        switch: bool,
        keep_every: int,
        check: float | None = None,
    ) -> None:
        super().__init__(layers)
        self.halves, self.lam, self.beta, self.switch = halves, lam, beta, switch
        self.keep_every, self.check = keep_every, check
        self.largest_error = 0.0
        self.recompute = True

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled() and self._may_recompute(args, kwargs):
            leaves, spec = tree_flatten(without_caches((args, kwargs)))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            trained = [p for p in self.parameters() if p.requires_grad]
            if any(t.requires_grad for t in (hidden, *tensors, *trained)):
                if any(is_dtensor(p) for p in trained):
                    raise ValueError("reversible: expected whole parameters, got shards (DTensor) of FSDP2 or another")
                rest = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
                out: Tensor = _Reversible.apply(_Plan(self, rest, spec, trained), hidden, *tensors, *trained)
                return out
        x1 = x2 = _wide(hidden)
        for layer in self.children():
            f, g = self.halves(layer, Call(args, kwargs, hidden.dtype))
            y1 = self.lam * x1 + f(x2)
            y2 = self.beta * x2 + g(y1)
            x1, x2 = (y2, y1) if self.switch else (y1, y2)
        return ((x1 + x2) / 2).to(hidden.dtype)

    def _may_recompute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True unless a cache would be filled twice, which in evaluation mode the caller may want all the same."""
        has_cache = any(map(is_cache, tree_flatten((args, kwargs))[0]))
        if not self.training:
            return not has_cache
        if filled_cache(args, kwargs):
            raise ValueError(
                "reversible: expected no tokens in the cache of keys and values while a model trains, got some; call "
                "model.eval(), or train without the cache"
            )
        if any(getattr(layer, "gradient_checkpointing", False) for layer in self.children()):
            raise ValueError(
                "reversible: expected layers that are not checkpointed, since they are computed back already; call "
                "model.gradient_checkpointing_disable()"
            )
        return True

    def _compare(self, layer: int, found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> None:
        """Note how far the input of a layer as it was computed back is from what it is."""
        error = max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, exact, strict=True))
        self.largest_error = max(self.largest_error, error)
        if self.check is not None and not error <= self.check:
            raise ValueError(
                f"reversible: expected halves computed back to a relative error of {self.check:g}, got {error:.3g} at "
                f"layer {layer}; keep more of them: keep_every below {self.keep_every}, or a larger λ or β"
            )


def _wide(hidden: Tensor) -> Tensor:
    return hidden.float() if hidden.dtype in (torch.bfloat16, torch.float16) else hidden


class _Plan(NamedTuple):
    """What a run knows beside its tensors: the other arguments (None where a tensor stands), and what trains."""

    stack: ReversibleStack
    rest: list[tuple[Any] | None]
    spec: TreeSpec
    trained: list[nn.Parameter]

    def call(self, tensors: Iterable[Tensor], dtype: torch.dtype) -> Call:
        given = iter(tensors)
        args, kwargs = tree_unflatten([next(given) if leaf is None else leaf[0] for leaf in self.rest], self.spec)
        return Call(args, kwargs, dtype)


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, hidden: Tensor, *tensors: Tensor) -> Tensor:
        stack = plan.stack
        ctx.plan, ctx.random, ctx.autocast = plan, [], _autocast_of(hidden.device)
        ctx.modes = [(module, module.training) for module in stack.modules()]
        ctx.versions = [p._version for p in plan.trained]
        draws = any(training for _, training in ctx.modes)
        given = tensors[: len(tensors) - len(plan.trained)]
        call = plan.call(given, hidden.dtype)
        kept = [hidden]
        x1 = x2 = _wide(hidden)
        with _autocast(ctx.autocast):
            for i, layer in enumerate(stack.children()):
                if i and i % stack.keep_every == 0:
                    kept += [x1, x2]
                f, g = stack.halves(layer, call)
                for_f = _random(hidden.device) if draws else None
                y1 = stack.lam * x1 + f(x2)
                for_g = _random(hidden.device) if draws else None
                y2 = stack.beta * x2 + g(y1)
                ctx.random.append((for_f, for_g))
                x1, x2 = (y2, y1) if stack.switch else (y1, y2)
        if _keeps_output(stack):
            kept += [x1, x2]
        ctx.number = len(kept)
        ctx.save_for_backward(*kept, *given)
        return ((x1 + x2) / 2).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        stack, lam, beta = plan.stack, plan.stack.lam, plan.stack.beta
        if [p._version for p in plan.trained] != ctx.versions:
            raise ValueError(
                "reversible: expected the layers' parameters as they were in forward, to compute back from them, got "
                "changed ones; call backward before optimizer.step()"
            )
        saved = ctx.saved_tensors
        hidden, *kept = saved[: ctx.number]
        # Leaves of graphs of single halves, which take the gradients of tensors among the arguments.
        given = [
            t.detach().requires_grad_(needed)
            for t, needed in zip(saved[ctx.number :], ctx.needs_input_grad[2:], strict=False)
        ]
        call = plan.call(given, hidden.dtype)
        captured = [t for t in given if t.requires_grad]
        own = set(map(id, plan.trained))
        grads: dict[int, Tensor] = {}

        def pull(output: Tensor, at: Tensor, grad: Tensor, layer: nn.Module) -> Tensor:
            """The gradient at the input of a half, from that of its output; those of all else are added up."""
            leaves = captured + [p for p in layer.parameters() if p.requires_grad and id(p) in own]
            found, *others = torch.autograd.grad(output, [at, *leaves], grad, allow_unused=True)
            for leaf, other in zip(leaves, others, strict=True):
                if other is not None:
                    grads[id(leaf)] = grads[id(leaf)] + other if id(leaf) in grads else other
            return torch.zeros_like(at) if found is None else found

        after = (kept.pop(-2), kept.pop()) if _keeps_output(stack) else None
        d1 = d2 = _wide(grad) / 2
        with _forked(hidden.device), _autocast(ctx.autocast), _in_modes(ctx.modes), torch.enable_grad():
            for i, layer in reversed(list(enumerate(stack.children()))):
                f, g = stack.halves(layer, call)
                for_f, for_g = ctx.random[i]
                y = after[::-1] if after is not None and stack.switch else after
                d1, d2 = (d2, d1) if stack.switch else (d1, d2)
                if i % stack.keep_every == 0:
                    x1, x2 = (_wide(hidden),) * 2 if i == 0 else (kept.pop(-2), kept.pop())
                    x2 = x2.detach().requires_grad_()
                    of_f = _run(f, x2, for_f)
                    y1 = (lam * x1 + of_f.detach()).requires_grad_()
                    of_g = _run(g, y1, for_g)
                    if stack.check is not None and y is not None:
                        stack._compare(i + 1, y, (y1.detach(), beta * x2.detach() + of_g.detach()))
                    d1 = d1 + pull(of_g, y1, d2, layer)
                else:
                    assert y is not None
                    y1 = y[0].detach().requires_grad_()
                    of_g = _run(g, y1, for_g)
                    x2 = ((y[1] - of_g.detach()) / beta).requires_grad_()
                    d1 = d1 + pull(of_g, y1, d2, layer)
                    of_f = _run(f, x2, for_f)
                    x1 = (y1.detach() - of_f.detach()) / lam
                d1, d2 = lam * d1, beta * d2 + pull(of_f, x2, d1, layer)
                after = x1, x2.detach()
        to_hidden = (d1 + d2).to(hidden.dtype) if ctx.needs_input_grad[1] else None
        return None, to_hidden, *(grads.get(id(t)) for t in (*given, *plan.trained))


def _keeps_output(stack: ReversibleStack) -> bool:
    """False if the last layer's input is kept, so that its output is not inverted."""
    return (len(stack) - 1) % stack.keep_every != 0


class _Random(NamedTuple):
    """Where torch's generators stood before a half."""

    cpu: Tensor
    device: torch.device
    cuda: Tensor | None


def _random(device: torch.device) -> _Random:
    return _Random(torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def _run(half: Half, x: Tensor, random: _Random | None) -> Tensor:
    """A half as it ran in forward."""
    if random is not None:
        torch.set_rng_state(random.cpu)
        if random.cuda is not None:
            torch.cuda.set_rng_state(random.cuda, random.device)
    return half(x)


def _forked(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def _autocast_of(device: torch.device) -> dict[str, tuple[bool, torch.dtype]]:
    return {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in {"cpu", device.type}}


@contextlib.contextmanager
def _in_modes(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Each module in training or evaluation, as it was; afterwards as it is now."""
    now = [(module, module.training) for module, _ in modes]
    for module, training in modes:
        module.training = training
    try:
        yield
    finally:
        for module, training in now:
            module.training = training


@contextlib.contextmanager
def _autocast(states: dict[str, tuple[bool, torch.dtype]]) -> Iterator[None]:
    """Autocast as it was. Without its cache of cast weights: one that forward made would have no gradient, and one of
    backward would be in the graphs of several halves."""
    with contextlib.ExitStack() as contexts:
        for kind, (enabled, dtype) in states.items():
            contexts.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=False))
        yield
