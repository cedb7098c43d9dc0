"""``Rider``: goes along with a torch optimizer, acts around its steps, and is saved in its state."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor


class Rider:
    """Acts before and after every step that an optimizer takes, and keeps its state in the optimizer's.

    It needs no call in the training loop: it hooks into ``optimizer.step()``, ``state_dict()`` and
    ``load_state_dict()``. Its state is in the first parameter group of the optimizer's, under ``key``, so that whatever
    saves and restores the optimizer resumes the rider; also where the optimizer was loaded before the rider was made.

    A step that a GradScaler made a fused optimizer skip does not count: neither ``before_step`` nor ``after_step`` is
    called. Riders of different keys may ride on one optimizer, and act in the order in which they got on.

    A subclass has a ``key``, and overrides what it needs of ``before_step``, ``restore``, ``after_step``,
    ``state_dict``, ``check_state`` and ``load_state_dict``. Its ``__init__`` calls this one, and at its end ``attach``.
    All of them run in the caller's grad mode, which during a step is mostly on.

    Args:
        optimizer: the one that steps: not another's wrapper, and not LBFGS, whose history is of all parameters at once.
        name: who an error is of.

    Raises:
        TypeError: no torch optimizer, or a wrapper of one.
        ValueError: LBFGS; an optimizer that has a rider of this key.
    """

    key: ClassVar[str]
    """What kind of rider it is, in a word, and where its state is."""
    reads_gradients: ClassVar[bool] = False
    """``before_step`` looks at gradients: where ``step`` is given a closure, it is called after that, not before."""
    history: dict[str, Any] | None = None
    """What it decided, for a picture: {"what": str, "steps": [...], "modules": [...], "values": [[...]]}. A step, the
    first that a decision was true of, has a row of values, and a module a column."""

    def __init__(self, optimizer: torch.optim.Optimizer, name: str) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{name}: expected optimizer to be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            raise TypeError(
                f"{name}: expected optimizer to be the one that steps, got a {type(optimizer).__name__} around it; "
                f"pass its .optimizer"
            )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                f"{name}: expected an optimizer with a state of its own for each parameter, got LBFGS, whose history "
                f"is of all together; use AdamW"
            )
        if hasattr(optimizer, self._place):
            article = "an" if self.key[0] in "aeiou" else "a"
            raise ValueError(
                f"{name}: expected an optimizer without {article} {self.key}, got one that has one; call its detach()"
            )
        self.optimizer = optimizer
        self._name = name
        self._loaded: dict[str, Any] | None = None
        self._skipped = False
        self._detach: list[Callable[[], None]] = []

    @property
    def _place(self) -> str:
        """The attribute of an optimizer that holds the rider."""
        return f"_lowrank_{self.key}"

    def before_step(self) -> None:
        """Called before a step that will be taken."""

    def restore(self) -> None:
        """Put back what ``before_step`` changed for this step alone. Called after every step, also one that raised."""

    def after_step(self) -> None:
        """Called after a step that was taken, and after ``restore``."""

    def extra_loss(self) -> Tensor | None:
        """What is added to the loss of the batch that the model has just seen; None: nothing. A training loop asks."""
        return None

    def finish(self) -> None:
        """Bring the model into the form in which it is saved when training is over: merge, or cut, what is pending."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the model's and the optimizer's states, as ``torch.save`` takes it."""
        return {}

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise ValueError for a state that does not fit; nothing has been loaded then."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a :meth:`state_dict`. Load the model's and the optimizer's states separately."""
        self.check_state(state)

    def found_state(self) -> dict[str, Any] | None:
        """The state that an optimizer brought which was loaded before the rider was made, checked; None without one."""
        state = self.optimizer.param_groups[0].get(self.key)
        if state is not None:
            self.check_state(state)
        return state

    def attach(self) -> bool:
        """Hook into the optimizer, and go on from ``found_state``. Returns whether there was one."""
        optimizer, found = self.optimizer, self.found_state()
        optimizer.param_groups[0].pop(self.key, None)
        handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save_into),
            optimizer.register_load_state_dict_pre_hook(self._take_from),
            optimizer.register_load_state_dict_post_hook(self._load_taken),
        ]
        setattr(optimizer, self._place, self)
        self._detach += [handle.remove for handle in handles] + [lambda: delattr(optimizer, self._place)]
        if type(self).restore is not Rider.restore:
            # Hooks do not see a step that raises, which has to leave everything as it was all the same.
            step = optimizer.step

            @functools.wraps(step)
            def restoring(_: Any, *args: Any, **kwargs: Any) -> Any:
                try:
                    return step(*args, **kwargs)
                finally:
                    self.restore()

            optimizer.step = types.MethodType(restoring, optimizer)  # type: ignore[method-assign]
        if found is not None:
            self.load_state_dict(found)
        return found is not None

    def detach(self) -> None:
        """Take the rider off the optimizer: later steps are the optimizer's alone."""
        while self._detach:
            self._detach.pop()()

    def gradient_scale(self) -> Tensor | float:
        """What gradients of a loss that is minimised are multiplied by to be those here: a fused optimizer under a
        GradScaler takes that out by itself, and one that maximises steps against it."""
        scale = getattr(self.optimizer, "grad_scale", None)
        sign = -1.0 if self.optimizer.param_groups[0].get("maximize") else 1.0
        return sign if scale is None else sign * scale

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        self.restore()
        # A GradScaler lets a fused optimizer see for itself that gradients are not finite, and step nothing.
        found_inf = getattr(optimizer, "found_inf", None)
        self._skipped = found_inf is not None and bool(found_inf)
        if self._skipped:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None or not self.reads_gradients:
            self.before_step()
            return None

        def closure_and_rider() -> Any:
            loss = closure()
            self.before_step()
            return loss

        return (args[0], closure_and_rider, *args[2:]), {k: v for k, v in kwargs.items() if k != "closure"}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.restore()
        if not self._skipped:
            self.after_step()

    def _save_into(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        first, *others = state["param_groups"]
        return {**state, "param_groups": [{**first, self.key: self.state_dict()}, *others]}

    def _take_from(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        first, *others = state["param_groups"]
        self._loaded = state.get(self.key, first.get(self.key))  # beside the groups, as older versions wrote it
        if self._loaded is not None:
            self.check_state(self._loaded)
        return {**state, "param_groups": [{k: v for k, v in first.items() if k != self.key}, *others]}

    def _load_taken(self, optimizer: torch.optim.Optimizer) -> None:
        if self._loaded is not None:
            self.load_state_dict(self._loaded)
            self._loaded = None


def history_of(what: str, modules: Iterable[str]) -> dict[str, Any]:
    """An empty ``Rider.history`` of one number a module."""
    return {"what": what, "steps": [], "modules": list(modules), "values": []}


def note(history: dict[str, Any], step: int, values: Mapping[str, float]) -> None:
    """Add what is true from a step on; nothing where that step has an entry, or nothing has changed."""
    row = [values[path] for path in history["modules"]]
    if not history["steps"] or (history["steps"][-1] < step and history["values"][-1] != row):
        history["steps"].append(step)
        history["values"].append(row)


def check_integer(op: str, option: str, value: Any, least: int) -> None:
    """Raise ValueError for what is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{op}: expected {option} to be an integer of at least {least}, got {value!r}")
