"""Phase one: gradients of the whole model, one layer of them alive at a time, and a score for every block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..adapt import plan_adaptation
from ..config import ALL_LINEAR, AdapterConfig
from ..functional import check_block_size
from ..gradients import summed_gradients
from ..report import count_parameters
from .selection import BlockSelection, Budget, select_blocks

SCORES = ("abs_mean", "mean_abs")


@dataclass(frozen=True, eq=False)
class BlockScores:
    """A score for every block of every targeted matrix: what :func:`warm_up` found.

    Attributes:
        scores: module path to (row blocks, column blocks), float32 on the CPU, in the model's order.
        shapes: module path to (N, K).
        block_size: (bm, bn).
        parameters: elements of all parameters of the model.
    """

    scores: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, int]]
    block_size: tuple[int, int]
    parameters: int

    def select(self, budget: Budget, *, of: str = "targets", per: str = "model") -> BlockSelection:
        """Phase two: the blocks with the highest scores, as many as the budget says, and exactly those.

        Args:
            budget: an integer: blocks. A float: a share, rounded down to whole blocks. Or {regular expression: one of
                these}: budgets of their own for the modules whose path it matches, whole or after a dot (the first
                that matches wins; :data:`ATTENTION` and :data:`MLP` fit most models); modules that none matches get
                nothing.
            of: what a share is of: "targets", the blocks that compete; or "parameters", all of the model's, as the
                paper counts.
            per: "model": all matrices of a budget compete; "matrix": each gets the budget for itself.

        Ties go to the earlier module, then row, then column.

        Raises:
            ValueError: a budget that selects nothing, or more than there is; a pattern that matches no module; scores
                that are not finite; an unknown ``of`` or ``per``.
        """
        return select_blocks(self.scores, self.shapes, self.block_size, self.parameters, budget, of, per)


def warm_up(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    block_size: int | tuple[int, int] = 256,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude_modules: str | Sequence[str] = (),
    score: str = "abs_mean",
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    offload: bool = False,
    progress: bool = False,
) -> BlockScores:
    """Accumulate the gradients of the targeted matrices over batches, and score their blocks.

    A gradient is added up in float32 and freed as soon as it is there, so that about one layer of gradients is alive.

    Args:
        model: not adapted yet; in the mode, and with the checkpointing, that it is to be trained in.
        batches: about a hundred; what ``loss`` takes.
        loss: loss(model, batch), a scalar that is differentiable.
        block_size: bm = bn, or (bm, bn), multiples of 16; blocks at the edge of a matrix may be smaller.
        target_modules, exclude_modules: as of :class:`~lowrank_kernels.AdapterConfig`.
        score: "abs_mean": mean of |accumulated gradient| over a block, the paper's text, which keeps a float32 copy of
            every targeted matrix; "mean_abs": |mean of the accumulated gradient|, the authors' code, which keeps a
            number a block.
        optimizer: None: no updates, the model stays as it is, bit for bit. Otherwise the warm-up trains all that
            requires grad, as the paper's does: called once for each parameter as ``optimizer([parameter])``, for an
            optimizer that steps as soon as that gradient is there.
        offload: keep the float32 sums on the CPU.
        progress: show a bar (needs tqdm).

    Returns:
        The scores. requires_grad and gradients are as they were before.

    Raises:
        ValueError: no batches, a loss that is not finite, a target whose weight is another's too, targets without a
            gradient; otherwise as :func:`~lowrank_kernels.adapt`.
    """
    size = check_block_size("warm_up", block_size)
    if score not in SCORES:
        raise ValueError(f"warm_up: expected score to be one of {', '.join(SCORES)}, got {score!r}")
    config = AdapterConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    targets = plan_adaptation(model, config).targets
    _check_own_weights(model, targets)
    optimizers: dict[int, torch.optim.Optimizer] = {}

    def step(p: nn.Parameter) -> None:
        assert optimizer is not None
        if id(p) not in optimizers:
            optimizers[id(p)] = optimizer([p])
        optimizers[id(p)].step()

    steps = 0
    with summed_gradients(
        model,
        {name: linear.weight for name, linear in targets.items()},
        reduce=None if score == "abs_mean" else partial(_block_sums, size=size),
        to_cpu=offload,
        step=None if optimizer is None else step,
    ) as sums:
        for batch in _bar(batches, progress, "warm-up"):
            value = loss(model, batch)
            if not math.isfinite(float(value.detach())):
                raise ValueError(f"warm_up: the loss is {float(value.detach())} at step {steps + 1}")
            value.backward()
            steps += 1
    if not steps:
        raise ValueError("warm_up: expected at least one batch, got none")
    missing = [name for name in targets if name not in sums]
    if missing:
        raise ValueError(
            f"warm_up: expected a gradient for every target, got none for {', '.join(missing[:5])}; exclude them"
        )
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in targets.items()}
    return BlockScores(
        {name: _score(sums.pop(name), shapes[name], size, score) / steps for name in targets},
        shapes,
        size,
        count_parameters(model)[1],
    )


def _check_own_weights(model: nn.Module, targets: Mapping[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name)
    for linear in targets.values():
        if len(owners[id(linear.weight)]) > 1:
            raise ValueError(
                f"warm_up: {' and '.join(owners[id(linear.weight)])} are one weight, and tuning one would change the "
                f"other; name the module in exclude_modules"
            )


def _bar(batches: Iterable[Any], progress: bool, name: str) -> Iterable[Any]:
    if not progress:
        return batches
    from tqdm import tqdm

    return tqdm(batches, desc=name, unit="step")


def _block_sums(matrix: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum over each block of a matrix (N, K); blocks at the edge may be smaller."""
    (n, k), (bm, bn) = matrix.shape, size
    rows, columns = -(-n // bm), -(-k // bn)
    whole = torch.nn.functional.pad(matrix, (0, columns * bn - k, 0, rows * bm - n))
    return whole.reshape(rows, bm, columns, bn).sum((1, 3))


def _score(total: Tensor, shape: tuple[int, int], size: tuple[int, int], score: str) -> Tensor:
    sums = (_block_sums(total.abs(), size) if score == "abs_mean" else total.abs()).cpu()
    heights, widths = (
        torch.tensor([min(b, length - start) for start in range(0, length, b)])
        for length, b in zip(shape, size, strict=True)
    )
    return sums / (heights[:, None] * widths)
