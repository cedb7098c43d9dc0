"""LoRAStack: ragged storage, adding, removing, compacting."""

from __future__ import annotations

import itertools

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.stack import Place

K, N = 24, 18


def adapter(rank, seed=0, dora=False, dtype=torch.float32):
    generator = torch.Generator().manual_seed(100 * rank + seed)
    factors = torch.randn(rank, K, generator=generator).to(dtype), torch.randn(N, rank, generator=generator).to(dtype)
    scaling = 0.25 * (1 + seed % 7)
    return (*factors, scaling, torch.rand(N, generator=generator).to(dtype)) if dora else (*factors, scaling)


def holds(stack, i, given):
    lora_a, lora_b, scaling, magnitude = stack.factors(i)
    assert torch.equal(lora_a, given[0]) and torch.equal(lora_b, given[1]) and scaling == given[2]
    assert float(stack.scalings[i]) == scaling
    assert (magnitude is None) == (len(given) == 3)
    assert magnitude is None or torch.equal(magnitude, given[3])
    place = stack.places[i]
    assert stack.table[i].tolist() == [place.start, place.rank, place.magnitude]


def test_nothing_is_padded():
    given = [adapter(r, dora=r == 3) for r in (1, 64, 3, 7)]
    stack = lk.LoRAStack.from_factors(given)
    assert stack.lora_a.shape == (75, K) and stack.lora_b.shape == (75, N) and stack.magnitude.shape == (1, N)
    assert stack.ranks == (1, 64, 3, 7) and stack.offsets == (0, 1, 65, 68) and stack.max_rank == 64
    assert stack.nbytes == 4 * (75 * (K + N) + N)
    for i, factors in enumerate(given):
        holds(stack, i, factors)


def test_the_widest_dtype_is_kept():
    stack = lk.LoRAStack.from_factors([adapter(2, dtype=torch.bfloat16), adapter(3)])
    assert stack.lora_a.dtype == stack.lora_b.dtype == torch.float32
    assert lk.LoRAStack.from_factors([adapter(2, dtype=torch.bfloat16)]).lora_a.dtype == torch.bfloat16


def test_adding_removing_and_compacting_keep_every_other_adapter():
    """A random walk against a dictionary; the others do not move until compact, and then keep their bits."""
    generator = torch.Generator().manual_seed(0)
    stack, there = lk.LoRAStack.empty(K, N), {}
    for step in range(200):
        places = {i: stack.places[i] for i in there}
        draw = float(torch.rand((), generator=generator))
        if draw < 0.55 or not there:
            rank = int(torch.randint(1, 20, (), generator=generator))
            given = adapter(rank, step, dora=step % 3 == 0)
            there[stack.add(*given)] = given
        elif draw < 0.95:
            gone = sorted(there)[int(torch.randint(len(there), (), generator=generator))]
            stack.remove(gone)
            del there[gone], places[gone]
        else:
            stack.compact()
            assert stack.lora_a.shape[0] == sum(stack.ranks)
            places = {}
        assert all(stack.places[i] == place for i, place in places.items())
        taken = sorted((p.start, p.start + p.rank) for p in stack.places if p.rank)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(taken))
        assert {i for i, r in enumerate(stack.ranks) if r} == set(there)
        for i, given in there.items():
            holds(stack, i, given)


def test_a_gap_is_used_again():
    stack = lk.LoRAStack.from_factors([adapter(8), adapter(4), adapter(2)])
    stack.remove(1)
    assert stack.ranks == (8, 0, 2) and stack.lora_a.shape[0] == 14
    assert stack.add(*adapter(3)) == 1 and stack.places[1].start == 8
    assert stack.lora_a.shape[0] == 14


def test_a_snapshot_stays_as_it_was():
    stack = lk.LoRAStack.from_factors([adapter(4), adapter(2)])
    x, w, ids = torch.randn(3, K), torch.randn(N, K), torch.tensor([0, 1, -1])
    before = stack.snapshot()
    expected = lk.multi_lora_linear(x, w, before, ids)
    stack.add(*adapter(30))  # the tensors are made anew
    stack.compact()
    assert torch.equal(lk.multi_lora_linear(x, w, before, ids), expected)
    assert len(before) == 2 and len(stack) == 3


def test_an_id_of_ones_choice():
    stack = lk.LoRAStack.from_factors([adapter(4)])
    assert stack.add(*adapter(2), at=3) == 3
    assert stack.ranks == (4, 0, 0, 2)
    assert stack.add(*adapter(1)) == 1
    with pytest.raises(ValueError, match=r"LoRAStack.add: expected at to be a free id, got 3"):
        stack.add(*adapter(2), at=3)


def test_rows_of_a_removed_adapter_get_the_base_product():
    stack = lk.LoRAStack.from_factors([adapter(4), adapter(2)])
    stack.remove(0)
    x, w = torch.randn(3, K), torch.randn(N, K)
    y = lk.multi_lora_linear(x, w, stack, torch.tensor([0, 0, -1]))
    torch.testing.assert_close(y, x @ w.T)


def test_gradients_reach_the_factors_that_were_stacked():
    a, b, s = adapter(4)
    a.requires_grad_()
    stack = lk.LoRAStack.from_factors([(a, b, s), adapter(2)])
    lk.multi_lora_linear(torch.randn(3, K), torch.randn(N, K), stack, torch.tensor([0, 1, 0])).sum().backward()
    assert a.grad is not None and a.grad.abs().sum() > 0


def test_moves_to_another_dtype():
    stack = lk.LoRAStack.from_factors([adapter(4, dora=True)]).to(dtype=torch.bfloat16)
    assert stack.lora_a.dtype == stack.magnitude.dtype == torch.bfloat16 and stack.scalings.dtype == torch.float32
    assert "ranks=(4,)" in repr(stack)


BAD = [
    ([], ValueError, "expected at least one adapter, got none"),
    ([(torch.zeros(2, K), torch.zeros(N, 3), 1.0)], ValueError, r"expected lora_a \(R, K\) and lora_b \(N, R\)"),
    ([(torch.zeros(0, K), torch.zeros(N, 0), 1.0)], ValueError, "expected a rank of at least 1 of adapter 0, got 0"),
    ([adapter(2), (torch.zeros(2, K + 1), torch.zeros(N, 2), 1.0)], ValueError, r"expected adapter 1 of \(K, N\) ="),
    ([(torch.zeros(2, K), torch.zeros(N, 2), float("nan"))], ValueError, "expected scaling of adapter 0"),
    ([(torch.zeros(2, K), torch.zeros(N, 2), 1e39)], ValueError, "number that float32 can hold, got 1e"),
    ([(torch.zeros(2, K), torch.zeros(N, 2), 1e-46)], ValueError, "number that float32 can hold, got 1e-46"),
    ([(torch.zeros(2, K), torch.zeros(N, 2), "1")], TypeError, "expected scaling of adapter 0 to be a number, got str"),
    ([(torch.zeros(2, K), torch.zeros(N, 2).long(), 1.0)], TypeError, "expected lora_b of adapter 0 to be a tensor"),
    ([([1.0], torch.zeros(N, 2), 1.0)], TypeError, "expected lora_a of adapter 0 to be a tensor"),
    ([(torch.zeros(2, K), torch.zeros(N, 2), 1.0, torch.zeros(3))], ValueError, r"magnitude of adapter 0"),
]


@pytest.mark.parametrize(("factors", "error", "message"), BAD)
def test_bad_factors(factors, error, message):
    with pytest.raises(error, match=rf"^LoRAStack.*{message}"):
        lk.LoRAStack.from_factors(factors)


def test_a_bad_adapter_leaves_the_stack_as_it_was():
    stack = lk.LoRAStack.from_factors([adapter(4)])
    before = stack.snapshot()
    for bad in ((torch.zeros(2, K + 1), torch.zeros(N, 2), 1.0), (torch.zeros(2, K), torch.zeros(N, 3), 1.0)):
        with pytest.raises(ValueError, match="LoRAStack"):
            stack.add(*bad)
    with pytest.raises(ValueError, match="expected the id of an adapter, got 1"):
        stack.remove(1)
    assert stack.places == before.places and stack.lora_a is before.lora_a


def test_training_factors_do_not_move():
    stack = lk.LoRAStack(torch.zeros(2, K, requires_grad=True), torch.zeros(2, N), [Place(0, 2, 1.0)])
    for change in (lambda: stack.add(*adapter(1)), lambda: stack.remove(0), stack.compact, lambda: stack.reserve(9)):
        with pytest.raises(RuntimeError, match="expected factors that do not train"):
            change()


# ----------------------------------------------------------------------------------------------------------- slices

SLICES = (10, 5, 3)


def sliced(*ranks, seed=0, dora=False):
    """An adapter of Q, K and V; rank 0: none there."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for s, (rank, width) in enumerate(zip(ranks, SLICES, strict=True)):
        factors = torch.randn(rank, K, generator=generator), torch.randn(width, rank, generator=generator)
        magnitude = (torch.rand(width, generator=generator),) if dora else ()
        parts.append((*factors, 0.5 + s, *magnitude) if rank else None)
    return parts


def holds_slices(stack, i, given):
    for s, part in enumerate(given):
        lora_a, lora_b, scaling, magnitude = stack.factors(i, s)
        place = stack.places[i]
        if part is None:
            assert lora_a.shape == (0, K) and stack.table[s, i].tolist() == [place.start, 0, -1]
            continue
        assert torch.equal(lora_a, part[0]) and torch.equal(lora_b, part[1]) and scaling == part[2]
        assert magnitude is None if len(part) == 3 else torch.equal(magnitude, part[3])
        assert stack.table[s, i].tolist() == [place.start, part[0].shape[0], place.magnitude]
        assert float(stack.scalings[s, i]) == scaling


def test_slices_take_their_own_columns():
    given = [sliced(4, 4, 4), sliced(2, 0, 7, seed=1), sliced(3, 1, 3, seed=2, dora=True)]
    stack = lk.LoRAStack.from_factors(given, slices=SLICES)
    assert stack.lora_a.shape == (3, 14, K) and stack.lora_b.shape == (14, N) and stack.ranks == (4, 7, 3)
    for i, factors in enumerate(given):
        holds_slices(stack, i, factors)
    assert "slices=(10, 5, 3)" in repr(stack) and stack.to(dtype=torch.bfloat16).slices == SLICES


def test_sliced_adapters_come_and_go():
    stack = lk.LoRAStack.empty(K, N, slices=SLICES)
    given = [sliced(4, 4, 4), sliced(8, 0, 7, seed=1), sliced(2, 1, 2, seed=2, dora=True)]
    for factors in given:
        stack.add_sliced(factors)
    before = stack.snapshot()
    stack.remove(1)
    stack.compact()
    assert stack.lora_b.shape[0] == 6 and stack.add_sliced(given[1]) == 1
    for i, factors in enumerate(given):
        holds_slices(stack, i, factors)
        holds_slices(before, i, factors)


def test_gradients_reach_sliced_factors():
    given = sliced(2, 0, 3)
    for part in (given[0], given[2]):
        part[0].requires_grad_()
    stack = lk.LoRAStack.from_factors([given], slices=SLICES)
    stack.lora_a.sum().backward()
    assert torch.equal(given[0][0].grad, torch.ones(2, K)) and torch.equal(given[2][0].grad, torch.ones(3, K))


def test_slices_that_do_not_fit():
    for factors, message in (
        (sliced(2, 2, 2)[:2], "expected 3 slices of adapter 0, factors or None each, got 2"),
        (sliced(0, 0, 0), "expected factors in at least one slice of adapter 0"),
        ([sliced(2, 2, 2)[0]] * 3, r"expected slice 1 of adapter 0 of \(K, N\) = \(24, 5\) on cpu, got \(24, 10\)"),
        ([*sliced(2, 2, 2, dora=True)[:2], sliced(2, 2, 2)[2]], "expected a magnitude in every slice of adapter 0"),
    ):
        with pytest.raises(ValueError, match=f"LoRAStack: {message}"):
            lk.LoRAStack.from_factors([factors], slices=SLICES)
    stack = lk.LoRAStack.empty(K, N, slices=SLICES)
    with pytest.raises(ValueError, match=r"LoRAStack\.add: expected a stack without slices; use add_sliced"):
        stack.add(*adapter(3))
    with pytest.raises(ValueError, match=r"LoRAStack\.add_sliced: expected a stack with slices; use add"):
        lk.LoRAStack.empty(K, N).add_sliced(sliced(1, 1, 1))
    with pytest.raises(ValueError, match=r"LoRAStack\.empty: expected slices that add up to N = 18"):
        lk.LoRAStack.empty(K, N, slices=(10, 5))
