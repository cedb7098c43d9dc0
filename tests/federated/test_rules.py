"""Aggregation rules against the weighted average of dense weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels.federated import (
    Factors,
    average,
    fed_avg,
    fed_ex_lora,
    fed_rac_lora_,
    ffa_lora,
    flex_lora,
    random_blocks,
    svd_factors,
)

F64 = torch.float64
N, K = 13, 29
WEIGHTS = [3, 1, 7]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def clients(
    ranks: list[int], alpha: float = 6.0, batch: tuple[int, ...] = (), dtype: torch.dtype = F64
) -> list[Factors]:
    """Of these ranks, with s = alpha / R."""
    return [
        Factors(
            random(*batch, r, K, seed=2 * i, dtype=dtype), random(*batch, N, r, seed=2 * i + 1, dtype=dtype), alpha / r
        )
        for i, r in enumerate(ranks)
    ]


def sharing(factors: list[Factors]) -> list[Factors]:
    """The same with the rows of one A."""
    a = max(factors, key=lambda f: f.rank).lora_a
    return [Factors(a[..., : f.rank, :], f.lora_b, f.scaling) for f in factors]


def dense(f: Factors) -> Tensor:
    return f.scaling * f.lora_b.to(F64) @ f.lora_a.to(F64)


def dense_average(factors: list[Factors], weights: list[float]) -> Tensor:
    return sum(w / sum(weights) * dense(f) for w, f in zip(weights, factors, strict=True))  # type: ignore[return-value]


RANKS = [[4, 4, 4], [2, 7, 1]]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_exact_rules_are_the_dense_weighted_average(ranks: list[int], batch: tuple[int, ...]) -> None:
    factors = clients(ranks, batch=batch)
    expected = dense_average(factors, WEIGHTS)
    mean, residual = fed_ex_lora(factors, WEIGHTS)
    assert residual.rank == 2 * max(ranks)
    torch.testing.assert_close(dense(mean) + dense(residual), expected, **EXACT)
    torch.testing.assert_close(dense(flex_lora(factors, WEIGHTS, rank=sum(ranks))), expected, **EXACT)
    shared = sharing(factors)
    torch.testing.assert_close(dense(ffa_lora(shared, WEIGHTS)), dense_average(shared, WEIGHTS), **EXACT)


def test_fedavg_averages_the_factors_and_is_not_exact() -> None:
    factors = clients([4, 4, 4])
    mean = fed_avg(factors, WEIGHTS)
    torch.testing.assert_close(mean.lora_a, sum(w / 11 * f.lora_a for w, f in zip(WEIGHTS, factors, strict=True)))
    torch.testing.assert_close(mean.lora_b, sum(w / 11 * f.lora_b for w, f in zip(WEIGHTS, factors, strict=True)))
    assert (dense(mean) - dense_average(factors, WEIGHTS)).norm() > 0.1 * dense(mean).norm()


def test_fedavg_counts_ranks_that_a_client_lacks_as_zeros() -> None:
    small, large = clients([2, 5], alpha=3.0)
    mean = fed_avg([small, large], [1, 3])
    assert mean.rank == 5 and mean.scaling == large.scaling
    torch.testing.assert_close(mean.lora_a[:2], 0.25 * small.lora_a + 0.75 * large.lora_a[:2])
    torch.testing.assert_close(mean.lora_a[2:], 0.75 * large.lora_a[2:])
    relative = small.scaling / large.scaling
    torch.testing.assert_close(mean.lora_b[:, :2], 0.25 * relative * small.lora_b + 0.75 * large.lora_b[:, :2])


@pytest.mark.parametrize("ranks", RANKS)
def test_flexlora_is_the_best_approximation_at_every_cut(ranks: list[int]) -> None:
    factors = clients(ranks)
    expected = dense_average(factors, WEIGHTS)
    u, sigma, vh = torch.linalg.svd(expected, full_matrices=False)
    found = flex_lora(factors, WEIGHTS)
    assert found.rank == max(ranks)
    for r in range(1, found.rank + 1):
        torch.testing.assert_close(dense(found.cut(r)), (u[:, :r] * sigma[:r]) @ vh[:r], **EXACT)
    torch.testing.assert_close(found.lora_b.norm(dim=0), found.lora_a.norm(dim=1))  # split evenly


@pytest.mark.parametrize(("n", "k"), [(3, 40), (40, 3), (1, 1)])
def test_flexlora_where_the_ranks_exceed_the_matrix(n: int, k: int) -> None:
    factors = [Factors(random(4, k, seed=i), random(n, 4, seed=9 + i), 0.5) for i in range(3)]
    found = flex_lora(factors, WEIGHTS, rank=6)
    assert found.lora_a.shape == (6, k) and found.lora_b.shape == (n, 6)
    torch.testing.assert_close(dense(found), dense_average(factors, WEIGHTS), **EXACT)


def test_fed_rac_lora_is_exact_beside_ranks_that_differ() -> None:
    w, shared = random(N, K, seed=50), sharing(clients([2, 7, 1]))
    expected = w + dense_average(shared, WEIGHTS)
    change = ffa_lora(shared, WEIGHTS)
    torch.testing.assert_close(
        fed_rac_lora_(w.clone(), change.lora_a, [change.lora_b], scaling=change.scaling), expected, **EXACT
    )


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", [fed_avg, ffa_lora, fed_ex_lora, flex_lora])
def test_one_client_gets_back_what_it_sent_bit_for_bit(rule: Callable[..., object], dtype: torch.dtype) -> None:
    (client,) = clients([4], dtype=dtype)
    found = rule([client], [12])
    mean, residual = found if rule is fed_ex_lora else (found, None)  # type: ignore[misc]
    assert torch.equal(mean.lora_a, client.lora_a) and torch.equal(mean.lora_b, client.lora_b)  # type: ignore[union-attr]
    assert mean.scaling == client.scaling and mean.lora_a.dtype == dtype  # type: ignore[union-attr]
    assert residual is None or (residual.rank == 0 and not dense(residual).any())  # type: ignore[union-attr]


@pytest.mark.parametrize("rule", [fed_avg, ffa_lora, fed_ex_lora, flex_lora])
def test_a_batch_of_layers_is_each_layer_by_itself(rule: Callable[..., object]) -> None:
    batched = sharing(clients([3, 2, 3], batch=(4,)))
    whole = rule(batched, WEIGHTS)
    for layer in range(4):
        alone = rule([Factors(f.lora_a[layer], f.lora_b[layer], f.scaling) for f in batched], WEIGHTS)
        pairs = zip(whole, alone, strict=True) if rule is fed_ex_lora else [(whole, alone)]  # type: ignore[call-overload]
        for of_batch, of_layer in pairs:
            torch.testing.assert_close(dense(of_batch)[layer], dense(of_layer), **EXACT)


@pytest.mark.parametrize("rule", [fed_avg, ffa_lora, fed_ex_lora, flex_lora])
def test_equal_weights_are_the_default_and_a_weight_of_zero_leaves_a_client_out(rule: Callable[..., object]) -> None:
    def total(found: object) -> Tensor:
        return sum(map(dense, found)) if rule is fed_ex_lora else dense(found)  # type: ignore

    factors = sharing(clients([3, 3, 3]))
    torch.testing.assert_close(total(rule(factors)), total(rule(factors, [5, 5, 5])), **EXACT)
    torch.testing.assert_close(total(rule(factors, [1, 2, 0])), total(rule(factors[:2], [1, 2])), **EXACT)


def test_float32_is_rounded_once() -> None:
    factors = clients([4] * 50, dtype=torch.float32)
    mean = fed_avg(factors)
    exact = torch.stack([f.lora_a.double() for f in factors]).mean(0)
    assert torch.equal(mean.lora_a, exact.float())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int]) -> None:
    n, k = shape
    factors = [Factors(torch.zeros(2, k, dtype=F64), torch.zeros(n, 2, dtype=F64)) for _ in range(2)]
    assert flex_lora(factors).lora_b.shape == (n, 2) and fed_ex_lora(factors)[1].lora_a.shape == (2, k)


def test_non_contiguous_and_requires_grad() -> None:
    plain = sharing(clients([4, 4]))
    odd = [Factors(f.lora_a.T.contiguous().T.requires_grad_(), f.lora_b.T.contiguous().T, f.scaling) for f in plain]
    for rule in (fed_avg, ffa_lora, flex_lora):
        ours, theirs = rule(odd), rule(plain)
        assert not ours.lora_a.requires_grad
        torch.testing.assert_close(dense(ours), dense(theirs), **EXACT)


@pytest.mark.parametrize("rule", [fed_avg, ffa_lora, fed_ex_lora, flex_lora])
@pytest.mark.parametrize(
    ("broken", "error", "message"),
    [
        (lambda a, b: Factors(a * math.nan, b), ValueError, "finite factors, and those of client 1 hold NaN or Inf"),
        (lambda a, b: Factors(a, b / 0), ValueError, "those of client 1 hold"),
        (lambda a, b: Factors(a[:1], b), ValueError, r"client 1, got \(1, 29\) and \(13, 3\)"),
        (lambda a, b: Factors(a, b[:-1]), ValueError, r"lora_b \(13, 'R'\) of client 1"),
        (lambda a, b: Factors(a.T, b), ValueError, "of client 1, got"),
        (lambda a, b: Factors(a, b, math.inf), ValueError, "client 1: expected scaling to be a finite number"),
        (lambda a, b: Factors(a, None), TypeError, "lora_b of client 1 to be matrices of floats"),
        (lambda a, b: Factors(a.to(torch.int32), b), TypeError, "lora_a of client 1 to be matrices of floats"),
        (lambda a, b: (a, b), TypeError, "list of lowrank_kernels.federated.Factors"),
    ],
)
def test_a_client_that_sends_nonsense_is_named(
    rule: Callable[..., object], broken: Callable[..., object], error: type[Exception], message: str
) -> None:
    first, second, third = sharing(clients([3, 3, 3]))
    with pytest.raises(error, match=f"{rule.__name__}: .*{message}"):
        rule([first, broken(second.lora_a, second.lora_b), third])


@pytest.mark.parametrize("rule", [fed_avg, ffa_lora, fed_ex_lora, flex_lora])
@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, math.nan], [1, True], [1, "2"]])
def test_weights_that_are_none(rule: Callable[..., object], weights: list[float]) -> None:
    with pytest.raises(ValueError, match=f"{rule.__name__}: expected"):
        rule(sharing(clients([2, 2])), weights)
    with pytest.raises(ValueError, match="got 0 and 0"):
        rule([])


def test_weights_of_numpy_are_numbers() -> None:
    factors = clients([2, 2])
    ours, theirs = fed_avg(factors, np.array([3, 7])), fed_avg(factors, [3, 7])  # type: ignore[arg-type]
    assert torch.equal(ours.lora_a, theirs.lora_a) and torch.equal(ours.lora_b, theirs.lora_b)


@pytest.mark.parametrize("rule", [fed_avg, ffa_lora, fed_ex_lora, flex_lora])
def test_a_result_that_overflows_its_dtype_is_refused(rule: Callable[..., object]) -> None:
    a, b = random(1, K, dtype=torch.float16), random(N, 1)
    if rule is fed_ex_lora:  # the factors fit, their differences do not
        a = torch.full((1, K), 6e4, dtype=torch.float16)
        factors = [Factors(a, b), Factors(-a, 2 * b)]
    else:
        factors = [Factors(a, b.half()), Factors(a, 1e12 * b)]
    with pytest.raises(ValueError, match=rf"{rule.__name__}: expected a finite result, .* overflow torch\.float16"):
        rule(factors)


def test_ffa_refuses_an_a_that_is_not_shared() -> None:
    with pytest.raises(ValueError, match="one A, shared by all clients, and that of client 1 is another"):
        ffa_lora(clients([3, 3]))


def test_flexlora_refuses_ranks_and_scalings_that_it_cannot_divide_by() -> None:
    factors = clients([3, 3])
    for rank, error in ((0, ValueError), (True, TypeError), (2.0, TypeError)):
        with pytest.raises(error, match="flex_lora: expected a rank"):
            flex_lora(factors, rank=rank)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scaling above 0"):
        flex_lora([f._replace(scaling=0.0) for f in factors])


def test_average_of_biases() -> None:
    biases = [random(7, seed=i, dtype=torch.float32) for i in range(3)]
    expected = sum(w / 11 * b.double() for w, b in zip(WEIGHTS, biases, strict=True))
    assert torch.equal(average(biases, WEIGHTS), expected.float())  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"average: expected shape \(7,\) of client 1, got \(6,\)"):
        average([biases[0], biases[1][:6]])
    with pytest.raises(ValueError, match="client 1's holds NaN"):
        average([biases[0], biases[1] * math.nan])
    with pytest.raises(TypeError, match="list of tensors of floats"):
        average([torch.ones(2, dtype=torch.int64)])


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25])
def test_federa_starts_at_the_base_model(scaling: float) -> None:
    w = random(N, K, seed=3)
    start = svd_factors(w, 4, scaling=scaling)
    u, sigma, vh = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(dense(start), (u[:, :4] * sigma[:4]) @ vh[:4], **EXACT)
    if scaling == 1.0:  # the paper's: A = √S Vᵀ
        torch.testing.assert_close(start.lora_a.abs(), (sigma[:4].sqrt()[:, None] * vh[:4]).abs(), **EXACT)
    residual = lk.merge_lora_(w.clone(), start.lora_a, start.lora_b, scaling=-scaling)
    torch.testing.assert_close(residual + dense(start), w, **EXACT)
    torch.testing.assert_close(torch.linalg.svdvals(residual)[: N - 4], sigma[4:], **EXACT)


def test_slora_starts_where_the_sparse_stage_ended() -> None:
    change = torch.zeros(40, 50, dtype=F64)
    change[:16, 32:48] = random(16, 16, seed=4)  # rank 16 at most
    start = svd_factors(change, 16, scaling=2.0)
    torch.testing.assert_close(dense(start), change, **EXACT)


def test_random_blocks_are_of_the_given_density() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = random_blocks((100, 200), 0.25, generator)
    assert blocks.dtype == torch.int32 and len(blocks) == round(0.25 * 7 * 13)
    assert len(set(map(tuple, blocks.tolist()))) == len(blocks)
    assert blocks[:, 0].max() < 7 and blocks[:, 1].max() < 13 and blocks.min() >= 0
    assert len(random_blocks((16, 16), 1e-9, generator)) == 1
    lk.nn.BlockSparseLinear(torch.nn.Linear(200, 100), blocks, 16)  # a mask that the layer takes
    for size in (0, 8, -16, True, 16.0):
        with pytest.raises(ValueError, match="random_blocks: expected size"):
            random_blocks((16, 16), 0.5, generator, size=size)  # type: ignore[arg-type]
    for density in (0.0, 1.5, math.nan, True):
        with pytest.raises(ValueError, match="random_blocks: expected density"):
            random_blocks((16, 16), density, generator)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: svd_factors(torch.zeros(3, 4), 5), ValueError, r"at most min\(N, K\) = 3, got 5"),
        (lambda: svd_factors(torch.zeros(3), 1), TypeError, "a matrix"),
        (lambda: svd_factors(torch.zeros(3, 4), 1, scaling=0.0), ValueError, "scaling above 0"),
        (lambda: svd_factors(torch.full((3, 4), math.nan), 1), ValueError, "finite"),
        (lambda: svd_factors(torch.zeros(3, 4), 1.0), TypeError, "rank to be an integer"),  # type: ignore[arg-type]
    ],
)
def test_messages_of_starts(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
