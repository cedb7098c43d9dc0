"""Weights of few bits: codes, and scales of blocks of them, read where they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .. import _extension
from ..cpp import cpp
from ..finite import all_finite
from .dense import adjacent
from .format import FrozenWeight

C = TypeVar("C", bound="CodedWeight")

# Numbers that the extension knows: csrc/cpu/coded.h.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHUNK = 1 << 20  # elements that PyTorch decodes at a time


class Codes(IntEnum):
    """Where the code of an element lies.

    In a nibble of a byte that two share, or in a byte; in an int32 of 8 elements of a row (K / 8, N), lowest first, or
    of 8 rows (K, N / 8), in the order 0, 2, 4, 6, 1, 3, 5, 7; in a record of a GGUF file, beside its scale.
    """

    HIGH_NIBBLE_FIRST, LOW_NIBBLE_FIRST, INT8, FLOAT8, WORDS_DOWN, WORDS_ACROSS, Q8_0, Q4_K = range(8)

    @property
    def item(self) -> int:
        """Bytes of an item of the codes."""
        return 4 if self in (Codes.WORDS_DOWN, Codes.WORDS_ACROSS) else 1

    def items(self, size: int) -> int:
        """Items that hold the codes of ``size`` elements."""
        elements, bytes_ = _RECORDS.get(self, (2, 1) if self in _NIBBLES else (1, 1))
        return -(-size // elements) * bytes_ // self.item

    @property
    def step(self) -> int:
        """Elements of a row that only come together."""
        return 8 if self.item == 4 else _RECORDS.get(self, (1, 1))[0]


_NIBBLES = (Codes.HIGH_NIBBLE_FIRST, Codes.LOW_NIBBLE_FIRST, Codes.WORDS_DOWN, Codes.WORDS_ACROSS)
_RECORDS = {Codes.Q8_0: (32, 34), Codes.Q4_K: (256, 144)}  # elements, bytes


class Scales(IntEnum):
    """What a scale is stored as: float32; a byte of a double quantisation; an exponent (e8m0); e4m3fn over a number."""

    FLOAT32, NESTED, EXPONENT, FLOAT8 = range(4)


@dataclass(eq=False)
class CodedWeight(FrozenWeight):
    """W (N, K) of elements rn((value(code) - zero) · scale of its block, dtype), computed in float32.

    Attributes:
        codes: as ``code`` says, of any shape; contiguous.
        scales: one element a block, contiguous; of codes in words, (blocks, N); of records, None.
        values: of the 16 codes, float32; None where codes are numbers themselves.
        nested: of a double quantisation: its map (256,) and its scales, float32.
        offset: of a double quantisation: what is added; of FLOAT8 scales: what divides.
        run: elements of the flattened W under one scale; 0 for blocks of ``block`` = (rows, columns) of W.
        nested_block: scales under one scale.
        zeros: uint8, of the shape of the scales, which codes in words need; None for zero.
        groups: int32 (K,), the block of each column, where they are out of order; None where k is in block
            k // columns.

    On a CPU, the extension decodes it as it multiplies: no dense copy of W, or of a part of it beyond some KiB a
    thread, is made for a product. On a GPU a Triton kernel decodes tiles in registers. PyTorch decodes rows elsewhere.
    """

    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor
    scales: Tensor | None
    values: Tensor | None = None
    nested: tuple[Tensor, Tensor] | None = None
    offset: float = 0.0
    run: int = 0
    block: tuple[int, int] = (1, 1)
    nested_block: int = 0
    zeros: Tensor | None = None
    groups: Tensor | None = None

    code: ClassVar[Codes]
    scale: ClassVar[Scales] = Scales.FLOAT32

    def __post_init__(self) -> None:
        n, k = self.shape
        kind, size = type(self).__name__, n * k
        blocks = -(-size // self.run) if self.run else -(-n // self.block[0]) * -(-k // self.block[1])
        if self.dtype not in DTYPES:
            raise TypeError(f"{kind}: expected dtype to be float32, bfloat16 or float16, got {self.dtype}")
        if k % self.code.step or (self.code.item == 4 and n % 8):
            both = "N and K" if self.code.item == 4 else "K"
            raise ValueError(f"{kind}: expected {both} to be a multiple of {self.code.step}, got ({n}, {k})")
        if self.code.item == 4 and self.zeros is None:
            raise ValueError(f"{kind}: expected zero points for codes in words, got none")
        counts = {"codes": self.code.items(size), "scales": blocks, "zeros": blocks, "groups": k}
        for name, count in counts.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.numel() != count:
                raise ValueError(
                    f"{kind}: expected {name} of {count} elements for a weight of shape ({n}, {k}), "
                    f"got {tuple(tensor.shape)}"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"{kind}: expected {name} to be contiguous, got strides {tensor.stride()}")
        if self.nested is not None and self.nested[1].numel() != -(-blocks // self.nested_block):
            raise ValueError(
                f"{kind}: expected {-(-blocks // self.nested_block)} scales of scales for {blocks} scales in blocks of "
                f"{self.nested_block}, got {tuple(self.nested[1].shape)}"
            )

    @property
    def scale_kind(self) -> Scales:
        return Scales.NESTED if self.nested is not None else self.scale

    def parts(self) -> Sequence[Tensor]:
        found = self.codes, self.scales, self.values, *(self.nested or ()), self.zeros, self.groups
        return [t for t in found if t is not None]

    @property
    def _numbers(self) -> list[int]:
        there = int(self.zeros is not None), int(self.groups is not None)
        return [DTYPES.index(self.dtype), *self.shape, self.run, *self.block, self.nested_block, *there]

    def settings(self) -> str:
        return " ".join(map(str, (*self._numbers, self.offset.hex())))

    @classmethod
    def from_parts(cls, parts: Sequence[Tensor], settings: str) -> CodedWeight:
        fields, has_zeros, has_groups = _fields_of(settings)
        rest = list(parts)
        groups = rest.pop() if has_groups else None
        zeros = rest.pop() if has_zeros else None
        codes, scales, values, table, nested = rest + [None] * (5 - len(rest))
        made = object.__new__(cls)  # of parts that were checked when they first came together
        made.__dict__.update(fields, codes=codes, scales=scales, values=values, zeros=zeros, groups=groups)
        made.nested = None if table is None or nested is None else (table, nested)
        return made

    def to(self, dtype: torch.dtype) -> CodedWeight:
        """The same codes, of values that are rounded to ``dtype``."""
        return self if dtype is self.dtype else replace(self, dtype=dtype)

    @property
    def extension_reads(self) -> bool:
        """True where the extension multiplies by it."""
        return self.codes.device.type == "cpu" and _extension.has_op("lora_linear_coded")

    def arguments(self) -> tuple[list[Tensor], list[int], float]:
        """The weight as ops of the extension take it."""
        return list(self.parts()), [int(self.code), int(self.scale_kind), *self._numbers], self.offset

    def encoded_again(self: C, weight: Tensor, rounding: str) -> C:
        """Another W (N, K) in this one's format, blocks and dtype.

        Raises:
            ValueError: the format has no encoder.
        """
        raise ValueError(f"{type(self).__name__}: expected a format with an encoder of this package")

    def dense(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        if self.extension_reads:
            found: Tensor = cpp.coded_rows(*self.arguments(), start, stop)
            return found
        out = self.codes.new_empty(stop - start, self.shape[1], dtype=self.dtype)
        step = max(1, _CHUNK // max(1, self.shape[1]))
        for first in range(start, stop, step):
            last = min(stop, first + step)
            out[first - start : last - start] = self.decode(first, last)
        return out

    def decode(self, start: int, stop: int) -> Tensor:
        """Rows of W by PyTorch: the formula, which the extension computes too."""
        n, k = self.shape
        flat = torch.arange(start * k, stop * k, device=self.codes.device)
        row, column = flat // k, flat % k
        codes = self.codes.reshape(-1)
        if self.code == Codes.WORDS_DOWN:
            value = (codes[column // 8 * n + row] >> column % 8 * 4 & 15).float()
        elif self.code == Codes.WORDS_ACROSS:
            order = row % 8 // 2 + row % 2 * 4
            value = (codes[column * (n // 8) + row // 8] >> order * 4 & 15).float()
        elif self.values is not None:
            byte = codes.view(torch.uint8)[flat // 2]
            high = (flat % 2 == 0) == (self.code == Codes.HIGH_NIBBLE_FIRST)
            value = self.values[torch.where(high, byte >> 4, byte & 15).long()]
        else:
            value = codes[flat].float()
        if self.run:
            place = flat // self.run
        else:
            block = column // self.block[1] if self.groups is None else self.groups.long()[column]
            if self.code.item == 4:
                place = block * n + row
            else:
                place = row // self.block[0] * -(-k // self.block[1]) + block
        if self.zeros is not None:
            value = value - self.zeros.reshape(-1)[place]
        return (value * self.scale_values(place)).to(self.dtype).view(stop - start, k)

    def scale_values(self, place: Tensor) -> Tensor:
        """The scales of some blocks in float32."""
        assert self.scales is not None
        scales = self.scales.reshape(-1)[place]
        if self.nested is not None:
            table, nested = self.nested
            return table[scales.long()] * nested[place // self.nested_block] + self.offset
        if self.scale == Scales.EXPONENT:
            return scales.view(torch.float8_e8m0fnu).float()
        if self.scale == Scales.FLOAT8:
            return scales.view(torch.float8_e4m3fn).float() / self.offset
        return scales

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
        if self._triton_multiplies(x):
            from ..kernels.coded import coded_product

            y = coded_product(adjacent(rows), self.operand(), bias)
        elif self.extension_reads and x.dtype != torch.float64:
            y = cpp.frozen_product_coded(adjacent(rows), *self.arguments(), bias)
        else:
            return super().product(x, bias)
        return y.view(*x.shape[:-1], self.shape[0])

    def grad_product(self, grad_y: Tensor) -> Tensor:
        rows = grad_y.reshape(grad_y.shape[:-1].numel(), grad_y.shape[-1])
        if self._triton_multiplies(grad_y):
            from ..kernels.coded import coded_product

            x = coded_product(adjacent(rows), self.operand(), None, grad=True)
        elif self.extension_reads and grad_y.dtype != torch.float64:
            no_q, no_a = rows.new_empty(rows.shape[0], 0), rows.new_empty(0, self.shape[1])
            x = cpp.lora_grad_x_coded(adjacent(rows), no_q, *self.arguments(), no_a, None, 0.0, None, 0.0, None)
        else:
            return super().grad_product(grad_y)
        return x.view(*grad_y.shape[:-1], self.shape[1])

    def operand(self) -> Any:
        """The weight as the Triton kernels take it."""
        from ..kernels.coded import CodedOperand

        kinds = int(self.code), int(self.scale_kind)
        tensors, (n, k) = (self.codes, self.scales, self.values, self.nested, self.zeros, self.groups), self.shape
        return CodedOperand(*tensors, (n, k), *kinds, self.offset, self.run, self.block, self.nested_block)

    def _triton_multiplies(self, rows: Tensor) -> bool:
        return rows.is_cuda and rows.dtype in DTYPES and 0 not in (*self.shape, rows.numel())

    @classmethod
    def from_checkpoint(cls: type[C], file: Any, name: str, **settings: Any) -> C:
        """The weight ``name`` of a safetensors file: ``from_tensors`` of the format. Needs safetensors."""
        from safetensors import safe_open

        with safe_open(file, "pt") as opened:
            made: C = cls.from_tensors(opened.get_tensor, name, **settings)  # type: ignore[attr-defined]
        return made

    @classmethod
    def stored(cls, tensors: Stored, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of a checkpoint by its name there.

        Raises:
            ValueError: it is missing, or of another dtype; by its name.
        """
        try:
            found = tensors[name] if isinstance(tensors, Mapping) else tensors(name)
        except Exception as error:
            raise ValueError(f"{cls.__name__}: expected the tensor {name}, which is not there") from error
        if dtype is not None and found.dtype != dtype:
            raise ValueError(f"{cls.__name__}: expected {name} of dtype {dtype}, got {found.dtype}")
        return found

    @classmethod
    def found(cls, tensors: Stored, name: str) -> Tensor | None:
        """A tensor of a checkpoint by its name there; None where it is missing."""
        try:
            return cls.stored(tensors, name)
        except ValueError:
            return None


_FIELDS: dict[str, tuple[dict[str, Any], int, int]] = {}  # of the settings seen


def _fields_of(settings: str) -> tuple[dict[str, Any], int, int]:
    """(fields but the tensors, whether there are zero points, and groups) of what ``settings`` wrote."""
    known = _FIELDS.get(settings)
    if known is not None:
        return known
    *numbers, offset = settings.split(" ")
    dtype, n, k, run, rows, columns, nested_block, has_zeros, has_groups = map(int, numbers)
    fields = {"shape": torch.Size((n, k)), "dtype": DTYPES[dtype], "offset": float.fromhex(offset), "run": run}
    found = {**fields, "block": (rows, columns), "nested_block": nested_block}, has_zeros, has_groups
    if len(_FIELDS) < 4096:
        _FIELDS[settings] = found
    return found


Stored = Callable[[str], Tensor] | Mapping[str, Tensor]
"""The tensors of a checkpoint by their names."""


def check_matrix(op: str, weight: Tensor) -> None:
    """Raise for what is no matrix of floats."""
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"{op}: expected weight of shape (N, K) and a float dtype, got {got}")


def check_finite(op: str, **tensors: Tensor) -> None:
    """Raise for a tensor that holds what is no finite number, which a cast to few bits would hide."""
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ValueError(f"{op}: expected {name} to hold finite numbers, got NaN or infinity")
