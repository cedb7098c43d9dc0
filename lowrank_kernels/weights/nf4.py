"""NF4 and FP4, 4 bits an element, as bitsandbytes stores them (0.50.2)."""

from __future__ import annotations

import json
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .coded import DTYPES, CodedWeight, Codes, Stored, check_finite, check_matrix
from .format import register
from .rounding import check_rounding, nearest, stochastic

C = TypeVar("C", bound="_Bitsandbytes4")
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)


class _Bitsandbytes4(CodedWeight):
    """W in 4 bits: byte i of the flattened W holds elements 2 i (high nibble) and 2 i + 1.

    w = rn(value(code) · absmax of its block, dtype); blocks run over row ends. The absmax may be quantised in its turn:
    absmax_i = rn(map[q_i] · nested_i / 256) + offset.
    """

    code = Codes.HIGH_NIBBLE_FIRST
    table: ClassVar[tuple[float, ...]]

    @classmethod
    def from_dense(
        cls: type[C],
        weight: Tensor,
        block_size: int = 64,
        *,
        dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        generator: torch.Generator | None = None,
    ) -> C:
        """W in 4 bits, without double quantisation: of each block, the value nearest to w / absmax.

        Args:
            weight: W (N, K), of a float dtype, finite.
            block_size: elements under one scale, a power of two of at least 32.
            dtype: of the values that it stands for; W's own by default.
            rounding: "nearest", or "stochastic": to one of the two values around, so that the mean is exact.
            generator: of stochastic rounding; torch's own by default.

        Raises:
            ValueError: a block size or a shape that is none, NaN or infinity.
        """
        op = f"{cls.__name__}.from_dense"
        check_matrix(op, weight)
        check_rounding(op, rounding)
        if not isinstance(block_size, int) or block_size < 32 or block_size & (block_size - 1):
            raise ValueError(f"{op}: expected block_size to be a power of two of at least 32, got {block_size!r}")
        flat = weight.detach().reshape(-1).float()
        check_finite(op, weight=flat)
        dtype = dtype or weight.dtype
        if flat.numel() and dtype in DTYPES and float(flat.abs().amax()) > torch.finfo(dtype).max:
            raise ValueError(f"{op}: expected weight to hold numbers that {dtype} has, got a larger one")
        whole = flat.numel() // block_size * block_size
        blocks, rest = flat[:whole].view(-1, block_size), flat[whole:]
        scales = blocks.abs().amax(1) if whole else flat.new_empty(0)
        # A whole block is multiplied by the reciprocal, the short one at the end divided, as bitsandbytes does it.
        scaled = (blocks * (1.0 / scales.clamp(min=1e-38))[:, None]).reshape(-1)
        if rest.numel():
            last = rest.abs().amax().clamp(min=1e-38)
            scales, scaled = torch.cat([scales, last[None]]), torch.cat([scaled, rest / last])
        values = torch.tensor(cls.table, device=weight.device)
        ascending, order = values.sort()
        scaled = scaled.clamp(-1.0, 1.0)
        places = nearest(scaled, ascending) if rounding == "nearest" else stochastic(scaled, ascending, generator)
        codes = order[places].to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, codes.numel() % 2))
        packed = codes[::2] << 4 | codes[1::2]
        return cls(weight.shape, dtype, packed, scales, values, run=block_size)

    def encoded_again(self: C, weight: Tensor, rounding: str) -> C:
        if self.nested is not None:
            raise ValueError(f"{type(self).__name__}: expected scales that are not quantised in their turn")
        return type(self).from_dense(weight, self.run, dtype=self.dtype, rounding=rounding)

    @classmethod
    def from_module(cls: type[C], module: nn.Module) -> C | None:
        """The weight of a ``bitsandbytes.nn.Linear4bit`` of this format; None for any other module.

        Raises:
            ValueError: the weight was laid out anew by an evaluation on a CPU, and cannot be read any more.
        """
        weight = module._parameters.get("weight")
        state = getattr(weight, "quant_state", None)
        if weight is None or state is None or state.quant_type != cls.format:
            return None
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"{cls.__name__}: expected a Linear4bit as it was loaded, got one that bitsandbytes laid out anew for "
                f"evaluation on this CPU, from which there is no way back; load the model again, and adapt it before "
                f"its first call"
            )
        nested = None
        if state.nested:
            nested = state.state2.code.float(), state.state2.absmax.float()
        return cls(
            torch.Size(state.shape),
            state.dtype,
            weight.detach().view(torch.uint8),
            state.absmax,
            state.code.float(),
            nested,
            float(state.offset) if state.nested else 0.0,
            state.blocksize,
            nested_block=state.state2.blocksize if state.nested else 0,
        )

    @classmethod
    def from_tensors(cls: type[C], tensors: Stored, name: str) -> C:
        """The weight ``name`` of a checkpoint, from its tensors by their names there.

        Raises:
            ValueError: a tensor that is missing, of another size or dtype, or NaN; each by its name.
        """
        state = json.loads(bytes(cls.stored(tensors, f"{name}.quant_state.bitsandbytes__{cls.format}").tolist()))
        needed = "shape", "dtype", "blocksize", *(("nested_blocksize",) if "nested_offset" in state else ())
        missing = [key for key in needed if not state.get(key)]
        if missing:
            raise ValueError(f"{cls.__name__}: expected {', '.join(missing)} in the quantisation state of {name}")
        nested, offset = None, 0.0
        if "nested_offset" in state:
            offset = float(state["nested_offset"])
            kept = {f: cls.stored(tensors, f"{name}.{f}").float() for f in ("nested_quant_map", "nested_absmax")}
            check_finite(cls.__name__, **{f"{name}.{f}": t for f, t in kept.items()})
            nested = kept["nested_quant_map"], kept["nested_absmax"]
        scales = cls.stored(tensors, f"{name}.absmax", torch.float32 if nested is None else torch.uint8)
        check_finite(cls.__name__, **{f"{name}.absmax": scales})
        codes, values = cls.stored(tensors, name).view(torch.uint8), cls.stored(tensors, f"{name}.quant_map").float()
        for of, table, size in (("quant_map", values, 16), ("nested_quant_map", nested and nested[0], 256)):
            if table is not None and table.numel() != size:
                raise ValueError(f"{cls.__name__}: expected {name}.{of} of {size} elements, got {tuple(table.shape)}")
        shape, dtype = torch.Size(state["shape"]), getattr(torch, state["dtype"])
        run, nested_block = state["blocksize"], state.get("nested_blocksize", 0)
        try:
            return cls(shape, dtype, codes, scales, values, nested, offset, run, nested_block=nested_block)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


@register
class NF4Weight(_Bitsandbytes4):
    __doc__ = _Bitsandbytes4.__doc__
    format = "nf4"
    table = _NF4


@register
class FP4Weight(_Bitsandbytes4):
    __doc__ = _Bitsandbytes4.__doc__
    format = "fp4"
    table = (*_FP4, *(-v for v in _FP4))
