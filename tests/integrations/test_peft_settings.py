"""Every setting of PEFT's LoraConfig: PEFT writes an adapter with it, and docs/peft.md says what comes of that here.

The table there is what this file sees; ``python -m tests.integrations.test_peft_settings`` writes it anew.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import typing
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import peft
import torch
import transformers as tf
from peft.tuners.lora import config as lora_config
from torch import nn

import lowrank_kernels as lk
from tests.integrations.tiny_models import IDS, assert_the_same, exact_logits, fresh, llama, mixtral, train

DOCS = Path(__file__).parents[2] / "docs" / "peft.md"
START, END = "<!-- settings -->\n", "<!-- end of settings -->\n"
CONFIG = "adapter_config.json"
INPUTS = {"input_ids": IDS}


def classifier() -> nn.Module:
    config = llama().config  # type: ignore[union-attr]
    config.num_labels, config.pad_token_id = 3, 0
    return tf.LlamaForSequenceClassification(config)


def untied() -> nn.Module:
    config = llama().config  # type: ignore[union-attr]
    config.tie_word_embeddings = False
    return tf.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16))


class Mixed(nn.Module):
    """A convolution and an attention of torch's between an embedding and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(64, 16), nn.Linear(16, 8)
        self.conv, self.attention = nn.Conv1d(16, 16, 3), nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.conv(self.embed(input_ids).mT).mT
        return tf.modeling_outputs.SequenceClassifierOutput(logits=self.out(self.attention(x, x, x)[0]))


class Try(NamedTuple):
    """A value of one setting; what else the config then needs, and of which model."""

    value: Any
    others: Mapping[str, Any] = MappingProxyType({})
    make: Callable[[], nn.Module] = llama
    by_config: bool = False
    """PEFT needs more than a tiny model to write such a file: its config is put beside a plain adapter."""
    about: str = ""


LEARNT = lora_config.LoraGAConfig()
INITS = {
    True: Try(True),
    False: Try(False),
    "gaussian": Try("gaussian"),
    "eva": Try("eva"),
    "olora": Try("olora"),
    "pissa": Try("pissa"),
    "pissa_niter_[number of iters]": Try("pissa_niter_4"),
    "corda": Try("corda", by_config=True),
    "loftq": Try("loftq", {"loftq_config": peft.LoftQConfig()}, by_config=True),
    "orthogonal": Try("orthogonal"),
    "mica": Try("mica"),
    "lora_ga": Try("lora_ga", {"lora_ga_config": LEARNT}),  # not in the type, but in the code
}
TRIES = {
    "task_type": [Try("CAUSAL_LM"), Try("SEQ_CLS", make=classifier)],
    "peft_type": [Try("LORA")],
    "auto_mapping": [Try({"base_model_class": "LlamaForCausalLM"})],
    "peft_version": [Try("0.21.2")],
    "base_model_name_or_path": [Try("org/model", by_config=True)],
    "revision": [Try("main")],
    "inference_mode": [Try(True)],
    "r": [Try(3)],
    "target_modules": [
        Try(["q_proj", "down_proj"]),
        Try(r".*\.1\..*_proj"),
        Try("all-linear"),
        Try(["q_proj", "lm_head"], about="a tied head"),
        Try(["q_proj", "embed_tokens"], about="an embedding"),
        Try(["out", "conv"], make=Mixed, about="a convolution"),
        Try(["out", "attention"], make=Mixed, about="`nn.MultiheadAttention`"),
    ],
    "exclude_modules": [Try(["layers.0.self_attn.q_proj"])],
    "lora_alpha": [Try(5)],
    "lora_dropout": [Try(0.25)],
    "fan_in_fan_out": [Try(True, {"target_modules": ["c_attn"]}, gpt2, about="transformers' Conv1D")],
    "bias": [Try("all"), Try("lora_only")],
    "use_rslora": [Try(True)],
    "modules_to_save": [Try(["lm_head"], make=untied), Try(["input_layernorm"]), Try(["embed_tokens"])],
    "init_lora_weights": list(INITS.values()),
    "layers_to_transform": [Try([1])],
    "layers_pattern": [Try("layers", {"layers_to_transform": 0})],
    "rank_pattern": [Try({"layers.0.self_attn.q_proj": 3})],
    "alpha_pattern": [Try({"layers.0.self_attn.q_proj": 3})],
    "megatron_config": [Try({"tensor_model_parallel_size": 2}, by_config=True)],
    "megatron_core": [Try("megatron.core")],
    "trainable_token_indices": [Try([1, 2])],
    "loftq_config": [Try({"loftq_bits": 4}, by_config=True)],
    "eva_config": [Try(peft.EvaConfig(), {"init_lora_weights": "eva"})],
    "corda_config": [Try(lora_config.CordaConfig(), by_config=True)],
    "lora_ga_config": [Try(LEARNT)],
    "use_dora": [Try(True)],
    "velora_config": [Try(lora_config.VeloraConfig())],
    "alora_invocation_tokens": [Try([1, 2], {"task_type": "CAUSAL_LM"}, by_config=True)],
    "use_qalora": [Try(True, by_config=True)],
    "qalora_group_size": [Try(8)],
    "monteclora_config": [Try(lora_config.MontecloraConfig())],
    "layer_replication": [Try([(0, 2), (1, 2)])],
    "runtime_config": [Try(lora_config.LoraRuntimeConfig())],
    "lora_bias": [Try(True)],
    "target_parameters": [Try(["experts.down_proj"], {"target_modules": []}, mixtral)],
    "use_bdlora": [Try(lora_config.BdLoraConfig(), by_config=True)],
    "arrow_config": [Try(lora_config.ArrowConfig(), by_config=True)],
    "kasa_config": [Try(lora_config.KasaConfig())],
    "ensure_weight_tying": [Try(True, {"modules_to_save": ["embed_tokens"]})],
}


class Seen(NamedTuple):
    load: str
    save: str
    bank: str


def see(setting: str, tried: Try) -> Seen:
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs, ours = Path(name) / "theirs", Path(name) / "ours"
        expected = write(setting, tried, theirs)
        model = fresh(tried.make)
        try:
            lk.load_adapter(model, theirs)
        except ValueError as error:
            check_refusal(setting, tried, error)
            return Seen("refused", "—", "refused")
        assert expected is not None, f"{setting}: read, but PEFT wrote no such adapter"
        assert_the_same(exact_logits(model, INPUTS), expected)
        given = json.loads((theirs / CONFIG).read_text())
        lk.save_adapter(model, ours, task_type=given["task_type"], base_model_name=given["base_model_name_or_path"])
        again = peft.PeftModel.from_pretrained(fresh(tried.make), ours).eval()
        assert_the_same(exact_logits(again, INPUTS), expected)
        written = json.loads((ours / CONFIG).read_text())
        kept = written.get(setting) == given.get(setting)
        return Seen("read", "written" if kept else "its effect is written", bank(setting, tried, theirs, expected))


def check_refusal(setting: str, tried: Try, error: ValueError) -> None:
    """The error names the setting, what follows from it, or the module that takes no adapter."""
    modules = tried.value if isinstance(tried.value, list) else []
    names = [setting, *map(str, modules), *tried.others, *(["modules_to_save"] if setting == "task_type" else [])]
    assert any(name in str(error) for name in names), f"{setting}: the refusal does not say so: {error}"


def write(setting: str, tried: Try, folder: Path) -> torch.Tensor | None:
    """An adapter with the setting, written by PEFT; the logits of its model, in float64."""
    settings = {"r": 2, "target_modules": ["q_proj"], **tried.others, setting: tried.value}
    if tried.by_config:
        plain = train(peft.get_peft_model(fresh(tried.make), peft.LoraConfig(r=2, target_modules=["q_proj"]))).eval()
        plain.save_pretrained(folder)
        with_it = peft.LoraConfig(**settings).to_dict()
        file = folder / CONFIG
        file.write_text(json.dumps({**json.loads(file.read_text()), **json.loads(json.dumps(with_it, default=list))}))
        return exact_logits(plain, INPUTS)
    model = train(peft.get_peft_model(fresh(tried.make), peft.LoraConfig(**settings))).eval()
    model.save_pretrained(folder)
    return exact_logits(model, INPUTS)


def bank(setting: str, tried: Try, folder: Path, expected: torch.Tensor) -> str:
    with lk.serving.AdapterBank(fresh(tried.make)) as bank:
        try:
            bank.load("a", folder)
        except ValueError as error:
            check_refusal(setting, tried, error)
            return "refused"
        with torch.no_grad(), bank.batch(["a"] * len(IDS)):
            got = bank.model(**INPUTS).logits.double()
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), setting  # float32 beside float64
    return "served"


def shown(tried: Try) -> str:
    value = tried.value
    text = f"{type(value).__name__}(...)" if dataclasses.is_dataclass(value) else json.dumps(value)
    text = {"true": "True", "false": "False"}.get(text, text)
    return f"`{text}`" + (f" ({tried.about})" if tried.about else "")


def table() -> str:
    lines = ["| setting | tried | `load_adapter` | `save_adapter` | `AdapterBank` |", "|---|---|---|---|---|"]
    for setting, tries in TRIES.items():
        seen = [see(setting, tried) for tried in tries]
        for row in dict.fromkeys(seen):
            values = ", ".join(shown(t) for t, s in zip(tries, seen, strict=True) if s == row)
            lines.append(f"| `{setting}` | {values} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def test_every_setting_of_this_peft_is_tried():
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} == TRIES.keys()
    kinds = typing.get_args(typing.get_type_hints(peft.LoraConfig)["init_lora_weights"])
    literals = {value for kind in kinds for value in typing.get_args(kind)}
    assert literals | {True, False, "lora_ga"} == INITS.keys()


def test_the_docs_say_what_is_seen():
    before, _, rest = DOCS.read_text().partition(START)
    told = rest.partition(END)[0]
    assert told == table(), "docs/peft.md: run python -m tests.integrations.test_peft_settings"
    assert before


if __name__ == "__main__":
    before, _, rest = DOCS.read_text().partition(START)
    DOCS.write_text(f"{before}{START}{table()}{END}{rest.partition(END)[2]}")
