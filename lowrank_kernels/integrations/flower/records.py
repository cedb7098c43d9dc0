"""Tensors as Flower's records, and how many bytes they are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor


def record_of(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """An ArrayRecord, which has no bfloat16: floats of less than 32 bits go as float32."""
    return ArrayRecord(
        {
            name: Array(np.ascontiguousarray((t.float() if t.is_floating_point() else t).detach().cpu().numpy()))
            for name, t in tensors.items()
        }
    )


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The tensors of a record, writable, and of memory of their own."""
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in record.items()}


def bytes_of(*records: ArrayRecord) -> int:
    """The bytes of all arrays as they are sent, each with NumPy's header of 128."""
    return sum(len(array.data) for record in records for array in record.values())
