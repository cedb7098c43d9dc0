"""Side by side: what an op costs, what peers cost, and what the floor is. The command is `lrk bench`."""

from .cases import OPS, Bench, Problem
from .run import Row, measure, write_csv
from .timing import Roofs, Sample, interleaved, keep_freed_memory, measure_roofs

__all__ = [
    "OPS",
    "Bench",
    "Problem",
    "Roofs",
    "Row",
    "Sample",
    "interleaved",
    "keep_freed_memory",
    "measure",
    "measure_roofs",
    "write_csv",
]
