"""Q8_0 and Q4_K, the records of GGUF files, read as they lie there (gguf 0.19)."""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .coded import CodedWeight, Codes
from .format import register

C = TypeVar("C", bound="_GGUFWeight")


class _GGUFWeight(CodedWeight):
    type_name: ClassVar[str]

    @classmethod
    def of_records(cls: type[C], records: Tensor, in_features: int, dtype: torch.dtype = torch.bfloat16) -> C:
        """The weight of a file's bytes (N, bytes of a row), uint8, which stay where they are.

        Raises:
            ValueError: bytes that do not make rows of K elements, scales that are not finite.
        """
        if records.dtype != torch.uint8 or records.dim() != 2:
            raise ValueError(
                f"{cls.__name__}: expected records as uint8 (N, bytes of a row), got {tuple(records.shape)} "
                f"{records.dtype}"
            )
        made = cls(torch.Size((records.shape[0], in_features)), dtype, records, None, run=32)
        made._check_scales()
        return made

    @classmethod
    def from_checkpoint(
        cls: type[C], file: Any, name: str, *, dtype: torch.dtype = torch.bfloat16, **settings: Any
    ) -> C:
        """The weight ``name`` of a GGUF file, in the file's order of rows. Needs the package gguf.

        llama.cpp's converters store the rows of q and k of Llama-like models in another order, for their own form of
        rotary embedding; a model of transformers needs them turned back.

        Raises:
            ValueError: no such tensor, or one of another type, by its name.
        """
        from gguf import GGUFReader

        found = next((t for t in GGUFReader(file).tensors if t.name == name), None)
        if found is None:
            raise ValueError(f"{cls.__name__}: expected the tensor {name}, which is not there")
        if found.tensor_type.name != cls.type_name:
            raise ValueError(f"{cls.__name__}: expected {name} of type {cls.type_name}, got {found.tensor_type.name}")
        records = torch.from_numpy(found.data.copy())
        return cls.of_records(records.view(-1, records.shape[-1]), int(found.shape[0]), dtype)

    def _check_scales(self) -> None:
        for scales in self._halves():
            if not bool(scales.isfinite().all()):
                raise ValueError(f"{type(self).__name__}: expected scales to be finite numbers, got NaN or infinity")

    def _halves(self) -> tuple[Tensor, ...]:
        raise NotImplementedError


@register
class Q8_0Weight(_GGUFWeight):
    """W = rn(q · d, dtype): records of 34 bytes, d (float16) and 32 q (int8), for 32 elements of a row."""

    format = "q8_0"
    type_name = "Q8_0"
    code = Codes.Q8_0

    def _halves(self) -> tuple[Tensor, ...]:
        return (self.codes.view(-1, 34)[:, :2].contiguous().view(torch.float16),)

    def decode(self, start: int, stop: int) -> Tensor:
        records = self.codes.view(self.shape[0], -1)[start:stop].reshape(-1, 34)
        d = records[:, :2].contiguous().view(torch.float16).float()
        return (records[:, 2:].view(torch.int8).float() * d).to(self.dtype).view(stop - start, -1)


@register
class Q4_KWeight(_GGUFWeight):
    """W = rn(d sc_b · q - m mn_b, dtype), each product and the difference rounded to float32: records of 144 bytes for
    256 elements of a row, d and m (float16), 6 bits of sc and mn for each block b of 32 (12 bytes), 4 bits of q."""

    format = "q4_k"
    type_name = "Q4_K"
    code = Codes.Q4_K

    def _halves(self) -> tuple[Tensor, ...]:
        return (self.codes.view(-1, 144)[:, :4].contiguous().view(torch.float16),)

    def decode(self, start: int, stop: int) -> Tensor:
        records = self.codes.view(self.shape[0], -1)[start:stop].reshape(-1, 144)
        d, m = records[:, :4].contiguous().view(torch.float16).float().unbind(1)
        first, second, third = records[:, 4:16].view(-1, 3, 4).unbind(1)  # of 6 bits each, and 4 and 2 bits
        scales = torch.cat([first & 63, third & 15 | first >> 6 << 4], 1).float() * d[:, None]
        least = torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1).float() * m[:, None]
        pairs = records[:, 16:].view(-1, 4, 32)
        q = torch.stack([pairs & 15, pairs >> 4], 2).view(-1, 8, 32).float()
        return (q * scales[:, :, None] - least[:, :, None]).to(self.dtype).view(stop - start, -1)
