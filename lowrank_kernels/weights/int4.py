"""INT4 in groups of a row, as compressed-tensors stores it (`pack-quantized`, 0.20)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .coded import CodedWeight, Codes, Stored, check_finite
from .format import register


@register
class Int4Weight(CodedWeight):
    """W = rn((q - z) · s of its group, dtype): q in 4 bits, 8 of a row to a 32-bit word, lowest first; s (N, K / g).

    z is 8 where there are no zero points. A column belongs to group k // g, or to the one that ``g_idx`` says.
    """

    format = "int4"
    code = Codes.LOW_NIBBLE_FIRST

    @classmethod
    def of_groups(
        cls,
        words: Tensor,
        scales: Tensor,
        in_features: int,
        dtype: torch.dtype,
        zero_words: Tensor | None = None,
        g_idx: Tensor | None = None,
    ) -> Int4Weight:
        """The weight of int32 words (N, K / 8), scales (N, K / g) of a float dtype, zero points in words
        (N / 8, K / g) and the groups of columns (K,).

        Codes stay where they are; scales are kept as float32 and zero points as bytes.

        Raises:
            ValueError: a K that is no multiple of 8, or of the number of groups; operands that do not fit.
        """
        if scales.dim() != 2 or words.dim() != 2:
            raise ValueError(
                f"Int4Weight: expected words (N, K / 8) and scales (N, K / g), got {tuple(words.shape)} and "
                f"{tuple(scales.shape)}"
            )
        n, groups = scales.shape
        if in_features % 8 or in_features % max(1, groups):
            raise ValueError(
                f"Int4Weight: expected K to be a multiple of 8 and of {groups} groups, got {in_features}: other widths "
                f"are packed in words that run past a row's end"
            )
        if words.shape != (n, in_features // 8):
            raise ValueError(
                f"Int4Weight: expected words of shape (N, K / 8) = ({n}, {in_features // 8}), got {tuple(words.shape)}"
            )
        zeros = None
        if zero_words is not None:
            if zero_words.shape != (-(-n // 8), groups):
                raise ValueError(
                    f"Int4Weight: expected zero points in words of shape (N / 8, K / g) = ({-(-n // 8)}, {groups}), "
                    f"got {tuple(zero_words.shape)}"
                )
            zeros = nibbles(zero_words.T).T[:n].contiguous()
        values = torch.arange(16.0, device=words.device) - (8.0 if zeros is None else 0.0)
        given = words.contiguous().view(torch.uint8), scales.float().contiguous(), values
        block = (1, in_features // max(1, groups))
        order = None if g_idx is None else column_groups("Int4Weight", g_idx, in_features, groups)
        return cls(torch.Size((n, in_features)), dtype, *given, block=block, zeros=zeros, groups=order)

    @classmethod
    def from_module(cls, module: nn.Module) -> Int4Weight | None:
        """The weight of a linear that compressed-tensors packed in 4 bits; None for any other module.

        Raises:
            ValueError: as :meth:`of_groups`.
        """
        scheme = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        found = {name: getattr(module, f"weight_{name}", None) for name in ("packed", "scale", "zero_point", "g_idx")}
        words, scales = found["packed"], found["scale"]
        if scheme is None or words is None or scales is None or words.dtype != torch.int32 or scheme.num_bits != 4:
            return None
        zeros, order = (None if t is None else t.detach() for t in (found["zero_point"], found["g_idx"]))
        if order is not None and bool((order < 0).any()):  # what it holds until an order is loaded
            order = None
        k = int(module.weight_shape[1])  # type: ignore[index]
        return cls.of_groups(words.detach(), scales.detach(), k, scales.dtype, zeros, order)

    @classmethod
    def from_tensors(cls, tensors: Stored, name: str) -> Int4Weight:
        """The weight ``name`` of a checkpoint: ``NAME_packed`` int32, ``NAME_scale``, ``NAME_shape`` and, where they
        are there, ``NAME_zero_point`` and ``NAME_g_idx``. Its dtype is the scales', in which compressed-tensors
        multiplies.

        Raises:
            ValueError: a tensor that is missing, of another size or dtype, or not finite; each by its name.
        """
        words = cls.stored(tensors, f"{name}_packed", torch.int32)
        scales, shape = cls.stored(tensors, f"{name}_scale"), cls.stored(tensors, f"{name}_shape").tolist()
        check_finite(cls.__name__, **{f"{name}_scale": scales})
        if len(shape) != 2 or scales.dim() != 2:
            raise ValueError(
                f"{cls.__name__}: expected {name}_shape of two numbers and {name}_scale (N, K / g), got {shape} and "
                f"{tuple(scales.shape)}"
            )
        if shape[0] != scales.shape[0]:
            raise ValueError(f"{cls.__name__}: expected {name}_scale of {shape[0]} rows, got {tuple(scales.shape)}")
        zeros, order = (cls.found(tensors, f"{name}_{other}") for other in ("zero_point", "g_idx"))
        return cls.of_groups(words, scales, int(shape[1]), scales.dtype, zeros, order)


def nibbles(words: Tensor) -> Tensor:
    """The codes of int32 words (..., n) as bytes (..., 8 n), the lowest bits first."""
    shifts = torch.arange(0, 32, 4, device=words.device)
    return (words.unsqueeze(-1) >> shifts & 15).to(torch.uint8).flatten(-2)


def column_groups(op: str, g_idx: Tensor, in_features: int, groups: int) -> Tensor | None:
    """The group of each column, int32 (K,); None where they are in order.

    Raises:
        ValueError: another size, or a number that is no group.
    """
    if g_idx.shape != (in_features,):
        raise ValueError(f"{op}: expected g_idx of shape (K,) = ({in_features},), got {tuple(g_idx.shape)}")
    if in_features and (int(g_idx.min()) < 0 or int(g_idx.max()) >= groups):
        raise ValueError(f"{op}: expected g_idx from 0 to {groups - 1}, got {int(g_idx.min())} to {int(g_idx.max())}")
    in_order = torch.arange(in_features, device=g_idx.device) // (in_features // max(1, groups))
    return None if torch.equal(g_idx, in_order.to(g_idx.dtype)) else g_idx.to(torch.int32).contiguous()
