"""INT4 in groups of a row, without zero points, as compressed-tensors stores it (`pack-quantized`, 0.20)."""

from __future__ import annotations

import torch
from torch import Tensor

from .coded import CodedWeight, Codes, Stored, check_finite
from .format import register


@register
class Int4Weight(CodedWeight):
    """W = rn((q - 8) · s of its group, dtype): q in 4 bits, 8 to a 32-bit word, lowest first; s (N, K / g)."""

    format = "int4"
    code = Codes.LOW_NIBBLE_FIRST

    @classmethod
    def of_groups(cls, words: Tensor, scales: Tensor, in_features: int, dtype: torch.dtype) -> Int4Weight:
        """The weight of int32 words (N, K / 8) and scales (N, K / g) of a float dtype.

        Raises:
            ValueError: a K that is no multiple of 8, or of the number of groups.
        """
        n, groups = scales.shape
        if in_features % 8 or in_features % max(1, groups):
            raise ValueError(
                f"Int4Weight: expected K to be a multiple of 8 and of {groups} groups, got {in_features}: other widths "
                f"are packed in words that run past a row's end"
            )
        values = torch.arange(-8.0, 8.0, device=words.device)
        given = words.contiguous().view(torch.uint8), scales.float().contiguous(), values
        return cls(torch.Size((n, in_features)), dtype, *given, block=(1, in_features // max(1, groups)))

    @classmethod
    def from_tensors(cls, tensors: Stored, name: str) -> Int4Weight:
        """The weight ``name`` of a checkpoint: ``NAME_packed`` int32, ``NAME_scale``, ``NAME_shape``. Its dtype is the
        scales', in which compressed-tensors multiplies.

        Raises:
            ValueError: a tensor that is missing, of another size or dtype, or not finite; each by its name; zero
                points, or an order of columns, which are not read yet.
        """
        for other in (f"{name}_zero_point", f"{name}_g_idx"):
            try:
                cls.stored(tensors, other)
            except ValueError:
                continue
            raise ValueError(f"{cls.__name__}: expected no {other}; symmetric groups in order are read, others are not")
        words = cls.stored(tensors, f"{name}_packed", torch.int32)
        scales, shape = cls.stored(tensors, f"{name}_scale"), cls.stored(tensors, f"{name}_shape").tolist()
        check_finite(cls.__name__, **{f"{name}_scale": scales})
        if shape[0] != scales.shape[0]:
            raise ValueError(f"{cls.__name__}: expected {name}_scale of {shape[0]} rows, got {tuple(scales.shape)}")
        return cls.of_groups(words, scales, int(shape[1]), scales.dtype)
