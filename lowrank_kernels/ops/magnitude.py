"""``lowrank_kernels::magnitude_histogram``: record, check, plan, backends, fake. Counts, which have no gradient."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cpp import cpp
from ..kernels.target import Target
from ..reference.magnitude import DIGITS, magnitude_histogram_ref
from .library import define
from .operands import backend_error, floats_error
from .planning import Choosing, Plan, Planner


class MagnitudeHistogram(NamedTuple):
    """Arguments of the op; see :func:`lowrank_kernels.magnitude_histogram`."""

    values: Tensor
    digit: int
    leading: int
    backend: str


def check_digits(call: MagnitudeHistogram) -> Exception | None:
    """The error of numbers out of their range; None where there is none."""
    op = "magnitude_histogram"
    for name, value, end in (("digit", call.digit, len(DIGITS)), ("leading", call.leading, None)):
        if end is None:
            end = 1 << (31 - sum(DIGITS[call.digit]))
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < end:
            return ValueError(f"{op}: expected {name} to be an integer from 0 to {end - 1}, got {value!r:.60}")
    return None


def check_magnitude_histogram(call: MagnitudeHistogram) -> Exception | None:
    """The error of operands that do not fit; None where they do."""
    op = "magnitude_histogram"
    return floats_error(op, values=call.values) or backend_error(op, call.backend)


def _decide(call: Any, records: bool, target: Target | None) -> Plan:
    c = Choosing("magnitude_histogram", call.values, target)
    *rows, columns = call.values.shape or (1,)
    settled = c.settled("magnitude_histogram", {"K": columns, "N": prod(rows)})
    backend = c.backend(call.backend, *settled)
    if call.values.empty:
        c.take("backend", "reference", "rule: nothing to count")
    elif backend == "triton":
        c.take("tiles", c.target, "rule: processors of the target", c.target.arch)
    return c.done()


plan_magnitude_histogram = Planner("magnitude_histogram", MagnitudeHistogram, _decide, check_magnitude_histogram)


def _magnitude_histogram(call: MagnitudeHistogram, plan: Plan | None) -> Tensor:
    plan = plan or plan_magnitude_histogram.known(call)
    if plan.backend == "reference":
        return plain_magnitude_histogram(call)
    bits, shift = DIGITS[call.digit]
    values = call.values.contiguous()
    if plan.backend == "triton":
        from ..kernels.magnitude import magnitude_histogram

        return magnitude_histogram(values, bits, shift, call.leading, plan.tiles)
    counts: Tensor = cpp.magnitude_counts(values.view(1, -1), bits, shift, call.leading)
    return counts


def plain_magnitude_histogram(call: MagnitudeHistogram) -> Tensor:
    """The formula as PyTorch's operations."""
    return magnitude_histogram_ref(call.values, digit=call.digit, leading=call.leading)


def _fake(call: MagnitudeHistogram) -> Tensor:
    return call.values.new_empty(1 << DIGITS[call.digit][0], dtype=torch.int64)


call_magnitude_histogram = define("magnitude_histogram", MagnitudeHistogram, None, _magnitude_histogram, _fake)
