"""The training loop that `lrk train` and `lrk demo` share."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..integrations.transformers import answer_loss
from ..rider import Rider
from .batches import Batch


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def adamw(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate, weight_decay=0.0)


@dataclass
class Run:
    """A model in training, with its optimizer and schedule, and the loss and seconds of each step."""

    name: str
    model: Any
    learning_rate: float
    steps: int
    make_optimizer: Callable[[Any, float], torch.optim.Optimizer] = adamw
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    rider: Rider | None = None
    """What rides on the optimizer, and may add to the loss; ``losses`` are without that."""

    def __post_init__(self) -> None:
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.make_optimizer(self.model, self.learning_rate)
        warmup = max(1, self.steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: cosine_schedule(step, self.steps, warmup)
        )

    @property
    def trainable(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def forward_backward(self, batch: Batch) -> float:
        self.model.train()
        loss = answer_loss(self.model, **batch)
        extra = None if self.rider is None else self.rider.extra_loss()
        (loss if extra is None else loss + extra).backward()
        return float(loss.detach())

    def step(self, batch: Batch) -> float:
        """Take one optimizer step and return its loss, which is kept with its duration."""
        _synchronize(batch["input_ids"].device)
        start = time.perf_counter()
        loss = self.forward_backward(batch)
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise ValueError(
                f"{self.name}: expected a finite loss and gradient, got {loss} and a norm of {norm} at step "
                f"{len(self.losses) + 1}, which was not taken; lower the learning rate"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        _synchronize(batch["input_ids"].device)
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss)
        return loss

    def median_seconds(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]

    def state(self, base: bool) -> dict[str, Any]:
        """Everything that the next step depends on: what trained at the start, all that layers have beside the modules
        they wrap, and with ``base`` those modules' weights too. What a layer makes of W (``made_of_weight``) is left
        out."""
        trained = set(map(id, self.parameters))
        adapted = {name: module for name, module in self.model.named_modules() if hasattr(module, "base_layer")}
        layers = tuple(f"{name}." for name in adapted)
        made = {f"{name}.{own}" for name, module in adapted.items() for own in getattr(module, "made_of_weight", ())}

        def is_kept(name: str, t: torch.Tensor) -> bool:
            wrapped = ".base_layer." in name
            own = name.startswith(layers) and not wrapped and name not in made
            return id(t) in trained or (base and wrapped) or own

        tensors = itertools.chain(self.model.named_parameters(), self.model.named_buffers())
        kept = {name: t.detach().clone() for name, t in tensors if is_kept(name, t)}
        random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])]
        return {
            "parameters": kept,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses,
            "seconds": self.seconds,
            "random": random,
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state`, bit for bit."""
        unknown = self.model.load_state_dict(state["parameters"], strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"{self.name}: expected a state of this model, got one with {', '.join(unknown[:3])}")
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses, self.seconds = state["losses"], state["seconds"]
        torch.set_rng_state(state["random"][0])
        if state["random"][1:]:
            torch.cuda.set_rng_state_all(state["random"][1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
