"""``BlockSparseLinear``: an nn.Linear of which chosen blocks of the weight train."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..functional import (
    block_columns,
    block_index_error,
    block_sparse_linear,
    check_block_size,
    plain_block_sparse_linear,
    raise_error,
    read_blocks,
    transformed,
    write_blocks_,
)
from .base_only import runs_base_alone
from .frozen import AroundBase, check_weight_may_be_read, check_wrappable
from .sharded import fill_, whole, why_not_written


class BlockSparseLinear(AroundBase):
    """y = x Wᵀ + bias, where the blocks of W at ``block_index`` train and the rest is frozen.

    The blocks are inside W: forward is the plain product. Backward is dX = dY W and, for the chosen blocks alone,
    dW_b = dY[:, rows of b]ᵀ x[:, columns of b]; of x, only the columns that they need are kept for it.

    Parameters and buffers: ``base_layer.weight`` (N, K), ``base_layer.bias`` (N,), both the ones of the wrapped layer
    itself, not copied; ``blocks`` (n_blocks, bm, bn), what trains; ``original_blocks``, what W held there before, in
    W's dtype. ``block_index`` (n_blocks, 2) int32 is in the state dict, and is no buffer: averages of a model's buffers
    round integers down, and the blocks would move.

    Any optimizer may train ``blocks``: every forward writes them into W, rounded to W's dtype, since nothing but their
    values tells whether they changed (fused optimizer steps leave version counters as they are). Where FSDP2 gathers W
    anew for the backward, that writes them too.

    Args:
        base_layer: a plain nn.Linear of float32, bfloat16, float16 or float64.
        block_index: the (row block, column block) of each block of W: (n_blocks, 2) integers, each once.
        block_size: bm = bn, or (bm, bn), multiples of 16. W need not be a multiple of it.
        dtype: of ``blocks``; default float32 (float64 over float64): a master copy where W is narrower.

    Raises:
        TypeError: a base layer that cannot be wrapped, with the reason; a dtype that is not a float.
        ValueError: blocks out of range or there twice, none at all, a block size that is no multiple of 16.

    Source: He et al., arXiv 2405.15525.
    """

    original_blocks: Tensor
    made_of_weight: ClassVar = ("original_blocks",)
    """Buffers that a layer over the same W has already."""

    def __init__(
        self,
        base_layer: nn.Linear,
        block_index: Tensor,
        block_size: int | tuple[int, int],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "BlockSparseLinear"
        check_wrappable(op, base_layer)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"{op}: expected dtype to be a floating dtype, got {dtype!r}")
        weight = base_layer.weight
        self.block_size = check_block_size(op, block_size)
        try:
            index = block_index if isinstance(block_index, Tensor) else torch.as_tensor(block_index, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{op}: expected block_index of integers (n_blocks, 2), got {block_index!r:.60}") from None
        if index.numel() and (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool):
            raise TypeError(f"{op}: expected block_index of integers (n_blocks, 2), got {index.dtype}")
        index = index.to("cpu", torch.int32)
        shape = base_layer.out_features, base_layer.in_features
        raise_error(block_index_error(op, index, self.block_size, shape))
        if not len(index):
            raise ValueError(f"{op}: expected block_index with at least one block, got none; leave this layer as it is")
        # Ascending: neighbours share rows, and kernels their loads.
        index = torch.tensor(sorted(index.tolist()), dtype=torch.int32, device="cpu")
        columns = block_columns(index, self.block_size, base_layer.in_features)
        self._column_width = 0 if columns is None else columns.width
        self._merged = False
        self._written_version: int | None = None
        self._weight_shared_with: tuple[str, ...] = ()

        self.base_layer = base_layer.requires_grad_(False)
        self._index_and_columns = self._placed = (index, None if columns is None else columns.blocks)
        original = read_blocks(weight.detach(), self.block_index, self.block_size)
        self.register_buffer("original_blocks", original)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.blocks = nn.Parameter(original.to(dtype or wide, copy=True))
        self.train(base_layer.training)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, block_index: Tensor, block_size: int | tuple[int, int], **settings: Any
    ) -> BlockSparseLinear:
        """Wrap ``linear``, sharing its weight and bias. Settings are those of the class."""
        return cls(linear, block_index, block_size, **settings)

    @property
    def block_index(self) -> Tensor:
        """(n_blocks, 2) int32, on W's device: the (row block, column block) of each of ``blocks``, ascending."""
        return self._on_device()[0]

    def _on_device(self) -> tuple[Tensor, Tensor | None]:
        """The index and the column blocks that it names, where W is now."""
        device = self.base_layer.weight.device
        if self._placed[0].device != device:
            index, columns = self._index_and_columns
            with torch.inference_mode(False):  # a later backward saves them
                self._placed = index.to(device), None if columns is None else columns.to(device)
        return self._placed

    @property
    def weight(self) -> Tensor:
        """W, with the blocks as they are now in it."""
        self.write_back_()
        return self.base_layer.weight

    @property
    def merged(self) -> bool:
        """Whether forward is the plain linear, and the blocks do not train."""
        return self._merged

    @property
    def weight_shared_with(self) -> tuple[str, ...]:
        """Names of other parameters that are this weight: there must be none, since it changes."""
        return self._weight_shared_with

    @weight_shared_with.setter
    def weight_shared_with(self, names: tuple[str, ...]) -> None:
        if names:
            raise ValueError(
                f"BlockSparseLinear: this weight is also that of {', '.join(names)}, which would change with it; "
                f"exclude this module, or give it a weight of its own"
            )
        self._weight_shared_with = ()

    def forward(self, x: Tensor) -> Tensor:
        if self._merged:
            return self.base_layer(x)
        if self.base_only_depth is not None and runs_base_alone(self):
            return self.base_forward(x)
        base = self.base_layer
        if transformed() or not isinstance(self.blocks, nn.Parameter):
            # W must not change: derivatives of every kind go through it, or it holds the layer's own blocks, and these
            # are functional_call's.
            return plain_block_sparse_linear(x, base.weight, self.blocks, self.block_index, base.bias)
        check_weight_may_be_read("BlockSparseLinear", base)
        self.write_back_()
        index, columns = self._on_device()
        return block_sparse_linear(
            x,
            base.weight,
            self.blocks,
            index,
            base.bias,
            columns=None if columns is None else (columns, self._column_width),
            rewrite=getattr(base, "_is_fsdp_managed_module", False),
        )

    def base_forward(self, x: Tensor) -> Tensor:
        base = self.base_layer  # W holds the blocks
        return plain_block_sparse_linear(x, base.weight, self.original_blocks, self.block_index, base.bias)

    def write_back_(self) -> BlockSparseLinear:
        """W[block] ← blocks, rounded to W's dtype. Nothing where they are sharded (DTensors)."""
        weight, blocks = self.base_layer.weight, self.blocks.detach()
        if torch.compiler.is_compiling():
            write_blocks_(weight, blocks, self.block_index)
        elif not isinstance(weight, nn.Parameter) and is_parametrized(self.base_layer, "weight"):
            raise ValueError(
                "BlockSparseLinear: expected base_layer to hold its weight, got one that torch.nn.utils.parametrize "
                "computes at each call, without the blocks; remove the parametrization"
            )
        elif type(weight.data) is Tensor:
            write_blocks_(weight.data, blocks, self.block_index)
            # Graphs that saved W must see that it changed, and must not where the same values were written again.
            version = None if blocks.is_inference() else blocks._version
            if version != self._written_version and not weight.is_inference():
                torch.autograd.graph.increment_version(weight)
            self._written_version = version
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Take the blocks from W as it is now, as at construction: for a model that was adapted on the meta device, and
        got its weights afterwards. Of shards (FSDP2) every rank has to call this, and each gathers W.

        Raises:
            ValueError: a layer that is merged, or whose weights are on the meta device.
        """
        if self._merged or any(p.is_meta for p in self.parameters()):
            raise ValueError(
                "BlockSparseLinear.reset_parameters: expected an unmerged layer with its weights at hand; call "
                "unmerge_(), or to_empty(device=...) and load the base model's weights first"
            )
        original = read_blocks(whole(self.base_layer.weight.detach()), self.block_index, self.block_size)
        self.original_blocks.copy_(original)
        fill_(self.blocks, original)

    def merge_(self) -> BlockSparseLinear:
        """Write the blocks into W; forward is then the plain linear, without gradients for them.

        Raises:
            ValueError: a weight that cannot be written just now, or is sharded. The layer is then as it was.
        """
        reason = why_not_written(self.base_layer, whole=True)
        if reason is not None:
            raise ValueError(f"BlockSparseLinear.merge_: expected a weight that takes the blocks, but {reason}")
        self.write_back_()
        self._merged = True
        return self

    @torch.no_grad()
    def unmerge_(self) -> BlockSparseLinear:
        """Put W back to what it was, bit for bit. The blocks keep their values: the next forward writes them again."""
        write_blocks_(self.base_layer.weight, self.original_blocks, self.block_index)
        self._merged = False
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """As of any module, with the blocks in W."""
        self.write_back_()
        return super().state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "block_index"] = self.block_index.clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key, index = prefix + "block_index", self._index_and_columns[0]
        given = state_dict.get(key, index)
        if given.shape != index.shape or not torch.equal(given.to(index), index):
            raise ValueError(
                f"BlockSparseLinear: expected a state of the same blocks at {prefix}block_index, got other positions; "
                f"make the layer with those"
            )
        super()._load_from_state_dict({k: t for k, t in state_dict.items() if k != key}, prefix, *args)
        if self._merged:
            self.write_back_()  # the base weight may not be in the state

    def extra_repr(self) -> str:
        bm, bn = self.block_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"blocks={len(self.blocks)} of {bm}×{bn}, merged={self.merged}"
        )
