"""GPTQ in 4 bits, as GPTQModel and AutoGPTQ store it: words of 8 elements of a row (GPTQModel 7.7.0)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .coded import CodedWeight, Codes, Stored, check_finite
from .format import register
from .int4 import column_groups, nibbles


@register
class GPTQWeight(CodedWeight):
    """W = rn((q - z) · s of its group, dtype): q in 4 bits, 8 of a row to an int32 (K / 8, N), lowest first; s
    (G, N); z in 4 bits (G, N / 8).

    A column belongs to group k // (K / G), or with an activation order to the one that ``g_idx`` says.
    ``checkpoint_format`` "gptq" (v1) holds the words of z less 0x11111111, as whole numbers of 32 bits; "gptq_v2" holds
    them as they are.

    Source: E. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    2023.
    """

    format = "gptq"
    code = Codes.WORDS_DOWN

    @classmethod
    def of_words(
        cls, qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, checkpoint_format: str
    ) -> GPTQWeight:
        """The weight of a checkpoint's four tensors. qweight stays where it is; scales are kept as float32 and zero
        points as bytes: 5 bytes a group of a row.

        Raises:
            ValueError: a format that is neither "gptq" nor "gptq_v2", tensors that do not fit, scales that are not
                finite.
        """
        op = cls.__name__
        if checkpoint_format not in ("gptq", "gptq_v2"):
            raise ValueError(f"{op}: expected checkpoint_format 'gptq' or 'gptq_v2', got {checkpoint_format!r}")
        check_matrices(op, qweight=qweight, qzeros=qzeros, scales=scales)
        k, n, groups = qweight.shape[0] * 8, qweight.shape[1], scales.shape[0]
        check_words(op, qweight, qzeros, scales, (n, k))
        words = qzeros + 0x11111111 if checkpoint_format == "gptq" else qzeros  # wraps, as it was made
        order = None if g_idx is None else column_groups(op, g_idx, k, groups)
        return cls(
            torch.Size((n, k)),
            scales.dtype,
            qweight,
            scales.float().contiguous(),
            block=(1, k // groups),
            zeros=nibbles(words),
            groups=order,
        )

    @classmethod
    def from_module(cls, module: nn.Module) -> GPTQWeight | None:
        """The weight of a linear of GPTQModel or AutoGPTQ in 4 bits; None for any other module.

        A module that has no ``qzero_format`` is taken for "gptq", the only one that AutoGPTQ wrote.

        Raises:
            ValueError: the module holds other bits, or laid its words out anew for its own kernel.
        """
        names = "qweight", "qzeros", "scales", "g_idx"
        found = [t.detach() for name in names if isinstance(t := getattr(module, name, None), Tensor)]
        if len(found) != len(names) or not hasattr(module, "bits"):
            return None
        qweight, qzeros, scales, g_idx = found
        if module.bits != 4:
            raise ValueError(f"{cls.__name__}: expected 4 bits, got a linear of {module.bits}")
        features = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if None not in features and (qweight.shape[0] * 8, qweight.shape[1]) != features:
            raise ValueError(
                f"{cls.__name__}: expected qweight of shape (K / 8, N) for (K, N) = {features}, got "
                f"{tuple(qweight.shape)}: a kernel of its own has laid it out anew; load the model with its backend "
                f"'torch'"
            )
        zero_format: Any = getattr(module, "qzero_format", lambda: 1)
        return cls.of_words(qweight, qzeros, scales, g_idx, "gptq" if zero_format() == 1 else "gptq_v2")

    @classmethod
    def from_tensors(cls, tensors: Stored, name: str, *, checkpoint_format: str) -> GPTQWeight:
        """The weight of the linear ``name`` of a checkpoint: its qweight, qzeros, scales and, where it is there, g_idx.

        Args:
            checkpoint_format: "gptq" or "gptq_v2", as the config's ``checkpoint_format`` says: the tensors do not.

        Raises:
            ValueError: a tensor that is missing, of another size or dtype, or not finite; each by its name.
        """
        qweight, qzeros = (cls.stored(tensors, f"{name}.{part}", torch.int32) for part in ("qweight", "qzeros"))
        scales, g_idx = cls.stored(tensors, f"{name}.scales"), cls.found(tensors, f"{name}.g_idx")
        try:
            return cls.of_words(qweight, qzeros, scales, g_idx, checkpoint_format)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def check_words(op: str, qweight: Tensor, qzeros: Tensor, scales: Tensor, shape: tuple[int, int]) -> None:
    """Raise for words that do not make a weight of ``shape`` (N, K) in groups."""
    n, k = shape
    groups = scales.shape[0]
    if scales.dim() != 2 or scales.shape[1] != n or not groups or k % groups or not scales.is_floating_point():
        raise ValueError(
            f"{op}: expected scales of shape (G, N), of a float dtype, with N = {n} and a G that divides K = {k}, got "
            f"{tuple(scales.shape)} {scales.dtype}"
        )
    if qweight.dtype != torch.int32 or qzeros.dtype != torch.int32 or qzeros.shape != (groups, n // 8) or n % 8:
        raise ValueError(
            f"{op}: expected int32 qzeros of shape (G, N / 8) = ({groups}, {n / 8:g}), got "
            f"{tuple(qzeros.shape)} {qzeros.dtype} beside qweight {qweight.dtype}"
        )
    check_finite(op, scales=scales)


def check_matrices(op: str, **tensors: Tensor) -> None:
    """Raise for a tensor that is no matrix."""
    for name, tensor in tensors.items():
        if tensor.dim() != 2:
            raise ValueError(f"{op}: expected {name} to be a matrix, got shape {tuple(tensor.shape)}")
