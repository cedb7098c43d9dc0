"""The density of activations as a term of the loss: formula, padding, hooks, and what recomputing does to them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from lowrank_kernels.losses import Density, density, density_report

F64 = torch.float64
EPS = 0.05


def random(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=F64).to(dtype)


def by_hand(o: Tensor, eps: float) -> Tensor:
    return (o**2 / (o**2 + eps)).mean()


# ------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("eps", [1e-7, EPS, 10.0])
def test_the_term_and_its_gradient_are_the_formulas(eps: float) -> None:
    o, plain = random(2, 5, 8).requires_grad_(), random(2, 5, 8).requires_grad_()
    term = density(o, eps=eps)
    torch.testing.assert_close(term, by_hand(plain, eps))
    grads = [torch.autograd.grad(3 * t, x)[0] for t, x in ((term, o), (by_hand(plain, eps), plain))]
    torch.testing.assert_close(*grads)


def test_a_small_eps_has_no_nan() -> None:
    o = torch.tensor([[0.0, 1e-3, 2.0]], requires_grad=True)
    (grad,) = torch.autograd.grad(density(o, eps=1e-30), o)
    assert grad.isfinite().all() and grad[0, 0] == 0


def test_at_the_root_of_eps_an_element_counts_half() -> None:
    assert density(torch.full((1, 4), 0.1), eps=0.01).item() == pytest.approx(0.5)
    assert density(torch.full((1, 4), 10**-3.5)).item() == pytest.approx(0.5)  # ε = 1e-7, added to o² as it is
    assert density(torch.tensor([[0.0, 5.0]])).item() == pytest.approx(0.5)


@pytest.mark.parametrize("filler", [0.0, 7.0, float("nan"), float("inf")])
def test_padding_does_not_count_whatever_it_holds(filler: float) -> None:
    o, mask = random(2, 4, 6), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    kept = o[mask.bool()].clone().requires_grad_()
    expected = by_hand(kept, EPS)
    o[mask == 0] = filler
    o.requires_grad_()
    for given in (o, o.reshape(8, 6)):
        term = density(given, mask, eps=EPS)
        torch.testing.assert_close(term, expected)
        (grad,) = torch.autograd.grad(term, o)
        assert not grad[mask == 0].any()
        torch.testing.assert_close(grad[mask == 1], torch.autograd.grad(expected, kept, retain_graph=True)[0])


@pytest.mark.parametrize(("o", "mask"), [(torch.zeros(0, 4), None), (torch.ones(2, 4), torch.zeros(2))])
def test_without_a_token_it_is_0(o: Tensor, mask: Tensor | None) -> None:
    o = o.clone().requires_grad_()
    term = density(o, mask)
    term.backward()
    assert term == 0 and not o.grad.any()


def test_half_precision_is_summed_in_float32_and_only_o_is_saved() -> None:
    o = random(64, 128, dtype=torch.bfloat16).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        term = density(o, eps=EPS)
    assert [t.data_ptr() for t in kept] == [o.data_ptr()]
    assert term.dtype == torch.float32
    torch.testing.assert_close(term.double(), by_hand(o.double(), EPS), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(term, o)
    exact = o.detach().double().requires_grad_()
    torch.testing.assert_close(grad.double(), torch.autograd.grad(by_hand(exact, EPS), exact)[0], rtol=0.01, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- the hooks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act_fn, self.down = nn.Linear(6, 10), nn.SiLU(), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.act_fn(self.up(x)))
        return y


class Model(nn.Module):
    """Two blocks; ``how`` calls each of them."""

    def __init__(self, how: Callable[..., Any] = lambda block, x: block(x)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.how = nn.Embedding(9, 6), nn.ModuleList([Block(), Block()]), how
        self.double()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        x, seen = self.embed(ids), []
        for block in self.blocks:
            seen.append(block.act_fn(block.up(x)))
            x = self.how(block, x)
        return SimpleNamespace(loss=x.square().mean(), last=x)


class Quiet(Model):
    """The same with each activation called once."""

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        x = self.embed(ids)
        for block in self.blocks:
            x = self.how(block, x)
        return SimpleNamespace(loss=x.square().mean(), last=x)


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])


def expected_term(model: nn.Module, mask: Tensor | None = MASK) -> Tensor:
    """By hand, of a model without hooks."""
    x, terms = model.embed(IDS), []
    for block in model.blocks:
        o = block.act_fn(block.up(x))
        terms.append(by_hand(o if mask is None else o[mask.bool()], EPS))
        x = x + block.down(o)
    return torch.stack(terms).mean()


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.parametrize("given", ["by name", "by position", "none"])
def test_the_term_is_the_mean_over_layers_and_unpadded_tokens(given: str) -> None:
    model, plain = Quiet(), Quiet()
    term = Density(model, 2.5, eps=EPS)
    assert list(term.layers) == ["blocks.0.act_fn", "blocks.1.act_fn"]
    args, kwargs = {"by name": ((), {"attention_mask": MASK}), "by position": ((MASK,), {}), "none": ((), {})}[given]
    model(IDS, *args, **kwargs)
    expected = 2.5 * expected_term(plain, None if given == "none" else MASK)
    torch.testing.assert_close(term(), expected)
    ours, theirs = grads(model, term()), grads(plain, expected)
    assert ours.keys() == theirs.keys() and len(ours) == 7
    for name, g in theirs.items():
        torch.testing.assert_close(ours[name], g)


@pytest.mark.parametrize("early_stop", [True, False])
def test_recomputed_hooks_do_not_count_again(early_stop: bool) -> None:
    from torch.utils.checkpoint import set_checkpoint_early_stop

    model = Quiet(lambda block, x: checkpoint(block, x, use_reentrant=False))
    plain, term = Quiet(), Density(model, eps=EPS)
    with set_checkpoint_early_stop(early_stop):
        loss = model(IDS, attention_mask=MASK).loss + term()
        before = term()
        ours = grads(model, loss)
    assert term() is not before and torch.equal(term(), before)
    for name, g in grads(plain, plain(IDS).loss + expected_term(plain)).items():
        torch.testing.assert_close(ours[name], g)


def test_two_checkpointed_batches_before_one_backward_keep_their_masks() -> None:
    model = Quiet(lambda block, x: checkpoint(block, x, use_reentrant=False))
    plain, term = Quiet(), Density(model, eps=EPS)
    first = model(IDS, attention_mask=MASK).loss + term()
    second = model(IDS[:, :3]).loss + term()
    ours = grads(model, first + second)
    plain_term = Density(plain, eps=EPS)
    both = [plain(IDS, attention_mask=MASK).loss + plain_term(), plain(IDS[:, :3]).loss + plain_term()]
    for name, g in grads(plain, both[0] + both[1]).items():
        torch.testing.assert_close(ours[name], g)


def test_reentrant_checkpointing_is_refused() -> None:
    model = Quiet(lambda block, x: checkpoint(block, x, use_reentrant=True))
    Density(model)
    with pytest.raises(ValueError, match="as in reentrant activation checkpointing, in which the term would have none"):
        model(IDS)


@pytest.mark.parametrize(("training", "records"), [(False, True), (True, False)])
def test_evaluation_and_no_grad_have_no_term(training: bool, records: bool) -> None:
    model = Quiet()
    term = Density(model)
    model(IDS)
    with torch.set_grad_enabled(records):
        model.train(training)(IDS)
    with pytest.raises(ValueError, match="expected a forward of the model in training before its term"):
        term()


def test_into_the_models_own_loss() -> None:
    model, plain = Quiet(), Quiet()
    Density(model, 0.5, eps=EPS, into_loss=True)
    torch.testing.assert_close(model(IDS, attention_mask=MASK).loss, plain(IDS).loss + 0.5 * expected_term(plain))
    torch.testing.assert_close(model.eval()(IDS).loss, plain(IDS).loss)


@pytest.mark.parametrize("into_loss", [False, True])
def test_a_call_beside_the_models_forward_does_not_count(into_loss: bool) -> None:
    """As recomputing is one."""
    model = Quiet()
    term = Density(model, eps=EPS, into_loss=into_loss)
    model(IDS)
    before = term()
    model.blocks[0](torch.ones(1, 6, dtype=F64))
    assert torch.equal(term(), before)


def test_a_forward_that_raised_does_not_leave_the_hooks_open() -> None:
    model = Quiet()
    term = Density(model, eps=EPS)
    with pytest.raises(IndexError):
        model(IDS + 100)
    model.blocks[0](torch.ones(1, 6, dtype=F64))  # a call beside the model's
    model(IDS)
    torch.testing.assert_close(term(), expected_term(Quiet(), None))


def test_removed_hooks_are_gone() -> None:
    model, plain = Quiet(), Quiet()
    Density(model, into_loss=True).remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(IDS).loss, plain(IDS).loss)


def test_an_activation_that_is_called_twice_counts_twice() -> None:
    model, plain = Model(), Quiet()
    term = Density(model, eps=EPS)
    model(IDS, attention_mask=MASK)
    assert len(term._terms or []) == 4
    torch.testing.assert_close(term(), expected_term(plain))


def test_the_input_of_a_linear_instead() -> None:
    model, plain = Quiet(), Quiet()
    term = Density(model, eps=EPS, modules=r".*\.down", of="input")
    model(IDS, attention_mask=MASK)
    torch.testing.assert_close(term(), expected_term(plain))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -1.0}, "expected alpha to be a finite number of at least 0, got -1.0"),
        ({"alpha": float("nan")}, "expected alpha"),
        ({"eps": 0.0}, "expected eps to be a finite number above 0, got 0.0"),
        ({"modules": "nothing"}, "modules to name activations, got 'nothing', which match nothing in this Quiet"),
        ({"modules": "("}, "expected a regular expression"),
        ({"of": "weights"}, "expected of to be 'output' or 'input', got 'weights'"),
    ],
)
def test_what_is_refused_leaves_no_hook(settings: dict[str, Any], words: str) -> None:
    model = Quiet()
    with pytest.raises(ValueError, match=words):
        Density(model, **settings)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_mask_that_does_not_fit_is_told_with_the_module() -> None:
    model = Quiet()
    Density(model)
    with pytest.raises(ValueError, match=r"activations of blocks\.0\.act_fn for each of the mask's \(2, 3\) tokens"):
        model(IDS, attention_mask=MASK[:, :3])
    with pytest.raises(ValueError, match="density: expected a mask of one entry a token"):
        density(torch.ones(2, 3, 4), torch.ones(2, 4))


def test_the_report_counts_unpadded_tokens_above_the_threshold() -> None:
    model = Quiet()
    batches = [{"attention_mask": MASK}, {"attention_mask": torch.ones_like(MASK)}]
    report = density_report(model, batches, lambda m, batch: m(IDS, **batch), threshold=0.1)
    o = model.blocks[0].act_fn(model.blocks[0].up(model.embed(IDS)))
    counted = torch.cat([o[MASK.bool()], o.flatten(0, 1)])
    assert report.layers["blocks.0.act_fn"] == pytest.approx((counted.abs() > 0.1).double().mean().item())
    assert report.mean == pytest.approx(sum(report.layers.values()) / 2)
    assert "activation density" in str(report) and "blocks.1.act_fn" in str(report)
    assert model.training and not model._forward_pre_hooks
    with pytest.raises(ValueError, match="got no token"):
        density_report(model, [], lambda m, batch: m(IDS))


def test_training_with_the_term_lowers_the_density_and_without_it_does_not() -> None:
    torch.manual_seed(0)
    found = {}
    for alpha in (0.0, 1.0):
        model = Quiet()
        lk.adapt(model, lk.LoRAConfig(r=2, target_modules=["up", "down"]))
        term = Density(model, alpha, eps=EPS)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(40):
            loss = model(IDS, attention_mask=MASK).last.square().mean()
            (loss + term()).backward()
            optimizer.step()
            optimizer.zero_grad()
        found[alpha] = density_report(model, [0], lambda m, _: m(IDS, attention_mask=MASK), threshold=EPS**0.5).mean
    assert found[1.0] < 0.5 * found[0.0], found


def test_a_copy_of_the_model_has_its_own_hooks() -> None:
    model = Quiet()
    term = Density(model, eps=EPS)
    copied = copy.deepcopy(model)
    model(IDS)
    kept = term()
    copied(IDS.flip(0))
    assert torch.equal(term(), kept)


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("of", ["output", "input"])
@pytest.mark.parametrize("copied_by", [copy.deepcopy, _saved])
def test_a_copy_after_a_forward_trains_with_the_term_of_its_own(copied_by: Callable[[Any], Any], of: str) -> None:
    model = PlainOutput()
    term = Density(model, eps=EPS, into_loss=True, modules=["act_fn"] if of == "output" else ["down"], of=of)
    model(IDS, attention_mask=MASK)
    kept, copied = term(), copied_by(model)
    plain = Quiet()
    torch.testing.assert_close(copied(IDS, attention_mask=MASK).loss, plain(IDS).loss + expected_term(plain))
    assert torch.equal(term(), kept)


class PlainOutput(Quiet):
    """Picklable; may return a tuple, or no loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__(_call)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, returns: str = "loss") -> Any:
        output = super().forward(ids)
        return {"loss": output, "tuple": (output.loss, output.last), "no loss": SimpleNamespace(loss=None)}[returns]


def _call(block: nn.Module, x: Tensor) -> Any:
    return block(x)


@pytest.mark.parametrize("returns", ["tuple", "no loss"])
def test_a_model_that_returns_no_loss_to_add_to_is_refused(returns: str) -> None:
    model = PlainOutput()
    Density(model, eps=EPS, into_loss=True)
    with pytest.raises(ValueError, match="expected the model to return a loss to add the term to"):
        model(IDS, returns=returns)
    with torch.no_grad():
        model(IDS, returns=returns)
    model.eval()(IDS, returns=returns)


def test_wrong_kinds_are_named() -> None:
    with pytest.raises(TypeError, match="expected o to be floats"):
        density(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="expected o to be floats"):
        density(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"Density: expected model to be .*, got NoneType"):
        Density(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Density: expected modules to be names or a regular expression, got 3"):
        Density(Quiet(), modules=3)  # type: ignore[arg-type]
    for threshold in (-1.0, float("nan"), True):
        with pytest.raises(ValueError, match="density_report: expected threshold"):
            density_report(Quiet(), [0], lambda m, _: m(IDS), threshold=threshold)
