"""`lrk train` with every method, on a language model small enough for a test: it learns, stops, and goes on."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("transformers")

import lowrank_kernels as lk
from lowrank_kernels.cli import docstrings, main, train
from lowrank_kernels.cli.allocation import save_cut
from lowrank_kernels.cli.batches import Batch
from lowrank_kernels.cli.factors import FACTORS, LINKS, save_adapter, save_from_start
from lowrank_kernels.cli.loop import Run
from lowrank_kernels.cli.method import save_model
from lowrank_kernels.cli.methods import METHODS, ignored_options
from lowrank_kernels.cli.reversible import save_reversible
from lowrank_kernels.cli.side import save_side_path
from lowrank_kernels.cli.smt import BLOCKS, save_blocks
from lowrank_kernels.cli.svft import PLACES, write_svft
from lowrank_kernels.cli.velora import save_projected


class Tokenizer:
    """One token a character; what the training loop needs of a tokenizer, and no more."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1 + ord(c) % 30 for c in text]}

    def save_pretrained(self, folder: Path) -> None:
        pass


def tiny_model(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


EXAMPLES = [docstrings.Example("t", f"f{i}", f"def f{i}", "abab" * (1 + i % 3)) for i in range(24)]


def load_tiny_task(args: Any) -> Any:
    return tiny_model(train.DTYPES[args.dtype or "float32"]), Tokenizer(), EXAMPLES, EXAMPLES[:8]


@pytest.fixture(autouse=True)
def tiny_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_task", load_tiny_task)


SMALL = {
    "--rank": "4",
    "--block-size": "16",
    "--budget": "0.1",
    "--warmup-steps": "2",
    "--steps-per-link": "4",
    "--link-warmup": "2",
    "--gradient-batches": "4",
    "--gate-learning-rate": "5",
    "--gate-penalty": "0.01",
    "--validation-examples": "4",
    "--steps-per-round": "4",
    "--score-after": "3",
    "--choose-every": "4",
    "--prune-warmup": "2",
    "--projection-rank": "4",
    "--projection-steps": "5",
    "--sub-tokens": "8",
    "--density-every": "4",
    "--late-layers": "1",
    "--side-width": "8",
}
WITH_RANK = [name for name, row in METHODS.items() if FACTORS in row.options]
WITH_LAYERS = [
    name for name, row in METHODS.items() if any(group in row.options for group in (FACTORS, BLOCKS, PLACES))
]
LOADERS: dict[Any, Callable[..., Any]] = {
    save_adapter: lk.load_adapter,
    save_from_start: lk.load_adapter,
    save_blocks: lk.smt.load_delta,
    save_projected: lk.load_adapter,
    write_svft: lk.load_svft,
    save_reversible: lk.reversible.load_meft,
    save_side_path: lk.side.load_sherl,
}
"""What loads over the base what these write."""
RATES = {"lora-pro": "0.3", "lora-rite": "5e-3"}


def options(method: str) -> list[str]:
    """Of a small run: those that every method has, and its own."""
    others = ignored_options(method)
    own = [word for option, value in SMALL.items() if option not in others for word in (option, value)]
    return ["--batch-size", "4", *own]


def command(method: str, *more: str, steps: int = 12) -> int:
    rate = ["--learning-rate", RATES.get(method, "1e-2")]
    return main(["train", "--method", method, "--steps", str(steps), *options(method), *rate, *more])


class Runs(NamedTuple):
    """One run of a method in one piece, and one that was stopped after step 6 of 12 and went on."""

    method: str
    whole: dict[str, Any]
    resumed: dict[str, Any]
    stopped_said: str
    folders: tuple[Path, Path]  # what each wrote

    def files(self) -> list[list[str]]:
        return [sorted(p.name for p in folder.iterdir()) for folder in self.folders]


def by_method(*methods: str) -> Any:
    """Runs of these methods, or of all; one of CoLA's links have ranks of their own."""
    cases = [(method, ()) for method in METHODS] + [("cola", ("--link-ranks", "4", "2", "1"))]
    chosen = [case for case in cases if not methods or case[0] in methods]
    return pytest.mark.parametrize("runs", chosen, indirect=True, ids=lambda case: " ".join((case[0], *case[1])))


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    method, more = request.param
    folder = tmp_path_factory.mktemp("runs")
    whole, resumed, state = folder / "whole.json", folder / "resumed.json", folder / "state.pt"
    folders = (folder / "out", folder / "again")
    dropout = ["--dropout", "0.1"] if method in WITH_RANK else []
    parts = ["--checkpoint", str(state), *dropout, *more]
    stopped = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_task", load_tiny_task)
        assert command(method, "--json", str(whole), "--output", str(folders[0]), *dropout, *more) == 0
        with contextlib.redirect_stdout(stopped):
            assert command(method, *parts, "--stop-after", "6") == 0  # in the middle of a link
        assert command(method, *parts, "--json", str(resumed), "--output", str(folders[1])) == 0
    found = (json.loads(path.read_text()) for path in (whole, resumed))
    return Runs(method, *found, stopped.getvalue(), folders)


@by_method()
def test_a_run_lowers_the_loss_on_what_it_has_not_seen(runs: Runs) -> None:
    assert runs.whole["held_out_after"] < runs.whole["held_out_before"]


@by_method()
def test_a_run_that_stops_says_where(runs: Runs) -> None:
    assert "stopped after step 6 of 12" in runs.stopped_said


@by_method()
def test_a_run_that_was_stopped_goes_on_bit_for_bit(runs: Runs) -> None:
    for key in ("losses", "held_out_before", "held_out_after", "links", "history"):
        assert runs.whole[key] == runs.resumed[key], key


@by_method()
def test_a_chain_has_its_links_and_the_others_none(runs: Runs) -> None:
    assert runs.whole["links"] == (3 if LINKS in METHODS[runs.method].options else 0)


@by_method()
def test_a_run_that_was_stopped_writes_the_same_files(runs: Runs) -> None:
    whole, resumed = runs.files()
    assert whole == resumed


@by_method(*(name for name, row in METHODS.items() if row.save in (save_model, save_cut)))
def test_a_chain_writes_a_whole_model(runs: Runs) -> None:
    files = runs.files()[0]
    assert "model.safetensors" in files and "adapter_config.json" not in files


@by_method(*(name for name, row in METHODS.items() if row.save in LOADERS))
def test_what_a_run_writes_is_loaded_over_the_base(runs: Runs) -> None:
    LOADERS[METHODS[runs.method].save](tiny_model(torch.float32), runs.folders[0])


@pytest.mark.parametrize("more", [["--rounding", "stochastic"], ["--master"]])
def test_chains_over_bfloat16(more: list[str]) -> None:
    assert command("rac-lora", "--dtype", "bfloat16", *more) == 0


def base_bytes(model: Any) -> dict[str, bytes]:
    """Every weight that the model came with, bit for bit, by its name in the model as it came."""
    layers = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer"))
    return {
        name.replace(".base_layer.", "."): p.detach().numpy().tobytes()
        for name, p in model.named_parameters()
        if ".base_layer." in name or not (name.startswith(layers) or ".meft." in name or ".sherl." in name)
    }


def without_targets() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2, n_positions=64))


def quantised() -> Any:
    model = tiny_model(torch.float32)
    for layer in model.model.layers:
        for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return model


def broken() -> Any:
    model = tiny_model(torch.float32)
    model.model.norm.weight.data[0] = float("nan")
    return model


REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...], dict[str, str]]] = {
    "rank over the matrix size": (
        lambda: tiny_model(torch.float32),
        ("--rank", "40"),
        {
            "": "min(N, K) = 32 for model.layers.0.self_attn.q_proj of shape (N, K) = (32, 32), got 40; lower r",
            "sherl": "min(N, K) = 32 for model.layers.1.self_attn.q_proj of shape (N, K) = (32, 32), got 40; lower r",
        },
    ),
    "no targets": (
        without_targets,
        (),
        {
            "": "replaces nothing in this GPT2LMHeadModel; its linears: transformer.h.*.attn.c_attn, ",
            "sherl": "expected modules of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj in ",
        },
    ),
    "quantised": (quantised, (), {"": "q_proj (quantised (Linear, weight of torch.int8))"}),
    "a loss that is not finite": (
        broken,
        (),
        {
            "": "expected a finite loss and gradient, got nan",
            "lora-ga": "estimate_gradients: expected a finite loss",
            "smt": "warm_up: the loss is nan",
        },
    ),
}


REFUSING = {"rank over the matrix size": WITH_RANK, "no targets": WITH_LAYERS, "quantised": WITH_LAYERS}


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in REFUSED for method in REFUSING.get(kind, METHODS)],
)
def test_what_is_refused_is_told_in_one_line_and_touches_no_weight(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, more, words = REFUSED[kind]
    model = make()
    monkeypatch.setattr(train, "load_task", lambda args: (model, Tokenizer(), EXAMPLES, EXAMPLES[:8]))
    before = base_bytes(model)
    assert command(method, *more) == 2
    said = capsys.readouterr().err
    assert words.get(method, words[""]) in said.splitlines()[-1] and "Traceback" not in said
    assert base_bytes(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_moves_nothing(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also in the middle of a run, in one element, while the loss is a number."""
    seen: list[tuple[Any, dict[str, torch.Tensor]]] = []
    sound = Run.forward_backward

    def forward_backward(run: Run, batch: Batch) -> float:
        loss = sound(run, batch)
        if len(run.losses) == 5:  # a chain is in its second link
            next(p.grad for p in run.parameters if p.grad is not None).view(-1)[1] = float("inf")
            seen.append((run.model, {name: p.detach().clone() for name, p in run.model.named_parameters()}))
        return loss

    monkeypatch.setattr(Run, "forward_backward", forward_backward)
    assert command(method) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"lrk: {method}: expected a finite loss and gradient, got ")
    assert last.endswith("and a norm of inf at step 6, which was not taken; lower the learning rate")
    ((model, before),) = seen
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """What a run of LoRA of rank 4 wrote after its first step."""
    state = tmp_path / "state.pt"
    assert command("lora", "--checkpoint", str(state), "--stop-after", "1") == 0
    return state


def last_line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Of what a run that is refused says."""
    capsys.readouterr()
    assert command(*arguments) == 2, arguments
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["lora", "--rank", "3"], "is of a run with rank=4"), (["cola"], "is of a run with method=lora")],
)
def test_the_state_of_another_run_is_refused(
    arguments: list[str], words: str, state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in last_line(capsys, *arguments, "--checkpoint", str(state))


def test_a_file_that_is_no_state_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "state.pt").write_bytes(b"nothing")
    assert command("lora", "--checkpoint", str(tmp_path / "state.pt")) == 2
    assert "to be one of `lrk train`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rac-lora", "--rounding", "stochastic"], "rac_lora: expected bfloat16 weights for stochastic rounding"),
        (["cola", "--link-ranks", "4", "5"], "cola: expected ranks from 1 to the layers' own of 4, one a link"),
        (["cola", "--steps-per-link", "0"], "--steps-per-link: expected an integer from 1 to 2147483647, got '0'"),
        (["xgblora", "--layer-share", "0"], "--layer-share: expected a number above 0, got '0'"),
        (["lora-ga", "--rank", "20"], "lora_ga: expected a rank of at most"),
        (["lora-ga", "--gradient-batches", "0"], "--gradient-batches: expected an integer from 1 to"),
        (["smt", "--warmup-steps", "0"], "--warmup-steps: expected an integer from 1 to 2147483647, got '0'"),
    ],
)
def test_options_that_a_method_cannot_take_are_refused_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in last_line(capsys, *arguments)
