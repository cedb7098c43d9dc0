"""What a method decided, by layer and step: a plain record that is saved with a run, and drawn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any


class History:
    """One number a layer, noted now and then.

    Args:
        what: what the numbers are, in words.
        every: steps from one entry to the next.
    """

    def __init__(self, what: str, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"History: expected entries every 1 step or more, got {every!r}")
        self.what, self.every = what, every
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []

    def record(self, step: int, values: Callable[[], Mapping[str, float]]) -> None:
        """Note the values that the function returns, if it is time for an entry."""
        if step % self.every == 0:
            self.steps.append(step)
            self.values.append(dict(values()))

    def state_dict(self) -> dict[str, Any]:
        return {"what": self.what, "steps": list(self.steps), "values": copy.deepcopy(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.values = list(state["steps"]), copy.deepcopy(state["values"])
