"""``LoRAEmbedding`` and ``DoRAEmbedding``: a frozen nn.Embedding and its trained low-rank correction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..init.factors import init_factors_
from .base_only import runs_base_alone
from .dora import DoRALayer
from .frozen import why_not_plain
from .lora import TRAIN, LoRALayer
from .matrix import matrix_shape


class LoRAEmbedding(LoRALayer):
    """y = E[ids] + s A[:, ids]ᵀ Bᵀ: the rows of Eᵀ + s B A, where E is the embedding's weight.

    Parameters, named as in a file of PEFT's: ``base_layer.weight`` (num_embeddings, embedding_dim), that of the wrapped
    embedding, frozen and not copied; ``lora_embedding_A`` (R, num_embeddings); ``lora_embedding_B`` (embedding_dim, R).

    Args:
        base_layer: a plain nn.Embedding of float32, bfloat16, float16 or float64. ``padding_idx`` and
            ``scale_grad_by_freq`` hold for A as they do for the embedding: the padding's column gets no gradient.
        init: as for ``LoRALinear``, but it is B that is sampled, and A that starts at zero; "kaiming" and "gaussian"
            both are PEFT's start: B normal with standard deviation 1.
        train: "both", or only "a" or "b"; the other factor is then sampled and frozen.
        dropout: of no effect, as in PEFT: ids have nothing to drop. Kept, because a file's setting is for all layers.
        (the others as for ``LoRALinear``; there is no ``lora_bias``)

    ids are integers of any shape; y has the embedding's dtype, in autocast too. The correction is computed in the wider
    of its own and the factors' dtype, and the sum rounded once.

    Raises:
        TypeError: a module that cannot be wrapped, with the reason. ``max_norm`` changes rows of the weight as they
            are looked up, and ``sparse`` gradients have no transpose: both are refused.
        ValueError: as ``LoRALinear``; lora_bias.

    Source: Hu et al., arXiv 2106.09685; the start is that of its authors' code.
    """

    wraps = "nn.Embedding"

    def __init__(self, base_layer: nn.Embedding, r: int = 8, **settings: Any) -> None:
        if settings.get("lora_bias"):
            raise ValueError(f"{type(self).__name__}: expected lora_bias to be False, got True; an embedding has none")
        super().__init__(base_layer, r, **settings)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, r: int = 8, **settings: Any) -> Any:
        """Wrap ``embedding``, sharing and freezing its weight. Settings are those of the class."""
        return cls(embedding, r, **settings)

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        if not isinstance(module, nn.Embedding):
            return f"not an nn.Embedding but a {type(module).__name__}"
        if module.max_norm is not None:
            return f"its max_norm={module.max_norm} changes rows of the weight as they are looked up"
        if module.sparse:
            return "its gradient is sparse; make it dense with sparse=False"
        return why_not_plain(module, nn.Embedding)

    @classmethod
    def shapes(cls, base_layer: nn.Module, r: int, lora_bias: bool = False) -> dict[str, tuple[int, ...]]:
        n, k = matrix_shape(base_layer)
        return {"lora_embedding_A": (r, k), "lora_embedding_B": (n, r)}

    def make_factors(self, init: str, train: str, lora_bias: bool, **options: Any) -> None:
        a, b = (torch.empty(shape, **options) for shape in LoRAEmbedding.shapes(self.base_layer, self.r).values())
        self.start_factors_(a, b)
        train_a, train_b = TRAIN[train]
        self.lora_embedding_A = nn.Parameter(a, requires_grad=train_a)
        self.lora_embedding_B = nn.Parameter(b, requires_grad=train_b)

    @classmethod
    def sampled_of(cls, train: str) -> str:
        return "a" if train == "b" else "b"

    def start_factors_(self, lora_a: Tensor, lora_b: Tensor) -> None:
        normal = self.init in ("kaiming", "gaussian")
        init_factors_(lora_a, lora_b, "gaussian" if normal else self.init, sampled=self.sampled)
        if normal:
            (lora_a if self.sampled == "a" else lora_b).mul_(self.r)  # from a deviation of 1 / R to 1

    @property
    def num_embeddings(self) -> int:
        return self.in_features

    @property
    def embedding_dim(self) -> int:
        return self.out_features

    @property
    def padding_idx(self) -> int | None:
        base: Any = self.base_layer
        index: int | None = base.padding_idx
        return index

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A, self.gated(self.lora_embedding_B)

    def forward(self, ids: Tensor) -> Tensor:
        rows: Any = self.base_layer(ids)
        if self._merged is not None or (self.base_only_depth is not None and runs_base_alone(self)):
            return rows
        return corrected(rows, ids, self.base_layer, *self.factors(), self.scaling)


class DoRAEmbedding(DoRALayer, LoRAEmbedding):
    """y = g ∘ (E[ids] + s A[:, ids]ᵀ Bᵀ) with g = m / n, n_j = ‖(Eᵀ + s B A)_j‖₂ over all embeddings.

    Parameters are those of :class:`LoRAEmbedding` and ``lora_magnitude_vector`` (embedding_dim,), PEFT's name, which
    starts at the norm of Eᵀ + s B A, and always trains. Settings and errors are those of ``LoRAEmbedding`` and
    ``DoRALinear``; ``dropout_base`` is of no effect, as dropout is.

    The norm is over the whole embedding, and computed at every forward: where few ids are looked up at a time, as in
    generation, merge the layer.

    Source: Liu et al., "DoRA", arXiv 2402.09353; PEFT for embeddings.
    """

    def forward(self, ids: Tensor) -> Tensor:
        rows: Any = self.base_layer(ids)
        if self._merged is not None or (self.base_only_depth is not None and runs_base_alone(self)):
            return rows
        self.check_at_hand()
        return corrected(rows, ids, self.base_layer, *self.factors(), self.scaling, self.column_scale())


def corrected(
    rows: Tensor,
    ids: Tensor,
    embedding: Any,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    column_scale: Tensor | None = None,
) -> Tensor:
    """g ∘ (E[ids] + s A[:, ids]ᵀ Bᵀ) from rows = E[ids] (..., N), in their dtype; without g where there is none."""
    dtype = torch.promote_types(rows.dtype, lora_a.dtype)
    with torch.autocast(rows.device.type, enabled=False):
        p = nn.functional.embedding(
            ids, lora_a.T, padding_idx=embedding.padding_idx, scale_grad_by_freq=embedding.scale_grad_by_freq
        )
        y = torch.addmm(
            rows.reshape(-1, rows.shape[-1]).to(dtype),
            p.reshape(-1, p.shape[-1]).to(dtype),
            lora_b.T.to(dtype),
            alpha=scaling,
        )
        if column_scale is not None:
            y = column_scale * y
        return y.to(rows.dtype).view(rows.shape)
