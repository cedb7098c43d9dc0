"""SVFT's linear (arXiv 2405.19597), as the formula says: W and a sparse M between its singular vectors."""

from __future__ import annotations

import torch
from torch import Tensor


def svft_matrix_ref(values: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """M of ``shape`` (I, J): ``values`` (E,) at the rows and columns of ``index`` (2, E), each once, and zeros."""
    rows, columns = index.long()
    return values.new_zeros(shape).index_put((rows, columns), values)


def svft_linear_ref(
    x: Tensor, weight: Tensor, u: Tensor, vh: Tensor, values: Tensor, index: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, t): t = x V, y = x Wᵀ + bias + (t Mᵀ) Uᵀ.

    Args:
        x: (..., K).  weight: W (N, K).  u: U (N, I).  vh: Vᵀ (J, K).
        values, index: of M (I, J), as for :func:`svft_matrix_ref`.

    Half precision is widened to float32, and y and t (M, J) are rounded once; float64 stays float64.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows = x.to(wide)
    t = rows @ vh.to(wide).T
    y = rows @ weight.to(wide).T + (t @ svft_matrix_ref(values.to(wide), index, (u.shape[1], len(vh))).T) @ u.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype), t.to(x.dtype)


def svft_linear_backward_ref(
    grad_y: Tensor,
    weight: Tensor,
    u: Tensor,
    vh: Tensor,
    values: Tensor,
    index: Tensor,
    t: Tensor | None,
    *,
    needs: tuple[bool, ...] = (True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dX = dY W + (ds M) Vᵀ with ds = dY U, dM_ij = Σ ds_i t_j at the places of M alone, and dbias = Σ dY, summed over
    tokens; ``needs`` says which of the three are wanted.

    Args:
        grad_y: dY (M, N).  t: x V (M, J), needed for dM alone.
    """
    wide = torch.promote_types(grad_y.dtype, torch.float32)
    dy, basis = grad_y.to(wide), vh.to(wide)
    ds = dy @ u.to(wide)
    grad_x = grad_values = None
    if needs[0]:
        m = svft_matrix_ref(values.to(wide), index, (u.shape[1], len(vh)))
        grad_x = (dy @ weight.to(wide) + (ds @ m) @ basis).to(grad_y.dtype)
    if needs[1]:
        assert t is not None
        rows, columns = index.long()
        grad_values = (ds.T @ t.to(wide))[rows, columns].to(values.dtype)
    return grad_x, grad_values, dy.sum(0).to(grad_y.dtype) if needs[2] else None
