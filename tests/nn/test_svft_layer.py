"""SVFT's layer: places of M, start, gradients, merging, states; its files, loaded where the SVD is another."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.nn import SVFTLinear
from lowrank_kernels.nn.svft import svft_places

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
PATTERNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "banded": {"band": 2},
    "random": {"k": 37, "seed": 3},
    "top": {"k": 37},
}
ON_EACH_PATTERN = pytest.mark.parametrize("pattern", PATTERNS)


def linear(k: int = 13, n: int = 9, dtype: torch.dtype = F32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def trained(pattern: str = "banded", **sizes: Any) -> SVFTLinear:
    """A layer whose M is not 0."""
    layer = SVFTLinear.from_linear(linear(**sizes), pattern, **PATTERNS[pattern])
    torch.manual_seed(1)
    nn.init.normal_(layer.values)
    return layer


def matrix(layer: SVFTLinear) -> Tensor:
    """M (r, r)."""
    m = torch.zeros(len(layer.sigma), len(layer.sigma), dtype=layer.values.dtype)
    m[layer.position[:, 0].long(), layer.position[:, 1].long()] = layer.values.detach()
    return m


# --------------------------------------------------------------------------------------------------------------- places


@ON_EACH_PATTERN
@pytest.mark.parametrize("r", [7, 9, 24])
def test_places_are_those_of_the_pattern_each_once(pattern: str, r: int) -> None:
    sigma = torch.linspace(3, 0.1, r) ** 2
    places = svft_places(sigma, pattern, **PATTERNS[pattern])
    i, j = places.T
    flat = (i * r + j).tolist()
    assert flat == sorted(set(flat)) and places.min() >= 0 and places.max() < r
    if pattern == "plain":
        assert torch.equal(i, torch.arange(r)) and torch.equal(i, j)
    elif pattern == "banded":
        assert len(places) == r * 5 - 2 * 3 and (i - j).abs().max() == 2
    else:
        assert len(places) == 37
    if pattern == "top":
        products = torch.outer(sigma.double(), sigma.double())
        assert products[i, j].sum() == pytest.approx(float(products.flatten().topk(37).values.sum()))


def test_equal_products_are_taken_by_row_then_column() -> None:
    places = svft_places(torch.ones(4), "top", k=6)
    assert places.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1]]
    assert svft_places(torch.tensor([2.0, 1.0]), "top", k=2).tolist() == [[0, 0], [0, 1]]


def test_random_places_are_those_of_their_seed_and_spread() -> None:
    sigma = torch.ones(40)
    first, again, other = (svft_places(sigma, "random", k=400, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first[:, 0].unique()) == 40 and abs(float(first.double().mean()) - 19.5) < 1.5


def test_the_places_of_every_module_are_its_own() -> None:
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    lk.adapt(model, lk.SVFTConfig(pattern="random", k=20))
    assert not torch.equal(model[0].position, model[1].position)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pattern": "diagonal"}, "expected pattern to be one of plain, banded, random, top, got 'diagonal'"),
        ({"pattern": 3}, "expected pattern to be a word"),
        ({"pattern": "banded"}, "expected band to be an integer of at least 0 for pattern 'banded', got None"),
        ({"pattern": "banded", "band": 9}, r"expected band below r = 9 for M \(r, r\), got 9"),
        ({"pattern": "banded", "band": -1}, "expected band to be an integer of at least 0"),
        ({"pattern": "random", "k": 0}, "expected k to be an integer of at least 1 for pattern 'random', got 0"),
        ({"pattern": "top", "k": 82}, r"expected k of at most r² = 81 for M \(r, r\), got 82"),
        ({"pattern": "random", "k": True}, "expected k to be an integer"),
        ({"pattern": "plain", "k": 3}, "expected k=None, since this pattern does not have it, got 3"),
        ({"pattern": "top", "k": 3, "band": 1}, "expected band=None"),
        ({"pattern": "random", "k": 3, "seed": 1.5}, "expected seed to be an integer, got 1.5"),
        ({"dtype": torch.int8}, "expected dtype to be a floating dtype"),
    ],
)
def test_a_pattern_that_cannot_be_is_refused_by_layer_and_config(settings: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        SVFTLinear.from_linear(linear(), **settings)
    model = nn.Sequential(linear())
    with pytest.raises((TypeError, ValueError), match=words):
        lk.adapt(model, lk.SVFTConfig(**settings))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("position", "words"),
    [
        (torch.tensor([[0, 9]]), "expected places from 0 to 8"),
        (torch.tensor([[0, 1], [0, 1]]), "expected every place of M once"),
        (torch.zeros(0, 2, dtype=torch.int64), r"expected position of shape \(E, 2\)"),
        (torch.zeros(3, 2), "expected position of integers"),
        ([[0, "a"]], "expected position of integers"),
    ],
)
def test_places_that_cannot_be_are_refused(position: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        SVFTLinear(linear(), position)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Conv1d(3, 3, 1), "not an nn.Linear but a Conv1d"),
        (lambda: nn.Linear(4, 4, device="meta"), "on the meta device"),
        (lambda: nn.Linear(4, 0), "an empty one"),
        (lambda: _with_nan(linear()), "expected a finite weight"),
    ],
)
def test_a_base_without_singular_vectors_is_refused(make: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        SVFTLinear.from_linear(make())  # type: ignore[arg-type]


def _with_nan(layer: nn.Linear) -> nn.Linear:
    layer.weight.data[1, 2] = torch.nan
    return layer


# -------------------------------------------------------------------------------------------------------------- formula


@ON_EACH_PATTERN
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("sizes", [(13, 9), (9, 13), (8, 8)])
def test_at_the_start_the_layer_is_the_linear_bit_for_bit(
    pattern: str, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    base = linear(*sizes, dtype=dtype)
    layer = SVFTLinear.from_linear(base, pattern, **PATTERNS[pattern])
    x = torch.randn(2, 5, sizes[0]).to(dtype)
    assert torch.equal(layer(x), base(x))
    assert layer.weight is base.weight and not base.weight.requires_grad and layer.values.dtype == F32


def test_u_sigma_and_v_are_those_of_w() -> None:
    layer = SVFTLinear.from_linear(linear(), "plain")
    assert layer.u.shape == (9, 9) and layer.vh.shape == (9, 13) and not layer.u.requires_grad
    torch.testing.assert_close(layer.u * layer.sigma @ layer.vh, layer.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.u.T @ layer.u, torch.eye(9), rtol=0, atol=1e-6)


@ON_EACH_PATTERN
def test_the_gradient_of_m_is_u_g_v_at_its_places_and_that_of_x_is_exact(pattern: str) -> None:
    """In float64, with G the gradient that W would have; the weight is U (Σ + M) Vᵀ."""
    layer = trained(pattern, dtype=F64)
    u, sigma, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    x = torch.randn(6, 13, dtype=F64, requires_grad=True)
    w = (u @ (torch.diag(sigma) + matrix(layer)) @ vh).requires_grad_()
    xs = x.detach().clone().requires_grad_()
    y, expected = layer(x), nn.functional.linear(xs, w, layer.bias)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy)
    assert x.grad is not None and w.grad is not None and xs.grad is not None and layer.values.grad is not None
    i, j = layer.position.long().T
    torch.testing.assert_close(layer.values.grad, (u.T @ w.grad @ vh.T)[i, j], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, xs.grad, rtol=1e-10, atol=1e-10)


def test_a_full_pattern_reaches_any_weight() -> None:
    """By one solve: M = Uᵀ (W' - W) V for a square W."""
    layer = SVFTLinear.from_linear(linear(8, 8, dtype=F64), "top", k=64)
    wanted = torch.randn(8, 8, dtype=F64)
    with torch.no_grad():
        layer.values.copy_((layer.u.T @ (wanted - layer.weight) @ layer.vh.T).flatten())
    x = torch.randn(3, 8, dtype=F64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, wanted, layer.bias), rtol=1e-10, atol=1e-10)


def test_columns_that_m_does_not_name_are_not_kept() -> None:
    layer = SVFTLinear(linear(20, 30), torch.tensor([[3, 0], [7, 0], [3, 5]]))
    assert (
        layer.u.shape == (30, 2) and layer.vh.shape == (2, 20) and layer.position.tolist() == [[3, 0], [3, 5], [7, 0]]
    )


def test_a_base_of_few_bits() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    lk.quantize_(model, "nf4")
    x = torch.randn(3, 64)
    before = model(x)
    lk.adapt(model, lk.SVFTConfig())
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert model[0].values.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="dequantize_"):
        model[0].merge_()


# ------------------------------------------------------------------------------------------------ merging and states


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_a_merge_is_the_formula_and_its_way_back_is_exact(dtype: torch.dtype) -> None:
    layer = trained(dtype=dtype)
    x, before = torch.randn(4, 13).to(dtype), layer.weight.detach().clone()
    y, state = layer(x), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.merge_()
    assert layer.merged and not torch.equal(layer.weight, before) and torch.equal(layer(x), layer.base_layer(x))
    torch.testing.assert_close(layer(x), y, rtol=4 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)
    assert all(torch.equal(t, state[name]) for name, t in layer.state_dict().items())
    nn.init.zeros_(layer.values)
    assert torch.equal(layer.merge_().unmerge_().weight, before) and not layer.merged


def test_merge_and_unload_gives_the_linear_back_with_m_in_it() -> None:
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(9, 5))
    flags = [p.requires_grad for p in model.parameters()]
    lk.adapt(model, lk.SVFTConfig(pattern="banded", band=1))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.values)
    x = torch.randn(3, 13)
    y = model(x)
    lk.merge_and_unload(model)
    assert type(model[0]) is nn.Linear and [p.requires_grad for p in model.parameters()] == flags
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


def test_a_merge_that_cannot_be_leaves_the_layer_as_it_was() -> None:
    layer = trained()
    before = layer.weight.detach().clone()
    layer.values.data[3] = torch.inf
    with pytest.raises(ValueError, match="expected finite values"):
        layer.merge_()
    layer.values.data[3] = 1.0
    layer.weight_shared_with = ("head.weight",)
    with pytest.raises(ValueError, match=r"is also that of head\.weight"):
        layer.merge_()
    assert torch.equal(layer.weight, before) and not layer.merged


def test_undo_puts_the_model_back_bit_for_bit_also_while_merged() -> None:
    model = nn.Sequential(linear(), nn.Linear(9, 5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = lk.adapt(model, lk.SVFTConfig(pattern="top", k=9))
    assert report.trainable == 18 and "SVFTLinear 9×13, M top, 9" in str(report)
    nn.init.normal_(model[0].values)
    model[0].merge_()
    report.undo()
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())


def test_a_state_is_right_where_the_vectors_have_other_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = trained(), torch.randn(4, 13)
    state = layer.state_dict()
    elsewhere(monkeypatch)
    other = SVFTLinear.from_linear(linear(), "banded", band=2)
    assert not torch.equal(other.u, layer.u)
    other.load_state_dict(dict(reversed(list(state.items()))))
    assert torch.equal(other(x), layer(x))


def test_a_state_of_other_places_is_refused() -> None:
    layer = SVFTLinear.from_linear(linear(), "random", k=20, seed=1)
    with pytest.raises(ValueError, match=r"expected a state of the same places of M at position, got others"):
        layer.load_state_dict(SVFTLinear.from_linear(linear(), "random", k=20, seed=2).state_dict())


def test_copies_and_base_only() -> None:
    layer, x = trained(), torch.randn(4, 13)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), layer(x)) and copied.values is not layer.values
    with lk.base_only(nn.Sequential(layer)):
        assert torch.equal(layer(x), layer.base_layer(x))
    layer.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="expected a base_layer without hooks"):
        layer(x)


def test_checkpointed_and_accumulated_gradients_are_the_plain_ones() -> None:
    layer, x = trained(), torch.randn(6, 13)
    layer(x).square().sum().backward()
    plain = layer.values.grad.clone()  # type: ignore[union-attr]
    layer.values.grad = None
    for part in (x[:0], x[:1], x[1:]):
        run = torch.utils.checkpoint.checkpoint(layer, part, use_reentrant=False)
        run.square().sum().backward()
    torch.testing.assert_close(layer.values.grad, plain)


# ---------------------------------------------------------------------------------------------------------------- files


def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on SVDs are those of another machine: other signs, and another basis where values are equal."""
    here = torch.linalg.svd

    def svd(a: Tensor, full_matrices: bool = True) -> Any:
        u, s, vh = here(a, full_matrices=full_matrices)
        generator = torch.Generator().manual_seed(0)
        turn, start = torch.zeros(len(s), len(s), dtype=s.dtype), 0
        ends = [i + 1 for i in range(len(s)) if i + 1 == len(s) or s[i] - s[i + 1] > 1e-9 * s[0]]
        for end in ends:  # an orthogonal matrix for each group of equal values; of one, a sign
            drawn = torch.randn(end - start, end - start, generator=generator, dtype=s.dtype)
            turn[start:end, start:end] = drawn.sign() if end - start == 1 else torch.linalg.qr(drawn).Q
            start = end
        return torch.return_types.linalg_svd((u @ turn, s, turn.T @ vh))

    monkeypatch.setattr(torch.linalg, "svd", svd)


def ordinary() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(13, 9), nn.ReLU(), nn.Linear(9, 9))


def repeated() -> nn.Module:
    """Singular values 3, 3, 3, 2 and 1 of the first matrix, and a rank of 4 of the second."""
    model = ordinary()
    torch.manual_seed(3)
    q, p = (torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q for n in (9, 13))
    values = torch.tensor([3.0, 3.0, 3.0, 2.0, 1.0, 0.5, 0.4, 0.3, 0.2], dtype=F64)
    with torch.no_grad():
        model[0].weight.copy_(q * values @ p[:9])
        model[2].weight.copy_(torch.randn(9, 4) @ torch.randn(4, 9))
    return model


def nothing() -> nn.Module:
    model = ordinary()
    nn.init.zeros_(model[0].weight)  # type: ignore[arg-type]
    nn.init.eye_(model[2].weight)  # type: ignore[arg-type]
    return model


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("make", [ordinary, repeated, nothing])
@ON_EACH_PATTERN
def test_a_file_is_right_where_the_svd_comes_out_otherwise(
    pattern: str, make: Callable[[], nn.Module], dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = make().to(dtype), torch.randn(5, 13).to(dtype)
    lk.adapt(model, lk.SVFTConfig(pattern=pattern, **PATTERNS[pattern]))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.values)
    y = model(x)
    lk.save_svft(model, tmp_path)
    elsewhere(monkeypatch)
    other = make().to(dtype)
    report = lk.load_svft(other, tmp_path)
    loose = 3 * torch.finfo(dtype).eps * float(y.detach().abs().max())
    torch.testing.assert_close(other(x), y, rtol=0, atol=max(loose, 1e-12))
    assert not any(p.requires_grad for p in other.parameters())
    report.undo()
    assert torch.equal(other[0].weight, make().to(dtype)[0].weight)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, F64], ids=str)
def test_a_file_of_a_model_that_was_cast_is_right(dtype: torch.dtype, tmp_path: Path) -> None:
    """Its singular vectors are of the weight before, and those of the weight that is saved are others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    base = copy.deepcopy(model).to(dtype)
    lk.adapt(model, lk.SVFTConfig(pattern="banded", band=3))
    nn.init.normal_(model[0].values)  # type: ignore[union-attr, arg-type]
    model.to(dtype)
    lk.save_svft(model, tmp_path)
    lk.load_svft(base, tmp_path)
    assert torch.equal(base[0].u, model[0].u) and torch.equal(base[0].vh, model[0].vh)
    x = torch.randn(5, 64).to(dtype)
    assert torch.equal(base(x), model(x))


def test_vectors_are_written_only_where_singular_values_do_not_determine_them() -> None:
    for make, kept in ((ordinary, [0, 0]), (repeated, [3, 5]), (nothing, [9, 9])):
        model = make()
        lk.adapt(model, lk.SVFTConfig())
        assert [len(model[i].basis()["u_kept"]) for i in (0, 2)] == kept


def _saved(folder: Path) -> Path:
    model = ordinary()
    lk.adapt(model, lk.SVFTConfig(pattern="banded", band=1))
    nn.init.normal_(model[0].values)  # type: ignore[union-attr, arg-type]
    return lk.save_svft(model, folder)


def _edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "svft_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return edit


def _edit_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "svft.safetensors")
        change(tensors)
        save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "svft.safetensors")

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda folder: (folder / "svft.safetensors").unlink(), "expected svft.safetensors in"),
        (lambda folder: (folder / "svft_config.json").write_text("{"), "to hold JSON"),
        (_edit_config(lambda c: c.update(format="x")), "to be of the format 'lowrank_kernels svft 1'"),
        (_edit_config(lambda c: c["modules"]["0"].update(sha256=3)), "shape, dtype and sha256"),
        (_edit_config(lambda c: c["modules"]["0"].update(shape="ab")), "shape, dtype and sha256"),
        (
            _edit_config(lambda c: c["modules"].update(other=c["modules"]["0"])),
            "expected a linear at other",
        ),
        (_edit_config(lambda c: c["modules"]["0"].update(shape=[9, 9])), r"0 has shape \[9, 9\], got \[9, 13\]"),
        (_edit_config(lambda c: c["modules"].pop("2")), "unexpected: 2.position"),
        (_edit_tensors(lambda t: t.pop("0.u_pivot")), "missing: 0.u_pivot"),
        (_edit_tensors(lambda t: t["0.values"].fill_(torch.nan)), "found NaN or Inf in 0.values"),
        (_edit_tensors(lambda t: t.update({"0.values": t["0.values"][:-1]})), "expected the tensors of a matrix"),
        (_edit_tensors(lambda t: t.update({"0.vh_value": t["0.vh_value"][:-1]})), "expected the tensors of a matrix"),
        (_edit_tensors(lambda t: t.update({"0.position": t["0.position"].long()})), "expected the tensors of a matrix"),
        (_edit_tensors(lambda t: t["0.position"][0].fill_(99)), "expected places from 0 to 8"),
        (_edit_tensors(lambda t: t["0.position"].copy_(t["0.position"].flip(0))), "ascending by row"),
        (_edit_tensors(lambda t: t["0.u_pivot"][2].fill_(-1)), "expected a basis of 9 vectors"),
        (
            _edit_tensors(lambda t: t["0.u_value"][2].mul_(0.5)),
            "differ by",
        ),
        (_edit_tensors(lambda t: t["2.values"].copy_(t["2.values"].double())), None),
    ],
)
def test_a_broken_file_is_refused_and_the_model_left_as_it_was(
    edit: Callable[[Path], Any], words: str | None, tmp_path: Path
) -> None:
    edit(_saved(tmp_path))
    model = ordinary()
    if words is None:
        lk.load_svft(model, tmp_path)
        return
    with pytest.raises(ValueError, match=words):
        lk.load_svft(model, tmp_path)
    assert type(model[0]) is nn.Linear and all(p.requires_grad for p in model.parameters())


def test_another_base_is_refused(tmp_path: Path) -> None:
    _saved(tmp_path)
    model = ordinary()
    with torch.no_grad():
        model[2].weight[0, 0] += 1e-6  # type: ignore[index, operator, union-attr]
    with pytest.raises(ValueError, match="expected the base that was tuned, whose 2 has sha256"):
        lk.load_svft(model, tmp_path)
    with pytest.raises(ValueError, match="0 has dtype float32, got bfloat16"):
        lk.load_svft(ordinary().to(BF16), tmp_path)


def test_what_a_file_has_no_place_for_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected SVFTLinear layers"):
        lk.save_svft(ordinary(), tmp_path / "a")
    model = ordinary()
    lk.adapt(model, lk.SVFTConfig(bias="all"))
    with pytest.raises(ValueError, match="expected bias='none', got 'all'"):
        lk.save_svft(model, tmp_path / "a")
    model = ordinary()
    lk.adapt(model, lk.SVFTConfig())
    model[0].merge_()  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="expected unmerged layers"):
        lk.save_svft(model, tmp_path / "a")
    model[0].unmerge_()  # type: ignore[operator, union-attr]
    model[0].values.data[0] = torch.nan  # type: ignore[union-attr, index, operator]
    with pytest.raises(ValueError, match="found NaN or Inf in 0"):
        lk.save_svft(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_after_a_merge_and_back_the_file_is_still_of_the_base(tmp_path: Path) -> None:
    model = ordinary()
    lk.adapt(model, lk.SVFTConfig())
    nn.init.normal_(model[0].values)  # type: ignore[union-attr, arg-type]
    model[0].merge_().unmerge_()  # type: ignore[operator, union-attr]
    lk.save_svft(model, tmp_path)
    lk.load_svft(ordinary(), tmp_path)
