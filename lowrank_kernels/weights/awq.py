"""AWQ in 4 bits, as AutoAWQ stores it for its GEMM kernels: words of 8 rows (0.2.9)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .coded import CodedWeight, Codes, Stored
from .format import register
from .gptq import check_matrices, check_words
from .int4 import nibbles

_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of a word in which a row lies


@register
class AWQWeight(CodedWeight):
    """W = rn((q - z) · s of its group, dtype): q in 4 bits, 8 rows of a column to an int32 (K, N / 8), in the order
    0, 2, 4, 6, 1, 3, 5, 7; s (K / g, N); z like q, (K / g, N / 8).

    Source: J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2024.
    """

    format = "awq"
    code = Codes.WORDS_ACROSS

    @classmethod
    def of_words(cls, qweight: Tensor, qzeros: Tensor, scales: Tensor) -> AWQWeight:
        """The weight of a checkpoint's three tensors. qweight stays where it is; scales are kept as float32 and zero
        points as bytes: 5 bytes a group of a row.

        Raises:
            ValueError: tensors that do not fit, scales that are not finite.
        """
        check_matrices(cls.__name__, qweight=qweight, qzeros=qzeros, scales=scales)
        k, n, groups = qweight.shape[0], qweight.shape[1] * 8, scales.shape[0]
        check_words(cls.__name__, qweight, qzeros, scales, (n, k))
        zeros = nibbles(qzeros).view(groups, n // 8, 8)[..., list(_ORDER)].reshape(groups, n)
        wide = scales.float().contiguous()
        return cls(torch.Size((n, k)), scales.dtype, qweight, wide, block=(1, k // groups), zeros=zeros)

    @classmethod
    def from_module(cls, module: nn.Module) -> AWQWeight | None:
        """The weight of a ``WQLinear_GEMM`` of AutoAWQ, or of a like linear of GPTQModel; None for any other module.

        Raises:
            ValueError: tensors of another layout (GEMV, exllama, Marlin), which their shapes give away.
        """
        names = "qweight", "qzeros", "scales"
        found = [t.detach() for name in names if isinstance(t := getattr(module, name, None), Tensor)]
        bits = getattr(module, "w_bit", getattr(module, "bits", None))
        if len(found) != len(names) or bits != 4 or isinstance(getattr(module, "g_idx", None), Tensor):  # GPTQ's own
            return None
        qweight, qzeros, scales = found
        features = getattr(module, "in_features", None), getattr(module, "out_features", None)
        if (qweight.shape[0], qweight.shape[1] * 8) != features:
            raise ValueError(
                f"{cls.__name__}: expected qweight of shape (K, N / 8) for (K, N) = {features}, got "
                f"{tuple(qweight.shape)}: only the layout of AutoAWQ's GEMM kernels is read"
            )
        return cls.of_words(qweight, qzeros, scales)

    @classmethod
    def from_tensors(cls, tensors: Stored, name: str) -> AWQWeight:
        """The weight of the linear ``name`` of a checkpoint: its qweight, qzeros and scales.

        Raises:
            ValueError: a tensor that is missing, of another size or dtype, or not finite; each by its name.
        """
        qweight, qzeros = (cls.stored(tensors, f"{name}.{part}", torch.int32) for part in ("qweight", "qzeros"))
        try:
            return cls.of_words(qweight, qzeros, cls.stored(tensors, f"{name}.scales"))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
