"""Terms that are added to a loss: the density of activations (DEFT, arXiv 2402.01911)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .config import names_match
from .names import named_modules
from .patterns import FilePattern

ACTIVATIONS = ("act_fn", "act", "activation_fn", "intermediate_act_fn")
"""What the activation of an MLP is called in transformers' models."""
EPS = 1e-7


def density(o: Tensor, mask: Tensor | None = None, *, eps: float = EPS) -> Tensor:
    """The mean of o² / (o² + ε) over the tokens that count, and over the elements of each: a smooth count of non-zeros.

    ε is added to o², as it is: an element counts ½ where |o| = √ε, 3.2e-4 for 1e-7. The derivative 2 o ε / (o² + ε)² is
    small far from there.

    Args:
        o: (..., F) activations, of any float dtype.
        mask: o's leading shape, or any shape with as many elements; tokens whose entry is 0 do not count. None: all do.
        eps: ε > 0.

    Returns:
        A scalar in float32, or float64 where o is; 0 where no token counts. For backward o alone is saved. Its gradient
        is exact, and 0 at tokens that do not count, whatever they hold.

    Raises:
        TypeError: no floats, or no dimension of elements.
        ValueError: a mask of another size, an ε that is not above 0 and finite.

    Source: Runwal et al., "From PEFT to DEFT", arXiv 2402.01911, section 3; the authors' code takes ε = 1e-7.
    """
    _check_positive("density", "eps", eps)
    if not isinstance(o, Tensor) or not o.is_floating_point() or o.dim() == 0:
        got = f"{o.dtype} of shape {tuple(o.shape)}" if isinstance(o, Tensor) else type(o).__name__
        raise TypeError(f"density: expected o to be floats (..., F), got {got}")
    if mask is not None and mask.numel() != o.shape[:-1].numel():
        raise ValueError(
            f"density: expected a mask of one entry a token, o's leading shape {tuple(o.shape[:-1])}, got "
            f"{tuple(mask.shape)}"
        )
    term: Tensor = _Density.apply(o, None if mask is None else mask != 0, eps)
    return term


class _Density(torch.autograd.Function):
    """Saves o alone, and keeps its mask as an attribute: activation checkpointing recomputes what is saved, and calls
    the hooks that made it again, when the mask may be that of another batch."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, mask: Tensor | None, eps: float) -> Tensor:
        square = o.to(torch.promote_types(o.dtype, torch.float32)).square()
        each = square / (square + eps)
        if mask is None:
            count: Any = max(1, o.numel())
        else:
            mask = mask.reshape(*o.shape[:-1], 1)
            each, count = torch.where(mask, each, 0.0), (mask.sum() * o.shape[-1]).clamp_min(1)
        ctx.save_for_backward(o)
        ctx.mask, ctx.eps, ctx.count = mask, eps, count
        return each.sum() / count

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (o,) = ctx.saved_tensors
        wide = o.to(grad.dtype)
        sums = wide.square() + ctx.eps  # not squared: ε² is 0 in float32 from 1e-23 on
        slope = (wide / sums) * (ctx.eps / sums) * (grad * 2.0 / ctx.count)
        if ctx.mask is not None:
            slope = torch.where(ctx.mask, slope, 0.0)
        return slope.to(o.dtype), None, None


class Density:
    """α times the mean density of a model's activations over its layers, for the batch that it saw last.

        term = Density(model, alpha=1.0)
        loss = model(**batch).loss + term()

    Hooks on the activations compute each layer's :func:`density` in the forward, and one on the model reads its
    ``attention_mask``, so that padding does not count. They run in training where gradients are recorded.

    Args:
        model: what is called with the batch: a model, or its decoder.
        alpha: α, of the loss's unit. 1 in the paper.
        eps: ε; see :func:`density`.
        modules: names or a regular expression, as for ``target_modules``.
        of: "output" of these modules, or "input": of ``down_proj``, what its product could skip.
        into_loss: add the term to the ``loss`` of what the model returns, for trainers that take it from there. Whoever
            accumulates gradients of several batches and divides elsewhere divides α too.

    With activation checkpointing (``use_reentrant=False``) the recomputed hooks do not count again. A copy of the
    model, by ``copy.deepcopy`` or ``torch.save``, has a ``Density`` of its own.

    Raises:
        TypeError: no module; ``modules`` that are neither names nor a regular expression.
        ValueError: nothing that matches; α below 0, ε not above 0, not finite. In a forward: modules that are called
            without gradients, by reentrant checkpointing, MEFT or SHERL, so that the term has none; activations that
            the mask does not fit; with ``into_loss``, a model that returns no ``loss``. ``term()``: no forward before
            it.

    ``remove()`` takes the hooks away.

    Source: Runwal et al., arXiv 2402.01911. PEFT's "DEFT" is another method.
    """

    def __init__(
        self,
        model: nn.Module,
        alpha: float = 1.0,
        *,
        eps: float = EPS,
        modules: str | Sequence[str] = ACTIVATIONS,
        of: str = "output",
        into_loss: bool = False,
    ) -> None:
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0.0 <= alpha < math.inf:
            raise ValueError(f"Density: expected alpha to be a finite number of at least 0, got {alpha!r}")
        _check_positive("Density", "eps", eps)
        self.alpha, self.eps = float(alpha), eps
        self.layers = activations(model, modules, of)
        self._terms: list[Tensor] | None = None
        self._open = False
        self._mask: Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            *_watch(self.layers, of, self._add),
            model.register_forward_hook(self._end_into_loss if into_loss else self._end, always_call=True),
        ]

    def __call__(self) -> Tensor:
        """α times the mean over the layers' terms of the last forward."""
        if not self._terms:
            raise ValueError(
                "Density: expected a forward of the model in training before its term, got none that called one of "
                f"{', '.join(list(self.layers)[:3])}"
            )
        return self.alpha * torch.stack(self._terms).mean()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_terms": None, "_open": False, "_mask": None}  # the last batch's are of another graph

    def remove(self) -> None:
        """Take the hooks off the model."""
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._open = model.training and torch.is_grad_enabled()
        self._terms = [] if self._open else None
        self._mask = _attention_mask(model, args, kwargs)

    def _add(self, name: str, o: Tensor) -> None:
        if not self._open:
            # Recomputing a checkpoint saves what was saved before, or it is refused; the mask is not among that.
            if torch.is_grad_enabled() and o.requires_grad:
                density(o, eps=self.eps)
            return
        if not torch.is_grad_enabled():
            raise ValueError(
                f"Density: expected {name} to record gradients, got a call without, as in reentrant activation "
                f"checkpointing, in which the term would have none; checkpoint with use_reentrant=False, and leave out "
                f"of modules what is in MEFT's layers or SHERL's early ones"
            )
        assert self._terms is not None
        self._terms.append(density(o, _fitting(name, o, self._mask), eps=self.eps))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self._open = False

    def _end_into_loss(self, model: nn.Module, args: Any, output: Any) -> Any:
        self._open = False
        if self._terms and output is not None:  # None: the forward raised
            if getattr(output, "loss", None) is None:
                raise ValueError(
                    f"Density: expected the model to return a loss to add the term to, got a {type(output).__name__} "
                    f"without one; give it labels and return_dict=True, or add term() to the loss yourself"
                )
            output.loss = output.loss + self()
        return output


@dataclass(frozen=True)
class DensityReport:
    """How many activations are above a threshold, by layer.

    Attributes:
        layers: {path: share of the elements of unpadded tokens with |o| > threshold}.
        threshold: √ε where none was given: where the term of :func:`density` is ½.
    """

    layers: Mapping[str, float]
    threshold: float

    @property
    def mean(self) -> float:
        """Over the layers."""
        return sum(self.layers.values()) / len(self.layers)

    def __str__(self) -> str:
        rows = [f"  {name}: {share:.2%}" for name, share in self.layers.items()]
        return "\n".join([f"activation density {self.mean:.2%} (above {self.threshold:.3g}), by layer:", *rows])


@torch.no_grad()
def density_report(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], Any],
    *,
    threshold: float = EPS**0.5,
    modules: str | Sequence[str] = ACTIVATIONS,
    of: str = "output",
) -> DensityReport:
    """Measure activations over some batches, in evaluation mode and without gradients.

    Args:
        model: as for :class:`Density`; its ``attention_mask`` tells padding.
        batches, run: ``run(model, batch)`` calls the model, or what holds it.
        threshold: what is above it in size counts. 0 counts what is not exactly zero.
        modules, of: as for :class:`Density`.

    Raises:
        TypeError: as :class:`Density`.
        ValueError: nothing that matches, or no token; a threshold that is below 0 or not finite.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0.0 <= threshold < math.inf:
        raise ValueError(f"density_report: expected threshold to be a finite number of at least 0, got {threshold!r}")
    layers = activations(model, modules, of)
    above = dict.fromkeys(layers, 0)
    total = dict.fromkeys(layers, 0)
    mask: list[Tensor | None] = [None]

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask[0] = _attention_mask(module, args, kwargs)

    def count(name: str, o: Tensor) -> None:
        fitting = _fitting(name, o, mask[0])
        kept = o if fitting is None else o.reshape(-1, o.shape[-1])[fitting.flatten() != 0]
        above[name] += int((kept.abs() > threshold).sum())
        total[name] += kept.numel()

    modes = [(m, m.training) for m in model.modules()]
    handles = [model.register_forward_pre_hook(begin, with_kwargs=True), *_watch(layers, of, count)]
    try:
        model.eval()
        for batch in batches:
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    called = {name: above[name] / total[name] for name in layers if total[name]}
    if not called:
        raise ValueError(f"density_report: expected batches that call {', '.join(list(layers)[:3])}, got no token")
    return DensityReport(called, threshold)


def activations(
    model: nn.Module, modules: str | Sequence[str] = ACTIVATIONS, of: str = "output"
) -> dict[str, nn.Module]:
    """The modules whose activations count, by path.

    Raises:
        TypeError: no module; ``modules`` that are neither names nor a regular expression.
        ValueError: none; an ``of`` that is neither "output" nor "input"; what is no regular expression.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Density: expected model to be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(modules, Sequence) or not all(isinstance(name, str) for name in modules):
        raise TypeError(f"Density: expected modules to be names or a regular expression, got {modules!r}")
    if of not in ("output", "input"):
        raise ValueError(f"Density: expected of to be 'output' or 'input', got {of!r}")
    wanted = FilePattern(modules) if isinstance(modules, str) else tuple(modules)
    found = {name: m for name, m in named_modules(model) if name and names_match(wanted, name)}
    if not found:
        raise ValueError(
            f"Density: expected modules to name activations, got {modules!r}, which match nothing in this "
            f"{type(model).__name__}; name modules whose output counts, or with of='input' the linears after them"
        )
    return found


def _watch(layers: Mapping[str, nn.Module], of: str, see: Callable[[str, Tensor], None]) -> list[Any]:
    """Hooks that call ``see(path, o)`` at each call of the modules."""
    if of == "output":
        return [m.register_forward_hook(partial(_see_output, see, name)) for name, m in layers.items()]
    return [m.register_forward_pre_hook(partial(_see_input, see, name)) for name, m in layers.items()]


# Functions of the module, not closures, so that a model is copied and pickled with hooks on its own Density.
def _see_output(see: Callable[[str, Tensor], None], name: str, module: nn.Module, args: Any, o: Tensor) -> None:
    see(name, o)


def _see_input(see: Callable[[str, Tensor], None], name: str, module: nn.Module, args: Any) -> None:
    see(name, args[0])


def _attention_mask(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    mask = kwargs.get("attention_mask")
    if mask is None and args:
        names = list(inspect.signature(model.forward).parameters)
        mask = dict(zip(names, args, strict=False)).get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _fitting(name: str, o: Tensor, mask: Tensor | None) -> Tensor | None:
    if mask is not None and mask.numel() != o.shape[:-1].numel():
        raise ValueError(
            f"Density: expected activations of {name} for each of the mask's {tuple(mask.shape)} tokens, got "
            f"{tuple(o.shape)}; leave the module out of modules"
        )
    return mask


def _check_positive(op: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise ValueError(f"{op}: expected {name} to be a finite number above 0, got {value!r}")
