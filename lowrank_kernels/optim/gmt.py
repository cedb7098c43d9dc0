"""GMT: a step moves only the elements with the largest gradients (Li et al., arXiv 2406.15330)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..functional import magnitude_histogram
from ..names import named_parameters
from ..nn.sharded import is_dtensor
from ..rider import Rider, check_integer, history_of, note
from .settings import check_model, check_number

OVER = ("tensor", "all")
_DIGIT_BITS = (12, 10, 9)
_USED_BITS = {torch.bfloat16: 15, torch.float16: 18}  # of a magnitude as float32; what lies below is 0


class Threshold(NamedTuple):
    """What is chosen: every element of a magnitude above that of ``bits``, and the first ``ties`` that have it.

    Attributes:
        bits: those of a float32's magnitude.
        ties: how many of the elements that equal it, in the order of the tensors and of their elements; None: all.
    """

    bits: int
    ties: int | None = None


def largest(tensors: Iterable[Tensor], count: int, *, exact: bool = True) -> Threshold:
    """The threshold above which ``count`` elements of all the tensors together lie: a radix selection.

    A histogram of the magnitudes' first 12 bits says between which values the count-th largest lies; one of the next
    bits, of the elements there alone, goes on, until it is known. Values are read at most three times (twice in half
    precision), nothing is sorted, and counts are integers: the result is exact, and the same in any order.

    Args:
        tensors: of any float dtypes and devices.
        count: from 1 to the elements there are.
        exact: False stops after the first histogram, one read: at the edge nearest to the count, so that more or fewer
            are chosen, but always one. A sixteenth of a power of two lies between edges.
    """
    tensors = list(tensors)
    leading, left, seen = 0, count, 0
    used = max(_USED_BITS.get(t.dtype, 31) for t in tensors)
    for digit, bits in enumerate(_DIGIT_BITS):
        counts: dict[torch.device, Tensor] = {}
        for t in tensors:
            found = magnitude_histogram(t, digit=digit, leading=leading)
            counts[t.device] = counts[t.device] + found if t.device in counts else found
        every = torch.stack([c.cpu() for c in counts.values()]).sum(0)
        above = every.flip(0).cumsum(0).tolist()  # how many are at least so large, from the largest on
        at = next(i for i, n in enumerate(above) if n >= left)
        higher = above[at - 1] if at else 0
        value, inside = len(above) - 1 - at, above[at] - higher
        seen += bits
        if not exact:
            nearer = left - higher < above[at] - left and higher > 0  # without this bin's elements, or with them
            return Threshold((value + nearer) << (31 - seen))
        leading, left = (leading << bits) | value, left - higher
        if seen >= used:
            break
    return Threshold(leading << (31 - seen), None if left == inside else left)


def chosen(tensors: Iterable[Tensor], threshold: Threshold) -> list[Tensor]:
    """For each tensor, True where an element is above the threshold or among its ties."""
    masks, left = [], threshold.ties
    for t in tensors:
        magnitude = _magnitude(t)
        if left is None:
            masks.append(magnitude >= threshold.bits)
            continue
        equal = magnitude == threshold.bits
        first = equal.flatten().cumsum(0).view_as(equal) <= left
        masks.append((magnitude > threshold.bits) | (equal & first))
        left = max(0, left - int(equal.count_nonzero()))
    return masks


def _magnitude(t: Tensor) -> Tensor:
    return t.to(torch.float32, memory_format=torch.contiguous_format).view(torch.int32) & 0x7FFFFFFF


class GMT(Rider):
    """Of each step, only the share of elements with the largest |gradient| is taken; every other keeps its bits.

    θ ← step(θ, g ∘ m) where m, and θ elsewhere, with m = 1 for the round(share · elements) largest |g|, at least one.
    g is what the loop has accumulated in ``p.grad``: the mean over a window of batches, as the paper has it. m is
    chosen anew at each step, or held for ``window`` of them.

    It rides on any optimizer, which sees masked gradients, so that moments of elements that are not chosen decay.
    Neither moments nor weight decay move those. With a share of 1 the steps are the optimizer's own, bit for bit.

    Args:
        model: whose parameters the optimizer steps; all of those are masked.
        optimizer: the one that steps.
        share: of the elements, above 0 and at most 1.
        window: optimizer steps for which a choice holds.
        over: "tensor": the share of each parameter; "all": of all of them together.
        exact: False: the threshold comes from one histogram, and the share is met to within a sixteenth of a power of
            two of magnitude.
        note_every: choices after which ``history`` is looked at, which waits for the device.

    Attributes:
        steps: how many were taken.
        history: share of the elements that moves, by parameter and step, for a picture.

    Ties are broken by order: of the parameters in the model, then of their elements. NaN counts as the largest. Takes a
    copy of the parameters during a step, and a byte an element for the choice. Gradients that are not chosen are zero
    after the step. Data-parallel ranks choose alike, since they have the same gradients. Resumes bit for bit with the
    model's and the optimizer's states, in the middle of a window too.

    Raises:
        TypeError, ValueError: an optimizer that steps none of the model's parameters, or others; shards; numbers out of
            range; and as :class:`~lowrank_kernels.rider.Rider`. At a step: sparse gradients; an optimizer that steps
            other parameters by now.

    Source: Li et al., "Gradient-Mask Tuning" (later "Enhancing Large Language Model Performance with Gradient-Based
    Parameter Selection"), arXiv 2406.15330.
    """

    key = "gmt"
    history: dict[str, Any]
    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        share: float = 0.2,
        *,
        window: int = 1,
        over: str = "tensor",
        exact: bool = True,
        note_every: int = 10,
    ) -> None:
        super().__init__(optimizer, "GMT")
        check_model("GMT", model)
        check_number("GMT", "share", share)
        if not 0.0 < share <= 1.0:
            raise ValueError(f"GMT: expected share to be above 0 and at most 1, got {share}")
        for option, value in (("window", window), ("note_every", note_every)):
            check_integer("GMT", option, value, 1)
        if over not in OVER:
            raise ValueError(f"GMT: expected over to be one of {', '.join(OVER)}, got {over!r}")
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own: dict[int, tuple[str, nn.Parameter]] = {}
        for name, p in named_parameters(model):
            if id(p) in stepped:
                own.setdefault(id(p), (name, p))
        if not stepped or own.keys() != stepped:
            raise ValueError("GMT: expected an optimizer of the model's own parameters, got one with others, or none")
        self.parameters, self._stepped = dict(own.values()), stepped
        for name, p in self.parameters.items():
            if is_dtensor(p):
                raise ValueError(f"GMT: expected whole parameters, got a shard in {name}")
        self.share, self.window, self.over, self.exact, self.note_every = share, window, over, exact, note_every
        self.steps = 0
        self._masks: dict[str, Tensor] = {}
        self._kept: list[tuple[Tensor, Tensor, Tensor]] = []
        self.history = history_of("share of the elements that moves", self.parameters)
        self.attach()

    def count(self, elements: int) -> int:
        """How many of so many elements move."""
        return min(elements, max(1, round(self.share * elements)))

    def _choose(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.over == "all":
            every = list(grads.values())
            threshold = largest(every, self.count(sum(g.numel() for g in every)), exact=self.exact)
            return dict(zip(grads, chosen(every, threshold), strict=True))
        return {
            name: chosen([g], largest([g], self.count(g.numel()), exact=self.exact))[0] for name, g in grads.items()
        }

    @torch.no_grad()
    def before_step(self) -> None:
        if self.share == 1.0:
            return
        if {id(p) for group in self.optimizer.param_groups for p in group["params"]} != self._stepped:
            raise ValueError(
                "GMT: expected the optimizer's parameters to be those that it had when GMT was made, got others, which "
                "would not be masked; call detach(), and make GMT anew"
            )
        grads = {}
        for name, p in self.parameters.items():
            if p.grad is not None and p.numel():
                if p.grad.layout != torch.strided:
                    raise ValueError(f"GMT: expected dense gradients, got a {p.grad.layout} one of {name}")
                grads[name] = p.grad
        if self.steps % self.window == 0 and grads:
            self._masks = self._choose(grads)
        for name, grad in grads.items():
            p, mask = self.parameters[name], self._masks.get(name)
            if mask is None:  # it had no gradient when the window began
                mask = torch.zeros_like(p, dtype=torch.bool)
            self._kept.append((p, p.detach().clone(), mask))
            grad.masked_fill_(~mask, 0.0)

    @torch.no_grad()
    def restore(self) -> None:
        while self._kept:
            p, before, mask = self._kept.pop()
            p.copy_(torch.where(mask, p, before))

    def after_step(self) -> None:
        if self.steps % (self.window * self.note_every) == 0 and self._masks:
            counts = torch.stack([m.count_nonzero() for m in self._masks.values()]).tolist()
            moved = dict.fromkeys(self.parameters, 0.0)
            moved |= {n: c / self.parameters[n].numel() for n, c in zip(self._masks, counts, strict=True)}
            note(self.history, self.steps + 1, moved)
        self.steps += 1
        if self.steps % self.window == 0:
            self._masks = {}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "masks": dict(self._masks), "history": copy.deepcopy(self.history)}

    def check_state(self, state: dict[str, Any]) -> None:
        for name, mask in state["masks"].items():
            p = self.parameters.get(name)
            if p is None or p.shape != mask.shape:
                raise ValueError(f"GMT: expected a state of this model, got a choice of {name} {tuple(mask.shape)}")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.check_state(state)
        self.steps, self.history = state["steps"], copy.deepcopy(state["history"])
        self._masks = {name: mask.to(self.parameters[name].device) for name, mask in state["masks"].items()}
