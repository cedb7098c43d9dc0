"""SoRA: gates that an L1 penalty sets to zero, and the ranks behind them cut (Ding et al., arXiv 2311.11696)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..rider import Rider, check_integer, history_of, note
from .ranks import Ranks, gated_layers


def soft_threshold(values: Tensor, threshold: float) -> Tensor:
    """T_ξ(v) = sign(v) max(|v| - ξ, 0), of each element; in the dtype and shape of ``values``."""
    return values.sign() * (values.abs() - threshold).clamp_min(0.0)


def rising(start: float, end: float, steps: int) -> Callable[[int], float]:
    """λ(t) = start + (end - start) min(1, t / steps): a penalty that rises linearly, and then stays.

    Returns:
        A function of the number of steps taken, for :class:`SoRA`.

    Raises:
        ValueError: a penalty that is below 0 or not finite; fewer than one step.
    """
    if not (0.0 <= start < math.inf and 0.0 <= end < math.inf) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"rising: expected penalties of at least 0 and steps of at least 1, got {start, end, steps}")
    return lambda step: start + (end - start) * min(1.0, step / steps)


def sora_groups(model: nn.Module, lr: float, gate_lr: float, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups of what trains: everything but gates, then gates, which never decay.

    Args:
        model: adapted with ``gate=True``.
        lr: of everything else.  weight_decay: of the same.
        gate_lr: η of the proximal step, a plain gradient's: some orders of magnitude above Adam's.

    Returns:
        Two groups, for any torch optimizer.

    Raises:
        TypeError, ValueError: no module; a model without gates, or with a layer that has none.
    """
    gates = {id(layer.lora_gate) for layer in gated_layers(model, "sora_groups").values()}
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if id(p) not in gates], "lr": lr, "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in gates], "lr": gate_lr, "weight_decay": 0.0},
    ]


class SoRA(Rider):
    """y = x Wᵀ + s (P ∘ g) Bᵀ, and for g a proximal step: g ← T_{ηλ}(g - η ∇g), T_ξ(v) = sign(v) max(|v| - ξ, 0).

    It rides on any optimizer, which steps everything else: the gates' gradients are taken out of its sight for the
    step. η is the rate that the gates' group has at that step, so a schedule reaches them too. A gate is zero where the
    loss gains less than λ by it, and :meth:`prune` then cuts its rank.

    Args:
        model: adapted with ``gate=True``.
        optimizer: with the gates among its parameters; see :func:`sora_groups`.
        penalty: λ, of the loss's unit; or a function of the number of steps taken, such as :func:`rising`.
        note_every: steps after which ``history`` is looked at, which waits for the device.

    Attributes:
        steps: how many were taken.
        history: gates that are not zero, by layer and step, for a picture.

    Clipping by a norm counts the gates' gradients in. The whole state is in the optimizer's ``state_dict``, and in the
    model's; after :meth:`prune` too.

    Raises:
        TypeError, ValueError: a model without gates, an optimizer that lacks one, a penalty below 0 or not finite, and
            as :class:`~lowrank_kernels.rider.Rider`.

    Source: Ding et al., "Sparse Low-rank Adaptation", arXiv 2311.11696, eq. 8 and 9. Their code thresholds by λ and not
    ηλ, and twice; see docs/methods/sora.md.
    """

    key = "sora"
    history: dict[str, Any]
    reads_gradients = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        penalty: float | Callable[[int], float],
        *,
        note_every: int = 10,
    ) -> None:
        super().__init__(optimizer, "SoRA")
        self.layers = gated_layers(model, "SoRA", optimizer)
        rates = self._rates()
        for path, layer in self.layers.items():
            if not layer.lora_gate.requires_grad or id(layer.lora_gate) not in rates:
                raise ValueError(
                    f"SoRA: expected an optimizer of all gates, for the rate in their group, got one without that of "
                    f"{path}; make it of lk.allocate.sora_groups(model, ...)"
                )
        check_integer("SoRA", "note_every", note_every, 1)
        self._penalty, self.steps = penalty, 0
        self.penalty()
        self._taken: list[tuple[nn.Parameter, Tensor]] = []
        self._ranks = Ranks(model, self.layers, optimizer)
        self.note_every, self.history = note_every, history_of("gates that are not zero", self.layers)
        note(self.history, 1, self.kept())
        self._detach += self._ranks.follow_loads()
        self.attach()

    def _rates(self) -> dict[int, Any]:
        """The learning rate of each parameter, by its id; groups are others after a state was loaded."""
        return {id(p): group["lr"] for group in self.optimizer.param_groups for p in group["params"]}

    def penalty(self) -> float:
        """λ of the next step."""
        value = self._penalty(self.steps) if callable(self._penalty) else self._penalty
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"SoRA: expected penalty to be a number or a function of the step, got {value!r}")
        if not 0.0 <= value < math.inf:
            raise ValueError(f"SoRA: expected a finite penalty of at least 0, got {value!r}")
        return float(value)

    def kept(self) -> dict[str, int]:
        """How many gates of each layer are not zero."""
        counts = torch.stack([layer.lora_gate.detach().count_nonzero() for layer in self.layers.values()]).tolist()
        return dict(zip(self.layers, counts, strict=True))

    def before_step(self) -> None:
        gates = [layer.lora_gate for layer in self.layers.values()]
        self._taken = [(gate, gate.grad) for gate in gates if gate.grad is not None]
        for gate, _ in self._taken:
            gate.grad = None

    def restore(self) -> None:
        while self._taken:
            gate, grad = self._taken.pop()
            gate.grad = grad

    @torch.no_grad()
    def after_step(self) -> None:
        penalty, scale, rates = self.penalty(), self.gradient_scale(), self._rates()
        for layer in self.layers.values():
            gate, rate = layer.lora_gate, rates[id(layer.lora_gate)]
            if gate.grad is not None:
                gate.copy_(soft_threshold(gate - rate / scale * gate.grad, rate * penalty))
        self.steps += 1
        if self.steps % self.note_every == 0:
            note(self.history, self.steps + 1, self.kept())

    @torch.no_grad()
    def prune(self) -> dict[str, int]:
        """Cut the ranks whose gates are zero out of A, B and the optimizer's state; the function stays.

        One rank, with its zero gate, is left where all of a layer's are zero: PEFT's format has no rank of 0.

        Returns:
            The rank of each layer. The model's config has them too, for ``save_adapter``.

        Raises:
            ValueError: a gate that is not finite; nothing has changed then.
        """
        keep: dict[str, list[int]] = {}
        for path, layer in self.layers.items():
            if not bool(layer.lora_gate.isfinite().all()):
                raise ValueError(f"SoRA.prune: expected finite gates, found NaN or Inf in {path}; nothing was cut")
            keep[path] = layer.lora_gate.nonzero().flatten().tolist() or [0]
        for path, kept in keep.items():
            if len(kept) < self.layers[path].r:
                self._ranks.change_(path, kept)
        self._ranks.write_down()
        return self._ranks.by_layer()

    def finish(self) -> None:
        self.prune()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "history": copy.deepcopy(self.history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]
        self.history = copy.deepcopy(state["history"])
