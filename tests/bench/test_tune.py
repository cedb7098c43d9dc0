"""`lrk tune`: what is wrong is refused, what is slow is not chosen, a tie changes nothing, and `auto` follows."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import functional, tuned
from lowrank_kernels.bench import Problem, Row
from lowrank_kernels.bench.tune import MARGIN, RULE, Settled, decide, settle, shapes, tunables, tune
from lowrank_kernels.cli import main
from lowrank_kernels.kernels.block_sparse_tiles import block_grad_tiles
from lowrank_kernels.kernels.lora_tiles import lora_tiles
from lowrank_kernels.kernels.multi_lora_tiles import choose_multi_strategy
from lowrank_kernels.kernels.target import TARGETS
from lowrank_kernels.ops import backend
from lowrank_kernels.ops import lora as lora_op
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

CPU = torch.device("cpu")
LORA = tunables("cpu")["lora_linear"]
PROBLEM = Problem({"M": 9, "K": 64, "N": 96, "R": 4}, torch.float32, False)
KEY = "lora_linear float32 M=16 K=64 N=128"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Where the table of this test is; what is read of it is forgotten afterwards."""
    path = tmp_path / "tune.json"
    monkeypatch.setenv(tuned.FLAG, str(path))
    tuned.forget()
    yield path
    tuned.forget()


def write(path, choices, **changes):
    entries = {key: {"choice": choice} for key, choice in choices.items()}
    tuned.write_table(path, {"cpu": {"conditions": tuned.conditions("cpu") | changes, "entries": entries}})
    tuned.forget()


# ---------------------------------------------------------------------------------------------------------- deciding


def row(provider, ratio=None, spread=0.01, reason=""):
    return Row("lora_linear", "M=9", "float32", "inference", provider, None, spread, ratio, reason=reason)


@pytest.mark.parametrize(
    ("rows", "choice"),
    [
        ([row(RULE, 1.0), row("own_product", 0.9)], "own_product"),
        ([row(RULE, 1.0), row("own_product", 1.0 - MARGIN / 2)], None),
        ([row(RULE, 1.0), row("own_product", 0.9, spread=0.2)], None),
        ([row(RULE, 0.9), row("own_product", 1.0)], None),
        ([row(RULE, 1.0), row("own_product", reason="wrong: not timed")], None),
        ([row(RULE, reason="wrong: not timed"), row("own_product", 1.5)], "own_product"),
        ([row("plain", 1.0), row(RULE, 1.5), row("reference", 1.0)], "reference"),
    ],
)
def test_what_is_chosen(rows, choice):
    ratio = {r.provider: (r.over_floor, r.spread) for r in rows}
    found = decide(rows, lambda name: (ratio[name][0] / ratio[RULE][0], ratio[name][1]))
    assert found.choice == choice
    assert found.over_plain == ratio[choice or RULE][0]
    assert set(found.refused) == {r.provider for r in rows if r.reason}


def test_the_best_replaces_the_rules_choice_only_where_it_beats_that_in_turns():
    rows = [row(RULE, 1.0), row("own_product", 0.6), row("reference", 0.9)]
    asked = []
    assert decide(rows, lambda name: asked.append(name) or (0.99, 0.001)).choice is None
    assert decide(rows, lambda name: (0.95, 0.001)).choice == "own_product" and asked == ["own_product"]


def test_a_tie_does_not_keep_what_loses_to_plain_pytorch():
    tie = lambda name: (1.0, 0.5)  # noqa: E731
    for rule, eager, choice in [(1.2, 0.95, "eager"), (1.02, 0.95, None), (1.3, 1.2, None)]:
        assert decide([row("plain", 1.0), row(RULE, rule), row("eager", eager)], tie).choice == choice


def test_nothing_right_is_no_choice():
    with pytest.raises(ValueError, match="every candidate was refused"):
        decide([row("plain", 1.0), row(RULE, reason="wrong: not timed")], pytest.fail)


def test_losing_to_plain_pytorch_is_said():
    slow, noisy = (decide([row(RULE, 1.2, spread=spread)], pytest.fail) for spread in (0.01, 0.3))
    assert slow.slower_than_plain and not noisy.slower_than_plain


def test_a_wrong_candidate_is_refused_and_a_slow_one_is_not_chosen():
    def run(name, op):
        if name == "own_product":
            return lambda inputs: op(inputs) * 1.01  # wrong, and the fastest

        def slowed(inputs):
            time.sleep(0.0 if name == "reference" else 0.003)
            return op(inputs)

        return slowed

    found = settle(LORA, PROBLEM, 0.05, CPU, run)
    assert found.choice == "reference"
    assert found.refused == {"own_product": "wrong: not timed"}
    assert found.rule_over_plain > 2 * found.over_plain


@pytest.mark.parametrize("op", list(tunables("cpu")))
def test_every_candidate_of_every_op_is_right_here(op):
    tunable = tunables("cpu")[op]
    sizes = {"M": 9, "K": 64, "N": 96, "R": 4, "G": 3, "blocks": 3, "size": 32}
    shape = {name: sizes[name] for name in shapes(tunable, "cpu")[0]}
    for dtype in (torch.float32, torch.bfloat16):
        assert not settle(tunable, Problem(shape, dtype, tunable.training), 0.0, CPU).refused


def test_a_candidate_is_what_runs():
    seen = {}

    def run(name, op):
        def call(inputs):
            y = op(inputs)
            seen[name] = tuned.choice("lora_linear", inputs["x"], dict)
            return y

        return call

    settle(LORA, PROBLEM, 0.0, CPU, run)
    assert seen == {RULE: None, **{name: name for name in LORA.candidates}}
    assert tuned.choice("lora_linear", torch.empty(1), dict) is None  # and not after it


# ------------------------------------------------------------------------------------------------------- the command


def counted(log):
    def settle(tunable, problem, seconds, device):
        log.append(tunable.key(problem))
        if problem.shape["M"] == 4:
            raise ValueError("every candidate was refused")
        return Settled("own_product", 0.5, 0.01, 1.0)

    return settle


def work(*rows):
    return [(LORA, replace(PROBLEM, shape={**PROBLEM.shape, "M": M})) for M in rows]


def test_a_second_run_goes_on_where_the_first_ended(table):
    log = []
    first = dict(tune(table, work(1, 4, 9), 0.0, 60.0, CPU, settle=counted(log)))
    assert len(log) == 3 and first["lora_linear float32 M=4 K=64 N=128"] == "every candidate was refused"
    assert set(json.loads(table.read_text())["cpu"]["entries"]) == {"lora_linear float32 M=1 K=64 N=128", KEY}
    second = dict(tune(table, work(1, 9, 16, 64), 0.0, 60.0, CPU, settle=counted(log)))
    assert list(second) == log[3:] == ["lora_linear float32 M=64 K=64 N=128"]  # 16 is of the class of 9
    assert len(dict(tune(table, work(1, 9), 0.0, 60.0, CPU, again=True, settle=counted(log)))) == 2
    assert len(json.loads(table.read_text())["cpu"]["entries"]) == 3


def test_no_class_is_begun_after_the_time_is_up(table):
    log = []
    assert dict(tune(table, work(1, 9), 0.0, -1.0, CPU, settle=counted(log))) == {
        "lora_linear float32 M=1 K=64 N=128": None, KEY: None,
    }  # fmt: skip
    assert not log and not table.exists()


def test_a_table_of_other_conditions_is_started_anew_and_other_devices_stay(table):
    write(table, {"lora_linear float32 M=1 K=64 N=128": "library_product"}, torch="1.0")
    other = {"conditions": {"device": "a GPU"}, "entries": {}}
    tuned.write_table(table, json.loads(table.read_text()) | {"cuda": other})
    dict(tune(table, work(9), 0.0, 60.0, CPU, settle=counted([])))
    found = json.loads(table.read_text())
    assert list(found["cpu"]["entries"]) == [KEY] and found["cuda"] == other
    assert found["cpu"]["conditions"] == tuned.conditions("cpu")


def test_the_command_writes_a_table_that_doctor_knows_of(table, capsys):
    arguments = ["tune", "--op", "merge_lora_", "--op", "lora_linear", "--dtypes", "float32", "--seconds", "0"]
    assert main([*arguments, "--op", "nothing"]) == 2
    assert "--op: expected some of lora_linear" in capsys.readouterr().err
    assert main([*arguments[:3], *arguments[5:], "--shapes", "K=64,N=96,R=4"]) == 0
    out = capsys.readouterr().out
    assert "merge_lora_ float32 K=64 N=128 R=4" in out and "1 classes settled now" in out
    assert tuned.describe("cpu").startswith(f"{table}: 1 classes of shapes")
    assert main(["doctor"]) == 0 and str(table) in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the lookup


def test_a_class_holds_sizes_up_to_a_power_of_two():
    sizes = [tuned.shape_class("op", torch.bfloat16, {"M": M}) for M in (0, 1, 2, 3, 4, 5, 8, 9)]
    assert sizes == [f"op bfloat16 M={M}" for M in (0, 1, 2, 4, 4, 8, 8, 16)]


def test_auto_follows_the_table(table, monkeypatch):
    calls = []
    monkeypatch.setattr(lora_op, "lora_linear_ref", lambda *a, **k: calls.append("ref") or _reference(*a, **k))
    _reference = lk.reference.lora_linear_ref
    x, w, a, b = torch.randn(9, 64), torch.randn(96, 64), torch.randn(4, 64), torch.randn(96, 4)
    lk.lora_linear(x, w, a, b)
    rule = lora_op.own_product(x, w)
    write(table, {KEY: "reference"})
    y = lk.lora_linear(x, w, a, b)
    assert calls == ["ref"] and torch.equal(y, lk.lora_linear(x, w, a, b, backend="reference"))
    lk.lora_linear(x, w, a, b, backend="cpu")  # a name is a name
    lk.lora_linear(x[:1], w, a, b)  # another class of shapes
    assert len(calls) == 2
    for choice, own in {"own_product": True, "library_product": False, "of the future": rule}.items():
        write(table, {KEY: choice.replace(" ", "_")})
        assert lora_op.own_product(x, w) is own
        torch.testing.assert_close(lk.lora_linear(x, w, a, b), y)
    write(table, {KEY: "eager"})
    gate, bias = torch.rand(4), torch.randn(96)
    with monkeypatch.context() as patch:
        patch.setattr(functional, "call_lora_linear", pytest.fail)
        torch.testing.assert_close(lk.lora_linear(x, w, a, b), y)
        gated = lk.lora_linear(x[None], w, a, b, bias, gate=gate, scaling=2.0)
    torch.testing.assert_close(gated, _reference(x[None], w, a, b, bias, gate=gate, scaling=2.0)[0])
    for choice in ("own_product", "library_product"):
        write(table, {KEY.replace("linear", "linear_backward"): choice})
        assert lora_op.own_grad_product(torch.empty(9, 96), w) is (choice == "own_product")
        own = torch.autograd.grad(lk.lora_linear(x.requires_grad_(), w, a, b).sum(), x)
        torch.testing.assert_close(own[0], (w + b @ a).sum(0).expand(9, 64))
    x = x.detach()
    write(table, {KEY: "own_product"})
    assert not lora_op.own_product(x, w.T.contiguous().T)  # the extension's product takes adjacent columns alone


STEP = KEY.replace("linear", "linear_backward")
FACTORS = ("x", "lora_a", "lora_b", "bias", "gate")


def operands(dtype=torch.float32, other=torch.float32, trained=()):
    """Of PROBLEM's class; the factors, bias and gate in another dtype."""
    sizes = {"x": (3, 3, 64), "weight": (96, 64), "lora_a": (4, 64), "lora_b": (96, 4), "bias": (96,), "gate": (4,)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(size, generator=generator).to(dtype if name in ("x", "weight") else other)
        .requires_grad_(name in trained)
        for name, size in sizes.items()
    }  # fmt: skip


@pytest.fixture
def runs_eager(monkeypatch):
    """Whether a call goes past the op."""
    went = []
    monkeypatch.setattr(
        functional, "lora_linear_eager", lambda *a: went.append("eager") or lora_op.lora_linear_eager(*a)
    )
    call = functional.call_lora_linear
    monkeypatch.setattr(functional, "call_lora_linear", lambda *a: went.append("op") or call(*a))

    def runs(**given):
        went.clear()
        lk.lora_linear(**given)
        return went == ["eager"]

    return runs


@pytest.mark.parametrize("trained", FACTORS)
def test_a_call_that_records_gradients_follows_the_step_and_any_other_the_forward(trained, table, runs_eager):
    frozen, training = operands(), operands(trained=(trained,))
    for choices in ({KEY: "eager"}, {STEP: "eager"}, {KEY: "eager", STEP: "library_product"}):
        write(table, choices)
        assert runs_eager(**training) is (choices.get(STEP) == "eager")
        assert runs_eager(**frozen) is (choices.get(KEY) == "eager")
        with torch.no_grad():
            assert runs_eager(**training) is (choices.get(KEY) == "eager")


def test_what_was_not_measured_never_goes_past_the_op(table, runs_eager):
    write(table, {KEY: "eager", STEP: "eager"})
    for given in (operands(), operands(trained=FACTORS)):
        assert runs_eager(**given)
        assert not runs_eager(**given, dropout_p=0.5) and not runs_eager(**given, backend="cpu")
        assert not runs_eager(**(given | {"x": given["x"][:1]}))  # another class
        with torch.autocast("cpu"):
            assert not runs_eager(**given)


@pytest.mark.parametrize("trained", [FACTORS, ("x",), ("lora_b",), ("lora_a", "gate")], ids="-".join)
@pytest.mark.parametrize(
    ("dtype", "other"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_gradients_past_the_op_are_those_of_the_formula(dtype, other, trained, table, monkeypatch):
    grad_y = torch.linspace(-1.0, 1.0, 9 * 96).view(3, 3, 96)

    def step(given, formula):
        y = formula(**given, scaling=0.7)
        return [y, *torch.autograd.grad(y, [given[name] for name in trained], grad_y.view_as(y).to(y.dtype))]

    def reference(x, **rest):
        return lk.reference.lora_linear_ref(x.flatten(0, 1), **rest)[0]

    given = operands(dtype, other, trained)
    exact = step({name: t.detach().double().requires_grad_(name in trained) for name, t in given.items()}, reference)
    rounded = step(given, reference)
    write(table, {STEP.replace("float32", str(dtype)[6:]): "eager"})
    monkeypatch.setattr(functional, "call_lora_linear", pytest.fail)
    for name, ours, eager, right in zip(("y", *trained), step(given, lk.lora_linear), rounded, exact, strict=True):
        assert ours.dtype == (dtype if name == "y" else given[name].dtype)
        assert_as_exact_as_eager(ours.view_as(right), eager, right, factor=GRADIENT_FACTOR, what=name)


def test_a_step_of_ours_that_is_slower_than_plain_pytorch_gives_way_to_its_calls(table, monkeypatch, runs_eager):
    call = functional.call_lora_linear
    monkeypatch.setattr(functional, "call_lora_linear", lambda *a: time.sleep(0.003) or call(*a))
    problem = replace(PROBLEM, training=True)
    assert (
        dict(tune(table, [(tunables("cpu")["lora_linear_backward"], problem)], 0.05, 60.0, CPU))[STEP].choice == "eager"
    )
    assert runs_eager(**operands(trained=FACTORS)) and not runs_eager(**operands())


def test_what_is_measured_next_follows_what_was_just_written(table):
    found = {}

    def settle(tunable, problem, seconds, device):
        found[tunable.op] = tuned.choice("lora_linear", torch.empty(1), tuned.product_sizes, (9, 64), (96, 64))
        return Settled("eager", 1.0, 0.01, 1.0)

    steps = [(tunables("cpu")[op], PROBLEM) for op in ("lora_linear", "lora_linear_backward")]
    dict(tune(table, steps, 0.0, 60.0, CPU, settle=settle))
    assert found == {"lora_linear": None, "lora_linear_backward": "eager"}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_plain_pytorch_is_a_candidate_for_inference_and_for_training(device_type):
    assert all("eager" in tunables(device_type)[op].candidates for op in ("lora_linear", "lora_linear_backward"))


def test_auto_takes_the_backend_that_the_table_names_if_it_runs_here(table, monkeypatch):
    weight = torch.randn(96, 64)
    resolve = lambda: backend.resolve_backend("dora_weight_norm", "auto", weight, lambda: {"K": 64, "N": 96, "R": 4})  # noqa: E731
    monkeypatch.setattr(backend, "_interpreted", lambda: False)
    rule = resolve()
    for choice, runs in {"reference": "reference", "cpu": rule, "triton": rule, "cuda": rule, "auto": rule}.items():
        write(table, {"dora_weight_norm float32 K=64 N=128 R=4": choice})
        assert resolve() == runs
    write(table, {"dora_weight_norm float32 K=64 N=128 R=4": "triton"})
    monkeypatch.setattr(backend, "_interpreted", lambda: True)
    assert resolve() == "triton"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ""),
        ("{", "is not a table of lrk tune"),
        ("[]", "is not a table of lrk tune"),
        ('{"cpu": {"conditions": {}, "entries": {"a": {"choice": 3}}}}', "is not a table of lrk tune"),
        ('{"cpu": {"conditions": {}, "entries": {"a": {"choice": "x; y"}}}}', "is not a table of lrk tune"),
        ({"device": "another"}, "made under other conditions (device another, here"),
        ({"torch": "1.0"}, "made under other conditions (torch 1.0, here"),
        ({"lowrank_kernels": "0.0"}, "made under other conditions (lowrank_kernels 0.0, here"),
    ],
)
def test_a_table_that_is_none_or_foreign_is_ignored_with_one_line(content, words, table, caplog):
    if isinstance(content, dict):
        write(table, {KEY: "reference"}, **content)
    elif content is not None:
        table.write_text(content)
    x = torch.empty(9, 64)
    with caplog.at_level(logging.INFO, "lowrank_kernels"):
        for _ in range(3):
            assert tuned.choice("lora_linear", x, lambda: {"M": 9, "K": 64, "N": 96}) is None
    assert [words in record.getMessage() for record in caplog.records] == ([True] if words else [])
    assert words in tuned.describe("cpu")


def test_an_import_reads_no_table(tmp_path):
    (tmp_path / "tune.json").write_text("{")
    script = (
        "import lowrank_kernels as lk, torch; from lowrank_kernels import tuned;"
        "assert not tuned._table.cache_info().currsize;"
        "lk.lora_linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1))"
    )
    environment = {**os.environ, tuned.FLAG: str(tmp_path / "tune.json")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("is not a table of lrk tune") == 1


def test_where_the_table_is(monkeypatch):
    monkeypatch.setenv(tuned.FLAG, "")
    assert tuned.table_path() is None
    monkeypatch.delenv(tuned.FLAG)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(tuned.table_path()) == "/somewhere/lowrank_kernels/tune.json"


# ----------------------------------------------------------------------------------------------------- tiles of a GPU


def test_tiles_follow_the_table_where_it_fits():
    target = TARGETS["sm_90"]

    def tiles(chosen, M=2048, R=16, dropout=False, aligned=True):
        return lora_tiles(target, M, 4096, 4096, R, torch.bfloat16, dropout, aligned=aligned, chosen=chosen)

    rule = tiles(None)
    found = tiles("two_kernel BLOCK_M=64 num_warps=4")
    assert rule.strategy == "library" and found.strategy == "two_kernel"
    assert found.main == replace(rule.main, BLOCK_M=64, num_warps=4) and found.main_dx.BLOCK_M == 64
    assert tiles("fused").strategy == "fused" and tiles("eager") == rule
    assert tiles("own_product") == rule and tiles("fused", dropout=True) == tiles(None, dropout=True)
    assert tiles("fused", R=256) == tiles(None, R=256)
    assert tiles("two_kernel BLOCK_M=64", aligned=False) == tiles(None, aligned=False)


def test_tiles_of_blocks_follow_the_table():
    def tiles(chosen, aligned=True):
        return block_grad_tiles(TARGETS["sm_90"], 8192, 41, 64, 64, torch.bfloat16, aligned, chosen)

    assert tiles("tiles BLOCK_M=32 splits=1") == replace(tiles(None), BLOCK_M=32, splits=1)
    assert tiles("reference") == tiles(None) and tiles("tiles splits=1", aligned=False) == tiles(None, aligned=False)


def test_what_may_be_tuned_on_a_gpu_is_what_the_tile_rules_take():
    for tunable in tunables("cuda").values():
        for candidate in tunable.candidates:
            name, changes = tuned.parse(candidate)
            assert name not in (RULE, "plain")
            if name in (*backend.BACKENDS, "eager") or candidate == "no_clusters":
                assert not changes
            elif tunable.op == "multi_lora_linear":
                assert choose_multi_strategy(TARGETS["sm_90"], 64, 512, 512, 8, 4, torch.bfloat16, True, name) == name
            elif tunable.op.startswith(("lora", "dora_linear")):
                found = lora_tiles(TARGETS["sm_90"], 2048, 4096, 4096, 16, torch.bfloat16, False, chosen=candidate)
                assert found.strategy == name and all(getattr(found.main, k) == v for k, v in changes.items())
            else:
                assert name == "tiles"
                tiles = block_grad_tiles(TARGETS["sm_90"], 8192, 41, 64, 64, torch.bfloat16, True, candidate)
                assert all(getattr(tiles, k) == v for k, v in changes.items())
        assert all(set(tunable.sizes) <= set(shape) for shape in shapes(tunable, "cuda"))
