"""MXFP4: 4 bits an element (e2m1), a power of two for 32 of a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .coded import CodedWeight, Codes, Scales, Stored, check_finite, check_matrix
from .format import register
from .rounding import check_rounding, stochastic

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
        """The weight of bytes (N, K / 2) or (N, K / 32, 16) and exponents (N, K / 32), uint8.

        Raises:
            ValueError: bytes and exponents that do not fit.
        """
        check_blocks(cls.__name__, codes, scales, _BLOCK)
        scales = scales.view(torch.uint8).contiguous()
        shape = torch.Size((scales.shape[0], scales.shape[1] * _BLOCK))
        values = torch.tensor(E2M1_VALUES, device=codes.device)
        return cls(shape, dtype, codes.view(torch.uint8).contiguous(), scales, values, block=(1, _BLOCK))

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        *,
        dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ) -> MXFP4Weight:
        """W in 4 bits: the exponent of a block's largest |w|, less 2; values to the nearest, halves to the even code.

        What is more than 6 times its scale becomes 6 times it, with either rounding.

        Args:
            weight: W (N, K), of a float dtype, finite.
            dtype: of the values that it stands for; W's own by default.
            rounding: "nearest", or "stochastic": to one of the two values around, so that the mean is exact.
            generator: of stochastic rounding; torch's own by default.

        Raises:
            ValueError: a K that is no multiple of 32, NaN or infinity.
        """
        op = "MXFP4Weight.from_dense"
        check_matrix(op, weight)
        check_rounding(op, rounding)
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
        codes = torch.where((codes != upper) & (codes % 2 == 1), upper, codes)
        if rounding == "stochastic":
            codes = stochastic(size, values, generator)
        codes = (codes + 8 * (scaled < 0)).to(torch.uint8)
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        return cls.of_blocks(packed, (exponents + 127).to(torch.uint8), dtype or weight.dtype)

    def encoded_again(self, weight: Tensor, rounding: str) -> MXFP4Weight:
        return type(self).from_dense(weight, dtype=self.dtype, rounding=rounding)

    @classmethod
    def experts(cls, tensors: Stored, name: str, *, dtype: torch.dtype = torch.bfloat16) -> list[MXFP4Weight]:
        """The weights (N, K) of gpt-oss's experts: ``NAME_blocks`` (E, N, K / 32, 16) and ``NAME_scales`` (E, N, K /
        32), both uint8, as "model.layers.0.mlp.experts.gate_up_proj". They share the tensors' memory.

        transformers' dense form of one is the transpose, (K, N); gate and up are every other row.

        Raises:
            ValueError: a tensor that is missing, or of another shape or dtype; each by its name.
        """
        codes, scales = (cls.stored(tensors, f"{name}_{part}", torch.uint8) for part in ("blocks", "scales"))
        if codes.dim() != 4 or codes.shape != (*scales.shape, _BLOCK // 2):
            raise ValueError(
                f"{cls.__name__}: expected {name}_blocks (E, N, K / 32, 16) and _scales (E, N, K / 32), got "
                f"{tuple(codes.shape)} and {tuple(scales.shape)}"
            )
        return [cls.of_blocks(codes[e], scales[e], dtype) for e in range(len(codes))]

    @classmethod
    def from_module(cls, module: nn.Module) -> MXFP4Weight | None:
        """The weight of a linear that compressed-tensors packed as MXFP4; None for any other module."""
        scheme = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        codes, scales = (module._parameters.get(f"weight_{name}") for name in ("packed", "scale"))
        if scheme is None or codes is None or scales is None or codes.dtype != torch.uint8:
            return None
        if scheme.num_bits != 4 or scheme.group_size != _BLOCK or scales.dtype != torch.uint8:
            return None
        return cls.of_blocks(codes.detach(), scales.detach(), torch.bfloat16)

    @classmethod
    def from_tensors(cls, tensors: Stored, name: str, *, dtype: torch.dtype = torch.bfloat16) -> MXFP4Weight:
        """The weight ``name`` of a compressed-tensors checkpoint (`mxfp4-pack-quantized`): ``NAME_packed`` (N, K / 2)
        and ``NAME_scale`` (N, K / 32), both uint8.

        Raises:
            ValueError: a tensor that is missing, or of another size or dtype; each by its name.
        """
        codes, scales = cls.stored(tensors, f"{name}_packed", torch.uint8), cls.stored(tensors, f"{name}_scale")
        return cls.of_blocks(codes, scales, dtype)


def check_blocks(op: str, codes: Tensor, scales: Tensor, block: int) -> None:
    """Raise for bytes of 4-bit codes and scales of ``block`` of them that are not of the same rows."""
    if scales.dim() != 2 or codes.shape[:1] != scales.shape[:1] or 2 * codes.numel() != block * scales.numel():
        raise ValueError(
            f"{op}: expected codes (N, K / 2) and scales (N, K / {block}), got {tuple(codes.shape)} and "
            f"{tuple(scales.shape)}"
        )
