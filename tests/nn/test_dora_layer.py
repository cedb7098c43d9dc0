"""DoRALinear: the formula and its gradients, a cache that is never stale, merging, and what a module has to survive."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lowrank_kernels.adapt import adapt
from lowrank_kernels.config import DoRAConfig
from lowrank_kernels.functional import ScaleCache
from lowrank_kernels.nn import DoRALinear
from lowrank_kernels.reference import dropout_keep_mask_ref


def make(k=24, n=16, r=4, dtype=torch.float32, bias=True, zero_rows=False, **settings):
    """A layer that has left its start: B is not 0 and m is not the norm."""
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    with torch.no_grad():
        if zero_rows:
            linear.weight[3:5] = 0
        layer = DoRALinear.from_linear(linear, r, **settings)
        layer.lora_B.weight.normal_(std=0.1)
        layer.lora_magnitude_vector.mul_(0.5 + torch.rand(n))
        if zero_rows:
            layer.lora_B.weight[3:5] = 0
            layer.lora_magnitude_vector[3:5] = 1.5
    return layer


def plain(layer, x, dropped=None, dtype=None):
    """The formula in plain torch, on the layer's own parameters."""
    dtype = dtype or x.dtype
    w, a, b, m = (
        t.to(dtype) for t in (layer.weight, layer.lora_A.weight, layer.lora_B.weight, layer.lora_magnitude_vector)
    )
    x = x.to(dtype)
    dropped = x if dropped is None else dropped
    norm = (w + layer.scaling * b @ a).norm(dim=1)
    norm = norm.detach() if layer.detach_norm else norm
    scale = torch.where(norm > 0, m / torch.where(norm > 0, norm, 1), 0)
    base = x @ w.T
    main = base + (scale - 1) * (dropped @ w.T) if layer.dropout_base else scale * base
    y = main + scale * layer.scaling * (dropped @ a.T @ b.T)
    return y if layer.bias is None else y + layer.bias.to(dtype)


def assert_same(got, expected, tolerance=2e-6):
    """Within a tolerance of the largest element."""
    assert got.dtype == expected.dtype
    scale = max(1.0, expected.detach().abs().max().item())
    assert (got - expected).abs().max() <= tolerance * scale


def gradients(layer, y, x):
    layer.zero_grad()
    x.grad = None
    y.sin().sum().backward()
    grads = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    return {**grads, "x": x.grad.clone()}


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "orthonormal"])
@pytest.mark.parametrize("train", ["both", "a", "b"])
def test_starts_as_the_wrapped_layer(init, train):
    linear = nn.Linear(40, 30)
    x = torch.randn(7, 40)
    y = linear(x)
    layer = DoRALinear.from_linear(linear, 4, init=init, train=train)
    assert_same(layer(x), y)
    trained = {"both": {"lora_A.weight", "lora_B.weight"}, "a": {"lora_A.weight"}, "b": {"lora_B.weight"}}[train]
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == trained | {"lora_magnitude_vector"}


def test_starts_as_the_wrapped_layer_in_bfloat16():
    linear = nn.Linear(40, 30, dtype=torch.bfloat16)
    x = torch.randn(7, 40, dtype=torch.bfloat16)
    y = linear(x)
    layer = DoRALinear.from_linear(linear, 4)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    assert (layer(x).float() - y.float()).abs().max() <= 2**-7 * y.abs().max()


@pytest.mark.parametrize("detach_norm", [True, False])
@pytest.mark.parametrize("dropout_base", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_autograds(detach_norm, dropout_base, dropout, bias):
    layer = make(bias=bias, rslora=True, alpha=3.0, dropout=dropout, dropout_base=dropout_base, detach_norm=detach_norm)
    x = torch.randn(5, 6, 24, requires_grad=True)
    for training in (True, False):
        layer.train(training)
        dropped = None
        if training and dropout:
            torch.manual_seed(5)
            seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
            keep = dropout_keep_mask_ref(seed, 30, 24, dropout).reshape(x.shape)
            dropped = torch.where(keep, x, 0.0) / (1 - dropout)
        expected = plain(layer, x, dropped)
        torch.manual_seed(5)
        got = layer(x)
        assert_same(got, expected)
        got, expected = gradients(layer, got, x), gradients(layer, expected, x)
        assert got.keys() == expected.keys() == {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "x"}
        for name, g in expected.items():
            assert_same(got[name], g, 2e-5)


@pytest.mark.parametrize("detach_norm", [True, False])
def test_zero_rows_yield_the_bias_and_no_gradient_of_their_magnitude(detach_norm):
    layer = make(zero_rows=True, detach_norm=detach_norm)
    x = torch.randn(9, 24, requires_grad=True)
    y = layer(x)
    assert torch.equal(y[:, 3:5], layer.bias[3:5].expand(9, 2))
    got, expected = gradients(layer, y, x), gradients(layer, plain(layer, x), x)
    assert got["lora_magnitude_vector"][3:5].count_nonzero() == 0
    for name, g in expected.items():
        if torch.isfinite(g).all():  # the plain norm has no gradient at 0
            assert_same(got[name], g, 2e-5)
        assert torch.isfinite(got[name]).all()


def test_a_zero_row_of_the_weight_learns_again_through_b():
    linear = nn.Linear(24, 16)
    with torch.no_grad():
        linear.weight[3] = 0
    layer = DoRALinear.from_linear(linear, 2)
    assert layer.lora_magnitude_vector[3] == 0
    with torch.no_grad():
        layer.lora_B.weight.normal_()
    layer(torch.randn(9, 24)).square().sum().backward()
    assert layer.lora_magnitude_vector.grad[3] != 0


def test_frozen_a_does_not_save_x():
    for train, saves_x in (("both", True), ("b", False)):
        layer = make(train=train)
        x = torch.randn(9, 24)
        y = layer(x)
        assert any(t is x for t in y.grad_fn.saved_tensors) == saves_x


# ----------------------------------------------------------------------------------------------------------- the cache


def edit(name):
    def change(layer):
        with torch.no_grad():
            layer.get_parameter(name).mul_(torch.linspace(0.5, 1.5, layer.get_parameter(name).shape[-1]))

    return change


def inference_edit(layer):
    with torch.inference_mode():
        layer.lora_B.weight.mul_(1.5)


def optimizer_step(layer):
    x = torch.randn(4, 24)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def load(assign):
    def change(layer):
        layer.load_state_dict({n: t + 0.1 for n, t in layer.state_dict().items()}, assign=assign)

    return change


def merge_with_edits(layer):
    layer.merge_()
    edit("lora_A.weight")(layer)
    layer.unmerge_()


def through_bfloat16(layer):
    layer.to(torch.bfloat16).to(torch.float32)


def new_storages(layer):
    """One after the other at what may be the same address, each with version 0."""
    for _ in range(3):
        layer.lora_magnitude_vector.data = torch.rand(16)
        layer(torch.randn(1, 24))


def raw_write(name):
    """No version counts it."""
    return lambda layer: layer.get_parameter(name).data.mul_(1.5 if name != "lora_A.weight" else -1.5)


def raw_signs(layer):
    """Two in a row: the row's sum of squares and its bits' parity stay."""
    layer.base_layer.weight.data[:, [2, 10]] *= -1


def raw_columns(layer):
    weight = layer.base_layer.weight.data
    weight[:, [2, 10]] = weight[:, [10, 2]]


CHANGES = {
    "W": edit("base_layer.weight"),
    "A": edit("lora_A.weight"),
    "B": edit("lora_B.weight"),
    "m": edit("lora_magnitude_vector"),
    "in inference mode": inference_edit,
    "optimizer": optimizer_step,
    "load_state_dict": load(False),
    "load_state_dict, assigned": load(True),
    "merged": merge_with_edits,
    "rounded": through_bfloat16,
    "float64": lambda layer: layer.to(torch.float64),
    "new storages": new_storages,
    **{f"raw, {name}": raw_write(name) for name in ("base_layer.weight", "lora_A.weight", "lora_B.weight")},
    "raw, m": raw_write("lora_magnitude_vector"),
    "signs of W": raw_signs,
    "columns of W": raw_columns,
    "alpha": lambda layer: setattr(layer, "alpha", 5.0),
}


@pytest.mark.parametrize("rows", [2, 6, 20, 200])  # each its own way through the extension, or the library's product
@pytest.mark.parametrize("kind", CHANGES)
def test_the_cache_is_never_stale(kind, rows):
    layer = make().eval()
    x = torch.randn(rows, 24)
    with torch.no_grad():
        before = layer(x)
    CHANGES[kind](layer)
    x = x.to(layer.weight.dtype)
    exact = layer.weight.dtype == torch.float64
    assert_same(layer(x), plain(layer, x), 1e-12 if exact else 2e-6)
    assert (layer(x) - before).abs().max() > (0 if exact else 1e-5)
    with torch.no_grad():
        assert_same(layer(x), plain(layer, x))


@pytest.mark.parametrize("rows", [2, 6, 20, 200])
def test_the_scale_is_kept_while_nothing_changes(rows):
    layer, x = make().eval(), torch.randn(rows, 24)
    with torch.no_grad():
        y = layer(x)
        kept = layer.scale_cache.kept
        assert kept[0] is not None
        assert torch.equal(layer(x), y) and layer.scale_cache.kept is kept
        layer.lora_B.weight.data[0, 0] += 1e-6
        layer(x)
        assert layer.scale_cache.kept is not kept


def test_the_kept_scale_is_the_one_that_is_used():
    """Else the test above would say nothing."""
    layer, x = make().eval(), torch.randn(3, 24)
    with torch.no_grad():
        layer(x)
        layer.scale_cache.kept[0].zero_()
        assert torch.equal(layer(x), layer.bias.expand(3, 16))


def test_functional_call_sees_the_tensors_that_it_is_given():
    layer = make().eval()
    x = torch.randn(3, 24)
    layer(x)
    m = layer.lora_magnitude_vector
    for _ in range(3):
        with torch.no_grad():
            m.mul_(1.5)
        assert_same(functional_call(layer, {"lora_magnitude_vector": m.data}, (x,)), plain(layer, x))


def test_inference_mode_before_training_and_layers_made_in_it():
    layer = make().eval()
    x = torch.randn(3, 24)
    with torch.inference_mode():
        y = layer(x)
    layer(x).sum().backward()  # what inference cached must not be an inference tensor
    layer.train()(x).sum().backward()
    assert_same(layer.eval()(x), y)
    with torch.inference_mode():
        inner = make().eval()
        assert_same(inner(x), y)
        inner.lora_magnitude_vector.mul_(2)
        assert_same(inner(x), plain(inner, x))


def copies(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    yield torch.load(buffer, weights_only=False)
    twin = make()
    twin.load_state_dict(layer.state_dict())
    yield twin


@pytest.mark.parametrize("merged", [False, True])
def test_copies_compute_the_same_and_are_independent(merged):
    layer = make().eval()
    x = torch.randn(3, 24)
    y = layer(x).detach()
    if merged:
        layer.merge_()
    for twin in copies(layer):
        assert_same(twin.eval()(x), y)
        twin.unmerge_()
        with torch.no_grad():
            twin.lora_magnitude_vector.zero_()
        assert torch.equal(twin(x), twin.bias.expand(3, 16))
        assert_same(layer(x), y)
    assert isinstance(copy.deepcopy(layer.scale_cache), ScaleCache)
    assert copy.deepcopy(layer.scale_cache).kept == (None, None)


# ------------------------------------------------------------------------------------------------------------- merging


def exact_sums(layer):
    """(W, W + s B A) in float64."""
    w, a, b = (t.detach().double() for t in (layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    return w, w + layer.scaling * b @ a


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_rounds_once(dtype):
    layer = make(k=40, n=30, dtype=dtype)
    _, sums = exact_sums(layer)
    exact = (layer.lora_magnitude_vector.detach().double() / sums.norm(dim=1))[:, None] * sums
    assert layer.merge_() is layer and layer.merged
    if dtype == torch.float32:
        assert (layer.weight.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
    else:
        assert (layer.weight == exact.to(dtype)).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_layer_is_its_linear(dtype):
    layer, x = make(k=40, n=30, dtype=dtype).merge_(), torch.randn(5, 40, dtype=dtype)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerge_comes_back_to_within_one_rounding(dtype):
    layer = make(k=40, n=30, dtype=dtype)
    w, sums = exact_sums(layer)
    layer.merge_().unmerge_()
    assert not layer.merged
    # One rounding of the merged row, seen before its scale, and one of the row itself.
    allowed = torch.finfo(dtype).eps * (sums.abs().amax(1, keepdim=True) + w.abs().amax(1, keepdim=True))
    assert ((layer.weight.double() - w).abs() <= allowed).all()


def test_merging_keeps_the_function_and_does_nothing_twice():
    layer = make().eval()
    x = torch.randn(6, 24)
    y = layer(x)
    assert_same(layer.merge_()(x), y)
    once = layer.weight.detach().clone()
    assert torch.equal(layer.merge_().weight, once)
    before = layer.unmerge_().weight.detach().clone()
    assert torch.equal(layer.unmerge_().weight, before)
    assert_same(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_kept_copy_comes_back_bit_for_bit(dtype):
    layer = make(dtype=dtype, zero_rows=True)
    before = layer.weight.detach().clone()
    layer.merge_(keep_copy=True)
    edit("lora_B.weight")(layer)
    assert torch.equal(layer.state_dict()["base_layer.weight"], before)
    assert torch.equal(layer.unmerge_().weight, before)


def test_rows_that_merging_wipes_out_are_kept():
    layer = make(dtype=torch.float16, zero_rows=True)
    with torch.no_grad():
        layer.lora_magnitude_vector[7] = 0
        layer.lora_magnitude_vector[8] = 1e-6  # subnormal in float16
    before = layer.weight.detach().clone()
    layer.merge_()
    assert layer.weight[[3, 4, 7]].count_nonzero() == 0
    assert layer._merged.kept.shape == (4, 24)
    layer.unmerge_()
    rows = [3, 4, 7, 8]
    assert torch.equal(layer.weight[rows], before[rows])
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=2e-3)


def test_state_dict_of_a_merged_layer_is_the_unmerged_one():
    layer = make().eval()
    x = torch.randn(4, 24)
    y = layer(x).detach()
    plain_state = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.merge_()
    state = layer.state_dict()
    assert list(state) == list(plain_state)
    for name, t in plain_state.items():
        torch.testing.assert_close(state[name], t, rtol=1e-6, atol=1e-6)
    fresh = make().merge_()
    fresh.load_state_dict(state)
    assert not fresh.merged
    assert_same(fresh.eval()(x), y)


def test_a_merged_layer_moves():
    layer = make(zero_rows=True)
    before = layer.weight.detach().clone()
    layer.merge_().double().unmerge_()
    torch.testing.assert_close(layer.weight, before.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda layer: layer.lora_magnitude_vector.fill_(float("inf")), "finite column scale"),
        (lambda layer: layer.lora_A.weight.fill_(float("nan")), "finite"),
        (lambda layer: setattr(layer, "weight_shared_with", ("embed.weight",)), r"also that of embed\.weight"),
    ],
)
def test_merge_refuses_what_would_spoil_the_weight_and_changes_nothing(spoil, match):
    layer = make()
    with torch.no_grad():
        spoil(layer)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=match):
        layer.merge_()
    assert torch.equal(layer.weight, before) and not layer.merged


# ---------------------------------------------------------------------------------------------- models, training


def make_model(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 6))
    report = adapt(model, DoRAConfig(r=3, **settings))
    with torch.no_grad():
        for layer in model[::2]:
            layer.lora_B.weight.normal_(std=0.3)
    return model, report


X = torch.linspace(-1, 1, 8 * 12).reshape(8, 12)


def model_gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_adapt_follows_the_patterns_and_undoes():
    model, report = make_model(
        rank_pattern={"2": 5}, alpha_pattern={"4": 2.0}, rslora=True, dropout_base=True, detach_norm=False, bias="all"
    )
    assert [(r.kind, r.rank) for r in report.replaced] == [("DoRALinear", r) for r in (3, 5, 3)]
    assert [layer.alpha for layer in model[::2]] == [16.0, 16.0, 2.0]
    assert all(layer.dropout_base and not layer.detach_norm and layer.rslora for layer in model[::2])
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    kinds = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias")
    assert trained == {f"{i}.{kind}" for i in (0, 2, 4) for kind in kinds}
    model[0].merge_()
    report.undo()
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_repeats_the_same_mask(use_reentrant, dropout):
    model, _ = make_model(dropout=dropout, dropout_base=True)
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    expected = model_gradients(model, model(x))
    torch.manual_seed(1)
    got = model_gradients(model, checkpoint(model, x, use_reentrant=use_reentrant))
    assert len(expected) == 9
    for name, g in expected.items():
        assert torch.equal(got[name], g), name


@pytest.fixture
def own_graphs():
    """The graphs of all nn.Sequentials share one limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("own_graphs")
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.3, "dropout_base": True}, {"detach_norm": False}], ids=str)
def test_compiles_as_one_graph(settings):
    model, _ = make_model(**settings)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    expected = model_gradients(model, model(X))
    torch.manual_seed(1)
    got = model_gradients(model, compiled(X))
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, rtol=2e-5, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(X), model.eval()(X), rtol=2e-6, atol=2e-6)
        model[0].lora_magnitude_vector.mul_(1.5)
        torch.testing.assert_close(compiled(X), model(X), rtol=2e-6, atol=2e-6)


def test_autocast_keeps_float32_parameters_and_gradients():
    model, _ = make_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(X)
    assert y.dtype == torch.bfloat16
    grads, exact = model_gradients(model, y.float()), model_gradients(model, model(X))
    assert {g.dtype for g in grads.values()} == {torch.float32}
    for name, g in exact.items():
        assert (grads[name] - g).norm() <= 0.05 * g.norm(), name


def test_training_lowers_the_loss_and_moves_nothing_else():
    model, _ = make_model()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target, losses = torch.sin(3 * X[:, :6]), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


# -------------------------------------------------------------------------------------------------------- words, errors


def test_repr_and_names():
    layer = make(dropout_base=True, detach_norm=False)
    assert "r=4" in repr(layer) and "dropout_base=True, detach_norm=False" in repr(layer)
    names = {"base_layer.weight", "base_layer.bias", "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    assert set(layer.state_dict()) == names
    assert {p.device.type for p in make().to("meta").parameters()} == {"meta"}
    assert DoRALinear(nn.Linear(4, 4, device="meta"), 2).lora_magnitude_vector.is_meta


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"lora_bias": True}, ValueError, "DoRALinear: expected lora_bias to be False, got True"),
        ({"r": 0}, ValueError, "r to be an integer of at least 1"),
        ({"dropout": 1.0}, ValueError, "0 <= dropout < 1"),
        ({"hyper": 1}, TypeError, "hyper"),
    ],
)
def test_wrong_settings_are_named(settings, error, match):
    linear = nn.Linear(4, 4)
    with pytest.raises(error, match=match):
        DoRALinear.from_linear(linear, **{"r": 2, **settings})
    assert linear.weight.requires_grad and linear.bias.requires_grad


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"lora_bias": True}, ValueError, "DoRAConfig: expected lora_bias to be False"),
        ({"dropout_base": 1}, TypeError, "DoRAConfig: expected dropout_base to be True or False, got 1"),
        ({"detach_norm": None}, TypeError, "DoRAConfig: expected detach_norm to be True or False, got None"),
        ({"r": 0}, ValueError, "DoRAConfig: expected r to be an integer"),
        ({"init": "pissa"}, ValueError, "DoRAConfig: expected init to be one of"),
    ],
)
def test_wrong_configs_are_named(settings, error, match):
    with pytest.raises(error, match=match):
        DoRAConfig(**settings)


def test_an_already_adapted_base_is_refused():
    with pytest.raises(TypeError, match="already adapted"):
        DoRALinear.from_linear(make(), 2)
