"""What `lrk` is told is checked before it does anything: one line on stderr, exit code 2, and nothing touched."""

from __future__ import annotations

import argparse
import importlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowrank_kernels.cli import COMMANDS, Parser, arguments, docstrings, main
from lowrank_kernels.cli.methods import METHODS, ignored_options

pytest.importorskip("transformers")

NO_GPU = "cuda" if not torch.cuda.is_available() else "cuda:99"
INTEGERS = ("x", "", "1.5", "0", "-1", "nan", "9" * 30)
NUMBERS = ("x", "", "nan", "inf", "-1", "1e999")
RATES = (*NUMBERS, "0")
DEVICES = ("x", "", "cpu:3", "cpu:-1", "meta", NO_GPU)
# What cannot be written: {file} is a file, {folder} a folder.
FILES = ("", "{folder}", "{file}/x", "{file}/x/y", "/proc/x", "/proc/x/y", "a\0b", "n" * 300)
FOLDERS = ("", "{file}", "{file}/x", "/proc/x", "a\0b", "n" * 300)
STATES = (*FILES, "/dev/null")
PICTURES = (*FILES, "x.txt", "x")
WORDS = ("x", "")

BAD: dict[str, dict[str, tuple[str, ...]]] = {
    "doctor": {
        "--explain": ("", "nothing M=1", "lora_linear", "lora_linear M=0 K=1 N=1 R=1", "lora_linear M=1 K=1 N=1 R=x"),
        "--dtype": WORDS,
        "--base": WORDS,
        "--device": ("x", "cpu:sm_90", "cuda:sm_1", "cuda:", "meta"),
    },
    "inspect": {
        "--op": WORDS,
        "--arch": WORDS,
        "--json": FILES,
        "--save-cubins": FOLDERS,
        "--write-budget": FILES,
        "--workers": (*INTEGERS, "257"),
    },
    "bench": {
        "--op": WORDS,
        "--shapes": (*WORDS, "M=0", "M=x"),
        "--providers": WORDS,
        "--dtypes": WORDS,
        "--modes": WORDS,
        "--device": DEVICES,
        "--threads": (*INTEGERS, "100000"),
        "--seconds": NUMBERS,
        "--budget": RATES,
        "--csv": FILES,
        "--json": FILES,
        "--plot": PICTURES,
    },
    "tune": {
        "--op": WORDS,
        "--shapes": (*WORDS, "M=0", "M=x"),
        "--dtypes": WORDS,
        "--device": DEVICES,
        "--seconds": NUMBERS,
        "--budget": RATES,
        "--file": STATES,
    },
    "train": {
        "--method": WORDS,
        "--model": ("x", ""),
        "--rank": INTEGERS,
        "--dropout": (*NUMBERS, "1"),
        "--steps": INTEGERS,
        "--batch-size": INTEGERS,
        "--learning-rate": RATES,
        "--held-out": INTEGERS,
        "--seed": ("x", "-1", "1.5"),
        "--device": DEVICES,
        "--dtype": WORDS,
        "--base": WORDS,
        "--output": FOLDERS,
        "--json": FILES,
        "--checkpoint": STATES,
        "--save-every": INTEGERS,
        "--stop-after": INTEGERS,
        "--steps-per-link": INTEGERS,
        "--link-warmup": ("x", "-1"),
        "--link-ranks": INTEGERS,
        "--rounding": WORDS,
        "--layer-share": (*RATES, "1.5"),
        "--factor-l2": NUMBERS,
        "--max-links": INTEGERS,
        "--gate-penalty": NUMBERS,
        "--gate-penalty-steps": ("x", "-1"),
        "--gate-learning-rate": RATES,
        "--validation-examples": INTEGERS,
        "--steps-per-round": INTEGERS,
        "--rounds": INTEGERS,
        "--moved-share": (*RATES, "1.5"),
        "--adapter-budget": (*RATES, "1.5"),
        "--proxy": WORDS,
        "--score-after": INTEGERS,
        "--choose-every": INTEGERS,
        "--freeze-share": (*RATES, "1.5"),
        "--prune-ratio": (*RATES, "1"),
        "--prune-warmup": ("x", "-1"),
        "--prune-steps": INTEGERS,
        "--projection-rank": INTEGERS,
        "--sub-tokens": INTEGERS,
        "--density-alpha": NUMBERS,
        "--density-eps": RATES,
        "--density-every": INTEGERS,
        "--velora-form": WORDS,
        "--projection-steps": INTEGERS,
        "--projection-scale": RATES,
        "--projection-moments": WORDS,
        "--update-share": (*RATES, "1.5"),
        "--mask-window": INTEGERS,
        "--mask-over": WORDS,
        "--pattern": WORDS,
        "--band": ("x", "-1", "1.5"),
        "--places": INTEGERS,
        "--meft": (*WORDS, "0", "4"),
        "--meft-lambda": ("x", "", "nan", "inf", "0", "-0.0"),
        "--meft-beta": ("x", "", "nan", "inf", "0", "-0.0"),
        "--keep-every": INTEGERS,
        "--adapter-size": INTEGERS,
        "--late-layers": INTEGERS,
        "--side-width": INTEGERS,
        "--gradient-batches": INTEGERS,
        "--budget": (*RATES, "1.5"),
        "--block-size": (*INTEGERS, "8", "24"),
        "--warmup-steps": INTEGERS,
    },
    "demo": {
        "--model": ("x", ""),
        "--rank": INTEGERS,
        "--dropout": (*NUMBERS, "1"),
        "--steps": INTEGERS,
        "--batch-size": INTEGERS,
        "--learning-rate": RATES,
        "--held-out": INTEGERS,
        "--seed": ("x", "-1", "1.5"),
        "--device": DEVICES,
        "--dtype": WORDS,
        "--output": FOLDERS,
        "--block-size": (*INTEGERS, "8", "24"),
        "--warmup-steps": INTEGERS,
    },
    "merge": {"--base": ("", "{file}", "{folder}/none", "a\0b"), "--out": FOLDERS, "--dtype": WORDS},
    "adapters": {"--base": ("", "{folder}/none", "a\0b"), "--json": FILES},
    "convert": {"--to": WORDS, "--base": ("", "{folder}/none", "a\0b"), "--names": ("", "x", "{{path}}")},
    "serve": {
        "--model": ("x", ""),
        "--adapters": ("", "{file}", "{folder}/none", "a\0b"),
        "--host": ("no.such.host.invalid", "1.2.3.4"),
        "--port": ("x", "", "-1", "99999999", "65536", "1.5"),
        "--budget-mib": INTEGERS,
        "--state": (*FILES, "{file}"),
        "--api-key": ("", "two words", "\u00e9", "a\nb"),
        "--allowed-host": ("", "a:80", "http://a", "[::1]"),
        "--allowed-origin": ("", "a.example", "ftp://a.example", "https://a.example/path", "null"),
        "--max-rows": INTEGERS,
        "--chunk-tokens": INTEGERS,
        "--cache-tokens": INTEGERS,
        "--max-queue": INTEGERS,
        "--max-length": INTEGERS,
        "--max-body-kib": INTEGERS,
        "--max-connections": (*INTEGERS, "100000000"),
        "--head-seconds": (*NUMBERS, "0"),
        "--body-seconds": (*NUMBERS, "0"),
        "--grace": ("x", "", "-1", "1.5"),
        "--device": DEVICES,
        "--dtype": WORDS,
        "--base": WORDS,
    },
}
# Options of methods that the table does not name have kinds of their own, and none takes a word that says nothing.
BAD["train"] |= {
    option: WORDS
    for row in METHODS.values()
    for group in row.options
    for option, settings in group.items()
    if option not in BAD["train"] and "action" not in settings
}
# Anything goes: a switch, or a text of which there is nothing to say before the work.
FREE = {"--help", "--debug", "--kernel"}

# What stands beside the option: {} is an existing folder.
POSITIONAL = {"adapters": ("{}",), "merge": ("{}", "--base={}", "--out=out"), "convert": ("{}", "out", "--to=peft")}

CASES = [(command, option, value) for command, of in BAD.items() for option, values in of.items() for value in values]


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing may begin: no functions are collected, no model is read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LRK_TUNE_FILE", str(tmp_path / "tune.json"))

    def began(*args: Any, **settings: Any) -> Any:
        pytest.fail("began to work")

    from lowrank_kernels import bench
    from lowrank_kernels.bench import tune
    from lowrank_kernels.inspect import launches

    monkeypatch.setattr(docstrings, "collect", began)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(bench, "measure_roofs", began)
    monkeypatch.setattr(tune, "tune", began)
    monkeypatch.setattr(launches, "recorded_launches", began)


def filled(value: str, folder: Path) -> str:
    (folder / "file").write_text("precious")
    (folder / "folder").mkdir(exist_ok=True)
    return value.format(file=folder / "file", folder=folder / "folder")


@pytest.mark.parametrize(
    ("command", "option", "value"), CASES, ids=lambda word: str(word)[:20].replace("\0", "0") or "empty"
)
def test_a_bad_value_is_one_line(
    command: str, option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = filled(value, tmp_path)
    words = [command, *(word.format(tmp_path) for word in POSITIONAL.get(command, ())), f"{option}={value}"]
    if command == "train" and option not in ("--method", "--model"):
        words += ["--method", next(m for m in METHODS if option not in ignored_options(m))]
        words += ["--checkpoint", "state.pt"] if option in ("--save-every", "--stop-after") else []
    if command == "serve" and option != "--adapters":
        words += ["--adapters", str(tmp_path / "folder")]
    if option != "--model" and command in ("train", "demo", "serve"):
        words += ["--model", str(tmp_path / "none")]  # comes after all that is checked
    before = sorted(tmp_path.iterdir())
    assert main(words) == 2, words
    lines = capsys.readouterr().err.splitlines()
    assert option == "--model" or len(lines) == 1, lines
    assert lines[-1].startswith("lrk: ") and len(lines[-1]) < 1000
    assert option in lines[-1] or (option, command) in {("--op", "inspect"), ("--model", command)}, lines[-1]
    assert sorted(tmp_path.iterdir()) == before and (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_is_in_the_table(command: Any) -> None:
    subparsers = Parser().add_subparsers()
    importlib.import_module(f"lowrank_kernels.cli.{command.module}").add_parser(subparsers)
    actions = subparsers.choices[command.name]._actions
    with_values = {a.option_strings[-1] for a in actions if a.option_strings and a.nargs != 0}
    assert with_values - FREE == set(BAD[command.name])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--method", "lora", "--steps-per-link", "4"], "--steps-per-link: is not an option of --method lora"),
        (["train", "--method", "dora", "--link-ranks", "4", "2"], "--link-ranks: is not an option of --method dora"),
        (["train", "--method", "smt", "--master"], "--master: is not an option of --method smt"),
        (["train", "--method", "smt", "--rank=4"], "--rank: is not an option of --method smt"),
        (["train", "--method", "cola", "--layer-share", "1"], "--layer-share: is not an option of --method cola"),
        (["train", "--method", "cola", "--budget", "0.1"], "--budget: is not an option of --method cola"),
        (["train", "--gradient-batches", "4"], "--gradient-batches: is not an option of --method lora"),
        (["train", "--stop-after", "3"], "--stop-after: needs --checkpoint"),
        (["train", "--save-every", "3"], "--save-every: needs --checkpoint"),
        (["train", "--json", "a", "--output", "b/../a"], "--json: expected another place than that of --output"),
        (["train", "--out", "a"], "unrecognized arguments: --out a"),
        (["demo", "--serve", "--block-size", "16"], "--block-size: is not an option of --serve"),
        (["demo", "--budget", "0.1"], "unrecognized arguments: --budget"),
        (["bench", "--append"], "--append: is for --csv"),
        (["bench", "--csv", "rows", "--json", "rows"], "--json: expected another place than that of --csv"),
        (["inspect", "--json", "x", "--save-cubins", "x"], "--save-cubins: expected another place than that of --json"),
        (["merge", ".", "--base", "."], "the following arguments are required: --out"),
        (["merge", ".", "--base", ".", "--out", "out"], "merge_checkpoint: expected the folder of a safetensors"),
        (["adapters", "diff", "."], "adapters diff: expected two adapters, got 1"),
        (["adapters", "none"], "ADAPTER: expected a file or a folder, got 'none'"),
        (["convert", "none", "out", "--to", "mlx"], "IN: expected a file or a folder, got 'none'"),
        (["convert", ".", "out"], "the following arguments are required: --to"),
        (["convert", ".", "out", "--to", "mlx"], "convert: expected an adapter of a known format (peft, gguf, "),
        (["serve"], "the following arguments are required: --adapters"),
        (["trian"], "COMMAND: invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
        (["doctor", "now"], "unrecognized arguments: now"),
    ],
)
def test_options_that_do_not_go_together(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lrk: {said}")


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--adapters", str(tmp_path), "--port", str(port), "--model", "none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lrk: --host, --port: expected an address to listen on, got 127.0.0.1:{port}: ")


def test_a_table_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LRK_TUNE_FILE", "/proc/tune.json")
    assert main(["tune"]) == 2
    assert capsys.readouterr().err.startswith("lrk: tune: the table: expected a place that can be written")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (arguments.count, "7", 7),
        (arguments.whole(16, multiple_of=16), "32", 32),
        (arguments.number(), "0", 0.0),
        (arguments.number(above=0.0), "1e-9", 1e-9),
        (arguments.number(0.0, below=1.0), "0.999", 0.999),
        (arguments.share, "1", 1.0),
        (arguments.port, "0", 0),
        (arguments.seed, "0", 0),
        (arguments.threads, "1", 1),
        (arguments.device, "cpu", "cpu"),
        (arguments.output_file, "new/rows.csv", Path("new/rows.csv")),
        (arguments.output_file, "/dev/stdout", Path("/dev/stdout")),
        (arguments.output_folder, ".", Path(".")),
        (arguments.output_folder, "a/b/c", Path("a/b/c")),
        (arguments.state_file, "x.pt", Path("x.pt")),
        (arguments.picture_file, "x.PNG", Path("x.PNG")),
        (arguments.folder, ".", Path(".")),
    ],
)
def test_what_is_right_is_taken(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert kind(text) == value
    assert os.listdir(".") == []


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(argparse.ArgumentTypeError, match="a file that may be written"):
        arguments.output_file(str(tmp_path / "mine"))
