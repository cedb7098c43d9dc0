"""PEFT → load_adapter → save_adapter → PEFT, with equal logits: models of every kind, every supported setting."""

from __future__ import annotations

import warnings

import peft
import pytest
import transformers

import lowrank_kernels as lk
from tests.integrations.tiny_models import MODELS, assert_the_same, exact_logits, fresh, plain_logits, train

SETTINGS = {
    "plain": {},
    "patterns": {"rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {r".*\.0\..*": 3}, "use_rslora": True},
    "DoRA": {"use_dora": True},
    "exclude_modules": {"exclude_modules": r".*\.0\..*"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": 1, "layers_pattern": ["layers", "layer", "block"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva", "eva_config": peft.EvaConfig()},
    "mica": {"init_lora_weights": "mica"},
    "modules_to_save": {"modules_to_save": True},
    "modules_to_save, bias all": {"modules_to_save": True, "bias": "all"},
}


def trained_names(model):
    """Of parameters that train, by the names that they have in a file."""
    names = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    names = {name.replace("modules_to_save.", "").replace("default.", "") for name in names}
    return {name.replace("magnitude_vector.weight", "magnitude_vector") for name in names}


def read_by_peft(model, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_of_pefts_is_read_and_written_again(kind, setting, tmp_path):
    tiny, settings = MODELS[kind], dict(SETTINGS[setting])
    if "modules_to_save" in settings:
        settings["modules_to_save"] = list(tiny.whole)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=list(tiny.targets), **settings)
    theirs = train(peft.get_peft_model(fresh(tiny.make), config)).eval()
    expected = exact_logits(theirs, tiny.inputs)
    plain = plain_logits(kind)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    theirs.save_pretrained(tmp_path / "theirs")

    ours = fresh(tiny.make)
    report = lk.load_adapter(ours, tmp_path / "theirs", trainable=True)
    assert_the_same(exact_logits(ours, tiny.inputs), expected)
    assert trained_names(ours) == trained_names(theirs)

    lk.save_adapter(ours, tmp_path / "ours")
    assert_the_same(exact_logits(read_by_peft(fresh(tiny.make), tmp_path / "ours"), tiny.inputs), expected)

    report.undo()
    assert_the_same(exact_logits(ours, tiny.inputs), plain)


TASKS = {
    "SEQ_CLS": (peft.AutoPeftModelForSequenceClassification, "BertForSequenceClassification", "classifier"),
    "TOKEN_CLS": (peft.AutoPeftModelForTokenClassification, "BertForTokenClassification", "classifier"),
    "QUESTION_ANS": (peft.AutoPeftModelForQuestionAnswering, "BertForQuestionAnswering", "qa_outputs"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("named", [True, False])
def test_a_tasks_head_is_written_as_pefts_auto_classes_read_it(task, named, tmp_path):
    auto, kind, head = TASKS[task]
    inputs = MODELS["bert"].inputs
    config = MODELS["bert"].make().config
    config.num_labels = 2

    def make():
        return getattr(transformers, kind)(config)

    base = fresh(make)
    base.save_pretrained(tmp_path / "base")
    report = lk.adapt(base, lk.LoRAConfig(r=2, modules_to_save=(head,) if named else ()))
    assert head not in [r.name for r in report.replaced]
    reasons = {s.name: s.reason for s in report.skipped}
    assert ("in modules_to_save" if named else "name it in modules_to_save to train it whole") in reasons[head]
    base.get_submodule(head).requires_grad_(True)
    train(base)
    expected = exact_logits(base, inputs)
    lk.save_adapter(base, tmp_path / "ours", task_type=task, base_model_name=str(tmp_path / "base"))
    theirs = auto.from_pretrained(tmp_path / "ours", is_trainable=True).eval()
    assert trained_names(theirs) >= {f"{head}.weight", f"{head}.bias"}
    assert_the_same(exact_logits(theirs, inputs), expected)

    theirs.save_pretrained(tmp_path / "theirs")
    again = fresh(make)
    lk.load_adapter(again, tmp_path / "theirs")
    assert_the_same(exact_logits(again, inputs), expected)
    with lk.serving.AdapterBank(fresh(make)) as bank, pytest.raises(ValueError, match=f"{head} .modules_to_save"):
        bank.load("a", tmp_path / "theirs")
