"""The training loop that `lrk train` and `lrk demo` share."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..integrations.transformers import answer_loss
from .docstrings import Example

Batch = dict[str, Tensor]


def encode(tokenizer: Any, examples: list[Example], device: torch.device | str) -> Batch:
    """A left-padded batch; labels cover the targets alone."""
    rows = []
    for example in examples:
        prompt = tokenizer(example.prompt)["input_ids"]
        target = tokenizer(example.target, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append((prompt + target, [-100] * len(prompt) + target))
    length = max(len(ids) for ids, _ in rows)
    columns = {
        "input_ids": [[tokenizer.pad_token_id] * (length - len(ids)) + ids for ids, _ in rows],
        "attention_mask": [[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows],
        "labels": [[-100] * (length - len(ids)) + labels for ids, labels in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


def batches(
    tokenizer: Any, examples: list[Example], size: int, seed: int, device: torch.device | str
) -> Iterator[Batch]:
    """Endless shuffled batches, the same for the same seed."""
    order = random.Random(seed)
    while True:
        shuffled = order.sample(examples, len(examples))
        for start in range(0, len(shuffled) - size + 1, size):
            yield encode(tokenizer, shuffled[start : start + size], device)


@torch.no_grad()
def held_out_loss(model: Any, tokenizer: Any, examples: list[Example], size: int, device: torch.device | str) -> float:
    """Mean loss a target token over the examples, in nats."""
    was_training = model.training
    model.eval()
    total = tokens = 0.0
    by_length = sorted(examples, key=lambda e: len(e.prompt) + len(e.target))
    for start in range(0, len(by_length), size):
        batch = encode(tokenizer, by_length[start : start + size], device)
        count = int((batch["labels"][:, 1:] != -100).sum())
        total += float(answer_loss(model, **batch)) * count
        tokens += count
    model.train(was_training)
    return total / tokens


def cosine_schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then half a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def adamw(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=learning_rate, weight_decay=0.0)


@dataclass
class Run:
    """One model under training, and what was seen of it."""

    name: str
    model: Any
    learning_rate: float
    steps: int
    make_optimizer: Callable[[Any, float], torch.optim.Optimizer] = adamw
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

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
        loss.backward()
        return float(loss.detach())

    def step(self, batch: Batch) -> float:
        """One optimizer step; its loss and its duration are kept."""
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
        """Everything that the next step depends on; with ``base`` the adapted layers' own weights too."""
        kept = {
            name: p.detach().clone()
            for name, p in self.model.named_parameters()
            if p.requires_grad or ".lora_" in name or (base and ".base_layer." in name)
        }
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


_ANYWHERE = ("checkpoint", "stop_after", "save_every", "output", "json", "debug", "given", "held_out", "command")
"""Options that may differ between the parts of one run."""


def _settings(args: Any) -> dict[str, str]:
    return {name: str(value) for name, value in vars(args).items() if name not in _ANYWHERE}


def write_checkpoint(args: Any, state: dict[str, Any]) -> None:
    """Write the run's state aside and rename it, so that the file is never half there."""
    args.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    aside = args.checkpoint.with_name(f".{args.checkpoint.name}.{os.getpid()}")
    try:
        torch.save({"settings": _settings(args), **state}, aside)
        os.replace(aside, args.checkpoint)
    finally:
        aside.unlink(missing_ok=True)


def read_checkpoint(args: Any) -> dict[str, Any] | None:
    """The state in ``--checkpoint``; None where there is none yet.

    Raises:
        ValueError: the file is of a run with other settings, which it names, or is no checkpoint.
    """
    if args.checkpoint is None or not args.checkpoint.exists():
        return None
    try:
        state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
        given = state["settings"]
    except Exception as error:
        raise ValueError(f"--checkpoint: expected {args.checkpoint} to be one of `lrk train`: {error}") from None
    other = [f"{k}={given.get(k)}" for k, v in _settings(args).items() if given.get(k) != v]
    if other:
        raise ValueError(f"--checkpoint: {args.checkpoint} is of a run with {', '.join(other)}; give another file")
    return dict(state)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep what libraries write to file descriptor 2 off the terminal: the profiler reports its own start there."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_allocated(function: Callable[[], object], device: torch.device) -> int:
    """Most bytes that torch's allocator held at one time during a call, beyond those held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with _silent_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held = peak = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@torch.no_grad()
def write_docstrings(model: Any, tokenizer: Any, examples: list[Example], device: torch.device | str) -> list[str]:
    """What the model writes for each prompt, greedily, up to the closing quotes."""
    was_training = model.training
    model.eval()
    inputs = tokenizer([e.prompt for e in examples], return_tensors="pt", padding=True).to(device)
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return [text.split('"""')[0].strip().splitlines()[0] if text.strip() else "" for text in texts]


def environment() -> dict[str, str]:
    """What a figure needs beside it: device, versions, commit, date, command."""
    from ..bench.run import conditions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    threads = str(torch.get_num_threads())
    return {**conditions(device, "lrk " + " ".join(sys.argv[1:])), "threads": threads}
