"""FP8 (e4m3fn) with scales of blocks, of rows, or of the whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .coded import CodedWeight, Codes, Stored, check_finite, check_matrix
from .format import register
from .rounding import check_rounding, stochastic

_LARGEST = 448.0


def check_block(op: str, block: tuple[int, int]) -> None:
    """Raise for what is no (rows, columns)."""
    if len(block) != 2 or not all(isinstance(size, int) and size > 0 for size in block):
        raise ValueError(f"{op}: expected block to be (rows, columns) of at least 1, got {block}")


@register
class FP8Weight(CodedWeight):
    """W = rn(q · s of its block, dtype): q float8_e4m3fn (N, K), s float32, one for ``block`` rows and columns of W.

    Blocks are those of the config; they are never guessed from the number of scales (transformers 5.23 does: 192 rows
    in blocks of 128 it reads as 96 and 96).
    """

    format = "fp8"
    code = Codes.FLOAT8

    @classmethod
    def of_blocks(cls, q: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> FP8Weight:
        """The weight of q (N, K) and its scales (⌈N / rows⌉, ⌈K / columns⌉) of float32, bfloat16 or e8m0; of rows or of
        the whole, in any shape.

        Raises:
            ValueError: a block that is none, q that is no matrix, scales of another grid.
        """
        check_block("FP8Weight", block)
        if q.dim() != 2:
            raise ValueError(f"FP8Weight: expected q of shape (N, K), got {tuple(q.shape)}")
        grid = -(-q.shape[0] // block[0]), -(-q.shape[1] // block[1])
        if 1 not in grid and scales.shape != grid:
            raise ValueError(f"FP8Weight: expected scales of shape {grid}, got {tuple(scales.shape)}")
        exponents = scales.dtype in (torch.uint8, torch.float8_e8m0fnu)
        wide = scales.view(torch.float8_e8m0fnu).float() if exponents else scales.float()
        return cls(q.shape, dtype, q.contiguous(), wide.contiguous(), block=block)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        block: tuple[int, int] = (128, 128),
        *,
        dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ) -> FP8Weight:
        """W in 8 bits: each block over its largest |w| / 448, rounded.

        Args:
            weight: W (N, K), of a float dtype, finite.
            block: (rows, columns) of W under one scale.
            dtype: of the values that it stands for; W's own by default.
            rounding: "nearest", or "stochastic": to one of the two values around, so that the mean is exact.
            generator: of stochastic rounding; torch's own by default.

        Raises:
            ValueError: a shape that is none, NaN or infinity, which the cast would turn into 448.
        """
        op = "FP8Weight.from_dense"
        check_matrix(op, weight)
        check_rounding(op, rounding)
        check_block(op, block)
        check_finite(op, weight=weight)
        (n, k), (rows, columns) = weight.shape, block
        grid = -(-n // rows), -(-k // columns)
        padded = torch.nn.functional.pad(
            weight.detach().float(), (0, grid[1] * columns - k, 0, grid[0] * rows - n)
        ).view(grid[0], rows, grid[1], columns)
        largest = padded.abs().amax((1, 3)) if padded.numel() else padded.new_zeros(grid)
        scales = torch.where(largest == 0, 1.0, (largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny))
        scaled = (padded / scales[:, None, :, None]).clamp(-_LARGEST, _LARGEST)
        if rounding == "stochastic":
            values = torch.arange(127, dtype=torch.uint8, device=weight.device).view(torch.float8_e4m3fn).float()
            scaled = values[stochastic(scaled.abs(), values, generator)].copysign(scaled)
        q = scaled.to(torch.float8_e4m3fn)
        q = q.view(grid[0] * rows, grid[1] * columns)[:n, :k]
        return cls.of_blocks(q, scales, block, dtype or weight.dtype)

    def encoded_again(self, weight: Tensor, rounding: str) -> FP8Weight:
        return type(self).from_dense(weight, self.block, dtype=self.dtype, rounding=rounding)

    @classmethod
    def from_module(cls, module: nn.Module) -> FP8Weight | None:
        """The weight of transformers' ``FP8Linear``, or of a linear that compressed-tensors cast to FP8; None for any
        other module."""
        names = "weight", "weight_scale_inv", "weight_scale"
        weight, inverse, scales = (module._parameters.get(name) for name in names)
        if weight is None or weight.dtype != torch.float8_e4m3fn:
            return None
        n, k = weight.shape
        if inverse is not None:
            rows, columns = getattr(module, "block_size", None) or (n, k)
            return cls.of_blocks(weight.detach(), inverse.detach(), (int(rows), int(columns)), torch.bfloat16)
        scheme = getattr(getattr(module, "quantization_scheme", None), "weights", None)
        if scheme is None or scales is None:
            return None
        block = scheme.block_structure or ((n, k) if scales.numel() == 1 else (1, k))
        return cls.of_blocks(weight.detach(), scales.detach(), tuple(block), scales.dtype)

    @classmethod
    def from_tensors(
        cls, tensors: Stored, name: str, *, block: tuple[int, int] | None = None, dtype: torch.dtype = torch.bfloat16
    ) -> FP8Weight:
        """The weight ``name`` of a checkpoint, from its tensors by their names there.

        Its scales are ``NAME_scale_inv`` of blocks, whose size has to be given, or ``NAME_scale`` of rows or of the
        whole.

        Raises:
            ValueError: a tensor that is missing, of another size or dtype, or NaN; each by its name.
        """
        q = cls.stored(tensors, name, torch.float8_e4m3fn)
        if q.dim() != 2:
            raise ValueError(f"FP8Weight: expected {name} of shape (N, K), got {tuple(q.shape)}")
        n, k = q.shape
        if block is not None:
            scales, of = cls.stored(tensors, f"{name}_scale_inv"), f"{name}_scale_inv"
        else:
            scales, of = cls.stored(tensors, f"{name}_scale"), f"{name}_scale"
            if scales.numel() not in (1, n):
                raise ValueError(f"FP8Weight: expected {of} of 1 or {n} elements, got {tuple(scales.shape)}")
            block = (n, k) if scales.numel() == 1 else (1, k)
        try:
            made = cls.of_blocks(q, scales, block, dtype)
        except ValueError as error:
            raise ValueError(f"{of}: {error}") from error
        assert made.scales is not None
        check_finite("FP8Weight", **{of: made.scales})
        return made
