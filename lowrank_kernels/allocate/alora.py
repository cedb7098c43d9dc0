"""ALoRA: ranks that validation data does not miss go to layers that need them (Liu et al., arXiv 2403.16187)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.lora import LoRALayer
from ..rider import Rider, check_integer, history_of, note
from .ranks import Ranks, check_score, evaluating, gated_layers, hold_gates_


class ALoRA(Rider):
    """After every ``every`` steps: the ranks that validation data needs least are cut, and others get as many.

    The importance of rank r is IS(r) = S(M) - S(M without r) + S(M with r alone), S the negative mean loss on the
    validation batches, M with r alone having no other rank in any layer. The ``moves`` ranks with the lowest are cut,
    wherever they are, and go to the layers of which none was cut: one each, the layers with the highest mean importance
    first, and round again. A new rank starts with B = 0, so that a reallocation changes the function by what was cut
    alone. Σ R never changes, and every layer keeps a rank.

    Args:
        model: adapted with ``gate=True``. Gates are 1, but while ranks are scored, and do not train; others are first
            put into B.
        optimizer: the one that steps the factors; it stays the same, and its state follows.
        batches: validation batches, kept; not what is trained on.
        loss: (model, batch) -> the loss, a scalar.
        every: optimizer steps between reallocations (the paper trains for an epoch or more).
        moves: ranks to move at each.
        rounds: how many reallocations there are; None: no end.
        seed: of the new ranks' A; torch's own generators are not touched.
        progress: show a bar while ranks are scored, which takes 2 Σ R passes over the batches.

    Attributes:
        steps: how many were taken.  round: how many reallocations there were.
        history: ranks by layer and step, for a picture.

    Resumes bit for bit with the model's and the optimizer's states.

    Raises:
        TypeError, ValueError: no batches; a model without gates; ``moves`` below 1, or more than could be cut; and as
            :class:`~lowrank_kernels.rider.Rider`. At a reallocation: a score that is not finite. Nothing has changed
            then.

    Source: Liu et al., "ALoRA: Allocating Low-Rank Adaptation", arXiv 2403.16187, section 3. PEFT's aLoRA, and the
    "alora" of PyPI, are other methods.
    """

    key = "alora"
    history: dict[str, Any]

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterable[Any],
        loss: Callable[[Any, Any], Tensor],
        *,
        every: int,
        moves: int,
        rounds: int | None = None,
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        super().__init__(optimizer, "ALoRA")
        for option, value, least in (("every", every, 1), ("moves", moves, 1), ("seed", seed, 0)):
            check_integer("ALoRA", option, value, least)
        if rounds is not None:
            check_integer("ALoRA", "rounds", rounds, 0)
        self.model, self.batches, self._loss = model, list(batches), loss
        if not self.batches:
            raise ValueError("ALoRA: expected validation batches, got none")
        self.layers = gated_layers(model, "ALoRA", optimizer)
        self._ranks = Ranks(model, self.layers, optimizer)
        self.budget = len(self._ranks)
        if moves > self.budget - len(self.layers):
            raise ValueError(
                f"ALoRA: expected moves of at most {self.budget - len(self.layers)}, as each of {len(self.layers)} "
                f"layers keeps one of {self.budget} ranks, got {moves}"
            )
        if len(self.layers) < 2:
            raise ValueError("ALoRA: expected several layers to move ranks between, got one")
        self.every, self.moves, self.rounds, self.seed, self.progress = every, moves, rounds, seed, progress
        self.steps = self.round = 0
        hold_gates_(self.layers)
        self.history = history_of("rank", self.layers)
        note(self.history, 1, self._ranks.by_layer())
        self._detach += self._ranks.follow_loads()
        self.attach()

    def after_step(self) -> None:
        self.steps += 1
        if self.steps % self.every == 0 and (self.rounds is None or self.round < self.rounds):
            self.reallocate()

    @torch.no_grad()
    def score(self) -> float:
        """S: the negative mean loss on the validation batches, in evaluation mode."""
        with evaluating(self.model):
            losses = [check_score("ALoRA", self._loss(self.model, b), "the validation loss") for b in self.batches]
        return -sum(losses) / len(losses)

    @torch.no_grad()
    def importance(self) -> dict[str, list[float]]:
        """IS of every rank, by layer."""
        whole, gates = self.score(), [layer.lora_gate for layer in self.layers.values()]
        found: dict[str, list[float]] = {path: [] for path in self.layers}
        try:
            for on in (1.0, 0.0):  # every rank but one, then one and no other
                _fill(gates, on)
                for path, layer in self._shown(self.layers.items()):
                    for r in range(layer.r):
                        layer.lora_gate[r] = 1.0 - on
                        score = self.score()
                        layer.lora_gate[r] = on
                        if on:
                            found[path].append(whole - score)
                        else:
                            found[path][r] += score
        finally:
            _fill(gates, 1.0)
        return found

    def _shown(self, layers: Iterable[tuple[str, LoRALayer]]) -> Iterable[tuple[str, LoRALayer]]:
        if not self.progress:
            return layers
        from tqdm import tqdm

        return tqdm(list(layers), desc="scoring ranks", unit="layer")

    def reallocate(self) -> dict[str, int]:
        """Cut and add ranks now. Returns the ranks by layer."""
        importance = self.importance()
        cut = self._lowest(importance)
        mean = {path: sum(scores) / len(scores) for path, scores in importance.items()}
        takers = sorted((path for path in self.layers if not cut[path]), key=lambda path: -mean[path])
        takers = takers or sorted(self.layers, key=lambda path: -mean[path])
        added = dict.fromkeys(self.layers, 0)
        for i in range(self.moves):
            added[takers[i % len(takers)]] += 1
        devices = {layer.lora_gate.device for layer in self.layers.values() if layer.lora_gate.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(self.seed + (self.round << 20))
            for path, layer in self.layers.items():
                if cut[path] or added[path]:
                    self._ranks.change_(path, [r for r in range(layer.r) if r not in cut[path]], added[path])
        self.round += 1
        note(self.history, self.steps + 1, self._ranks.by_layer())
        self._ranks.write_down()
        return self._ranks.by_layer()

    def _lowest(self, importance: dict[str, list[float]]) -> dict[str, set[int]]:
        """The ranks to cut, by layer: the lowest of all, the first of equal ones, but never a layer's last."""
        cut: dict[str, set[int]] = {path: set() for path in self.layers}
        every = sorted((score, i, r) for i, scores in enumerate(importance.values()) for r, score in enumerate(scores))
        paths, left = list(self.layers), self.moves
        for _, i, r in every:
            if left and len(cut[paths[i]]) + 1 < len(importance[paths[i]]):
                cut[paths[i]].add(r)
                left -= 1
        return cut

    def state_dict(self) -> dict[str, Any]:
        history = copy.deepcopy(self.history)
        return {"steps": self.steps, "round": self.round, "seed": self.seed, "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.round, self.seed = state["steps"], state["round"], state["seed"]
        self.history = copy.deepcopy(state["history"])


def _fill(gates: Iterable[Tensor], value: float) -> None:
    for gate in gates:
        gate.fill_(value)
