"""`lrk bench`: every op at small sizes, wrong and failing providers, what is written."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowrank_kernels
from lowrank_kernels.bench import OPS, Problem, Roofs, Row, interleaved, measure
from lowrank_kernels.bench.plot import draw_all
from lowrank_kernels.bench.run import read_csv
from lowrank_kernels.cli import main

CPU = torch.device("cpu")
SMALL = {"M": 9, "K": 64, "N": 96, "R": 4, "G": 3, "blocks": 3, "size": 32, "E": 100}


def problem(op: str, dtype: torch.dtype = torch.float32, training: bool = False) -> Problem:
    return Problem({name: SMALL[name] for name in OPS[op].shapes[0]}, dtype, training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "training"), [(name, training) for name in OPS for training in {False, bool(OPS[name].trained)}]
)
def test_every_op_and_provider_is_right_and_timed(op, dtype, training):
    providers = tuple(OPS[op].providers)
    rows = measure(OPS[op], problem(op, dtype, training), providers, 0.0, CPU, Roofs(1e10, 1e11))
    assert [row.provider for row in rows] == list(providers)
    for row in rows:
        assert not row.reason, row
        assert row.median_us > 0 and row.spread >= 0 and row.over_floor > 0
        assert (row.over_roof is None) == training
        assert (row.error is None) == (row.provider == "floor")


def test_what_is_wrong_or_fails_is_a_row_without_a_figure():
    def fails(inputs):
        raise NotImplementedError("not on this device")

    bench = OPS["lora_linear"]
    bench = dataclasses.replace(
        bench, providers={**bench.providers, "peft": fails, "ours": lambda i: bench.providers["plain"](i) * 1.01}
    )
    rows = {row.provider: row for row in measure(bench, problem("lora_linear"), bench.providers, 0.0, CPU)}
    assert rows["ours"].reason == "wrong: not timed" and rows["ours"].median_us is None and rows["ours"].error > 3
    assert rows["peft"].reason == "NotImplementedError: not on this device" and rows["peft"].median_us is None
    assert rows["plain"].median_us > 0


def test_a_result_that_is_not_finite_is_wrong():
    bench = OPS["lora_linear"]
    bench = dataclasses.replace(
        bench, providers={**bench.providers, "ours": lambda i: bench.providers["plain"](i) * float("nan")}
    )
    (row,) = measure(bench, problem("lora_linear"), ["ours"], 0.0, CPU)
    assert row.reason == "wrong: not timed"


def test_turns_are_taken_and_sampled():
    seen = []
    samples = interleaved({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 0.0, CPU)
    assert len(samples["a"].times) == len(samples["b"].times) >= 7 and seen.count("a") == seen.count("b")
    turns = [tuple(seen[i : i + 2]) for i in range(4, len(seen), 2)]
    assert {("a", "b"), ("b", "a")} == set(turns)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(arguments, files by kind, what was printed) of a run of the command that writes every kind of file."""
    folder = tmp_path_factory.mktemp("bench")
    files = {kind: folder / f"rows.{kind}" for kind in ("csv", "json", "png")}
    arguments = ["bench", "--op", "merge_lora_", "--op", "dora_weight_norm", "--dtypes", "float32", "--seconds", "0"]
    arguments += ["--shapes", "K=64,N=96,R=4", "--shapes", "K=65,N=9,R=70", "--modes", "inference"]
    arguments += ["--csv", str(files["csv"]), "--json", str(files["json"]), "--plot", str(files["png"])]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(arguments) == 0
    return arguments, files, out.getvalue()


def test_the_command_prints_a_table_and_the_roofs(written):
    _, _, out = written
    assert out.count("merge_lora_") >= 4 and "measured roofs, float32" in out


def test_the_command_writes_rows_with_where_they_are_from(written):
    _, files, _ = written
    with files["csv"].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * (2 + 3)
    assert {"device", "torch", "commit", "command", "date"} <= rows[0].keys() and rows[0]["torch"] == torch.__version__
    again, where = read_csv(files["csv"])
    assert [r.provider for r in again] == [r["provider"] for r in rows] and where["torch"] == torch.__version__
    assert all(r.median_us > 0 for r in again)
    assert len(json.loads(files["json"].read_text())["rows"]) == len(rows)


def test_the_command_draws_a_picture(written):
    _, files, _ = written
    assert files["png"].read_bytes()[:4] == b"\x89PNG"


def test_the_command_appends_rows(written, tmp_path):
    arguments, files, _ = written
    rows, longer = read_csv(files["csv"])[0], shutil.copy(files["csv"], tmp_path / "longer.csv")
    arguments = [str(longer) if word == str(files["csv"]) else word for word in arguments]
    assert main([*arguments, "--append"]) == 0
    assert len(read_csv(longer)[0]) == 2 * len(rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "lora"], "--op: expected some of lora_linear"),
        (["--providers", "unsloth"], "--providers: expected some of floor"),
        (["--op", "lora_linear", "--shapes", "M=1,K=2"], "--shapes: expected M=16,K=2048,N=2048,R=16 or the like"),
        (["--op", "lora_linear", "--shapes", "M=0,K=2,N=2,R=2"], "or the like for lora_linear, got M=0,K=2,N=2,R=2"),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_the_gpu_check_runs_dry(tmp_path):
    """`make gpu-check DRY=1`: the script that a GPU will run, on a CPU."""
    script = Path(lowrank_kernels.__file__).parent.parent / "benchmarks" / "gpu_check.py"
    command = [sys.executable, str(script), "--dry", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "nothing failed" in done.stdout and "FAIL" not in done.stdout
    rows, where = read_csv(tmp_path / "dry_bench.csv")
    assert {row.op for row in rows} == set(OPS) and "--dry" in where["command"]
    assert json.loads((tmp_path / "dry_check.json").read_text())["failures"] == []


@pytest.mark.parametrize("wrong", [False, True])
def test_the_selftest_gives_a_verdict_an_op(wrong, monkeypatch, capsys):
    for name, bench in list(OPS.items()):
        small = dataclasses.replace(bench, shapes=({key: SMALL[key] for key in bench.shapes[0]},))
        if wrong and name == "lora_linear":
            ours = bench.providers["ours"]
            small = dataclasses.replace(small, providers={**bench.providers, "ours": lambda i, f=ours: f(i) * 1.1})
        monkeypatch.setitem(OPS, name, small)
    assert main(["doctor", "--selftest"]) == int(wrong)
    lines = capsys.readouterr().out.partition("Self-test")[2].splitlines()[1:]
    assert [line.split()[0] for line in lines] == [name for name in OPS for _ in range(2)]
    for line in lines:
        if wrong and line.split()[0] == "lora_linear":
            assert "wrong: not timed" in line and "PyTorch" not in line
        else:
            assert "right" in line and "plain PyTorch (" in line


def test_pictures_are_drawn_where_the_rows_are_enough_for_them(tmp_path):
    def row(shape, provider, roof=1.5, op="lora_linear"):
        return Row(op, shape, "float32", "inference", provider, 100.0, 0.05, 1.2, roof)

    where = {"device": "a CPU", "torch": "2", "commit": "c", "date": "d"}
    one = [row("M=4 K=8 N=8 R=2", name) for name in ("floor", "plain", "ours")]
    assert draw_all(tmp_path / "one.png", one, where) == [tmp_path / "one.png", tmp_path / "one-roof.png"]
    assert draw_all(tmp_path / "no.png", [dataclasses.replace(r, over_roof=None) for r in one], where) == [
        tmp_path / "no.png"
    ]
    assert draw_all(tmp_path / "nothing.png", [], where) == []
    swept = [row(f"M={m} K=8 N=8 R=2", name) for m in (4, 8, 64) for name in ("floor", "ours")]
    swept += [row(f"M=64 K=8 N=8 R=2 G={g}", "ours", op="multi_lora_linear") for g in (1, 8, 64)]
    files = draw_all(tmp_path / "swept.png", swept, where)
    assert [file.stem for file in files] == ["swept", "swept-roof", "swept-sweeps"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files)
