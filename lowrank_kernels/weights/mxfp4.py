"""MXFP4: 4 bits an element (e2m1), a power of two for 32 of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from .coded import CodedWeight, Codes, Scales, Stored, check_finite, check_matrix
from .format import register

_BLOCK = 32
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = (*_E2M1, *(-v for v in _E2M1))


@register
class MXFP4Weight(CodedWeight):
    """W = rn(value(code) · 2^(s - 127), dtype): K / 32 exponents s a row; byte i of a row holds elements 2 i (low
    nibble) and 2 i + 1. A scale of 255 is NaN, as the standard has it (transformers 5.23 makes infinity of it).

    Source: Open Compute Project, "OCP Microscaling Formats (MX) Specification" 1.0.
    """

    format = "mxfp4"
    code = Codes.LOW_NIBBLE_FIRST
    scale = Scales.EXPONENT

    @classmethod
    def of_blocks(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> MXFP4Weight:
        """The weight of bytes, 16 a block, and exponents (N, K / 32), uint8: one expert's, for gpt-oss's experts."""
        scales = scales.view(torch.uint8).contiguous()
        shape = torch.Size((scales.shape[0], scales.shape[1] * _BLOCK))
        values = torch.tensor(E2M1_VALUES, device=codes.device)
        return cls(shape, dtype, codes.view(torch.uint8).contiguous(), scales, values, block=(1, _BLOCK))

    @classmethod
    def from_dense(cls, weight: Tensor, *, dtype: torch.dtype | None = None) -> MXFP4Weight:
        """W in 4 bits: the exponent of a block's largest |w|, less 2; values to the nearest, halves to the even code.

        Raises:
            ValueError: a K that is no multiple of 32, NaN or infinity.
        """
        op = "MXFP4Weight.from_dense"
        check_matrix(op, weight)
        check_finite(op, weight=weight)
        n, k = weight.shape
        if k % _BLOCK:
            raise ValueError(f"{op}: expected K to be a multiple of {_BLOCK}, got a weight of shape ({n}, {k})")
        blocks = weight.detach().float().view(n, k // _BLOCK, _BLOCK)
        largest = blocks.abs().amax(2) if blocks.numel() else blocks.new_zeros(n, k // _BLOCK)
        exponents = (torch.frexp(largest)[1] - 3).clamp(-127, 127)  # of 1 <= mantissa < 2, less e2m1's own 2
        scaled = torch.ldexp(blocks, -exponents[:, :, None]).view(n, k)
        size = scaled.abs()
        values = torch.tensor(_E2M1, device=weight.device)
        middles = (values[1:] + values[:-1]) / 2
        # A half goes to the even code: below an even code it goes up, above one down.
        codes = torch.bucketize(size, middles)
        upper = torch.bucketize(size, middles, right=True)
        codes = torch.where((codes != upper) & (codes % 2 == 1), upper, codes) + 8 * (scaled < 0)
        codes = codes.to(torch.uint8)
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        return cls.of_blocks(packed, (exponents + 127).to(torch.uint8), dtype or weight.dtype)

    @classmethod
    def from_tensors(cls, tensors: Stored, name: str, *, dtype: torch.dtype = torch.bfloat16) -> MXFP4Weight:
        """The weight ``name`` of a compressed-tensors checkpoint (`mxfp4-pack-quantized`): ``NAME_packed`` (N, K / 2)
        and ``NAME_scale`` (N, K / 32), both uint8.

        Raises:
            ValueError: a tensor that is missing, or of another size or dtype; each by its name.
        """
        codes, scales = cls.stored(tensors, f"{name}_packed", torch.uint8), cls.stored(tensors, f"{name}_scale")
        return cls.of_blocks(codes, scales, dtype)
