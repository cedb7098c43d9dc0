"""Modules that train whole beside an adapter: what trains, what is written, what comes back; and why targets fail."""

from __future__ import annotations

import copy
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.adapt import config_of
from tests.integrations.tiny_models import IDS, MODELS, assert_the_same, bert, exact_logits, fresh, llama, mamba, train

INPUTS = {"input_ids": IDS}
WEIGHTS = "adapter_model.safetensors"


def untied():
    config = llama().config
    config.tie_word_embeddings = False
    return type(llama())(config)


def saved(model, folder, **names):
    lk.save_adapter(model, folder, **names)
    return load_file(folder / WEIGHTS)


@pytest.fixture
def tied():
    """(a model whose embedding trains whole beside its tied head, the report, the head, the embedding of before)."""
    model = fresh(llama)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert head.weight is embedding.weight
    report = lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("q_proj",), modules_to_save=("embed_tokens",)))
    return model, report, head, embedding


def test_a_copy_of_the_module_trains(tied):
    model, report, head, embedding = tied
    assert report.notes == ("model.embed_tokens trains whole, by modules_to_save",)
    assert model.model.embed_tokens is not embedding and model.lm_head is head
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n} == {
        "model.embed_tokens.weight"
    }


def test_a_head_that_was_tied_keeps_its_own_weight_as_in_peft(tied):
    model, _, head, _ = tied
    train(model)
    assert torch.equal(head.weight, fresh(llama).lm_head.weight)


def test_undo_puts_the_module_back_after_training(tied):
    model, report, head, embedding = tied
    train(model)
    report.undo()
    assert model.model.embed_tokens is embedding and embedding.weight is head.weight
    assert_the_same(exact_logits(model, INPUTS), exact_logits(fresh(llama), INPUTS))
    assert all(p.requires_grad for p in model.parameters())


def test_a_module_in_modules_to_save_takes_no_adapter_and_a_name_that_matches_nothing_is_told():
    config = lk.LoRAConfig(r=2, target_modules=("q_proj", "up_proj"), modules_to_save=("mlp", "nothing"))
    report = lk.adapt(fresh(llama), config)
    reasons = {s.name: s.reason for s in report.skipped}
    assert {r.name.rpartition(".")[2] for r in report.replaced} == {"q_proj"}
    assert reasons["model.layers.0.mlp.up_proj"] == "in modules_to_save, which trains it whole"
    assert "modules_to_save['nothing']" in reasons


@pytest.mark.parametrize("value", ["score", ("",), (1,), None])
def test_modules_to_save_are_names(value):
    with pytest.raises(TypeError, match="LoRAConfig: expected modules_to_save to be names of modules, got"):
        lk.LoRAConfig(modules_to_save=value)


def test_modules_that_cannot_train_are_refused_and_nothing_changes():
    model = fresh(llama)
    for name, why in (("layers", "ModuleList is never called"), ("norm", "which takes no gradient")):
        if name == "norm":
            model.model.norm.weight = nn.Parameter(torch.ones(32, dtype=torch.int8), requires_grad=False)
        with pytest.raises(ValueError, match=rf"adapt: expected modules_to_save .* got model\.{name}: .*{why}"):
            lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("q_proj",), modules_to_save=(name,)))
        assert config_of(model) is None


def test_buffers_are_saved_with_their_module(tmp_path):
    def make():
        return nn.ModuleDict({"lin": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)})

    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["lin"], modules_to_save=["norm"]))
    train(theirs)
    theirs.base_model.model["norm"].train()(torch.randn(8, 4))
    theirs.save_pretrained(tmp_path / "theirs")
    model = make()
    report = lk.load_adapter(model, tmp_path / "theirs")
    assert int(model["norm"].num_batches_tracked) == 1 and bool(model["norm"].running_mean.any())
    written, expected = saved(model, tmp_path / "ours"), load_file(tmp_path / "theirs" / WEIGHTS)
    assert written.keys() == expected.keys() and all(torch.equal(t, written[n]) for n, t in expected.items())
    report.undo()
    assert int(model["norm"].num_batches_tracked) == 0


def test_chains_and_merging_leave_the_head_alone():
    model = fresh(bert)
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("query",), modules_to_save=("classifier",)))
    train(model)
    head, expected = copy.deepcopy(model.classifier.state_dict()), exact_logits(model, INPUTS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    chain = lk.chain.Chain(model, optimizer, 1)
    model(**INPUTS).logits.sum().backward()
    optimizer.step()
    assert chain.link == 1
    assert all(torch.equal(t, head[key]) for key, t in model.classifier.state_dict().items())
    torch.testing.assert_close(exact_logits(model, INPUTS), expected, rtol=1e-4, atol=1e-4)
    lk.merge_and_unload(model)
    assert all(torch.equal(t, head[key]) for key, t in model.classifier.state_dict().items())


def test_a_head_is_written_beside_one_adapter_of_many_and_by_a_config_given_later(tmp_path):
    model = fresh(bert)
    lk.adapt(model, lk.MultiLoRAConfig(ranks=(2, 3), target_modules=("query",)))
    several = saved(model, tmp_path / "b", adapter=1, task_type="SEQ_CLS")
    assert torch.equal(several["base_model.model.classifier.weight"], model.classifier.weight)
    model = fresh(bert)
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("query",)))
    later = saved(model, tmp_path / "c", config=replace(config_of(model), modules_to_save=("classifier",)))
    assert later.keys() >= {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    with lk.serving.AdapterBank(fresh(bert)) as bank:
        bank.load("a", tmp_path / "c")  # its head is the model's own


def test_the_head_is_written_beside_what_lora_ga_learnt(tmp_path):
    model = fresh(bert)
    config = lk.LoRAConfig(r=2, target_modules=("query",), modules_to_save=("classifier",))
    linears = lk.plan_adaptation(model, config).targets
    gradients = {name: torch.randn_like(linear.weight) for name, linear in linears.items()}
    lk.adapt(model, config)
    starts = lk.init.lora_ga_(model, gradients)
    train(model)
    lk.save_lora_ga_adapter(model, starts, tmp_path)
    again = fresh(bert)
    lk.load_adapter(again, tmp_path)
    assert_the_same(exact_logits(again, INPUTS), exact_logits(model, INPUTS))


def test_an_adapted_head_is_not_written_whole(tmp_path):
    model = fresh(bert)
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("query", "classifier")))
    with pytest.raises(ValueError, match=r"save_adapter: expected no adapter on .*classifier\.lora_A.*leave task_type"):
        lk.save_adapter(model, tmp_path, task_type="SEQ_CLS")
    assert not list(tmp_path.iterdir())


def test_a_head_of_another_size_is_named(tmp_path):
    model = fresh(bert)
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("query",)))
    lk.save_adapter(model, tmp_path, task_type="SEQ_CLS")
    config = bert().config
    config.num_labels = 5
    with pytest.raises(ValueError, match=r"classifier\.\w+ of shape \(5.*got \(3"):
        lk.load_adapter(type(model)(config), tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [llama, untied])
def test_resized_embeddings_are_read(make, tmp_path):
    theirs = fresh(make)
    theirs.resize_token_embeddings(70, mean_resizing=False)
    theirs = train(peft.get_peft_model(theirs, peft.LoraConfig(r=2, target_modules=["q_proj"])))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    expected = exact_logits(theirs, INPUTS)
    with pytest.raises(ValueError, match=r"of shape \(64, 32\) as the model's.*resize_token_embeddings\(70\) first"):
        lk.load_adapter(fresh(make), tmp_path / "theirs")
    model = fresh(make)
    model.resize_token_embeddings(70, mean_resizing=False)
    report = lk.load_adapter(model, tmp_path / "theirs")
    assert_the_same(exact_logits(model, INPUTS), expected)
    assert set(report.notes) == {f"{n} trains whole, by modules_to_save" for n in ("model.embed_tokens", "lm_head")}
    lk.save_adapter(model, tmp_path / "ours")
    again = fresh(make)
    again.resize_token_embeddings(70, mean_resizing=False)
    assert_the_same(exact_logits(peft.PeftModel.from_pretrained(again, tmp_path / "ours"), INPUTS), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_what_peft_converted_to_the_untouched_base_is_read(init, tmp_path):
    start = {"lora_ga_config": peft.LoraGAConfig()} if init == "lora_ga" else {}
    theirs = peft.get_peft_model(
        fresh(llama), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init, **start)
    )
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = init
    expected = exact_logits(train(theirs), INPUTS)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'; .*path_initial_model_for_weight_conversion"):
        lk.load_adapter(fresh(llama), tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model = fresh(llama)
    lk.load_adapter(model, tmp_path / "converted")
    assert (exact_logits(model, INPUTS) - expected).abs().max() <= 1e-5 * expected.abs().max()


# -------------------------------------------------------------------------------------- why a target takes no adapter


def quantised(model):
    query = model.model.layers[0].self_attn.q_proj
    query.weight = nn.Parameter(query.weight.to(torch.int8), requires_grad=False)


def hooked(model):
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)


def compiled(model):
    attention = model.model.layers[0].self_attn
    attention.q_proj = torch.compile(attention.q_proj)


def missing(model):
    del model.model.layers[0].self_attn.q_proj


REASONS = {
    quantised: r"model\.layers\.0\.self_attn\.q_proj: quantised \(Linear, weight of torch\.int8\); .* let PEFT run it",
    hooked: r"model\.layers\.0\.self_attn\.q_proj: it carries hooks .*; remove them first",
    compiled: r"model\.layers\.0\.self_attn\.q_proj: compiled by itself, .*; adapt the model, then compile",
    missing: r"unexpected: base_model\.model\.model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight",
}


@pytest.mark.parametrize("change", REASONS, ids=lambda f: f.__name__)
def test_a_target_of_the_file_that_takes_no_adapter_is_named_with_the_reason(change, tmp_path):
    model = fresh(llama)
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("q_proj",)))
    lk.save_adapter(model, tmp_path)
    other = fresh(llama)
    change(other)
    with pytest.raises(ValueError, match=REASONS[change]):
        lk.load_adapter(other, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_a_target_of_pefts_that_takes_no_adapter_is_named_with_the_reason(tmp_path):
    tiny = next(tiny for tiny in MODELS.values() if tiny.make is mamba)
    config = peft.LoraConfig(r=2, target_modules=[*tiny.targets, "dt_proj"])
    peft.get_peft_model(fresh(mamba), config).save_pretrained(tmp_path)
    reason = r"mixer\.dt_proj: its parent, MambaMixer, reads its weight instead of calling it"
    with pytest.raises(ValueError, match=rf"unexpected: .*dt_proj.*take no adapter: .*{reason}"):
        lk.load_adapter(fresh(mamba), tmp_path)


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens", "norm"])
def test_a_shard_of_what_trains_whole_is_not_written(part, tmp_path):
    model = fresh(llama)
    lk.adapt(model, lk.LoRAConfig(r=2, target_modules=("q_proj",), modules_to_save=(f"model.{part}", part)))
    module = next(m for name, m in model.named_modules() if name.endswith(part))
    module.weight = nn.Parameter(module.weight.detach().flatten()[:5].clone())
    with pytest.raises(ValueError, match=rf"weight of .*{part} .* got \(5,\), a shard; .*nothing was written"):
        lk.save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())
