"""XGBLoRA: a chain whose links train rank 1 in a few layers, drawn anew each time (Zhang et al., arXiv 2410.19694)."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import nn

from .chain import Chain


class XGBLoRA(Chain):
    """The chain that :func:`xgblora` makes. A link is a round.

    Attributes:
        share, l2, rounds: as given.
        history: which layers each round trained, 1 or 0, by the first step of the round.
        (the others as for :class:`Chain`)
    """

    reads_gradients: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        steps_per_round: int,
        *,
        share: float,
        l2: float,
        rounds: int | None,
        **settings: Any,
    ) -> None:
        for option, value in (("share", share), ("l2", l2)):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"xgblora: expected {option} to be a number, got {value!r}")
        if rounds is not None and (isinstance(rounds, bool) or not isinstance(rounds, int)):
            raise TypeError(f"xgblora: expected rounds to be an integer or None, got {rounds!r}")
        if not 0.0 < share <= 1.0:
            raise ValueError(f"xgblora: expected share above 0 and of at most 1, got {share}")
        if not 0.0 <= l2 < math.inf:
            raise ValueError(f"xgblora: expected l2 to be finite and at least 0, got {l2}")
        if rounds is not None and rounds < 1:
            raise ValueError(f"xgblora: expected rounds of at least 1, got {rounds}")
        self.share, self.l2, self.rounds = share, l2, rounds
        self._starts: list[tuple[int, int]] = []  # (first step, round) of each round that trained
        self._steps = 0
        super().__init__(model, optimizer, steps_per_round, one_sided=False, name="xgblora", **settings)

    @property
    def over(self) -> bool:
        """Whether all rounds are over, so that nothing trains further."""
        return self.rounds is not None and self.link >= self.rounds

    def trained(self) -> Collection[str]:
        return () if self.over else self._drawn(self.link)

    def _drawn(self, round_: int) -> set[str]:
        """The layers of a round: a function of the seed and the round."""
        names = list(self.layers)
        generator = torch.Generator().manual_seed(self._seed(len(names), round_))
        order = torch.randperm(len(names), generator=generator).tolist()
        return {names[i] for i in order[: max(1, math.floor(self.share * len(names) + 0.5))]}

    @property
    def history(self) -> dict[str, Any]:  # type: ignore[override]
        rows = [self._drawn(round_) for _, round_ in self._starts]
        return {
            "what": "trains in the round that begins here: 1, rests: 0",
            "steps": [step for step, _ in self._starts],
            "modules": list(self.layers),
            "values": [[int(path in row) for path in self.layers] for row in rows],
        }

    def warmup_factor(self) -> float:
        return 1.0 if self.over else super().warmup_factor()

    def before_step(self) -> None:
        super().before_step()
        trained = self.trained()
        weight = self.l2 * self.gradient_scale()
        for path, layer in self.layers.items():
            factors = layer.lora_A.weight, layer.lora_B.weight
            if path not in trained:
                for p in (*factors, layer.lora_gate):
                    if p is not None:
                        p.grad = None  # no step at all, neither by moments nor by weight decay
                continue
            for factor in factors:
                if self.l2 and factor.grad is not None:
                    factor.grad.add_(factor.detach() * weight)

    def after_step(self) -> None:
        self._steps += 1
        if not self.over:
            if self.link_step == 0:
                self._starts.append((self._steps, self.link))
            super().after_step()

    def detach(self) -> None:
        super().detach()
        for layer in self.layers.values():
            layer.rests = False

    def _begin(self) -> None:
        super()._begin()
        # When all is over the last round's layers go on making gradients, so that a loss still has a backward.
        awake = self._drawn(self.rounds - 1) if self.over and self.rounds else self.trained()
        for path, layer in self.layers.items():
            layer.rests = path not in awake

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "steps": self._steps, "starts": list(self._starts)}

    def check_state(self, state: dict[str, Any]) -> None:
        super().check_state(state)
        if "starts" not in state:
            raise ValueError("xgblora: expected a state of its own, got that of another chain")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._steps, self._starts = state["steps"], list(state["starts"])


def xgblora(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps_per_round: int,
    *,
    share: float = 0.3,
    l2: float = 1e-4,
    rounds: int | None = None,
    init: str = "gaussian",
    **settings: Any,
) -> XGBLoRA:
    """Boosting with low-rank corrections: in each round a few layers get a weak learner, which is then merged.

    A round draws layers, gives them a fresh A and B = 0, trains these for ``steps_per_round`` steps on
    loss + l2 / 2 · Σ (‖A‖² + ‖B‖²), and merges them: W ← W + s B A. The paper's rank is 1 (``LoRAConfig(r=1)``); any
    other works. After T rounds the update of a layer has a rank of up to T R.

    Layers outside of the round keep W, A and B bit for bit. No gradient is made for them (``LoRALinear.rests``), x is
    not kept for their backward, and the optimizer has no state of theirs. Under DistributedDataParallel this needs
    ``find_unused_parameters=True``.

    Args:
        model: adapted with ``LoRAConfig(r=1)``, both factors training. Factors that hold a correction already are
            merged at the end of the first round, drawn or not.
        share: of the layers that train in a round, above 0 and up to 1; at least one does. Drawn by ``seed`` and round.
        l2: its gradient l2 · A, l2 · B is added before each step, so with Adam it goes through the moments, as
            ``torch.optim.Adam``'s weight decay does, and unlike AdamW's.
        rounds: after so many nothing trains further; None: it goes on.
        init: of the fresh A; "gaussian" has the standard deviation 1/R.
        (the others as for :class:`Chain`)

    Raises:
        TypeError, ValueError: a share of 0 or above 1, an l2 below 0, a layer with a frozen factor, and as
            :class:`Chain`.
    """
    return XGBLoRA(model, optimizer, steps_per_round, share=share, l2=l2, rounds=rounds, init=init, **settings)
