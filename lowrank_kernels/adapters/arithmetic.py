"""Sums, mergers and extractions of adapters: on factors where that is exact, a module at a time where it is not.

Products and decompositions are computed in float64; results are float32 with s = 1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter, Factors, check_adapter
from .base import checkpoint_files
from .convert import read
from .folder import FILE_DTYPES, few, read_header

Source = str | os.PathLike[str] | Adapter
_MAX_TENSORS = 1 << 20


class Approximation(NamedTuple):
    """An adapter of lower rank than what it stands for."""

    adapter: Adapter
    errors: Mapping[str, float]
    """Of each module ‖D - B A‖ / ‖D‖ in the Frobenius norm, D being what B A stands for; 0 where that is 0."""
    left_out: tuple[str, ...] = ()
    """Names of tensors that differ between two models and are no matrices: no adapter of this kind holds them."""


def weighted_sum(sources: Sequence[Source], weights: Sequence[float] | None = None) -> Adapter:
    """Σ_i w_i s_i B_i A_i, exactly: A = [A_1; A_2; ...], B = [w_1 s_1 B_1, w_2 s_2 B_2, ...].

    The rank of a module is the sum of its ranks in the adapters that have it. ``reduce_rank`` makes it smaller.

    Args:
        sources: adapters, of any format that is read.
        weights: w of each; None: 1.

    Raises:
        ValueError: DoRA, or weights trained whole, which do not add up; shapes that differ; weights that are not finite
            or not as many as there are sources.
    """
    adapters, weights = _given("weighted_sum", sources, weights)
    modules = {}
    for path, terms in _terms("weighted_sum", adapters, weights).items():
        parts = [f._replace(scaling=f.scaling * w).folded() for f, w in terms]
        a, b = torch.cat([f.lora_a for f in parts]), torch.cat([f.lora_b for f in parts], 1)
        biases = [f.lora_bias for f in parts if f.lora_bias is not None]
        bias = torch.stack([t.float() for t in biases]).sum(0) if biases else None
        modules[path] = Factors(a, b, 1.0, None, bias, parts[0].embedding)
    return Adapter(modules, settings=_common(adapters), origin="a weighted sum")


def reduce_rank(source: Source, rank: int) -> Approximation:
    """The adapter of rank ``rank`` that is nearest to s B A in every module, by the SVD of an R × R matrix.

    s B A = Q_b (s R_b R_aᵀ) Q_aᵀ with B = Q_b R_b and Aᵀ = Q_a R_a; the SVD U S Vᵀ of the matrix in the middle gives
    B' = Q_b U √S and A' = √S Vᵀ Q_aᵀ, cut at ``rank``. No matrix of W's size is made. The error is √(Σ S_i² of what is
    cut off), over that of all. A module of a lower rank keeps it.

    Raises:
        ValueError: a rank below 1; DoRA, whose norm depends on all of B A.
    """
    (adapter,), _ = _given("reduce_rank", [source], None)
    _check_rank("reduce_rank", rank)
    _check_plain("reduce_rank", adapter)
    modules, errors = {}, {}
    for path, f in adapter.modules.items():
        a, b = f.lora_a.double().flatten(1), f.lora_b.double().flatten(1)
        (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a.T), torch.linalg.qr(b)
        u, s, v = torch.linalg.svd(f.scaling * r_b @ r_a.T, full_matrices=False)
        bias = None if f.lora_bias is None else f.lora_bias * f.scaling
        modules[path] = _of_svd(f, q_b @ u, s, v @ q_a.T, rank)._replace(lora_bias=bias)
        errors[path] = _share(s, min(rank, f.rank))
    return Approximation(replace(adapter, modules=modules), errors)


def ties(
    sources: Sequence[Source], weights: Sequence[float] | None = None, *, density: float, rank: int
) -> Approximation:
    """TIES-Merging of the corrections D_i = s_i B_i A_i, and the nearest adapter of a rank to it.

    Of each D_i the share ``density`` of largest magnitude stays. The sign of each element is that of Σ_i D_i; the mean
    of w_i D_i is taken over those i whose sign it is. (Yadav et al., 2023, arXiv:2306.01708, section 4.) Elements are
    those of the corrections: on factors, signs mean nothing. One module's corrections are in memory at a time.

    Raises:
        ValueError: as :func:`weighted_sum`; a density that is not above 0 and at most 1; a rank below 1.
    """
    _check_density("ties", density)

    def merge(deltas: list[Tensor], own: list[float]) -> Tensor:
        trimmed = torch.stack([_largest(d, density) for d in deltas])
        sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
        agree = trimmed.sign() == sign
        weighted = trimmed * torch.tensor(own, dtype=trimmed.dtype).view(-1, *[1] * deltas[0].dim())
        return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)

    return _merged("ties", sources, weights, rank, merge)


def dare(
    sources: Sequence[Source], weights: Sequence[float] | None = None, *, density: float, rank: int, seed: int = 0
) -> Approximation:
    """DARE of the corrections D_i = s_i B_i A_i, and the nearest adapter of a rank to Σ_i w_i M_i ∘ D_i / density.

    M_i keeps each element with the probability ``density``, drawn from ``seed`` in the order of the paths. (Yu et al.,
    2024, arXiv:2311.03099, equation 2.)

    Raises:
        ValueError: as :func:`ties`.
    """
    _check_density("dare", density)
    generator = torch.Generator().manual_seed(seed)

    def merge(deltas: list[Tensor], own: list[float]) -> Tensor:
        total = torch.zeros_like(deltas[0])
        for delta, w in zip(deltas, own, strict=True):
            keep = torch.rand(delta.shape, generator=generator, dtype=torch.float64) < density
            total += delta * keep * (w / density)
        return total

    return _merged("dare", sources, weights, rank, merge)


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    rank: int,
    *,
    targets: Callable[[str], bool] | None = None,
    seed: int = 0,
) -> Approximation:
    """The adapter of a rank that is near to what full fine-tuning changed: B A ≈ W_tuned - W_base in every matrix.

    By randomised SVD with ``rank`` + 8 random directions and two power iterations (Halko, Martinsson and Tropp, 2011,
    algorithms 4.4 and 5.1): exact up to rounding where the change has that rank. Matrices that did not change get no
    factors. One matrix of each model is in memory at a time.

    Args:
        base, tuned: folders of safetensors checkpoints of one architecture.
        rank: of each module, or the smaller side of its matrix.
        targets: which matrices, by the path of their module; None: all but embeddings and heads.
        seed: of the random directions.

    Returns:
        The adapter, the error of each module, and the names of changed tensors that it does not hold.

    Raises:
        ValueError: a folder without safetensors; tensors that are not there in both, or in other shapes; a rank below
            1; two models that are the same.
    """
    from safetensors import safe_open

    op = "extract"
    _check_rank(op, rank)
    old, new = _places(op, Path(base)), _places(op, Path(tuned))
    if old.keys() != new.keys():
        raise ValueError(f"{op}: expected two models of the same tensors, got others: {few(sorted(old ^ new.keys()))}")
    wanted = targets or (lambda path: not path.endswith(("embed_tokens", "lm_head", "wte", "embed_in", "embed_out")))
    generator = torch.Generator().manual_seed(seed)
    modules, errors, left_out = {}, {}, []
    for name in sorted(old):
        pair = []
        for places in (old, new):
            with safe_open(places[name][0], framework="pt", device="cpu") as file:
                pair.append(file.get_tensor(name))
        if pair[0].shape != pair[1].shape:
            raise ValueError(
                f"{op}: expected {name} of shape {tuple(pair[0].shape)} in both, got {tuple(pair[1].shape)}"
            )
        if torch.equal(pair[0], pair[1]):
            continue
        path = name.removesuffix(".weight")
        if path == name or pair[0].dim() != 2 or not wanted(path):
            left_out.append(name)
            continue
        change = pair[1].double() - pair[0].double()
        u, s, v = _randomised_svd(change, rank, generator)
        modules[path] = _of_svd(None, u, s, v, rank)
        rest = change - modules[path].delta(torch.float64)
        errors[path] = float(rest.norm() / change.norm())
    if not modules:
        raise ValueError(f"{op}: expected two models whose matrices differ, got none that do in {tuned}")
    adapter = Adapter(modules, settings={"base_model_name_or_path": str(base)}, origin=f"{tuned} over {base}")
    return Approximation(check_adapter(adapter, op), errors, tuple(left_out))


def _places(op: str, folder: Path) -> dict[str, tuple[Path, str]]:
    """{name: (file, dtype)} of the float tensors of a checkpoint."""
    files = checkpoint_files(folder) if folder.is_dir() else []
    if not files:
        raise ValueError(f"{op}: expected the folder of a safetensors checkpoint, got {folder}")
    found = {n: (path, entry.dtype) for path in files for n, entry in read_header(path, _MAX_TENSORS, op).items()}
    return {name: place for name, place in found.items() if place[1] in FILE_DTYPES}


def _randomised_svd(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    directions = min(rank + 8, *matrix.shape)
    random = torch.randn(matrix.shape[1], directions, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(matrix @ random)[0]
    for _ in range(2):
        q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ q)[0])[0]
    u, s, v = torch.linalg.svd(q.T @ matrix, full_matrices=False)
    return q @ u, s, v


def _merged(
    op: str,
    sources: Sequence[Source],
    weights: Sequence[float] | None,
    rank: int,
    merge: Callable[[list[Tensor], list[float]], Tensor],
) -> Approximation:
    adapters, weights = _given(op, sources, weights)
    _check_rank(op, rank)
    modules, errors = {}, {}
    for path, terms in sorted(_terms(op, adapters, weights).items()):
        if any(f.lora_bias is not None for f, _ in terms):
            raise ValueError(f"{op}: expected adapters without lora_bias, got one of {path}; weighted_sum adds those")
        delta = merge([f.delta(torch.float64) for f, _ in terms], [w for _, w in terms])
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        modules[path] = _of_svd(terms[0][0], u, s, v, rank)
        errors[path] = _share(s, rank)
    return Approximation(Adapter(modules, settings=_common(adapters), origin=op), errors)


def _of_svd(like: Factors | None, u: Tensor, s: Tensor, v: Tensor, rank: int) -> Factors:
    """√S shared by both factors, cut at the rank, in the shapes of ``like``."""
    r = min(rank, s.numel())
    root = s[:r].sqrt()
    a, b = (root[:, None] * v[:r]).float(), (u[:, :r] * root).float()
    if like is not None:
        a, b = a.reshape(r, *like.lora_a.shape[1:]), b.reshape(b.shape[0], r, *like.lora_b.shape[2:])
    return Factors(a, b, 1.0, embedding=like is not None and like.embedding)


def _share(s: Tensor, rank: int) -> float:
    total = float(s.norm())
    return float(s[rank:].norm()) / total if total else 0.0


def _largest(delta: Tensor, density: float) -> Tensor:
    keep = int(density * delta.numel())
    kept = torch.zeros(delta.numel(), dtype=delta.dtype)
    kept[delta.abs().flatten().topk(keep).indices] = 1.0
    return delta * kept.view(delta.shape)


def _given(
    op: str, sources: Sequence[Source], weights: Sequence[float] | None
) -> tuple[list[Adapter], Sequence[float]]:
    adapters = [s if isinstance(s, Adapter) else read(s) for s in sources]
    weights = [1.0] * len(adapters) if weights is None else list(weights)
    if not adapters or len(weights) != len(adapters) or not all(math.isfinite(w) for w in weights):
        raise ValueError(f"{op}: expected a finite weight for each of {len(adapters)} adapters, got {weights}")
    return [check_adapter(adapter, op) for adapter in adapters], weights


def _terms(op: str, adapters: Sequence[Adapter], weights: Sequence[float]) -> dict[str, list[tuple[Factors, float]]]:
    """{path: (factors, weight) of each adapter that has it}."""
    found: dict[str, list[tuple[Factors, float]]] = {}
    for adapter, w in zip(adapters, weights, strict=True):
        _check_plain(op, adapter)
        for path, f in adapter.modules.items():
            found.setdefault(path, []).append((f, w))
    for path, terms in found.items():
        shapes = {(*f.lora_a.shape[1:], *f.lora_b.shape[:1], f.embedding) for f, _ in terms}
        if len(shapes) > 1:
            raise ValueError(f"{op}: expected {path} of one shape in every adapter, got {sorted(map(str, shapes))}")
    return found


def _check_plain(op: str, adapter: Adapter) -> None:
    if adapter.dora:
        raise ValueError(
            f"{op}: expected LoRA adapters, got DoRA in {adapter.origin}, whose norm is over W + s B A; merge each "
            f"into the base and extract() the result"
        )
    if adapter.others:
        raise ValueError(
            f"{op}: expected factors alone, got weights trained whole in {adapter.origin}: {few(list(adapter.others))}"
        )


def _check_rank(op: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"{op}: expected rank to be an integer of at least 1, got {rank!r}")


def _check_density(op: str, density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise ValueError(f"{op}: expected density to be above 0 and at most 1, got {density!r}")


def _common(adapters: Sequence[Adapter]) -> dict[str, Any]:
    first = dict(adapters[0].settings)
    return {key: value for key, value in first.items() if all(a.settings.get(key) == value for a in adapters)}
