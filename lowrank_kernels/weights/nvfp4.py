"""NVFP4: 4 bits an element (e2m1), an e4m3fn scale for 16 of a row, and one number for all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .coded import CodedWeight, Codes, Scales, Stored, check_finite
from .format import register
from .mxfp4 import E2M1_VALUES, check_blocks

_BLOCK = 16


@register
class NVFP4Weight(CodedWeight):
    """W = rn(value(code) · rn(s / global), dtype): K / 16 scales s (e4m3fn) a row; byte i of a row holds elements 2 i
    (low nibble) and 2 i + 1.

    ``global`` divides, as in compressed-tensors (2688 / max|W|); ModelOpt's ``weight_scale_2`` is its reciprocal.
    """

    format = "nvfp4"
    code = Codes.LOW_NIBBLE_FIRST
    scale = Scales.FLOAT8

    @classmethod
    def of_blocks(cls, codes: Tensor, scales: Tensor, global_scale: float, dtype: torch.dtype) -> NVFP4Weight:
        """The weight of bytes (N, K / 2) and scales (N, K / 16), float8_e4m3fn.

        Raises:
            ValueError: bytes and scales that do not fit.
        """
        check_blocks(cls.__name__, codes, scales, _BLOCK)
        shape = torch.Size((scales.shape[0], scales.shape[1] * _BLOCK))
        values = torch.tensor(E2M1_VALUES, device=codes.device)
        given = codes.view(torch.uint8).contiguous(), scales.view(torch.uint8).contiguous(), values
        return cls(shape, dtype, *given, offset=global_scale, block=(1, _BLOCK))

    @classmethod
    def from_module(cls, module: nn.Module) -> NVFP4Weight | None:
        """The weight of a linear that compressed-tensors packed as NVFP4; None for any other module."""
        names = "weight_packed", "weight_scale", "weight_global_scale"
        codes, scales, whole = (module._parameters.get(name) for name in names)
        if codes is None or scales is None or whole is None or scales.dtype != torch.float8_e4m3fn:
            return None
        return cls.of_blocks(codes.detach(), scales.detach(), float(whole), torch.bfloat16)

    @classmethod
    def from_tensors(cls, tensors: Stored, name: str, *, dtype: torch.dtype = torch.bfloat16) -> NVFP4Weight:
        """The weight ``name`` of a compressed-tensors checkpoint (`nvfp4-pack-quantized`): ``NAME_packed`` (N, K / 2)
        uint8, ``NAME_scale`` (N, K / 16) float8_e4m3fn, ``NAME_global_scale`` (1,) float32.

        Raises:
            ValueError: a tensor that is missing, of another size or dtype, or not finite; each by its name.
        """
        codes = cls.stored(tensors, f"{name}_packed", torch.uint8)
        scales = cls.stored(tensors, f"{name}_scale", torch.float8_e4m3fn)
        whole = cls.stored(tensors, f"{name}_global_scale", torch.float32)
        check_finite(cls.__name__, **{f"{name}_scale": scales.float(), f"{name}_global_scale": whole})
        if whole.numel() != 1 or float(whole) == 0.0:
            raise ValueError(f"{cls.__name__}: expected {name}_global_scale of one number but 0, got {whole.tolist()}")
        return cls.of_blocks(codes, scales, float(whole), dtype)
