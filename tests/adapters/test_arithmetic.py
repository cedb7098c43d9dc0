"""Sums on factors, TIES, DARE, lower ranks and extraction, against dense matrices and against PEFT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_kernels.adapters import Adapter, Factors, dare, extract, read, reduce_rank, ties, weighted_sum

pytest.importorskip("safetensors")
F64 = torch.float64


def factors(n: int, k: int, r: int, s: float = 1.0) -> Factors:
    return Factors(torch.randn(r, k), torch.randn(n, r), s)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def pair() -> list[Adapter]:
    """Two adapters of other ranks and scalings, that share one module."""
    return [
        Adapter({"a": factors(13, 7, 3, 0.3), "b": factors(5, 9, 1, -2.0)}),
        Adapter({"a": factors(13, 7, 7, 1.7), "c": factors(6, 6, 2, 1 / 3)}),
    ]


def near(found: Tensor, exact: Tensor, size: float = 2e-6) -> None:
    assert float((found - exact).norm()) <= size * float(exact.norm())


def test_a_weighted_sum_is_exact_and_has_the_sum_of_the_ranks() -> None:
    one, two = pair()
    total = weighted_sum([one, two], [0.25, -3.0])
    exact = 0.25 * one.modules["a"].delta(F64) - 3 * two.modules["a"].delta(F64)
    near(total.modules["a"].delta(F64), exact, 2e-7)
    assert {path: f.rank for path, f in total.modules.items()} == {"a": 10, "b": 1, "c": 2}
    near(total.modules["c"].delta(F64), -3 * two.modules["c"].delta(F64), 2e-7)


def test_a_sum_of_powers_of_two_keeps_every_bit() -> None:
    one = Adapter({"a": Factors(torch.randn(3, 7), torch.randn(13, 3).bfloat16(), 2.0)})
    (f,) = weighted_sum([one], [0.25]).modules.values()
    assert f.lora_b.dtype == torch.bfloat16 and torch.equal(f.lora_b, one.modules["a"].lora_b * 0.5)


def test_biases_of_the_second_factor_add_up() -> None:
    one, two = (Adapter({"a": factors(5, 4, 2, s)._replace(lora_bias=torch.randn(5))}) for s in (0.5, 2.0))
    total = weighted_sum([one, two], [3.0, -1.0]).modules["a"]
    torch.testing.assert_close(total.lora_bias, 1.5 * one.modules["a"].lora_bias - 2 * two.modules["a"].lora_bias)


@pytest.mark.parametrize("rank", [1, 4, 7, 10, 20])
def test_a_reduced_rank_is_the_nearest_and_says_its_error(rank: int) -> None:
    total = weighted_sum(pair())
    found = reduce_rank(total, rank)
    exact = total.modules["a"].delta(F64)
    u, s, v = torch.linalg.svd(exact, full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    near(found.adapter.modules["a"].delta(F64), best, 1e-6)
    off = float((exact - best).norm() / exact.norm())
    assert found.errors["a"] == pytest.approx(off, abs=1e-6)
    assert found.adapter.modules["a"].rank == min(rank, 7)  # K = 7


def test_convolutions_and_embeddings_keep_their_shapes() -> None:
    conv = Factors(torch.randn(4, 3, 3, 3), torch.randn(8, 4, 1, 1), 1.5)
    embedding = Factors(torch.randn(4, 11), torch.randn(8, 4), 0.5, embedding=True)
    given = Adapter({"conv": conv, "embedding": embedding})
    for found in (reduce_rank(given, 2).adapter, weighted_sum([given, given])):
        assert found.modules["conv"].lora_a.shape[1:] == (3, 3, 3) and found.modules["conv"].lora_b.shape[2:] == (1, 1)
        assert found.modules["embedding"].embedding
    near(weighted_sum([given, given]).modules["conv"].delta(F64), 2 * conv.delta(F64), 2e-7)


def by_hand(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    """TIES an element at a time."""
    trimmed = []
    for delta in deltas:
        kept = delta.abs().flatten().sort(descending=True).values[: int(density * delta.numel())]
        trimmed.append(torch.where(delta.abs() >= kept[-1], delta, torch.zeros_like(delta)))
    out = torch.zeros_like(deltas[0])
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            column = [float(d[i, j]) for d in trimmed]
            sign = 1 if sum(column) >= 0 else -1
            agree = [w * v for w, v in zip(weights, column, strict=True) if v * sign > 0]
            out[i, j] = sum(agree) / len(agree) if agree else 0.0
    return out


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_ties_by_hand(density: float) -> None:
    adapters = [Adapter({"a": factors(9, 7, r, s)}) for r, s in ((2, 0.5), (3, 1.5), (1, 1.0))]
    weights = [1.0, 0.5, 2.0]
    exact = by_hand([a.modules["a"].delta(F64) for a in adapters], weights, density)
    found = ties(adapters, weights, density=density, rank=7)
    near(found.adapter.modules["a"].delta(F64), exact, 1e-6)
    assert found.errors["a"] <= 1e-12


def test_dare_keeps_the_mean() -> None:
    given = Adapter({"a": factors(6, 5, 2)})
    exact = given.modules["a"].delta(F64)
    found = torch.stack(
        [dare([given], density=0.5, rank=5, seed=seed).adapter.modules["a"].delta(F64) for seed in range(400)]
    )
    # Each element is 0 or twice its value, with equal chances: the mean of 400 is off by a twentieth of it on average.
    off = (found.mean(0) - exact) / exact
    assert float(off.square().mean().sqrt()) == pytest.approx(1 / 20, rel=0.35)
    values = (found / exact).round(decimals=4).unique()
    assert values.tolist() == [0.0, 2.0] or values.abs().tolist() == [0.0, 2.0]
    again = dare([given], density=0.5, rank=5, seed=7).adapter
    assert again.content_hash() == dare([given], density=0.5, rank=5, seed=7).adapter.content_hash()


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
def test_peft_agrees(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = torch.nn.ModuleDict({"q": torch.nn.Linear(12, 16, bias=False), "v": torch.nn.Linear(12, 8, bias=False)})
    base.config = {}  # type: ignore[assignment]
    settings = {"target_modules": ["q", "v"], "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=5, **settings), "one")
    model.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=7, **settings))
    for name in ("one", "two"):
        model.save_pretrained(str(tmp_path), selected_adapters=[name])
    weights = [0.7, 0.4]
    extra = {"density": 0.4} if kind == "ties_svd" else {}
    model.add_weighted_adapter(
        ["one", "two"], weights, "both", combination_type=kind, **extra, **({} if kind == "cat" else {"svd_rank": 4})
    )
    ours = [read(tmp_path / name) for name in ("one", "two")]
    total = weighted_sum(ours, weights)
    found = {
        "cat": lambda: total,
        "svd": lambda: reduce_rank(total, 4).adapter,
        "ties_svd": lambda: ties(ours, weights, density=0.4, rank=4).adapter,
    }[kind]()
    for name in ("q", "v"):
        theirs = model.base_model.model[name].get_delta_weight("both").detach().double()
        near(found.modules[name].delta(F64), theirs, 5e-6)


# ----------------------------------------------------------------------------------------------------------- extraction


def checkpoint(folder: Path, tensors: dict[str, Tensor], files: int = 1) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    names = sorted(tensors)
    for i in range(files):
        save_file({name: tensors[name] for name in names[i::files]}, folder / f"model-{i}.safetensors")
    return folder


def test_extraction_gives_a_change_of_low_rank_back(tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(40, 24), "b.weight": torch.randn(7, 31), "same.weight": torch.randn(5, 5)}
    base |= {"norm.weight": torch.ones(24), "embed_tokens.weight": torch.randn(9, 24)}
    f = factors(40, 24, 3)
    tuned = base | {"a.weight": base["a.weight"] + f.delta(), "b.weight": base["b.weight"] + torch.randn(7, 31)}
    tuned |= {"norm.weight": torch.full((24,), 1.5), "embed_tokens.weight": torch.randn(9, 24)}
    found = extract(checkpoint(tmp_path / "base", base, 2), checkpoint(tmp_path / "tuned", tuned), 3)
    assert found.adapter.modules.keys() == {"a", "b"}
    assert found.left_out == ("embed_tokens.weight", "norm.weight")
    assert found.errors["a"] <= 1e-6  # float32's rounding of the tuned weight
    near(found.adapter.modules["a"].delta(F64), f.delta(F64), 1e-6)
    change = (tuned["b.weight"].double() - base["b.weight"].double()).contiguous()
    singular = torch.linalg.svdvals(change)
    least = float(singular[3:].norm() / singular.norm())
    assert least <= found.errors["b"] <= 1.001 * least


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_does_not_add_up_is_refused(tmp_path: Path) -> None:
    one, two = pair()
    dora = Adapter({"a": factors(13, 7, 3)._replace(magnitude=torch.ones(13))})
    whole = replace(one, others={"score.weight": torch.ones(2)})
    for call, said in (
        (lambda: weighted_sum([one, dora]), "DoRA"),
        (lambda: weighted_sum([one, whole]), "weights trained whole"),
        (lambda: weighted_sum([one, two], [1.0]), "a finite weight for each of 2"),
        (lambda: weighted_sum([one], [float("nan")]), "a finite weight"),
        (lambda: weighted_sum([]), "each of 0 adapters"),
        (lambda: weighted_sum([one, Adapter({"a": factors(12, 7, 3)})]), "of one shape"),
        (lambda: reduce_rank(one, 0), "rank to be an integer"),
        (lambda: reduce_rank(dora, 1), "DoRA"),
        (lambda: ties([one, two], density=0.0, rank=1), "density"),
        (lambda: dare([one, two], density=1.5, rank=1), "density"),
        (lambda: extract(tmp_path, tmp_path, 1), "the folder of a safetensors checkpoint"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    base = checkpoint(tmp_path / "base", {"a.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="two models whose matrices differ"):
        extract(base, base, 1)
    other = checkpoint(tmp_path / "other", {"b.weight": torch.ones(3, 3)})
    with pytest.raises(ValueError, match="two models of the same tensors"):
        extract(base, other, 1)
