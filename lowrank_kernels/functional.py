"""What a user calls on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.batch_plan import BatchPlan, as_ids, check_range, plan_batch
from .ops.block_sparse import (
    BlockAdamW,
    BlockSparseLinear,
    BlockSparseWeightGrad,
    block_index_error,
    call_block_adamw_,
    call_block_sparse_linear,
    call_block_sparse_weight_grad,
    check_block_adamw,
    check_block_size,
    check_block_sparse_linear,
    check_block_sparse_weight_grad,
    read_blocks,
    write_blocks_,
)
from .ops.dora import (
    DoRALinear,
    DoRAWeightNorm,
    ScaleCache,
    call_dora_linear,
    call_dora_weight_norm,
    check_dora_linear,
    check_dora_weight_norm,
    dora_linear_directly,
    dora_linear_remembering,
    magnitude_error,
    norm_of_shards,
    pair_of,
    plan_dora_linear,
)
from .ops.experts import RoutedRows, plan_experts
from .ops.frozen import FrozenLinear, call_frozen_linear, check_frozen_linear, plan_frozen_linear
from .ops.galore import GaLoreAdam, call_galore_adam_, check_galore_adam, check_galore_rates, plan_galore_adam
from .ops.importance import (
    LoRAImportance,
    call_lora_importance,
    check_lora_importance,
    plain_lora_importance,
    plan_lora_importance,
)
from .ops.library import traced, transformed, unobserved
from .ops.lora import (
    LoRALinear,
    call_lora_linear,
    check_lora_linear,
    lora_linear_again,
    lora_linear_directly,
    lora_linear_eager,
    plan_lora_linear,
)
from .ops.magnitude import (
    MagnitudeHistogram,
    call_magnitude_histogram,
    check_digits,
    check_magnitude_histogram,
    plain_magnitude_histogram,
    plan_magnitude_histogram,
)
from .ops.multi_lora import (
    MultiLoRALinear,
    call_multi_lora_linear,
    check_multi_lora_linear,
    check_stack_scale,
    multi_lora_linear_directly,
    plan_multi_lora_linear,
)
from .ops.operands import (
    backend_error,
    check_flag,
    count_error,
    device_error,
    floats_error,
    frozen_error,
    number_error,
    product_error,
    raise_error,
    scaling_error,
    seed_tensor,
    under_autocast,
    vector_error,
)
from .ops.plain import (
    plain_block_sparse_linear,
    plain_block_sparse_weight_grad,
    plain_column_scale,
    plain_dora_linear,
    plain_lora_linear,
    plain_multi_lora_linear,
    plain_weight_norm,
)
from .ops.svft import (
    SVFTLinear,
    call_svft_linear,
    check_svft_linear,
    plain_svft_linear,
    plan_svft_linear,
    svft_pattern,
)
from .ops.velora import VeLoRALinear, call_velora_linear, check_velora_linear, unit_mean, velora_error
from .stack import LoRAStack
from .weights import ExpertWeights, FrozenWeight, Weight, dense, like, rows


def _seeded(call: Any, seed: Tensor | int | None, op: str) -> Any:
    """The call with a dropout seed, where there is dropout."""
    if call.dropout_p == 0.0:
        return call
    return call._replace(dropout_seed=seed_tensor(op, "dropout_seed", seed, call.x.device))


def lora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    velora_vector: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Frozen linear plus low-rank correction: y = x Wᵀ + bias + s (P ∘ gate) Bᵀ with P = drop(x) Aᵀ.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference"); any strides, may be empty.
        weight: W (N, K), x's dtype, frozen.
        lora_a: A (R, K) and
        lora_b: B (N, R), any float dtype: they are rounded to x's dtype inside; their gradients have their own dtype.
        bias: (N,) or None, of any float dtype.
        scaling: s, usually alpha / R, or alpha / sqrt(R) for rsLoRA.
        gate: (R,) or None: a factor for each rank.
        dropout_p: probability of zeroing an element of the correction's input, 0 <= p < 1; kept ones are scaled
            by 1 / (1 - p). The base product never sees dropout. Pass 0 in evaluation.
        dropout_seed: int64 scalar (tensor or int). The mask is a function of (seed, row, column) and is never stored;
            every backend draws the same one. Without a seed one is drawn from torch's generator of x's device.
        velora_vector: v (d,) or None, of any float dtype, d dividing K; rounded to x's, and a constant. For the
            gradient of A, z (M, K / d) is saved in place of x: v times each sub-token, which is d elements of
            drop(x). Backward takes x̂ = z ⊗ v for drop(x): dA = (s (Q ∘ gate)ᵀ z) ⊗ v, Q = dY B. All else is exact.
            v should have unit length: one of length √c makes dA c times as large.
        backend: "auto", "reference", "cpu" (C++), "triton" or "cuda". A named one runs or raises.

    Returns:
        y (..., N) in x's dtype.

    Accumulates in float32; with the Triton kernels the sum of both products is rounded once; where a library computes
    the base product (CPU, large products on a GPU) the correction is added to its rounded result. Deterministic run to
    run. For backward, P (M, R) is saved where B or the gate is trained, and x, or z, where A is.

    Raises:
        ValueError: shapes or devices that do not fit, a weight that requires grad, a dropout probability outside
            [0, 1), a backend that is unknown or cannot run here.
        TypeError: dtypes that do not fit.

    Source: Hu et al., "LoRA", arXiv 2106.09685, eq. 3; the gate is that of SoRA, arXiv 2311.11696; z that of VeLoRA,
    arXiv 2405.17991.
    """
    raise_error(scaling_error("lora_linear", scaling, getattr(x, "dtype", torch.float32)))
    if backend == "auto" and dropout_p == 0.0:
        again = lora_linear_again(x, weight, lora_a, lora_b, bias, gate, scaling)
        if again is not None:
            return again
    weight = like(x, weight)
    call = LoRALinear(x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p, None, False, backend)
    if velora_vector is not None:
        call = _saving_z(call, velora_vector)
    if traced():
        raise_error(check_lora_linear(call))
        call, plan = _seeded(call, dropout_seed, "lora_linear"), None
        if transformed():
            return plain_lora_linear(call)
    else:
        plan = plan_lora_linear(call)
    unseen = plan is not None and unobserved(call[:6])
    if plan is not None and dropout_p == 0.0:
        if plan.direct and unseen:
            return lora_linear_directly(call)
        if plan.eager and not torch._C._is_any_autocast_enabled():
            return lora_linear_eager(call)
    elif call.dropout_seed is None:
        call = _seeded(call, dropout_seed, "lora_linear")
    if torch.is_grad_enabled() and (lora_b.requires_grad or (gate is not None and gate.requires_grad)):
        seed, v = call.dropout_seed, call.velora_vector  # with save_p; _replace would take four times as long
        call = LoRALinear(x, weight, lora_a, lora_b, bias, gate, scaling, dropout_p, seed, True, backend, v)
    y: Tensor = call_lora_linear(call, plan, unseen=unseen)[0]
    return y


def _saving_z(call: LoRALinear, velora_vector: Tensor) -> LoRALinear:
    """The call with VeLoRA's vector, where a gradient of A is recorded."""
    raise_error(velora_error("lora_linear", call.x, velora_vector))
    if not (torch.is_grad_enabled() and isinstance(call.lora_a, Tensor) and call.lora_a.requires_grad):
        return call
    if transformed():
        raise ValueError(
            "lora_linear: expected no velora_vector inside torch.func transforms and forward-mode differentiation, "
            "which would differentiate the exact formula; leave it out there"
        )
    return call._replace(velora_vector=velora_vector)


def velora_linear(x: Tensor, weight: Tensor, velora_vector: Tensor, bias: Tensor | None = None) -> Tensor:
    """Trained linear that saves projections of x: y = x Wᵀ + bias; dW = dYᵀ x̂ = (dYᵀ z) ⊗ v, with x̂ = z ⊗ v.

    Args:
        x: (..., K), float32, bfloat16, float16 or float64; any strides, may be empty.
        weight: W (N, K), x's dtype; may train.
        velora_vector: v (d,), of any float dtype, d dividing K; rounded to x's, and a constant. Unit length makes x̂ the
            projection of x.
        bias: (N,) or None, of any float dtype.

    Returns:
        y (..., N) in x's dtype. dX = dY W and dbias are exact.

    The products are PyTorch's, dYᵀ z is d times smaller than dYᵀ x, and x̂ is never made. For backward z (M, K / d) is
    saved where W is trained, v, and W itself. z is made in a second reading of x.

    Raises:
        ValueError: shapes or devices that do not fit, a d that does not divide K, a vector that requires grad;
            torch.func transforms, which would differentiate the exact formula.
        TypeError: dtypes that do not fit.

    Source: Miles et al., "VeLoRA", arXiv 2405.17991, section 3.
    """
    call = VeLoRALinear(x, weight, bias, velora_vector)
    raise_error(check_velora_linear(call))
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return frozen_linear(x, weight, bias)
    if transformed():
        raise ValueError("velora_linear: expected no torch.func transform; take torch.nn.functional.linear there")
    y: Tensor = call_velora_linear(call)[0]
    return y


@torch.no_grad()
def velora_vector(x: Tensor, length: int, mask: Tensor | None = None) -> Tensor:
    """v: the mean of the sub-tokens of x, ``length`` elements each, to unit length; 1 / √d everywhere where it is zero.

    Args:
        x: (..., K), of any float dtype; K a multiple of ``length``.
        mask: of x's leading shape, or None: tokens whose entry is 0, such as padding, do not count.

    Returns:
        (length,) in float32, or float64 where x is. Zeros where there is no token, or the mean is not finite.

    Raises:
        ValueError, TypeError: sizes that do not fit.

    Source: Miles et al., "VeLoRA", arXiv 2405.17991, section 3.2.
    """
    op = "velora_vector"
    raise_error(floats_error(op, x=x) or count_error(op, "length", length, 1))
    if x.dim() == 0 or x.shape[-1] % length:
        raise ValueError(f"{op}: expected x of shape (..., K), K a multiple of length = {length}, got {tuple(x.shape)}")
    if mask is not None:
        if mask.shape != x.shape[:-1]:
            raise ValueError(f"{op}: expected mask of shape {tuple(x.shape[:-1])}, got {tuple(mask.shape)}")
        x = x[mask.bool()]
    return unit_mean(x.reshape(-1, length))


def fold_gate(lora_b: Tensor, gate: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """B ∘ gate: each column of B (N, R, ...) times its rank's gate (R,); in float32, or float64 where one of them is.

    A B that stands for both: (P ∘ gate) Bᵀ = P (B ∘ gate)ᵀ.
    """
    wide = torch.promote_types(torch.promote_types(lora_b.dtype, torch.float32), dtype)
    return lora_b.to(wide) * gate.view(1, -1, *(1 for _ in lora_b.shape[2:]))


def dora_weight_norm(
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float = 1.0,
    weight_sq_norm: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Row norms of the adapted weight, without forming it: n_i = ‖W_i + s B_i A‖₂.

    n_i² = ‖W_i‖² + 2 s Σ_k B_ik (W Aᵀ)_ik + s² B_i (A Aᵀ) B_iᵀ, clamped at 0.

    Args:
        weight: W (N, K), float32, bfloat16 or float16; read once, in its own dtype.
        lora_a: A (R, K) and
        lora_b: B (N, R), any float dtype; not rounded to W's.
        weight_sq_norm: ‖W_i‖² (N,), float32, from an earlier call while W has not changed; computed in the same pass
            otherwise.
        backend: "auto", "reference" (dense), "cpu" and "cuda" (C++ extension), "triton".

    Returns:
        (N,) float32; float64 where W is float64 (reference).

    Accumulates in float32, deterministic. Where terms cancel, those of W_i ≈ -s B_i A or those of B_i A itself, digits
    are lost: the error of n_i² is about 1e-7 (‖W_i‖ + s Σ_r |B_ir| ‖A_r‖)², and a negative n_i² counts as 0. (Triton's
    kernel squares the sum itself: there it is about 1e-7 n_i² and, of the sum, 1e-7 (|W_ik| + s Σ_r |B_ir A_rk|).)
    Differentiable in both factors.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a backend that cannot run here.

    Source: Liu et al., "DoRA", arXiv 2402.09353, eq. 5.
    """
    call = DoRAWeightNorm(weight, lora_a, lora_b, scaling, weight_sq_norm, None, backend)
    raise_error(check_dora_weight_norm(call))
    if transformed():
        return plain_weight_norm(weight, lora_a, lora_b, scaling)
    norm: Tensor = call_dora_weight_norm(call)[0]
    return norm


def dora_column_scale(
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    *,
    scaling: float = 1.0,
    weight_sq_norm: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, g, ‖W_i‖²), each (N,): what :func:`dora_linear` needs beside its operands, until one of them changes.

    g = m / n, and 0 where n is 0: such a row of the output is its bias. Arguments, numbers and errors as for
    :func:`dora_weight_norm`; never records gradients.
    """
    op = "dora_column_scale"
    call = DoRAWeightNorm(weight, lora_a, lora_b, scaling, weight_sq_norm, magnitude, backend)
    raise_error(check_dora_weight_norm(call, op) or magnitude_error(op, magnitude, weight))
    if transformed():
        return plain_column_scale(weight, lora_a, lora_b, magnitude, scaling)
    with torch.no_grad():
        norm, sq_norm, scale = call_dora_weight_norm(call)
    return norm, scale, sq_norm


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    gate: Tensor | None = None,
    weight_sq_norm: Tensor | None = None,
    norm_and_scale: tuple[Tensor, Tensor] | None = None,
    scale_cache: ScaleCache | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    dropout_base: bool = False,
    detach_norm: bool = True,
    backend: str = "auto",
) -> Tensor:
    """Weight-decomposed linear: y = g ∘ (x Wᵀ + s P Bᵀ) + bias with P = drop(x) Aᵀ, g = m / n, n_i = ‖W_i + s B_i A‖₂.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference").
        weight: W (N, K), x's dtype, frozen.
        lora_a: A (R, K),
        lora_b: B (N, R) and
        magnitude: m (N,), any float dtype.
        bias: (N,) or None; not scaled.
        scaling: s.
        gate: (R,) or None: a factor for each rank, in u and in the norm alike: B ∘ gate takes the place of B. That is
            how it is computed, in float32: N R products beside N K.
        weight_sq_norm: as for :func:`dora_weight_norm`.
        norm_and_scale: (n, g) from :func:`dora_column_scale` for these very operands, taken on trust; computed here
            otherwise.
        scale_cache: a ``ScaleCache`` of the caller's, one a layer: where no gradient is recorded on a CPU, g is kept in
            it and used again as long as every operand proves to be what it was.
        dropout_p, dropout_seed: as for :func:`lora_linear`.
        dropout_base: dropout reaches the base product too, as in PEFT's training:
            y = x Wᵀ + (g - 1) ∘ (drop(x) Wᵀ) + g ∘ s P Bᵀ + bias. Costs a second main product. False is the paper's
            simplified form.
        detach_norm: treat n as a constant in backward (the paper's section 4.3, and PEFT). False: full gradients.
        backend: "auto", "reference", "cpu", "triton" or "cuda" (the norm alone).

    Returns:
        y (..., N) in x's dtype. A row i with n_i = 0 has g_i = 0: there y is the bias, and the gradient of m_i is 0.

    g and the sum of both products stay in float32 until the one rounding of y (with a library's main product: until
    the one after its own). For backward, u = x Wᵀ + s P Bᵀ (M, N) is saved where m is trained: recomputing it would
    read x and W again and multiply them again, and y does not determine it where g is 0.

    Raises:
        ValueError, TypeError: as :func:`lora_linear`, and for a magnitude that does not fit.

    Source: Liu et al., "DoRA", arXiv 2402.09353, eq. 5 and 11.
    """
    raise_error(scaling_error("dora_linear", scaling, getattr(x, "dtype", torch.float32)))
    if scale_cache is not None and not isinstance(scale_cache, ScaleCache):
        raise TypeError(f"dora_linear: expected scale_cache to be a ScaleCache, got {type(scale_cache).__name__}")
    norm, scale = pair_of(norm_and_scale)
    weight = like(x, weight)
    if gate is not None and isinstance(lora_b, Tensor) and lora_b.dim() == 2:
        raise_error(vector_error("dora_linear", "gate", "R", gate, lora_b.shape[1], lora_b.device, like="lora_b"))
        lora_b = fold_gate(lora_b, gate, getattr(x, "dtype", torch.float32))
    call = DoRALinear(
        x, weight, lora_a, lora_b, magnitude, weight_sq_norm, norm, scale, bias,
        scaling, dropout_p, None, dropout_base, detach_norm, False, backend,
    )  # fmt: skip
    if hasattr(weight, "device_mesh"):
        call = norm_of_shards(call)
    if traced():
        raise_error(check_dora_linear(call))
        call, plan = _seeded(call, dropout_seed, "dora_linear"), None
        if transformed():
            return plain_dora_linear(call)
    else:
        plan = plan_dora_linear(call)
    unseen = plan is not None and unobserved(call[:9])
    if plan is not None and unseen:
        if plan.direct:
            return dora_linear_directly(call)
        if plan.remembers and scale_cache is not None:
            return dora_linear_remembering(call, plan, scale_cache)
    if call.dropout_seed is None:
        call = _seeded(call, dropout_seed, "dora_linear")
    trained = call.lora_a.requires_grad or call.lora_b.requires_grad or call.magnitude.requires_grad
    if torch.is_grad_enabled() and trained:
        call = call._replace(save=True)
    y: Tensor = call_dora_linear(call, plan, unseen=unseen)[0]
    return y


def frozen_linear(x: Tensor, weight: Weight, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = x Wᵀ + bias over a frozen weight of any format; dX = dY W.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with a dense weight); any strides, may be empty.
        weight: W (N, K), frozen: a tensor of x's dtype, or of :mod:`lowrank_kernels.weights`.
        bias: (N,) or None, of any float dtype.
        backend: "auto", "reference", "cpu" or "triton". The product is the format's own in all but "reference".

    Returns:
        y (..., N) in x's dtype.

    Accumulates in float32 and rounds once. Of codes of few bits no dense copy is made on a CPU. Nothing is saved for
    backward but W itself.

    Raises:
        ValueError: shapes or devices that do not fit, a weight that requires grad, a backend that is unknown or cannot
            run here.
        TypeError: dtypes that do not fit.
    """
    call = FrozenLinear(x, like(x, weight), bias, backend)
    if traced():
        raise_error(check_frozen_linear(call))
        if transformed():
            return torch.nn.functional.linear(x, dense(call.weight), bias)
        plan = None
    else:
        plan = plan_frozen_linear(call)
    y: Tensor = call_frozen_linear(call, plan)
    return y


class BlockColumns(NamedTuple):
    """The columns of x that the gradients of some blocks need."""

    blocks: Tensor
    """(n,) int32, ascending: the distinct column blocks."""
    width: int
    """How many columns of x these are."""


def block_columns(block_index: Tensor, block_size: int | tuple[int, int], in_features: int) -> BlockColumns | None:
    """The distinct column blocks of ``block_index``; None where they are more than half of the K columns.

    Reads the index: on a GPU that waits for the device.
    """
    op = "block_columns"
    _, bn = check_block_size(op, block_size)
    raise_error(count_error(op, "in_features", in_features, 0))
    if not isinstance(block_index, Tensor) or block_index.dim() != 2 or block_index.is_floating_point():
        raise TypeError(f"{op}: expected block_index to be a tensor of integers (n_blocks, 2), got {block_index!r:.60}")
    index = block_index[:, 1].unique().to(torch.int32)
    width = sum(min(bn, in_features - j * bn) for j in index.tolist())
    return BlockColumns(index, width) if 2 * width <= in_features else None


def block_sparse_weight_grad(
    x: Tensor, grad_y: Tensor, block_index: Tensor, block_size: int | tuple[int, int], *, backend: str = "auto"
) -> Tensor:
    """Gradients of chosen blocks of W for y = x Wᵀ: dW_b = dY[:, rows of b]ᵀ x[:, columns of b].

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference"); any strides, may be empty.
        grad_y: dY (..., N), x's dtype and leading shape.
        block_index: (n_blocks, 2) int32, the (row block, column block) of each block of W, each once, in any order;
            blocks that share rows or columns share their loads best in ascending order.
        block_size: bm = bn, or (bm, bn): rows and columns of a block, multiples of 16. W need not be a multiple of it:
            what sticks out is zero.
        backend: "auto", "reference", "cpu" (C++) or "triton". A named one runs or raises.

    Returns:
        (n_blocks, bm, bn) in x's dtype.

    Accumulates in float32 and rounds once; sums over tokens that are cut into parts are added in a fixed order, so the
    result is the same bits at every run. One launch, and one for that sum. On a GPU the values of the index are not
    checked.

    Raises:
        ValueError: shapes or devices that do not fit, a block out of range or there twice, a block size that is no
            multiple of 16, a backend that is unknown or cannot run here.
        TypeError: dtypes that do not fit.

    Source: He et al., "Sparse Matrix in Large Language Model Fine-tuning", arXiv 2405.15525.
    """
    bm, bn = check_block_size("block_sparse_weight_grad", block_size)
    call = BlockSparseWeightGrad(x, grad_y, block_index, bm, bn, getattr(x, "dtype", torch.float32), backend)
    raise_error(check_block_sparse_weight_grad(call))
    if transformed():
        return plain_block_sparse_weight_grad(x, grad_y, block_index, (bm, bn))
    grad: Tensor = call_block_sparse_weight_grad(call)
    return grad


def block_sparse_linear(
    x: Tensor,
    weight: Weight,
    blocks: Tensor,
    block_index: Tensor,
    bias: Tensor | None = None,
    *,
    columns: BlockColumns | tuple[Tensor, int] | None = None,
    rewrite: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A linear of which chosen blocks train: y = x Wᵀ + bias; dX = dY W, dW_b = dY[:, rows of b]ᵀ x[:, columns of b].

    The blocks are already inside W: ``blocks`` is not read, and receives the gradient. Keeping W up to date with it is
    the caller's (:class:`~lowrank_kernels.nn.BlockSparseLinear` does).

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference").
        weight: W (N, K), x's dtype, frozen.
        blocks: (n_blocks, bm, bn), any float dtype, which its gradient has: float32 blocks over a bfloat16 weight get
            a float32 gradient.
        block_index: (n_blocks, 2) int32, as for :func:`block_sparse_weight_grad`.
        bias: (N,) or None, of any float dtype.
        columns: :func:`block_columns` of the index. With it the index counts as checked, and is not read.
        rewrite: the backward writes the blocks into W again before it reads W: for a W that is gathered anew then.
        backend: "auto", "reference", "cpu" or "triton". The products with W are the library's in all but "reference".

    Returns:
        y (..., N) in x's dtype.

    Saved for backward where the blocks train: the columns of x that they need, each once, in a storage of their own,
    M · width · itemsize bytes; x itself where these are more than half of its columns, or where no ``columns`` are
    given and the index cannot be read (on a GPU without waiting, or under torch.compile).

    Raises:
        ValueError, TypeError: as :func:`block_sparse_weight_grad`, and for a weight that requires grad.

    Source: He et al., "Sparse Matrix in Large Language Model Fine-tuning", arXiv 2405.15525.
    """
    chosen, width = columns or (None, 0)
    call = BlockSparseLinear(x, like(x, weight), blocks, block_index, bias, chosen, width, False, rewrite, backend)
    raise_error(check_block_sparse_linear(call))
    if transformed():
        return plain_block_sparse_linear(x, weight, blocks, block_index, bias)
    if torch.is_grad_enabled() and blocks.requires_grad:
        call = call._replace(save=True)
        readable = type(block_index) is Tensor and block_index.device.type == "cpu"
        if columns is None and readable and not torch.compiler.is_compiling():
            chosen, width = block_columns(block_index, (blocks.shape[1], blocks.shape[2]), weight.shape[1]) or (None, 0)
            call = call._replace(columns=chosen, width=width)
    y: Tensor = call_block_sparse_linear(call)[0]
    return y


def block_adamw_(
    blocks: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight: Tensor,
    block_index: Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    seed: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of AdamW on packed blocks, and the blocks into W, in one kernel. In place.

    m ← β₁ m + (1 - β₁) g, v ← β₂ v + (1 - β₂) g², p ← (1 - lr λ) p - lr m̂ / (√v̂ + ε), W[block] ← p, with
    m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ).

    Args:
        blocks: p (n_blocks, bm, bn), contiguous: float32 (also over a bfloat16 W: the master copy), bfloat16 or
            float16.
        grad: g, the shape of ``blocks``, any float dtype.
        exp_avg, exp_avg_sq: m and v, the shape of ``blocks``, float32, contiguous.
        weight: W (N, K); its blocks are overwritten, all else is untouched.
        block_index: (n_blocks, 2) int32.
        step: t, from 1.
        seed: int64 scalar tensor: bfloat16 blocks are rounded stochastically, by Philox words of (seed, block,
            element), the same in every backend; use another seed at each step. None: to nearest.

    Computed in float32; p is rounded once, and W gets what ``blocks`` holds.

    Raises:
        ValueError, TypeError: shapes, dtypes or layouts that do not fit; stochastic rounding of other than bfloat16.

    Source: Loshchilov and Hutter, "Decoupled weight decay", arXiv 1711.05101.
    """
    op = "block_adamw_"
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{op}: expected betas to be a pair of numbers, got {betas!r:.60}")
    tensors = blocks, grad, exp_avg, exp_avg_sq, weight, block_index
    call = BlockAdamW(*tensors, lr, *betas, eps, weight_decay, step, seed, backend)
    raise_error(check_block_adamw(call))
    call_block_adamw_(call)


__all__ = [
    "BlockColumns",
    "ScaleCache",
    "block_adamw_",
    "block_columns",
    "block_index_error",
    "block_sparse_linear",
    "block_sparse_weight_grad",
    "check_block_size",
    "check_flag",
    "dora_column_scale",
    "dora_linear",
    "dora_weight_norm",
    "frozen_linear",
    "galore_adam_",
    "lora_importance",
    "lora_linear",
    "magnitude_histogram",
    "plain_block_sparse_linear",
    "raise_error",
    "read_blocks",
    "svft_linear",
    "svft_pattern",
    "transformed",
    "under_autocast",
    "write_blocks_",
]


def galore_adam_(
    weight: Tensor,
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    scale: float = 0.25,
    backend: str = "auto",
) -> None:
    """One step of GaLore on W, in place: Adam on the projected gradient, brought back to W's size.

    L = Pᵀ G, m ← β₁ m + (1 - β₁) L, v ← β₂ v + (1 - β₂) L²,
    W ← (1 - lr λ) W - lr α P (m̂ / (√v̂ + ε)), with m̂ = m / (1 - β₁ᵗ) and v̂ = v / (1 - β₂ᵗ).

    No matrix of W's size is made: G is read where it lies, and W read and written once.

    Args:
        weight: W (N, K), float32, bfloat16 or float16, any strides (float64 with backend="reference"). To project G on
            its other side (G P), give ``weight.T``, ``grad.T`` and a basis (K, R).
        grad: G (N, K), any float dtype and strides.
        basis: P (N, R), orthonormal columns, R <= N, any float dtype.
        exp_avg, exp_avg_sq: m, v (R, K), float32 (float64 over a float64 W), any strides. Fastest beside a
            ``weight.T`` as transposes of (K, R) that lie row by row.
        step: t, from 1.
        scale: α.
        backend: "auto", "reference", "cpu" (C++) or "triton".

    Computed in float32, W rounded once. Deterministic. A NaN or an infinity in G reaches the moments and W: ask first.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, numbers out of their range, a backend that is
            unknown or cannot run here. Nothing has been written then.

    Source: Zhao et al., "GaLore", arXiv 2403.03507, algorithm 2.
    """
    op = "galore_adam_"
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"{op}: expected betas to be a pair of numbers, got {betas!r:.60}")
    tensors = weight, grad, basis, exp_avg, exp_avg_sq
    call = GaLoreAdam(*tensors, lr, *betas, eps, weight_decay, scale, step, backend)
    raise_error(check_galore_rates(call))
    plan = None
    if traced():
        raise_error(check_galore_adam(call))
    else:
        plan = plan_galore_adam(call)
    call_galore_adam_(call, plan)


def lora_importance(
    weight: Weight,
    lora_a: Tensor,
    lora_b: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    *,
    scaling: float = 1.0,
    dim: str = "rows",
    backend: str = "auto",
) -> Tensor:
    """What pruning an output or input channel costs: sums of LoRAPrune's importance over rows or columns of W.

    Î = ((∇B A + B ∇A - ∇B ∇A) ∘ (W + s B A))², whose first factor stands for the gradient that W does not have. No
    matrix of W's size is made: tiles of ∇B (A - ∇A) + B ∇A and of W + s B A are, in registers.

    Args:
        weight: W (N, K), float32, bfloat16 or float16, any strides (float64 with backend="reference"). One that is
            stored in few bits is decoded some rows at a time.
        lora_a, grad_a: A and its gradient ∇A (R, K), and
        lora_b, grad_b: B and its gradient ∇B (N, R), any float dtype and strides; not rounded to W's dtype.
        scaling: s.
        dim: "rows": (N,), a sum for each output channel; "columns": (K,), for each input channel.
        backend: "auto", "reference" (dense), "cpu" (C++) or "triton".

    Returns:
        float32 (float64 where W is float64). A constant to autograd, whatever requires grad.

    Accumulates in float32, deterministic: sums of parts are added in a fixed order. Squares below 1e-38 lose digits,
    those above 3e38 are infinite, and NaN in W or in a factor goes through as NaN.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, an unknown dim, a backend that is unknown or
            cannot run here.

    Source: Zhang et al., "LoRAPrune", arXiv 2305.18403.
    """
    call = LoRAImportance(weight, lora_a, lora_b, grad_a, grad_b, scaling, dim, backend)
    plan = None
    with torch.no_grad():
        if traced():
            raise_error(check_lora_importance(call))
            if transformed():
                return plain_lora_importance(call).detach()
        else:
            plan = plan_lora_importance(call)
        sums: Tensor = call_lora_importance(call, plan)
    return sums


def magnitude_histogram(values: Tensor, *, digit: int = 0, leading: int = 0, backend: str = "auto") -> Tensor:
    """How many elements have each magnitude: counts of a digit of |x|, from which a k-th largest is found exactly.

    The 31 bits of a float32's magnitude are a number that rises with it. They are read as three digits of 12, 10 and 9
    bits; ``digit`` says which is counted, over the elements whose higher digits, as one number, are ``leading``. The
    first has 16 values to a power of two; bfloat16 and float16 have zeros in the last. Infinity is above every number,
    NaN above infinity.

    Args:
        values: any shape and strides, float32, bfloat16 or float16 (float64, rounded to float32, with
            backend="reference").
        digit: 0, 1 or 2.
        leading: what the digits above are: below 2^12 for digit 1, below 2^22 for digit 2, and 0 for digit 0.
        backend: "auto", "reference", "cpu" (C++) or "triton".

    Returns:
        (4096,), (1024,) or (512,) int64. A constant to autograd, whatever requires grad.

    Values are read once, and integers are added: exact, and the same on every backend.

    Raises:
        ValueError, TypeError: numbers out of their range, no float tensor, a backend unknown or unable to run here.
    """
    call = MagnitudeHistogram(values, digit, leading, backend)
    raise_error(check_digits(call))
    plan = None
    with torch.no_grad():
        if traced():
            raise_error(check_magnitude_histogram(call))
            if transformed():
                return plain_magnitude_histogram(call)
        else:
            plan = plan_magnitude_histogram(call)
        counts: Tensor = call_magnitude_histogram(call, plan)
    return counts


def stack_column_scale(weight: Weight, stack: LoRAStack, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(n, g), each (D, N): :func:`dora_column_scale` of each DoRA adapter of a stack, in the order of its magnitudes.

    Rows that no adapter has are 0. Never records gradients.

    Raises:
        TypeError, ValueError: a stack that is not one, or has no magnitudes; and as :func:`dora_column_scale`.
    """
    op = "stack_column_scale"
    if not isinstance(stack, LoRAStack):
        raise TypeError(f"{op}: expected stack to be a LoRAStack, got {type(stack).__name__}")
    if stack.magnitude is None:
        raise ValueError(f"{op}: expected a stack with DoRA adapters, got one without magnitudes")
    raise_error(backend_error(op, backend))
    shape = (stack.out_features, stack.in_features)
    if not isinstance(weight, (Tensor, FrozenWeight)) or weight.shape != shape or not weight.is_floating_point():
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: expected weight of shape (N, K) = {shape} and a floating dtype, got {got}")
    if weight.device != stack.lora_a.device:
        raise ValueError(
            f"{op}: expected weight and stack on one device, got {weight.device} and {stack.lora_a.device}"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.zeros(stack.magnitude.shape, dtype=dtype, device=weight.device)
    scale = torch.zeros_like(norm)
    sq_norms: list[Tensor | None] = [None] * len(stack.slices)
    with torch.no_grad():
        for adapter, place in enumerate(stack.places):
            if place.rank and place.magnitude >= 0:
                for s in range(len(stack.slices)):
                    lora_a, lora_b, scaling, magnitude = stack.factors(adapter, s)
                    assert magnitude is not None
                    own = (place.magnitude, stack.columns(s))
                    columns = stack.columns(s)
                    part = weight if not stack.is_sliced else rows(weight, columns.start, columns.stop)
                    norm[own], scale[own], sq_norms[s] = dora_column_scale(
                        part,
                        lora_a,
                        lora_b,
                        magnitude,
                        scaling=scaling,
                        weight_sq_norm=sq_norms[s],
                        backend=backend,
                    )
    return norm, scale


def svft_linear(
    x: Tensor,
    weight: Weight,
    u: Tensor,
    vh: Tensor,
    values: Tensor,
    pattern: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Frozen linear plus a sparse matrix in a frozen basis: y = x Wᵀ + bias + ((x V) Mᵀ) Uᵀ, which is x (W + U M Vᵀ)ᵀ.

    M is (I, J) with E values at fixed places; no matrix of W's size is made, in either direction:
    dX = dY W + ((dY U) M) Vᵀ, and dM_ij = Σ_tokens (dY U)_i (x V)_j at the places of M alone.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference"); any strides, may be empty.
        weight: W (N, K), x's dtype, frozen.
        u: U (N, I) and
        vh: Vᵀ (J, K), frozen, any float dtype: a copy in x's dtype is made where that is another.
        values: the values of M (E,), any float dtype; they are not rounded to x's.
        pattern: their places, from :func:`svft_pattern`.
        bias: (N,) or None, of any float dtype.
        backend: "auto", "reference", "cpu" (C++) or "triton".

    Returns:
        y (..., N) in x's dtype.

    The products with W, V and U are the library's. What is between them accumulates in float32 and is rounded to x's
    dtype once. Deterministic: sums over tokens are added up in a fixed order, without atomics. For backward, t = x V
    (M, J) is saved in x's dtype where the values are trained, and x never is.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, W, U or V that require grad, a backend that is
            unknown or cannot run here.

    Source: Lingam et al., "SVFT", arXiv 2405.19597; W in place of U Σ Vᵀ, see docs/methods/svft.md.
    """
    call = SVFTLinear(x, like(x, weight), u, vh, values, pattern, bias, False, backend)
    plan = None
    if traced():
        raise_error(check_svft_linear(call))
        if transformed():
            return plain_svft_linear(call)
    else:
        plan = plan_svft_linear(call)
    if torch.is_grad_enabled() and values.requires_grad:
        call = call._replace(save_t=True)
    y: Tensor = call_svft_linear(call, plan)[0]
    return y


def _dropout_of_each(dropout_p: float | Sequence[float], adapters: int) -> list[float]:
    """A probability an adapter, or none at all where there is no dropout."""
    if isinstance(dropout_p, (int, float)):
        if dropout_p == 0.0:
            return []
        dropout_p = [dropout_p] * adapters
    try:
        ps = [float(p) for p in dropout_p]
    except (TypeError, ValueError):
        raise TypeError(f"multi_lora_linear: expected dropout_p of numbers, got {dropout_p!r:.60}") from None
    if len(ps) != adapters or not all(0.0 <= p < 1.0 for p in ps):
        raise ValueError(
            f"multi_lora_linear: expected 0 <= dropout_p < 1, for all adapters or for each of {adapters}, "
            f"got {dropout_p}"
        )
    return ps if any(ps) else []


def experts_linear(
    x: Tensor,
    weight: Tensor,
    stack: LoRAStack,
    rows: RoutedRows | Tensor,
    *,
    norm_and_scale: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Frozen experts plus each row's own correction: y_m = g_i ∘ (W_e x_m + s_i B_i A_i drop(x_m)).

    Row m goes to expert e, and i is e's adapter, or that one of its G adapters which the row has. g_i =
    m_i / ‖W_e + s_i B_i A_i‖₂ (row norms) for a DoRA adapter, 1 for a LoRA one. No W_e + s B A is made.

    Args:
        x: (M, K), float32, bfloat16 or float16 (float64 with backend="reference"): a row for each token and expert.
        weight: (E, N, K), x's dtype, frozen; of any strides, so that experts stored as (E, K, N) are the transposed
            view.
        stack: a :class:`LoRAStack` of E adapters, or of E G where ``rows`` has adapters: adapter g of expert e is
            number e G + g. Not sliced.
        rows: which rows are whose, by :func:`plan_experts`; or (M,) integers from 0 to E - 1, in any order. Rows that
            are sorted (``x[rows.order]`` and ``rows.sorted()``) are multiplied where they lie.
        norm_and_scale: (n, g), each (D, N), from :func:`experts_column_scale`; computed here otherwise, which reads
            the weights.
        dropout_p: of all adapters.  dropout_seed: as for :func:`lora_linear`; the mask is over the rows of x.
        backend: "auto", "reference", "cpu" (C++) or "triton", of the correction. W's product is torch's grouped one in
            bfloat16 on a GPU; else a product an expert, for which a GPU has to be synchronised.

    Returns:
        y (M, N) in x's dtype. Gradients reach x and the stack's tensors. Saved for backward: x where A trains, and P
        (M, R) where B does.

    Raises:
        ValueError, TypeError: as :func:`multi_lora_linear`; a weight that is not (E, N, K), or requires grad; rows that
            were planned for another number of experts or rows.

    Sources: as :func:`multi_lora_linear`; Gale et al., "MegaBlocks", arXiv 2211.15841 (products over experts' rows).
    """
    op = "experts_linear"
    _check_experts(op, weight, stack)
    if isinstance(x, Tensor) and x.dim() != 2:
        raise ValueError(f"{op}: expected x of shape (M, K) = (M, {weight.shape[2]}), got {tuple(x.shape)}")
    raise_error(
        backend_error(op, backend)
        or floats_error(op, x=x)
        or product_error(op, x, weight[0])
        or device_error(op, x, weight=weight, stack=stack.lora_a)
        or frozen_error(op, x, weight)
        or number_error(op, "dropout_p", dropout_p, 0.0, 1.0)
    )
    planned = rows if isinstance(rows, RoutedRows) else _planned(op, rows, len(weight))
    if len(planned.bounds) != len(weight) + 1 or len(planned.order) != len(x):
        raise ValueError(
            f"{op}: expected rows planned for {len(weight)} experts and {len(x)} rows, got a plan for "
            f"{len(planned.bounds) - 1} and {len(planned.order)}"
        )
    raise_error(device_error(op, x, rows=planned.order))
    each = 1 if planned.num_adapters is None else planned.num_adapters
    if len(stack) != each * len(weight):
        raise ValueError(
            f"{op}: expected a stack of {each * len(weight)} adapters, {each} for each of {len(weight)} experts, "
            f"got {len(stack)}"
        )
    check_stack_scale(norm_and_scale, stack.magnitude, op)
    if stack.has_dora and norm_and_scale is None:
        norm_and_scale = experts_column_scale(weight, stack, backend=backend)
    made = ExpertWeights(weight, planned.bounds, None if planned.is_sorted else planned.order)
    return multi_lora_linear(
        x,
        made,
        stack if planned.num_adapters is None else stack.with_spare(planned.num_adapters),
        planned.segments,
        norm_and_scale=norm_and_scale,
        dropout_p=dropout_p,
        dropout_seed=seed_tensor(op, "dropout_seed", dropout_seed, x.device) if dropout_p else None,
        backend=backend,
    )


def experts_column_scale(weight: Tensor, stack: LoRAStack, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(n, g), each (D, N): :func:`dora_column_scale` of the DoRA adapters of a stack for experts (E, N, K).

    Adapter number i is expert ``i // G``'s, with G = len(stack) / E. Never records gradients.

    Raises:
        TypeError, ValueError: a weight that is not (E, N, K), a stack that is not of its experts, or without
            magnitudes.
    """
    op = "experts_column_scale"
    _check_experts(op, weight, stack)
    raise_error(backend_error(op, backend))
    if stack.magnitude is None:
        raise ValueError(f"{op}: expected a stack with DoRA adapters, got one without magnitudes")
    each, odd = divmod(len(stack), len(weight))
    if odd or not each:
        raise ValueError(f"{op}: expected as many adapters for each of {len(weight)} experts, got {len(stack)} in all")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.zeros(stack.magnitude.shape, dtype=dtype, device=weight.device)
    scale = torch.zeros_like(norm)
    with torch.no_grad():
        for i, place in enumerate(stack.places):
            if place.rank and place.magnitude >= 0:
                lora_a, lora_b, scaling, magnitude = stack.factors(i)
                assert magnitude is not None
                found = dora_column_scale(
                    weight[i // each].detach(), lora_a, lora_b, magnitude, scaling=scaling, backend=backend
                )
                norm[place.magnitude], scale[place.magnitude] = found[:2]
    return norm, scale


def _planned(op: str, rows: Any, experts: int) -> RoutedRows:
    try:
        return plan_experts(rows, experts)
    except (TypeError, ValueError) as error:
        said = str(error).removeprefix("plan_experts: expected ")
        raise type(error)(f"{op}: expected rows of plan_experts, or {said}") from None


def _check_experts(op: str, weight: Any, stack: Any) -> None:
    if not isinstance(stack, LoRAStack):
        raise TypeError(f"{op}: expected stack to be a LoRAStack, got {type(stack).__name__}")
    if stack.is_sliced:
        raise ValueError(f"{op}: expected a stack without slices, got one of {len(stack.slices)}")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 3 or not len(weight):
        got = f"{tuple(weight.shape)} {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{op}: expected weight of shape (E, N, K) and a floating dtype, got {got}")
    if tuple(weight.shape[1:]) != (stack.out_features, stack.in_features):
        raise ValueError(
            f"{op}: expected weight and stack of one (N, K), got {tuple(weight.shape[1:])} and "
            f"({stack.out_features}, {stack.in_features})"
        )
    if weight.device != stack.lora_a.device:
        raise ValueError(
            f"{op}: expected weight and stack on one device, got {weight.device} and {stack.lora_a.device}"
        )


def multi_lora_linear(
    x: Tensor,
    weight: Weight,
    stack: LoRAStack,
    adapter_ids: Tensor | BatchPlan,
    bias: Tensor | None = None,
    *,
    weights: Tensor | None = None,
    norm_and_scale: tuple[Tensor, Tensor] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Frozen linear plus each row's own adapter: y_m = g_i ∘ (W x_m + s_i B_i P_m) + bias with P_m = A_i drop(x_m).

    Row m has adapter i; g_i = m_i / ‖W + s_i B_i A_i‖₂ (row norms) for a DoRA adapter of the stack, 1 for a LoRA one.
    With J adapters a row: y_m = W x_m + Σ_j w_mj s_i(j) B_i(j) P_mj + bias.

    Args:
        x: (..., K), float32, bfloat16 or float16 (float64 with backend="reference"); M rows in all.
        weight: W (N, K), x's dtype, frozen.
        stack: a :class:`LoRAStack` of G adapters for this linear; its ``lora_a``, ``lora_b`` and ``magnitude`` get
            gradients where they require them. Factors are rounded to x's dtype inside (C++ keeps what they have).
            In a sliced one (Q, K and V as one weight) an adapter has factors of its own for each slice of the columns
            of y: one base product, then each slice as a linear of its own.
        adapter_ids: integers of x's leading shape, from -1, for the base product alone, to G - 1; or (M, J); or the
            plan that :func:`plan_batch` made of such, to share between linears.
        bias: (N,) or None, of any float dtype.
        weights: (M, J), each adapter's share in its row; they get no gradient.
        norm_and_scale: (n, g), each (D, N), from :func:`stack_column_scale` for this weight and stack; computed here
            otherwise, which reads the weight once for each DoRA adapter.
        dropout_p: as for :func:`lora_linear`, one for all adapters or one each. The norm is a constant in backward.
        dropout_seed: as for :func:`lora_linear`; the mask is over all M rows.
        backend: "auto", "reference", "cpu" (C++) or "triton".

    Returns:
        y (..., N) in x's dtype.

    The rows of an adapter are multiplied at its own rank, whatever the others' are; rows with id -1 cost nothing beyond
    the base product. That is the library's, to which the correction is added in float32; for few tokens the extension's
    on a CPU, and on a GPU our own, in whose float32 accumulator the correction rides, rounded once. Deterministic. A
    row's correction does not depend on the other rows, nor on its place among them.

    Raises:
        ValueError: shapes or devices that do not fit, ids out of range (on a GPU: a device-side assertion), a weight
            that requires grad, several adapters a row where the stack holds DoRA adapters, a backend that cannot run.
        TypeError: dtypes that do not fit, ids that are not integers, a stack that is not one.

    Sources: Chen et al., "Punica", arXiv 2310.18547 (the batch of adapters); Hu et al., arXiv 2106.09685; Liu et al.,
    arXiv 2402.09353.
    """
    op = "multi_lora_linear"
    if not isinstance(stack, LoRAStack):
        raise TypeError(f"{op}: expected stack to be a LoRAStack, got {type(stack).__name__}")
    batch = adapter_ids if isinstance(adapter_ids, BatchPlan) else None
    given: Any = adapter_ids if batch is None else batch.adapter_ids
    ps = [] if dropout_p == 0.0 else _dropout_of_each(dropout_p, len(stack))
    each_p = torch.tensor(ps, dtype=torch.float64, device=stack.lora_a.device) if ps else None
    slices = stack.slices if stack.is_sliced else None
    magnitude = stack.magnitude if stack.has_dora else None
    weight = like(x, weight)
    call = MultiLoRALinear(
        x, weight, stack.lora_a, stack.lora_b, magnitude, bias, stack.table, stack.scalings, stack.max_rank, slices,
        given, None, None, None, weights, None, None, each_p, None, False, False, backend,
    )  # fmt: skip
    plan = None
    if traced():
        raise_error(check_multi_lora_linear(call))
    else:
        plan = plan_multi_lora_linear(call)
    planned = len(stack) if batch is None else batch.bounds.shape[1] - 2
    if planned != len(stack):
        raise ValueError(f"{op}: expected a plan for {len(stack)} adapters, got one for {planned}")
    unseen = plan is not None and unobserved(call)
    if plan is not None and plan.direct and unseen:
        return multi_lora_linear_directly(call, plan)
    ids = given if batch is not None else as_ids(given.reshape(-1) if given.shape == x.shape[:-1] else given)
    seed = seed_tensor(op, "dropout_seed", dropout_seed, x.device) if ps else None
    norm = scale = None
    if magnitude is not None:
        check_stack_scale(norm_and_scale, magnitude)
        norm, scale = norm_and_scale or stack_column_scale(weight.detach(), stack, backend=backend)
    call = call._replace(
        adapter_ids=ids,
        weights=None if weights is None else weights.to(torch.float32),
        norm=norm,
        column_scale=scale,
        dropout_seed=seed,
        scalings=stack.scalings_in(x.dtype) if x.dtype == torch.float64 else stack.scalings,
    )
    if transformed():
        if torch._C._functorch.is_batchedtensor(ids):
            raise ValueError(
                f"{op}: expected adapter_ids that torch.func.vmap does not map over, since they decide which rows are "
                f"multiplied by what; give x all rows at once, with their ids"
            )
        return plain_multi_lora_linear(call)
    if batch is None and not (plan is not None and plan.unsorted):
        try:
            batch = plan_batch(ids, len(stack))
        except ValueError:
            check_range(given, len(stack))  # in this op's name, and in the words of the ids as they were given
            raise
    grad = torch.is_grad_enabled()
    if batch is not None:
        call = call._replace(order=batch.order, bounds=batch.bounds, tiles=batch.tiles)
    call = call._replace(
        save_p=grad and stack.lora_b.requires_grad, save_u=grad and magnitude is not None and magnitude.requires_grad
    )
    y: Tensor = call_multi_lora_linear(call, plan, unseen=unseen)[0]
    return y
