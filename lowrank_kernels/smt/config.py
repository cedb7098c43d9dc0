"""Phase three: what ``adapt`` makes of a selection."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..config import AdapterConfig
from ..nn.block_sparse import BlockSparseLinear
from .selection import BlockSelection


@dataclass(frozen=True, kw_only=True)
class SMTConfig(AdapterConfig):
    """Linears with chosen blocks become :class:`~lowrank_kernels.nn.BlockSparseLinear`; everything else is frozen.

    Args:
        selection: which blocks of which modules, from ``lk.smt.warm_up(...).select(...)``, or made by hand. It says
            what is targeted: ``target_modules`` and ``exclude_modules`` are not to be given.
        dtype: of the trained blocks; default float32, a master copy where W is narrower.
        bias: as of :class:`~lowrank_kernels.AdapterConfig`.

    Raises:
        TypeError, ValueError: at construction, for values of the wrong kind; by ``adapt``, for modules of the selection
            that the model does not have, or not as plain linears of that shape.
    """

    selection: BlockSelection
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.selection, BlockSelection):
            raise TypeError(f"SMTConfig: expected a BlockSelection, got {type(self.selection).__name__}")
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"SMTConfig: expected dtype to be a floating dtype, got {self.dtype!r}")
        whole_paths = "|".join(re.escape(name) for name in self.selection.blocks)
        if self.exclude_modules or self.target_modules not in (AdapterConfig.target_modules, whole_paths):
            raise ValueError(
                "SMTConfig: expected no target_modules or exclude_modules: the selection names its modules"
            )
        object.__setattr__(self, "target_modules", whole_paths)
        super().__post_init__()

    def layer(self, name: str, linear: nn.Linear) -> BlockSparseLinear:
        wanted, shape = tuple(self.selection.shapes[name]), (linear.out_features, linear.in_features)
        if shape != wanted:
            raise ValueError(f"adapt: expected {name} of shape (N, K) = {wanted} as in the selection, got {shape}")
        return BlockSparseLinear.from_linear(
            linear, self.selection.blocks[name], self.selection.block_size, dtype=self.dtype
        )

    def rank_of(self, name: str) -> int:
        """0: a block has its full rank."""
        return 0

    def size_of(self, name: str) -> str:
        bm, bn = self.selection.block_size
        return f"{len(self.selection.blocks[name])} blocks of {bm}×{bn}"

    def unused(self, names: Sequence[str], whole: Sequence[str] = ()) -> list[str]:
        missing = [name for name in self.selection.blocks if name not in names]
        if missing:
            raise ValueError(
                f"adapt: expected every module of the selection to be a plain nn.Linear of this model, which "
                f"{len(missing)} are not, first {missing[0]}; select for this model"
            )
        return []
