"""Problems of the multi-adapter linear, and its plain-PyTorch form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.reference import dropout_keep_mask_ref
from lowrank_kernels.stack import Place

from . import Problem
from .lora import BF16, F16, F32, SEED

RANKS = (1, 2, 3, 5, 7, 8, 16, 32, 64)


def eager_multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    places: Sequence[Place],
    dropout_p: Sequence[float] | float = 0.0,
) -> Tensor:
    """What one would write with PyTorch alone: a loop over the adapters, every step rounded to x's dtype."""
    ids = adapter_ids if adapter_ids.dim() == 2 else adapter_ids[:, None]
    ps = [dropout_p] * len(places) if isinstance(dropout_p, float) else dropout_p
    base = x @ weight.T
    y = base
    for j in range(ids.shape[1]):
        for i, (start, rank, scaling, dora, _) in enumerate(places):
            mine = (ids[:, j] == i)[:, None]
            a, b = (f[start : start + rank].to(x.dtype) for f in (lora_a, lora_b))
            dropped = x
            if ps[i]:
                keep = dropout_keep_mask_ref(torch.tensor(SEED), *x.shape, ps[i])
                dropped = torch.where(keep, x, 0) / (1.0 - ps[i])
            correction = scaling * (dropped @ a.T @ b)
            if weights is not None:
                correction = weights[:, j : j + 1].to(x.dtype) * correction
            if dora >= 0:
                assert magnitude is not None
                norm = (weight + scaling * (b.T @ a)).norm(dim=1).detach()
                scale = magnitude[dora].to(x.dtype) / norm
                y = torch.where(mine, scale * base + scale * correction, y)
            else:
                y = y + torch.where(mine, correction, 0)
    return y if bias is None else y + bias


def multi_lora_problem(
    name: str,
    ids: Tensor,
    K: int,
    N: int,
    ranks: Sequence[int],
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    *,
    dora: Sequence[int] = (),
    bias: bool = False,
    weighted: bool = False,
    dropout_p: Sequence[float] | float = 0.0,
    seed: int = 0,
) -> Problem:
    """``ids`` (M,) or (M, J); ``dora``: which adapters have a magnitude."""
    generator = torch.Generator().manual_seed(seed)
    factor_dtype = factor_dtype or dtype
    M, total = ids.shape[0], sum(ranks)

    def random(*shape: int, scale: float = 1.0, of: torch.dtype = dtype, grad: bool = True) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(of).requires_grad_(grad)

    places, start = [], 0
    for i, rank in enumerate(ranks):
        places.append(Place(start, rank, 0.5 + 0.25 * (i % 4), list(dora).index(i) if i in dora else -1))
        start += rank
    per_rank = torch.cat([torch.full((rank, 1), rank**-0.5) for rank in ranks]) if ranks else torch.zeros(0, 1)
    lora_b = (per_rank * torch.randn(total, N, generator=generator)).to(factor_dtype).requires_grad_()
    tensors = {
        "x": random(M, K),
        "weight": random(N, K, scale=K**-0.5, grad=False),
        "lora_a": random(total, K, scale=K**-0.5, of=factor_dtype),
        "lora_b": lora_b,
        "adapter_ids": ids,
    }
    if bias:
        tensors["bias"] = random(N)
    if dora:
        tensors["magnitude"] = (0.5 + torch.rand(len(dora), N, generator=generator)).to(factor_dtype).requires_grad_()
    if weighted:
        tensors["weights"] = random(*ids.shape, of=F32, grad=False)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        stack = lk.LoRAStack(t["lora_a"], t["lora_b"], places, t.get("magnitude"))
        return lk.multi_lora_linear(
            t["x"],
            t["weight"],
            stack,
            t["adapter_ids"],
            t.get("bias"),
            weights=t.get("weights"),
            dropout_p=dropout_p,
            dropout_seed=SEED,
            backend=backend,
        )

    def eager(t: dict[str, Tensor]) -> Tensor:
        return eager_multi_lora_linear(**t, places=places, dropout_p=dropout_p)

    return Problem(f"multi_lora: {name}", tensors, run, eager)


def eager_sliced(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    adapter_ids: Tensor,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    *,
    places: Sequence[Place],
    slices: Sequence[int],
    **settings: Any,
) -> Tensor:
    """Every slice as a linear of its own, with the rows of the weight and of everything else that are its own."""
    parts, begin = [], 0
    for s, width in enumerate(slices):
        own = slice(begin, begin + width)
        of_slice = [Place(p.start, *p.slices[s], p.magnitude) for p in places]
        parts.append(
            eager_multi_lora_linear(
                x,
                weight[own],
                lora_a[s],
                lora_b[:, own],
                adapter_ids,
                None if bias is None else bias[own],
                None if magnitude is None else magnitude[:, own],
                places=of_slice,
                **settings,
            )
        )
        begin += width
    return torch.cat(parts, dim=1)


def sliced_problem(
    name: str,
    ids: Tensor,
    K: int,
    slices: Sequence[int],
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    **settings: Any,
) -> Problem:
    """``ranks``: an adapter's in each slice, 0 for none."""
    dropout_p = settings.get("dropout_p", 0.0)
    plain = multi_lora_problem(name, ids, K, sum(slices), [max(r) for r in ranks], dtype, factor_dtype, **settings)
    tensors = dict(plain.tensors)
    generator = torch.Generator().manual_seed(7)
    total = tensors["lora_b"].shape[0]
    more = K**-0.5 * torch.randn(len(slices), total, K, generator=generator)
    tensors["lora_a"] = more.to(tensors["lora_a"].dtype).requires_grad_()
    places, start, dora = [], 0, settings.get("dora", ())
    for i, each in enumerate(ranks):
        of_slices = tuple((r, 0.5 + 0.25 * ((i + s) % 4) if r else 0.0) for s, r in enumerate(each))
        row = list(dora).index(i) if i in dora else -1
        places.append(Place(start, max(each), of_slices[0][1], row, of_slices))
        start += max(each)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        stack = lk.LoRAStack(t["lora_a"], t["lora_b"], places, t.get("magnitude"), slices=slices)
        return lk.multi_lora_linear(
            t["x"],
            t["weight"],
            stack,
            t["adapter_ids"],
            t.get("bias"),
            dropout_p=dropout_p,
            dropout_seed=SEED,
            backend=backend,
        )

    def eager(t: dict[str, Tensor]) -> Tensor:
        return eager_sliced(**t, places=places, slices=slices, dropout_p=dropout_p)

    return Problem(f"multi_lora: {name}", tensors, run, eager)


def eager_experts(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    magnitude: Tensor | None = None,
    *,
    places: Sequence[Place],
    **settings: Any,
) -> Tensor:
    """A loop over the experts, each of which is a linear for many adapters to all rows."""
    y, each = 0.0, len(places) // len(weight)
    for e, w in enumerate(weight):
        own = places[e * each : (e + 1) * each]
        mine = ids[:, 0] == e
        of_one = eager_multi_lora_linear(x, w, lora_a, lora_b, ids[:, 1], None, magnitude, places=own, **settings)
        y = y + torch.where(mine[:, None], of_one, 0)
    return y  # type: ignore[return-value]


def experts_problem(
    name: str,
    ids: Tensor,
    adapters: Tensor | None,
    K: int,
    N: int,
    ranks: Sequence[Sequence[int]],
    dtype: torch.dtype,
    factor_dtype: torch.dtype | None = None,
    *,
    transposed: bool = False,
    in_order: bool = False,
    **settings: Any,
) -> Problem:
    """``ids`` (M,): each row's expert; ``ranks``: of the adapters of each expert, of which ``adapters`` (M,) picks one.

    ``transposed``: weights are stored as (E, K, N). ``in_order``: rows come sorted by expert.
    """
    every = [r for of_expert in ranks for r in of_expert]
    plain = multi_lora_problem(name, ids, K, N, every, dtype, factor_dtype, **settings)
    places = [
        Place(
            p, r, 0.5 + 0.25 * (i % 4), list(settings.get("dora", ())).index(i) if i in settings.get("dora", ()) else -1
        )
        for i, (p, r) in enumerate(zip(torch.tensor([0, *every]).cumsum(0).tolist(), every, strict=False))
    ]
    E, G = len(ranks), len(ranks[0])
    generator = torch.Generator().manual_seed(5)
    weight = (K**-0.5 * torch.randn((E, K, N) if transposed else (E, N, K), generator=generator)).to(dtype)
    which = torch.zeros_like(ids) if adapters is None else adapters
    if in_order:
        turn = (ids * (G + 1) + torch.where(which < 0, G, which)).argsort(stable=True)
        ids, which = ids[turn], which[turn]
    tensors = plain.tensors | {"weight": weight.transpose(1, 2) if transposed else weight}
    tensors.pop("adapter_ids")
    tensors["ids"] = torch.stack([ids, which], dim=1)

    def run(t: dict[str, Tensor], backend: str) -> Tensor:
        stack = lk.LoRAStack(t["lora_a"], t["lora_b"], places, t.get("magnitude"))
        given = (t["ids"][:, 0], E, *(() if adapters is None else (t["ids"][:, 1], G)))
        rows = lk.plan_experts(*given)
        if in_order:
            assert torch.equal(rows.order, torch.arange(len(ids), dtype=torch.int32))
            rows = rows.sorted()
        return lk.experts_linear(
            t["x"],
            t["weight"],
            stack,
            rows,
            dropout_p=settings.get("dropout_p", 0.0),
            dropout_seed=SEED,
            backend=backend,
        )

    def eager(t: dict[str, Tensor]) -> Tensor:
        return eager_experts(**t, places=places, dropout_p=settings.get("dropout_p", 0.0))

    return Problem(f"multi_lora: {name}", tensors, run, eager)


def population(name: str, rows: int, adapters: int, seed: int = 0) -> Tensor:
    """Punica's populations, and the batches without adapters: (rows,) ids, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    if name == "identical":
        ids = torch.zeros(rows, dtype=torch.int64)
    elif name == "distinct":
        ids = torch.arange(rows) % adapters
    elif name == "uniform":
        groups = max(1, int(rows**0.5 + 0.999))
        ids = torch.arange(rows) % min(groups, adapters)
    elif name == "zipf":
        shares = 1.0 / torch.arange(1, adapters + 1) ** 1.5
        ids = torch.multinomial(shares, rows, replacement=True, generator=generator)
    elif name == "skewed":
        ids = torch.ones(rows, dtype=torch.int64)
        ids[:1] = 0
    elif name == "base":
        ids = torch.full((rows,), -1)
    else:
        assert name == "mixed"
        ids = torch.randint(-1, adapters, (rows,), generator=generator)
    return ids[torch.randperm(rows, generator=generator)]


POPULATIONS = ("identical", "distinct", "uniform", "zipf", "skewed", "base", "mixed")


def problems() -> Iterator[Problem]:
    for dtype in (BF16, F16, F32):
        yield multi_lora_problem(f"{dtype}", population("mixed", 70, 3), 136, 88, (5, 16, 8), dtype)
    for name in POPULATIONS:
        yield multi_lora_problem(f"{name}, all ranks", population(name, 40, len(RANKS)), 96, 72, RANKS, BF16, F32)
    yield multi_lora_problem("long segments", population("skewed", 90, 2), 72, 80, (33, 7), F16, bias=True)
    yield multi_lora_problem("odd sizes", population("mixed", 37, 4), 131, 77, (5, 1, 3, 16), F32, bias=True)
    yield multi_lora_problem("wide", population("mixed", 6, 2), 1100, 40, (4, 2), BF16)
    yield multi_lora_problem("rank 256", population("mixed", 9, 2), 64, 56, (256, 3), BF16)
    dora = {"dora": (0, 2), "bias": True}
    yield multi_lora_problem("DoRA among LoRA", population("mixed", 50, 4), 72, 80, (4, 8, 3, 16), BF16, F32, **dora)
    yield multi_lora_problem("DoRA, float32", population("mixed", 50, 4), 66, 50, (4, 8, 3, 16), F32, dora=(1, 3))
    several = torch.stack([population("mixed", 40, 3, seed) for seed in (1, 2, 3)], dim=1)
    yield multi_lora_problem("several a row", several, 72, 80, (4, 8, 3), BF16, F32, bias=True)
    yield multi_lora_problem("several a row, weighted", several, 66, 50, (4, 8, 3), F32, weighted=True)
    yield multi_lora_problem("weighted", population("mixed", 40, 3)[:, None], 72, 80, (4, 8, 3), BF16, weighted=True)
    yield multi_lora_problem(
        "dropout each", population("mixed", 60, 3), 68, 80, (4, 8, 3), BF16, F32, dropout_p=(0.0, 0.25, 0.5)
    )
    yield multi_lora_problem("dropout, float32", several, 67, 45, (4, 8, 3), F32, dropout_p=0.3, weighted=True)
    yield multi_lora_problem("one row", population("distinct", 1, 1), 136, 88, (16,), BF16)
    yield multi_lora_problem("no row", torch.zeros(0, dtype=torch.int64), 136, 88, (16, 3), BF16, bias=True)
    qkv = {"K": 72, "slices": (40, 24, 24), "ranks": ((4, 4, 4), (3, 0, 9), (0, 16, 0))}
    yield sliced_problem("slices", population("mixed", 40, 3), dtype=BF16, factor_dtype=F32, bias=True, **qkv)
    yield sliced_problem("slices, dropout", population("mixed", 40, 3), dtype=F32, dropout_p=0.3, **qkv)
    odd = {"K": 67, "slices": (33, 51), "ranks": ((5, 7), (1, 20), (2, 2))}
    yield sliced_problem("slices, DoRA", population("mixed", 40, 3), dtype=F32, bias=True, dora=(0, 2), **odd)
    yield sliced_problem(
        "slices, several a row", several.clamp(max=1), dtype=F16, **(odd | {"ranks": ((5, 7), (1, 20))})
    )
    one_each = [(4,), (7,), (1,), (16,), (4,)]
    hit = torch.tensor([0, 1, 3, 4])[population("uniform", 40, 4)]  # none is expert 2's
    yield experts_problem("experts", hit, None, 72, 40, one_each, BF16, F32)
    yield experts_problem("experts, dropout", hit, None, 67, 45, one_each, F32, transposed=True, dropout_p=0.3)
    dora_experts = {"dora": range(5), "in_order": True}
    yield experts_problem("experts, DoRA", hit, None, 72, 40, one_each, F32, **dora_experts)
    yield experts_problem("experts, float16", hit, None, 64, 56, one_each, F16, transposed=True, in_order=True)
    pairs, two = population("mixed", 40, 2, seed=4), [(4, 2), (3, 8), (1, 1), (16, 5), (7, 4)]
    yield experts_problem("experts with adapters", hit, pairs, 66, 50, two, F32, F32)
    yield experts_problem("experts with adapters, DoRA", hit, pairs, 72, 40, two, BF16, F32, dora=(1, 6))
    yield experts_problem("experts without rows", hit[:0], None, 24, 16, one_each, F32)
