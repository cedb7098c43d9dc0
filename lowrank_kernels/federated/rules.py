"""What a server makes of its clients' factors: one pure function a rule.

Each takes the clients' :class:`Factors`, of any ranks and scalings, and their weights c_i, such as numbers of examples,
which are taken as shares of their sum. Leading dimensions are layers of equal shape, and one call does them all. Sums
are made in float64, in the order of the clients, and rounded once to the dtype of the first client's factors. Nothing
of the size of W is made.

Raised by all: TypeError and ValueError as :func:`~.factors.check_clients` and :func:`~.factors.check_shares` have them;
ValueError where finite factors give NaN or Inf in the dtype of the result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..finite import all_finite
from .factors import Factors, check_clients, check_rank, check_scaling, check_shares, padded


@torch.no_grad()
def average(tensors: Sequence[Tensor], client_weights: Sequence[float] | None = None) -> Tensor:
    """Σ_i c_i T_i of tensors of one shape: biases, DoRA's magnitudes, blocks of W.

    Raises:
        TypeError: not a list of floating tensors.
        ValueError: other shapes; NaN or Inf.
    """
    if not isinstance(tensors, (list, tuple)) or not all(
        isinstance(t, Tensor) and t.is_floating_point() for t in tensors
    ):
        raise TypeError("average: expected tensors to be a list of tensors of floats, one a client")
    shares = check_shares("average", len(tensors), client_weights)
    first = tensors[0]
    total = torch.zeros_like(first, dtype=torch.float64)
    for place, (share, t) in enumerate(zip(shares, tensors, strict=True)):
        if t.shape != first.shape:
            raise ValueError(f"average: expected shape {tuple(first.shape)} of client {place}, got {tuple(t.shape)}")
        if not all_finite(t):
            raise ValueError(f"average: expected finite tensors, and client {place}'s holds NaN or Inf; leave it out")
        total.add_(t.detach(), alpha=share)
    return total.to(first.dtype)


@torch.no_grad()
def fed_avg(clients: Sequence[Factors], client_weights: Sequence[float] | None = None) -> Factors:
    """A = Σ_i c_i A_i, B = Σ_i c_i B_i: FedAvg of the factors.

    Not exact: B A is not Σ_i c_i B_i A_i, except for one client, or where one factor is the same for all. A client of
    a lower rank counts with zeros in the ranks that it lacks.

    Source: McMahan et al., arXiv 1602.05629, on LoRA's factors as Zhang et al., arXiv 2305.05644, have it; zeros for
    other ranks: Cho et al., arXiv 2401.06432.
    """
    check_clients("fed_avg", clients)
    shares = check_shares("fed_avg", len(clients), client_weights)
    alike, s = padded(clients)
    mean = Factors(average([c.lora_a for c in alike], shares), average([c.lora_b for c in alike], shares), s)
    return _rounded("fed_avg", mean, clients)


@torch.no_grad()
def ffa_lora(clients: Sequence[Factors], client_weights: Sequence[float] | None = None) -> Factors:
    """A as it is, B = Σ_i c_i B_i, where all clients have the same A: s B A = Σ_i c_i s_i B_i A_i, exactly.

    A client of rank R_i has the first R_i rows of A. FFA-LoRA keeps one A for ever; Fed-RAC-LoRA draws one a round,
    and merges s B A into W at its end.

    Raises:
        ValueError: a client whose A is another.

    Source: Sun et al., arXiv 2403.12313; Malinovsky et al., arXiv 2410.08305, section 6.
    """
    check_clients("ffa_lora", clients)
    shares = check_shares("ffa_lora", len(clients), client_weights)
    whole = max(clients, key=lambda c: c.rank)
    for place, c in enumerate(clients):
        if not torch.equal(c.lora_a, whole.cut(c.rank).lora_a):
            raise ValueError(f"ffa_lora: expected one A, shared by all clients, and that of client {place} is another")
    alike, s = padded(clients)
    mean = Factors(whole.lora_a.detach(), average([c.lora_b for c in alike], shares), s)
    return _rounded("ffa_lora", mean, clients)._replace(lora_a=mean.lora_a)


@torch.no_grad()
def fed_ex_lora(clients: Sequence[Factors], client_weights: Sequence[float] | None = None) -> tuple[Factors, Factors]:
    """(mean, residual): the averaged factors, and the change of W that makes them exact.

    s B̄ Ā as of :func:`fed_avg`, and s (Σ_i c_i B_i A_i - B̄ Ā), to be merged into W, whose sum is
    Σ_i c_i s_i B_i A_i. The deviations from B̄ sum to zero, so with n clients

        Σ_i c_i B_i A_i - B̄ Ā = Σ_{i < n} c_i (B_i - B̄) (A_i - A_n),

    factors of rank (n - 1) R, which is how the residual is returned; of rank 0 for one client.

    Source: Singhal et al., arXiv 2410.09432, equation 6; the smaller rank is ours.
    """
    check_clients("fed_ex_lora", clients)
    shares = check_shares("fed_ex_lora", len(clients), client_weights)
    mean = fed_avg(clients, client_weights)
    alike, s = padded(clients)
    centre = mean.lora_b.double()  # as the clients get it, rounded
    last = alike[-1]
    a = [c.lora_a - last.lora_a for c in alike[:-1]]
    b = [share * (c.lora_b - centre) for share, c in zip(shares, alike[:-1], strict=False)]
    empty = Factors(last.lora_a[..., :0, :], last.lora_b[..., :0])
    residual = Factors(torch.cat([empty.lora_a, *a], dim=-2), torch.cat([empty.lora_b, *b], dim=-1), s)
    return mean, _rounded("fed_ex_lora", residual, clients)


@torch.no_grad()
def flex_lora(
    clients: Sequence[Factors], client_weights: Sequence[float] | None = None, *, rank: int | None = None
) -> Factors:
    """The best approximation U S Vᵀ of Σ_i c_i s_i B_i A_i of a rank, split evenly: B = U √(S/s), A = √(S/s) Vᵀ.

    Exact where ``rank`` is at least that of the sum, which is at most Σ_i R_i. Ranks are in descending order of
    their singular values, so that ``cut(r)`` is the best approximation of rank r. One client of just this rank is
    returned as it is.

    From QR decompositions of the stacked B (N, Σ_i R_i) and the stacked A; the SVD is of a (Σ_i R_i, Σ_i R_i) matrix.

    Args:
        rank: of the result; the highest of the clients' by default. Zeros beyond the rank of the sum.

    Raises:
        TypeError, ValueError: a rank that is not an integer of at least 1; an s of the highest rank's client that is
            not above 0.

    Source: Bai et al., arXiv 2402.11505, section 3.
    """
    op = "flex_lora"
    check_clients(op, clients)
    shares = check_shares(op, len(clients), client_weights)
    whole = max(clients, key=lambda c: c.rank)
    rank = whole.rank if rank is None else rank
    check_rank(op, rank)
    check_scaling(op, whole.scaling, divides=True)
    if len(clients) == 1 and whole.rank == rank:
        return whole
    b = torch.cat([c.lora_b.double() * (share * c.scaling) for share, c in zip(shares, clients, strict=True)], dim=-1)
    a = torch.cat([c.lora_a.double() for c in clients], dim=-2)
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.mT)
    u, sigma, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    root = (sigma[..., :rank] / whole.scaling).sqrt()
    new_b = (q_b @ u[..., :rank]) * root[..., None, :]
    new_a = root[..., :, None] * (vh[..., :rank, :] @ q_a.mT)
    missing = rank - root.shape[-1]
    wide_a, wide_b = torch.nn.functional.pad(new_a, (0, 0, 0, missing)), torch.nn.functional.pad(new_b, (0, missing))
    return _rounded(op, Factors(wide_a, wide_b, whole.scaling), clients)


def _rounded(op: str, found: Factors, clients: Sequence[Factors]) -> Factors:
    """In the dtypes of the first client's factors. Raises ValueError where that gives NaN or Inf."""
    a, b = found.lora_a.to(clients[0].lora_a.dtype), found.lora_b.to(clients[0].lora_b.dtype)
    if not (all_finite(a) and all_finite(b)):
        raise ValueError(f"{op}: expected a finite result, and the clients' factors overflow {a.dtype} and {b.dtype}")
    return Factors(a, b, found.scaling)
