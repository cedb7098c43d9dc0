"""The op families of this package: the one list that ops, benchmarks, tuning, inspection, tests and docs go by.

A family has one name in every folder: ``reference/lora.py``, ``ops/lora.py``, ``kernels/lora.py``,
``bench/cases/lora.py``, ``inspect/lora.py``, ``tests/problems/lora.py``, ``tests/ops/test_lora.py``. Most are found by
that name; where a table must be written by hand, ``tests/package/test_families.py`` fails until the family is in it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One op family.

    Attributes:
        name: of its modules.
        ops: public functions that are measured, tuned and explained: each has a plan by its name.
        beside: the family's other public functions on tensors.
        triton: it has Triton kernels, in ``kernels/<name>.py``.
        cuda_cpp: those of ``ops`` that have a CUDA C++ kernel, which "auto" prefers to Triton's.
    """

    name: str
    ops: tuple[str, ...]
    beside: tuple[str, ...] = ()
    triton: bool = True
    cuda_cpp: tuple[str, ...] = ()


FAMILIES = (
    Family("lora", ops=("lora_linear",), beside=("frozen_linear", "velora_linear")),
    Family(
        "dora",
        ops=("dora_linear", "dora_weight_norm"),
        beside=("dora_column_scale",),
        cuda_cpp=("dora_weight_norm",),
    ),
    Family("merge", ops=("merge_lora_",), beside=("merge_dora_", "unmerge_dora_")),
    Family("importance", ops=("lora_importance",)),
    Family("galore", ops=("galore_adam_",)),
    Family("magnitude", ops=("magnitude_histogram",)),
    Family("block_sparse", ops=("block_sparse_weight_grad",), beside=("block_sparse_linear", "block_adamw_")),
    Family(
        "multi_lora",
        ops=("multi_lora_linear",),
        beside=("stack_column_scale", "experts_linear", "experts_column_scale"),
    ),
    Family("svft", ops=("svft_linear",), beside=("svft_pattern",)),
)

NAMES = tuple(family.name for family in FAMILIES)
WITH_TRITON = tuple(family.name for family in FAMILIES if family.triton)
OPS = tuple(op for family in FAMILIES for op in family.ops)
FUNCTIONS = tuple(name for family in FAMILIES for name in (*family.ops, *family.beside))
CUDA_CPP = tuple(op for family in FAMILIES for op in family.cuda_cpp)


def has_triton(op: str) -> bool:
    """True for an op whose family has Triton kernels, and for names that are of no family."""
    return not any(op in (*family.ops, *family.beside) for family in FAMILIES if not family.triton)
