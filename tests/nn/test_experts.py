"""``LoRAExperts`` over blocks of experts that lie as those of transformers do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowrank_kernels as lk
from lowrank_kernels.cli.peak_memory import peak_allocated
from lowrank_kernels.nn import LoRAExperts
from lowrank_kernels.nn.experts import expert_weights, from_peft, to_peft
from lowrank_kernels.optim.factors import factor_groups
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

H, I, R = 16, 24, 4


class Experts(nn.Module):
    """E experts down(silu(gate) ∘ up), with the attributes of transformers' blocks; ``forward`` is a plain loop."""

    def __init__(self, experts: int, *, hidden: int = H, inner: int = I, transposed: bool = False, bias: bool = False):
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias, self.has_gate = experts, transposed, bias, True
        for name, shape in {"gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}.items():
            of_one = shape[::-1] if transposed else shape
            values = torch.randn(experts, *of_one, generator=torch.Generator().manual_seed(len(name)))
            setattr(self, name, nn.Parameter(values / shape[1] ** 0.5))
            if bias:
                setattr(self, f"{name}_bias", nn.Parameter(torch.linspace(-1, 1, shape[0]).repeat(experts, 1)))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        matrices = {name: getattr(self, name) for name in ("gate_up_proj", "down_proj")}
        if self.is_transposed:
            matrices = {name: w.transpose(1, 2) for name, w in matrices.items()}
        out = torch.zeros_like(x)
        for e in range(self.num_experts):
            token, choice = (index == e).nonzero().unbind(1)
            y = x[token]
            for name, w in matrices.items():
                y = nn.functional.linear(y, w[e], getattr(self, f"{name}_bias")[e] if self.has_bias else None)
                y = self._apply_gate(y) if name == "gate_up_proj" else y
            out = out.index_add(0, token, (y * weights[token, choice, None]).to(out.dtype))
        return out


def routed(tokens: int, experts: int, top_k: int, dtype: torch.dtype = torch.float32, hidden: int = H, last: int = 0):
    """x, top-k indices, which never name the ``last`` experts, and weights."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype).requires_grad_()
    weights, index = torch.rand(tokens, experts - last, generator=generator).topk(top_k)
    return x, index, weights.to(dtype).requires_grad_()


def random_factors(layer: LoRAExperts) -> LoRAExperts:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in layer.adapters.named_parameters():
            if not name.endswith("magnitude"):
                p.copy_(torch.randn(p.shape, generator=generator) / 3)
            else:
                p.mul_(0.5 + torch.rand(p.shape, generator=generator))
    return layer


def with_deltas(layer: LoRAExperts, factors: dict[str, Tensor]) -> nn.Module:
    """The block with dense corrected weights, as functions of the factors."""
    dense = copy.deepcopy(layer.base_layer)
    for name, of in layer.adapters.items():
        a, b = (factors[f"{name}.{key}"] for key in ("lora_A", "lora_B"))
        w = expert_weights(layer.base_layer)[name].detach().to(a.dtype)
        w = w + of.scaling * torch.einsum("ern,erk->enk", b.view(len(w), of.r, -1), a.view(len(w), of.r, -1))
        if of.lora_magnitude is not None:
            w = factors[f"{name}.lora_magnitude"][:, :, None] * w / w.norm(dim=2, keepdim=True).detach()
        del dense._parameters[name]
        setattr(dense, name, w.transpose(1, 2) if dense.is_transposed else w)
    return dense


def results(call: Any, given: tuple[Tensor, ...], factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and all gradients."""
    y = call(*given)
    wanted = {"x": given[0], "weights": given[2], **factors}
    grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape).bfloat16().to(y.dtype)
    return {"y": y.detach(), **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), grad), strict=True))}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    ("experts", "top_k", "transposed"), [(1, 1, False), (4, 2, True), (16, 8, False), (64, 1, True)]
)
def test_the_block_is_that_of_dense_corrected_weights(experts: int, top_k: int, transposed: int, dora: bool) -> None:
    """In float64, whose gradients of W + s B A autograd takes; the last expert gets no row where there are several."""
    block = Experts(experts, transposed=bool(transposed), bias=bool(transposed)).double()
    layer = random_factors(LoRAExperts(block, R, dora=dora))
    given = routed(11, experts, top_k, torch.float64, last=min(1, experts - 1))
    factors = dict(layer.adapters.named_parameters())
    copies = {name: p.detach().clone().requires_grad_() for name, p in factors.items()}
    ours = results(layer, given, factors)
    dense = results(with_deltas(layer, copies), given, copies)
    for name, value in dense.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dora", [False, True])
def test_a_block_is_as_exact_as_eager(dtype: torch.dtype, dora: bool) -> None:
    layers = [random_factors(LoRAExperts(Experts(4).to(dtype), R, dora=dora, dtype=dtype)) for _ in range(2)]
    wide = copy.deepcopy(layers[1]).double()
    given = routed(40, 4, 2, dtype)
    factors = dict(layers[0].adapters.named_parameters())
    ours = results(layers[0], given, factors)
    copies = {name: p.detach().clone().requires_grad_() for name, p in factors.items()}
    eager = results(with_deltas(layers[1], copies), given, copies)
    doubles = tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in given)
    copies = {name: p.detach().double().requires_grad_() for name, p in factors.items()}
    oracle = results(with_deltas(wide, copies), doubles, copies)
    for name, value in ours.items():
        factor = 2.0 if name == "y" else GRADIENT_FACTOR
        assert_as_exact_as_eager(value, eager[name], oracle[name], factor=factor, what=name)


def test_a_fresh_block_computes_what_the_base_does() -> None:
    block = Experts(4)
    given = routed(9, 4, 2)
    for dora in (False, True):
        layer = LoRAExperts(copy.deepcopy(block), R, dora=dora)
        torch.testing.assert_close(layer(*given), block(*given), rtol=1e-5, atol=1e-6)
        assert not any(p.requires_grad for p in layer.base_layer.parameters())


@pytest.mark.parametrize("parameters", [["down_proj"], ["gate_up_proj"]])
def test_one_weight_alone_may_be_adapted(parameters: list[str]) -> None:
    layer = random_factors(LoRAExperts(Experts(4).double(), R, parameters=parameters))
    given = routed(9, 4, 2, torch.float64)
    factors = dict(layer.adapters.named_parameters())
    assert {name.split(".")[0] for name in factors} == set(parameters)
    ours, dense = results(layer, given, factors), results(with_deltas(layer, factors), given, factors)
    for name, value in dense.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_may_come_in_any_order(dtype: torch.dtype) -> None:
    """Bit for bit where this package multiplies; in float32 PyTorch does, and rounds rows by their place."""
    layer = random_factors(LoRAExperts(Experts(4).to(dtype), R))
    x, index, weights = routed(30, 4, 2, dtype)
    turn = torch.randperm(30, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        turned, straight = layer(x[turn], index[turn], weights[turn]), layer(x, index, weights)[turn]
    if dtype == torch.bfloat16:
        assert torch.equal(turned, straight)
    torch.testing.assert_close(turned, straight, rtol=1e-5, atol=1e-6 * float(straight.abs().max()))


@pytest.mark.parametrize(
    "dora", [False, pytest.param(True, marks=pytest.mark.nightly)]
)  # eager DoRA: in the test above
def test_the_same_bits_every_time_and_in_a_compiled_graph(dora: bool) -> None:
    layer = random_factors(LoRAExperts(Experts(2, transposed=True, bias=True), R, dora=dora))
    given, factors = routed(12, 2, 2), dict(layer.adapters.named_parameters())
    first = results(layer, given, factors)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for again in (results(layer, given, factors), results(compiled, given, factors)):
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def test_dropout_is_drawn_in_training_and_again_in_checkpointing() -> None:
    layer = random_factors(LoRAExperts(Experts(4), R, dropout=0.4))
    given, factors = routed(12, 4, 2), dict(layer.adapters.named_parameters())
    torch.manual_seed(1)
    dropped = results(layer, given, factors)
    torch.manual_seed(1)
    again = results(lambda *t: checkpoint(layer, *t, use_reentrant=False), given, factors)
    for name, value in dropped.items():
        assert torch.equal(again[name], value), name
    assert not torch.equal(dropped["y"], layer.eval()(*given))
    assert torch.equal(layer(*given), layer(*given))


def test_no_dense_correction_is_made() -> None:
    """A step over a few tokens holds less than a tenth of one weight at any time."""
    layer = random_factors(LoRAExperts(Experts(64, hidden=64, inner=96), R))
    given = routed(4, 64, 2, hidden=64)
    layer(*given).sum().backward()
    held = peak_allocated(lambda: layer(*given).sum().backward(), torch.device("cpu"))
    of_factors = sum(p.numel() * 4 for p in layer.adapters.parameters())
    assert held < of_factors + layer.base_layer.down_proj.numel() * 4 / 10


def test_of_the_activation_its_input_alone_is_saved() -> None:
    layer, kept = LoRAExperts(Experts(4), R), {}
    x, index, weights = routed(64, 4, 2)
    own = {p.untyped_storage().data_ptr() for p in [*layer.parameters(), x, weights]}

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x, index, weights)
    rows = 128
    # x and P of both products, the activation's input and output, what the router weighs; and scalings of experts
    assert sum(kept.values()) <= 4 * rows * (H + R + 2 * I + I + R + H) + 2 * 4 * 4


def test_merging_puts_the_corrections_in_and_takes_them_out_bit_for_bit() -> None:
    for dora in (False, True):
        layer = random_factors(LoRAExperts(Experts(4, transposed=dora), R, dora=dora))
        given, before = routed(9, 4, 2), copy.deepcopy(dict(layer.base_layer.named_parameters()))
        y, state = layer(*given), copy.deepcopy(layer.state_dict())
        layer.merge_()
        assert layer.merged and layer.merge_() is layer
        torch.testing.assert_close(layer.base_layer(*given), y, rtol=1e-4, atol=1e-5)
        assert torch.equal(layer(*given), layer.base_layer(*given))
        for name, t in layer.state_dict().items():
            assert torch.equal(t, state[name]), name
        layer.unmerge_()
        assert all(torch.equal(p, before[name]) for name, p in layer.base_layer.named_parameters())
        layer.merge_().load_state_dict(state)
        assert not layer.merged and torch.equal(layer(*given), y)
        layer.merge_(keep=False)
        with pytest.raises(ValueError, match="keep=False"):
            layer.unmerge_()


def test_factors_that_are_not_finite_are_not_merged() -> None:
    layer = random_factors(LoRAExperts(Experts(4), R))
    before = copy.deepcopy(layer.base_layer.state_dict())
    layer.adapters["down_proj"].lora_B.data[3, 2] = float("nan")
    with pytest.raises(ValueError, match="lora_B of down_proj holds NaN"):
        layer.merge_()
    assert not layer.merged
    assert all(torch.equal(t, before[name]) for name, t in layer.base_layer.state_dict().items())


def test_the_layout_of_peft_and_ours_are_each_others_inverse() -> None:
    b = torch.arange(5 * 6.0).view(5, 6)  # N = 5, R = 2, E = 3: column 3 r + e
    ours = from_peft(b, 3)
    assert torch.equal(ours[2 * 1 + 0], b[:, 1])  # expert 1, rank 0
    assert torch.equal(ours[2 * 2 + 1], b[:, 5])  # expert 2, rank 1
    assert torch.equal(to_peft(ours, 3), b)


def test_what_cannot_be_wrapped_is_refused_with_the_reason() -> None:
    plain = nn.Linear(4, 4)
    hooked, spread, coded = Experts(2), Experts(2), Experts(2)
    hooked.register_forward_hook(lambda *a: None)
    spread._is_expert_parallel = True
    coded.down_proj = nn.Parameter(torch.zeros(2, 3, 3, dtype=torch.uint8), requires_grad=False)
    for module, why in ((plain, "formula is not known"), (hooked, "hooks"), (spread, "parallel"), (coded, "uint8")):
        with pytest.raises(TypeError, match=f"LoRAExperts: expected a block of experts.*{why}"):
            LoRAExperts(module, R)
    with pytest.raises(ValueError, match=r"expected parameters of gate_up_proj, down_proj, got \['router'\]"):
        LoRAExperts(Experts(2), R, parameters=["router"])
    layer = LoRAExperts(Experts(2), R)
    layer.base_layer.register_forward_hook(lambda *a: None)
    with pytest.raises(RuntimeError, match="without hooks"):
        layer(*routed(3, 2, 1))


def test_adapt_takes_experts_by_their_weights_names_and_undoes_it() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"experts": Experts(4)}), "b": nn.ModuleDict({"experts": Experts(2)})})
    before = copy.deepcopy(model.state_dict())
    config = lk.LoRAConfig(r=3, target_modules=(), target_parameters=("a.experts.down_proj", "nowhere"))
    report = lk.adapt(model, config)
    assert [(r.name, r.kind, r.shape, r.rank) for r in report.replaced] == [
        ("a.experts.down_proj", "LoRAExperts", (H, I), 3)
    ]
    left = {s.name: s.reason for s in report.skipped}
    assert "not in target_parameters" in left["b.experts.gate_up_proj"] and "a.experts.gate_up_proj" in left
    assert left["target_parameters['nowhere']"] == "matches no weight of experts"
    assert "4 experts, rank 3" in str(report)
    trains = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trains == [f"a.experts.adapters.down_proj.{key}" for key in ("lora_A", "lora_B")]
    report.undo()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    every = lk.adapt(
        model, lk.DoRAConfig(r=3, target_modules=(), target_parameters="all-experts", rank_pattern={"b.*": 2})
    )
    assert [r.rank for r in every.replaced] == [3, 3, 2, 2]
    with lk.base_only(model), torch.no_grad():
        given = routed(5, 2, 1)
        assert torch.equal(model["b"]["experts"](*given), model["b"]["experts"].base_layer(*given))


def test_settings_that_experts_have_not_are_reasons_to_leave_them() -> None:
    for config, word in (
        (lk.LoRAConfig(r=2, gate=True, target_parameters="all-experts"), "gate"),
        (lk.DoRAConfig(r=2, detach_norm=False, target_parameters="all-experts"), "detach_norm"),
        (lk.DoRAConfig(r=2, dropout=0.1, dropout_base=True, target_parameters="all-experts"), "dropout_base"),
    ):
        report = lk.adapt(nn.ModuleDict({"q": nn.Linear(8, 8), "experts": Experts(2)}), config)
        assert [r.name for r in report.replaced] == ["q"]
        assert all(word in s.reason for s in report.skipped) and len(report.skipped) == 2
    for wrong in (3, "experts", [""], None):
        with pytest.raises(TypeError, match="target_parameters"):
            lk.LoRAConfig(r=2, target_parameters=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target_parameters"):
        lk.LaMDAConfig(r=2, target_parameters="all-experts")


def test_a_merged_model_is_the_plain_one_again() -> None:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "experts": Experts(4)})
    keys = list(model.state_dict())
    lk.adapt(model, lk.LoRAConfig(r=2, target_parameters="all-experts"))
    given = routed(7, 4, 2)
    y = random_factors(model["experts"])(*given)
    lk.merge_and_unload(model)
    assert isinstance(model["experts"], Experts) and list(model.state_dict()) == keys
    torch.testing.assert_close(model["experts"](*given), y, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad for p in model.parameters())


def test_factors_of_experts_are_no_pairs_of_an_optimizer_and_no_link_of_a_chain() -> None:
    model = nn.ModuleDict({"q": nn.Linear(8, 8), "experts": Experts(4)})
    lk.adapt(model, lk.LoRAConfig(r=2, target_parameters="all-experts"))
    pairs, others = factor_groups(model)
    assert len(pairs["params"]) == 2 and len(others["params"]) == 4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="LoRAExperts in experts"):
        lk.chain.cola(model, optimizer, 1)


def test_gradients_of_gradients_are_refused() -> None:
    x, index, weights = routed(5, 2, 1)
    (grad,) = torch.autograd.grad(LoRAExperts(Experts(2), R)(x, index, weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"gradients of gradients|once_differentiable"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("kind", ["experts", "velora", "lora"])
def test_on_the_meta_device_a_layer_gives_its_shapes(kind: str) -> None:
    x = torch.empty(3, H, device="meta")
    with torch.device("meta"):
        if kind == "experts":
            y = LoRAExperts(Experts(4), r=2)(x, torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2))
        elif kind == "velora":
            y = lk.velora_linear(x, torch.empty(H, H, dtype=torch.float32), velora_vector=torch.empty(4))
        else:
            layer = lk.nn.LoRALinear(nn.Linear(H, H), r=2)
            layer.lora_A.register_forward_hook(lambda *_: None)  # its factors are called
            y = layer(x)
    assert y.is_meta
    assert y.shape == (3, H)
