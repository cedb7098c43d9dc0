"""LoRAEmbedding and DoRAEmbedding: numbers against float64, merging, and what they refuse."""

import copy
import pickle

import pytest
import torch
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.nn import DoRAEmbedding, LoRAEmbedding
from lowrank_kernels.reference import lora_embedding_ref
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

KINDS = [LoRAEmbedding, DoRAEmbedding]


def make(kind, k=13, n=8, r=3, dtype=torch.float32, embedding=None, **settings):
    torch.manual_seed(0)
    layer = kind.from_embedding(embedding or nn.Embedding(k, n, dtype=dtype), r, **settings)
    with torch.no_grad():
        for factor in layer.factors():
            factor.normal_(std=0.5)
        if kind is DoRAEmbedding:
            layer.lora_magnitude_vector.uniform_(1.0, 3.0)
    return layer


def reference(layer, ids, dtype, **settings):
    """Outputs and gradients of the dense formula in a dtype: (y, {name: gradient})."""
    own = {name: p.detach().to(dtype).requires_grad_() for name, _, p in named(layer)}
    y = lora_embedding_ref(
        ids,
        layer.weight.detach().to(dtype),
        own["lora_embedding_A"],
        own["lora_embedding_B"],
        own.get("lora_magnitude_vector"),
        scaling=layer.scaling,
        **settings,
    )
    y.sin().sum().backward()
    return y.detach(), {name: p.grad for name, p in own.items()}


def named(layer):
    return [(name, shape, p) for name, p, shape in layer.correction_parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rslora", [True, False])
def test_outputs_and_gradients_are_the_formula(kind, rslora):
    layer = make(kind, alpha=6.0, rslora=rslora)
    assert layer.scaling == pytest.approx(6.0 / (3**0.5 if rslora else 3))
    ids = torch.randint(13, (2, 5))
    y = layer(ids)
    y.sin().sum().backward()
    exact, exact_grads = reference(layer, ids, torch.float64)
    eager, eager_grads = reference(layer, ids, torch.float32)
    assert_as_exact_as_eager(y.detach(), eager, exact)
    for name, _, p in named(layer):
        assert_as_exact_as_eager(p.grad, eager_grads[name], exact_grads[name], factor=GRADIENT_FACTOR, what=name)
    assert layer.weight.grad is None and not layer.weight.requires_grad


def test_dora_with_the_norms_gradient():
    layer = make(DoRAEmbedding, detach_norm=False)
    ids = torch.randint(13, (7,))
    layer(ids).sin().sum().backward()
    _, exact = reference(layer, ids, torch.float64, detach_norm=False)
    for name, _, p in named(layer):
        torch.testing.assert_close(p.grad.double(), exact[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_factors_over_a_half_precision_base(kind, dtype):
    layer = make(kind, k=40, n=32, dtype=dtype)
    assert layer.lora_embedding_A.dtype == torch.float32
    ids = torch.randint(40, (3, 11))
    y = layer(ids)
    exact, _ = reference(layer, ids, torch.float64)
    assert_as_exact_as_eager(y.detach(), exact.to(dtype), exact)
    y.float().square().sum().backward()
    assert layer.lora_embedding_B.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert torch.equal(layer(ids), y)  # as of the embedding alone, autocast changes nothing


def test_a_new_layer_is_the_embedding():
    layer = LoRAEmbedding(nn.Embedding(400, 300), 8)
    ids = torch.arange(400)
    assert torch.equal(layer(ids), layer.base_layer(ids))
    dora = DoRAEmbedding(nn.Embedding(9, 7), 2)
    torch.testing.assert_close(dora(torch.arange(9)), dora.base_layer(torch.arange(9)))


def test_factors_start_as_pefts():
    layer = LoRAEmbedding(nn.Embedding(400, 300), 8)
    assert not layer.lora_embedding_A.any() and abs(layer.lora_embedding_B.std() - 1.0) < 0.05


def test_where_b_alone_trains_a_is_random_and_b_zero():
    layer = LoRAEmbedding(nn.Embedding(9, 7), 2, train="b")
    assert layer.lora_embedding_A.any() and not layer.lora_embedding_B.any()
    assert not layer.lora_embedding_A.requires_grad and layer.lora_embedding_B.requires_grad


def test_parameters_are_called_as_pefts():
    dora = DoRAEmbedding(nn.Embedding(9, 7), 2)
    assert {name: tuple(p.shape) for name, p in dora.named_parameters()} == {
        "base_layer.weight": (9, 7),
        "lora_embedding_A": (2, 9),
        "lora_embedding_B": (7, 2),
        "lora_magnitude_vector": (7,),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_the_padding_gets_no_gradient_and_frequent_ids_a_smaller_one(kind):
    layer = make(kind, embedding=nn.Embedding(13, 8, padding_idx=4, scale_grad_by_freq=True))
    ids = torch.tensor([[4, 4, 1], [2, 2, 2]])
    y = layer(ids)
    upstream = torch.randn_like(y)
    (y * upstream).sum().backward()
    grad = layer.lora_embedding_A.grad
    assert not grad[:, 4].any() and not grad[:, 0].any() and grad[:, 1].any()
    g = layer.column_scale().detach() if kind is DoRAEmbedding else 1.0
    expected = layer.scaling * (g * upstream[1]).mean(0) @ layer.lora_embedding_B.detach()
    torch.testing.assert_close(grad[:, 2], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merging_and_back(kind, dtype):
    layer = make(kind, dtype=dtype)
    ids, before = torch.arange(13), layer.weight.detach().clone()
    y, state = layer(ids).detach(), {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge_()
    assert layer.merged and layer.merge_() is layer
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(layer(ids), y, rtol=2 * eps, atol=4 * eps)
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=0, atol=8 * eps * float(y.abs().max()))
    layer.unmerge_()
    torch.testing.assert_close(layer.weight, before, rtol=0, atol=8 * eps * float(y.abs().max()))
    assert not layer.merged


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_compute_the_same(kind):
    layer, ids = make(kind, dropout=0.5).train(), torch.randint(13, (2, 5))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(ids), layer(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_is_taken(kind):
    layer, ids = make(kind, dropout=0.5).train(), torch.randint(13, (2, 5))
    assert layer(ids[:0]).shape == (0, 5, 8)
    layer(ids[:0]).sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_of_the_base_is_called_and_changes_nothing(kind):
    layer, ids = make(kind, dropout=0.5).train(), torch.randint(13, (2, 5))
    y, seen = layer(ids), []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(layer(ids), y) and seen


def test_dora_refuses_an_offloaded_embedding_and_lora_calls_it():
    for kind in KINDS:
        layer, ids = make(kind), torch.randint(13, (4,))
        y, weight = layer(ids).detach(), layer.base_layer.weight.detach()
        layer.base_layer.to("meta")
        layer.base_layer.forward = lambda ids, weight=weight: nn.functional.embedding(ids, weight)
        if kind is LoRAEmbedding:
            assert torch.equal(layer(ids), y)
        else:
            with pytest.raises(ValueError, match="DoRAEmbedding: expected the whole weight of base_layer at hand"):
                layer(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile(kind):
    layer, ids = make(kind), torch.randint(13, (2, 5))
    expected = layer(ids)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids), expected)


def test_what_it_refuses():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    for module, words in (
        (nn.Embedding(4, 4, max_norm=1.0), r"max_norm=1.0 changes rows"),
        (nn.Embedding(4, 4, sparse=True), r"its gradient is sparse"),
        (Scaled(4, 4), "a Scaled has a forward of its own"),
        (nn.Linear(4, 4), "not an nn.Embedding but a Linear"),
    ):
        with pytest.raises(TypeError, match=f"LoRAEmbedding: expected a plain nn.Embedding, .*{words}"):
            LoRAEmbedding(module, 2)
        assert module.weight.requires_grad
    with pytest.raises(ValueError, match="LoRAEmbedding: expected lora_bias to be False"):
        LoRAEmbedding(nn.Embedding(4, 4), 2, lora_bias=True)
    with pytest.raises(ValueError, match="DoRAEmbedding: expected lora_bias to be False"):
        DoRAEmbedding(nn.Embedding(4, 4), 2, lora_bias=True)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.embed(ids))))


@pytest.fixture(params=[lk.LoRAConfig, lk.DoRAConfig], ids=lambda config: config.__name__)
def tied(request):
    """(a model whose head reads its adapted embedding, the report, what it computed before, ids)."""
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(12, (2, 5))
    plain = model(ids)
    report = lk.adapt(model, request.param(r=2, target_modules=("embed", "body")))
    return model, report, plain, ids


def test_adapt_takes_an_embedding_that_is_named(tied):
    model, report, plain, ids = tied
    prefix = report.replaced[0].kind.removesuffix("Embedding")
    assert prefix in ("LoRA", "DoRA")
    kinds = {r.name: (r.kind, r.shape) for r in report.replaced}
    assert kinds == {"embed": (f"{prefix}Embedding", (8, 12)), "body": (f"{prefix}Linear", (8, 8))}
    torch.testing.assert_close(model(ids), plain)


def test_an_embedding_that_a_head_reads_is_not_merged(tied):
    model, _, _, _ = tied
    with pytest.raises(ValueError, match=r"this weight is also that of head\.weight"):
        model.embed.merge_()
    with pytest.raises(ValueError, match="expected weights of its own"):
        lk.merge_and_unload(model)


def test_undo_puts_the_embedding_back(tied):
    model, report, plain, ids = tied
    report.undo()
    assert isinstance(model.embed, nn.Embedding) and torch.equal(model(ids), plain)


@pytest.mark.parametrize("config", [lk.LoRAConfig, lk.DoRAConfig])
def test_adapt_leaves_an_embedding_that_is_not_named(config):
    plan = lk.plan_adaptation(Tied(), config(r=2))
    assert "embed" not in {s.name for s in plan.skipped} and "embed" not in plan.targets


def test_lora_bias_leaves_the_embedding_out():
    report = lk.adapt(Tied(), lk.LoRAConfig(r=2, lora_bias=True, target_modules=("embed", "body")))
    assert [r.name for r in report.replaced] == ["body"]
    assert {s.name: s.reason for s in report.skipped}["embed"] == "lora_bias, which an embedding has no place for"
