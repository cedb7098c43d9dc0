"""`lrk tune`: what is wrong is refused, what is slow is not chosen, a tie changes nothing, and `auto` follows."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import functional, tuned
from lowrank_kernels.bench import Problem, Row, timing
from lowrank_kernels.bench.cases import tunables
from lowrank_kernels.bench.tune import MARGIN, RULE, Settled, decide, settle, shapes, tune, words
from lowrank_kernels.cli import main
from lowrank_kernels.kernels.block_sparse_tiles import block_grad_tiles
from lowrank_kernels.kernels.lora_tiles import lora_tiles
from lowrank_kernels.kernels.target import TARGETS
from lowrank_kernels.ops import backend
from lowrank_kernels.ops import lora as lora_op
from lowrank_kernels.ops.dora import DoRAWeightNorm
from lowrank_kernels.ops.examples import EXAMPLES
from lowrank_kernels.ops.planning import plan
from tests.tolerance import GRADIENT_FACTOR, assert_as_exact_as_eager

CPU = torch.device("cpu")
LORA = tunables("cpu")["lora_linear"]
PROBLEM = Problem({"M": 9, "K": 64, "N": 96, "R": 4}, torch.float32, False)
KEY = "lora_linear float32 M=16 K=64 N=128"
OWN, LIBRARY, REFERENCE, EAGER = {"base": "own"}, {"base": "library"}, {"backend": "reference"}, {"eager": True}
PLANS = {words(fields): fields for fields in ({}, OWN, LIBRARY, REFERENCE, EAGER)}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Where the table of this test is; what is read of it is forgotten afterwards."""
    path = tmp_path / "tune.json"
    monkeypatch.setenv(tuned.FLAG, str(path))
    tuned.forget()
    yield path
    tuned.forget()


def write(path, plans, **changes):
    entries = {key: {"plan": fields} for key, fields in plans.items()}
    tuned.write_table(path, {"cpu": {"conditions": tuned.conditions("cpu") | changes, "entries": entries}})
    tuned.forget()


class Clock:
    """A clock that every look at it moves by a millisecond, and that stands still otherwise."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 0.001
        return self.now

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """What measured calls are timed by: each takes a millisecond, and what it lets pass itself."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


# ---------------------------------------------------------------------------------------------------------- deciding


def row(provider, ratio=None, spread=0.01, reason=""):
    return Row("lora_linear", "M=9", "float32", "inference", provider, None, spread, ratio, reason=reason)


@pytest.mark.parametrize(
    ("rows", "choice"),
    [
        ([row(RULE, 1.0), row("base=own", 0.9)], "base=own"),
        ([row(RULE, 1.0), row("base=own", 1.0 - MARGIN / 2)], RULE),
        ([row(RULE, 1.0), row("base=own", 0.9, spread=0.2)], RULE),
        ([row(RULE, 0.9), row("base=own", 1.0)], RULE),
        ([row(RULE, 1.0), row("base=own", reason="wrong: not timed")], RULE),
        ([row(RULE, reason="wrong: not timed"), row("base=own", 1.5)], "base=own"),
        ([row("plain", 1.0), row(RULE, 1.5), row("backend=reference", 1.0)], "backend=reference"),
    ],
)
def test_what_is_chosen(rows, choice):
    ratio = {r.provider: (r.over_floor, r.spread) for r in rows}
    found = decide(rows, lambda name: (ratio[name][0] / ratio[RULE][0], ratio[name][1]), PLANS)
    assert found.plan == PLANS[choice]
    assert found.over_plain == ratio[choice][0]
    assert set(found.refused) == {r.provider for r in rows if r.reason}


def test_the_best_replaces_the_rules_plan_only_where_it_beats_that_in_turns():
    rows = [row(RULE, 1.0), row("base=own", 0.6), row("backend=reference", 0.9)]
    asked = []
    assert decide(rows, lambda name: asked.append(name) or (0.99, 0.001), PLANS).plan == {}
    assert decide(rows, lambda name: (0.95, 0.001), PLANS).plan == OWN and asked == ["base=own"]


def test_a_tie_does_not_keep_what_loses_to_plain_pytorch():
    tie = lambda name: (1.0, 0.5)  # noqa: E731
    for rule, eager, fields in [(1.2, 0.95, EAGER), (1.02, 0.95, {}), (1.3, 1.2, {})]:
        rows = [row("plain", 1.0), row(RULE, rule), row("eager=True", eager)]
        assert decide(rows, tie, PLANS).plan == fields


def test_nothing_right_is_no_choice():
    with pytest.raises(ValueError, match="every candidate was refused"):
        decide([row("plain", 1.0), row(RULE, reason="wrong: not timed")], pytest.fail, PLANS)


def test_losing_to_plain_pytorch_is_said():
    slow, noisy = (decide([row(RULE, 1.2, spread=spread)], pytest.fail, PLANS) for spread in (0.01, 0.3))
    assert slow.slower_than_plain and not noisy.slower_than_plain


def test_a_wrong_candidate_is_refused_and_a_slow_one_is_not_chosen(clock):
    def run(name, op):
        if name == "base=own":
            return lambda inputs: op(inputs) * 1.01  # wrong, and the fastest

        def slowed(inputs):
            clock.pass_(0.0 if name == "backend=reference" else 0.003)
            return op(inputs)

        return slowed

    found = settle(LORA, PROBLEM, 0.05, CPU, run)
    assert found.plan == REFERENCE
    assert found.refused == {"base=own": "wrong: not timed"}
    assert found.over_plain == pytest.approx(1.0) and found.rule_over_plain == pytest.approx(4.0)


@pytest.mark.parametrize("op", list(tunables("cpu")))
def test_every_candidate_of_every_op_is_right_here(op):
    tunable = tunables("cpu")[op]
    sizes = {"M": 9, "K": 64, "N": 96, "R": 4, "G": 3, "blocks": 3, "size": 32, "E": 100}
    shape = {name: sizes[name] for name in shapes(tunable, "cpu")[0]}
    for dtype in (torch.float32, torch.bfloat16):
        assert not settle(tunable, Problem(shape, dtype, tunable.training), 0.0, CPU).refused


def lora_fields():
    return tuned.settled("lora_linear", "cpu", torch.float32, {"M": 9, "K": 64, "N": 96})[0]


def test_a_candidate_is_what_runs():
    seen = {}

    def run(name, op):
        def call(inputs):
            y = op(inputs)
            seen[name] = lora_fields()
            return y

        return call

    settle(LORA, PROBLEM, 0.0, CPU, run)
    assert seen == {words(fields): fields for fields in ({}, *LORA.candidates)}
    assert lora_fields() == {}  # and not after it


# ------------------------------------------------------------------------------------------------------- the command


def counted(log):
    def settle(tunable, problem, seconds, device):
        log.append(tunable.key(problem))
        if problem.shape["M"] == 4:
            raise ValueError("every candidate was refused")
        return Settled(OWN, 0.5, 0.01, 1.0)

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
        "lora_linear float32 M=1 K=64 N=128": None,
        KEY: None,
    }
    assert not log and not table.exists()


def test_a_table_of_other_conditions_is_started_anew_and_other_devices_stay(table):
    write(table, {"lora_linear float32 M=1 K=64 N=128": LIBRARY}, torch="1.0")
    other = {"conditions": {"device": "a GPU"}, "entries": {}}
    tuned.write_table(table, json.loads(table.read_text()) | {"cuda": other})
    dict(tune(table, work(9), 0.0, 60.0, CPU, settle=counted([])))
    found = json.loads(table.read_text())
    assert list(found["cpu"]["entries"]) == [KEY] and found["cuda"] == other
    assert found["cpu"]["conditions"] == tuned.conditions("cpu")


def test_an_op_that_is_not_there_is_refused(table, capsys):
    assert main(["tune", "--op", "lora_linear", "--op", "nothing", "--dtypes", "float32", "--seconds", "0"]) == 2
    assert "--op: expected some of lora_linear" in capsys.readouterr().err


def test_the_command_writes_a_table_that_doctor_knows_of(table, capsys):
    arguments = ["--op", "merge_lora_", "--dtypes", "float32", "--seconds", "0", "--shapes", "K=64,N=96,R=4"]
    assert main(["tune", *arguments]) == 0
    out = capsys.readouterr().out
    assert "merge_lora_ float32 K=64 N=128 R=4" in out and "1 classes settled now" in out
    assert tuned.describe("cpu").startswith(f"{table}: 1 classes of shapes")
    assert main(["doctor"]) == 0 and str(table) in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- the lookup


def test_a_class_holds_sizes_up_to_a_power_of_two():
    sizes = [tuned.shape_class("op", torch.bfloat16, {"M": M}) for M in (0, 1, 2, 3, 4, 5, 8, 9)]
    assert sizes == [f"op bfloat16 M={M}" for M in (0, 1, 2, 4, 4, 8, 8, 16)]


@pytest.fixture
def tensors():
    """x, W, A, B of PROBLEM."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*size, generator=generator) for size in ((9, 64), (96, 64), (4, 64), (96, 4)))


@pytest.fixture
def references(monkeypatch):
    """A list that grows with each call of the reference."""
    calls = []
    reference = lora_op.lora_linear_ref
    monkeypatch.setattr(lora_op, "lora_linear_ref", lambda *a, **k: calls.append("ref") or reference(*a, **k))
    return calls


def test_auto_runs_the_backend_that_the_table_names(table, tensors, references):
    lk.lora_linear(*tensors)
    assert references == []
    write(table, {KEY: REFERENCE})
    y = lk.lora_linear(*tensors)
    assert references == ["ref"]
    assert torch.equal(y, lk.lora_linear(*tensors, backend="reference"))


def test_a_backend_that_the_call_names_wins_over_the_table(table, tensors, references):
    write(table, {KEY: REFERENCE})
    lk.lora_linear(*tensors, backend="cpu")
    assert references == []


def test_an_entry_is_of_its_own_class_of_shapes_alone(table, tensors, references):
    write(table, {KEY: REFERENCE})
    x, *others = tensors
    lk.lora_linear(x[:1], *others)
    assert references == []


def base_of(x, w, a, b):
    call = lora_op.LoRALinear(x, w, a, b, None, None, 1.0, 0.0, None, False, "auto")
    return plan("lora_linear", call).base


@pytest.mark.parametrize("fields", [OWN, LIBRARY, {"base": "of the future"}])
def test_auto_takes_the_product_that_the_table_names(fields, table, tensors):
    y, rule = lk.lora_linear(*tensors), base_of(*tensors)
    write(table, {KEY: fields})
    assert base_of(*tensors) == (rule if fields["base"] == "of the future" else fields["base"])
    torch.testing.assert_close(lk.lora_linear(*tensors), y)


def test_eager_in_the_table_goes_past_the_op(table, tensors, monkeypatch):
    x, w, a, b = tensors
    gate, bias = torch.rand(4), torch.randn(96)
    y = lk.lora_linear(x, w, a, b)
    write(table, {KEY: EAGER})
    monkeypatch.setattr(functional, "call_lora_linear", pytest.fail)
    torch.testing.assert_close(lk.lora_linear(x, w, a, b), y)
    gated = lk.lora_linear(x[None], w, a, b, bias, gate=gate, scaling=2.0)
    exact = lk.reference.lora_linear_ref(x[None], w, a, b, bias, gate=gate, scaling=2.0)[0]
    torch.testing.assert_close(gated, exact)


@pytest.mark.parametrize("fields", [OWN, LIBRARY])
def test_the_backward_takes_the_product_that_the_table_names(fields, table, tensors):
    x, w, a, b = tensors
    write(table, {KEY.replace("linear", "linear_backward"): fields})
    call = EXAMPLES["lora_linear"].call(PROBLEM.shape, torch.float32, CPU, backward=True)
    assert plan("lora_linear_backward", call).base == fields["base"]
    (grad,) = torch.autograd.grad(lk.lora_linear(x.requires_grad_(), w, a, b).sum(), x)
    torch.testing.assert_close(grad, (w + b @ a).sum(0).expand(9, 64))


def test_the_extensions_product_takes_adjacent_columns_alone_whatever_the_table_says(table, tensors):
    x, w, a, b = tensors
    write(table, {KEY: OWN})
    assert base_of(x, w.T.contiguous().T, a, b) == "library"


STEP = KEY.replace("linear", "linear_backward")
FACTORS = ("x", "lora_a", "lora_b", "bias", "gate")


def operands(dtype=torch.float32, other=torch.float32, trained=()):
    """Of PROBLEM's class; the factors, bias and gate in another dtype."""
    sizes = {"x": (3, 3, 64), "weight": (96, 64), "lora_a": (4, 64), "lora_b": (96, 4), "bias": (96,), "gate": (4,)}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(size, generator=generator)
        .to(dtype if name in ("x", "weight") else other)
        .requires_grad_(name in trained)
        for name, size in sizes.items()
    }


@pytest.fixture
def runs_eager(monkeypatch):
    """Whether a call goes past the op."""
    went = []
    monkeypatch.setattr(
        functional, "lora_linear_eager", lambda *a: went.append("eager") or lora_op.lora_linear_eager(*a)
    )
    call = functional.call_lora_linear
    monkeypatch.setattr(functional, "call_lora_linear", lambda *a, **k: went.append("op") or call(*a, **k))

    def runs(**given):
        went.clear()
        lk.lora_linear(**given)
        return went == ["eager"]

    return runs


@pytest.mark.parametrize("trained", FACTORS)
def test_a_call_that_records_gradients_follows_the_step_and_any_other_the_forward(trained, table, runs_eager):
    frozen, training = operands(), operands(trained=(trained,))
    for plans in ({KEY: EAGER}, {STEP: EAGER}, {KEY: EAGER, STEP: LIBRARY}):
        write(table, plans)
        assert runs_eager(**training) is (plans.get(STEP) == EAGER)
        assert runs_eager(**frozen) is (plans.get(KEY) == EAGER)
        with torch.no_grad():
            assert runs_eager(**training) is (plans.get(KEY) == EAGER)


def test_what_was_not_measured_never_goes_past_the_op(table, runs_eager):
    write(table, {KEY: EAGER, STEP: EAGER})
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
    write(table, {STEP.replace("float32", str(dtype)[6:]): EAGER})
    monkeypatch.setattr(functional, "call_lora_linear", pytest.fail)
    for name, ours, eager, right in zip(("y", *trained), step(given, lk.lora_linear), rounded, exact, strict=True):
        assert ours.dtype == (dtype if name == "y" else given[name].dtype)
        assert_as_exact_as_eager(ours.view_as(right), eager, right, factor=GRADIENT_FACTOR, what=name)


def test_a_step_of_ours_that_is_slower_than_plain_pytorch_gives_way_to_its_calls(table, monkeypatch, runs_eager, clock):
    call = functional.call_lora_linear
    monkeypatch.setattr(functional, "call_lora_linear", lambda *a, **k: clock.pass_(0.003) or call(*a, **k))
    problem = replace(PROBLEM, training=True)
    found = dict(tune(table, [(tunables("cpu")["lora_linear_backward"], problem)], 0.05, 60.0, CPU))
    assert found[STEP].plan == EAGER
    assert runs_eager(**operands(trained=FACTORS)) and not runs_eager(**operands())


def test_what_is_measured_next_follows_what_was_just_written(table):
    found = {}

    def settle(tunable, problem, seconds, device):
        found[tunable.op] = lora_fields()
        return Settled(EAGER, 1.0, 0.01, 1.0)

    steps = [(tunables("cpu")[op], PROBLEM) for op in ("lora_linear", "lora_linear_backward")]
    dict(tune(table, steps, 0.0, 60.0, CPU, settle=settle))
    assert found == {"lora_linear": {}, "lora_linear_backward": EAGER}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_plain_pytorch_is_a_candidate_for_inference_and_for_training(device_type):
    assert all(EAGER in tunables(device_type)[op].candidates for op in ("lora_linear", "lora_linear_backward"))


def test_auto_takes_the_backend_that_the_table_names_if_it_runs_here(table, monkeypatch):
    call = DoRAWeightNorm(torch.randn(96, 64), torch.randn(4, 64), torch.randn(96, 4), 1.0, None, None, "auto")
    key = "dora_weight_norm float32 K=64 N=128 R=4"
    monkeypatch.setattr(backend, "interpreted", lambda: False)
    rule = plan("dora_weight_norm", call).backend
    for name, runs in {"reference": "reference", "cpu": rule, "triton": rule, "cuda": rule, "auto": rule}.items():
        write(table, {key: {"backend": name}})
        assert plan("dora_weight_norm", call).backend == runs
    write(table, {key: {"backend": "triton"}})
    monkeypatch.setattr(backend, "interpreted", lambda: True)
    assert plan("dora_weight_norm", call).backend == "triton"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ""),
        ("{", "is not a table of lrk tune"),
        ("[]", "is not a table of lrk tune"),
        ('{"version": 2, "cpu": {"conditions": {}, "entries": {"a": {"plan": 3}}}}', "is not a table of lrk tune"),
        ('{"version": 2, "cpu": {"conditions": {}, "entries": {"a": {"plan": {"b": 1.5}}}}}', "is not a table of lrk"),
        (
            '{"cpu": {"conditions": {}, "entries": {"a": {"choice": "own_product"}}}}',
            "is of version 1, here 2: ignored",
        ),
        ({"device": "another"}, "made under other conditions (device another, here"),
        ({"torch": "1.0"}, "made under other conditions (torch 1.0, here"),
        ({"lowrank_kernels": "0.0"}, "made under other conditions (lowrank_kernels 0.0, here"),
    ],
)
def test_a_table_that_is_none_or_foreign_is_ignored_with_one_line(content, words, table, caplog):
    if isinstance(content, dict):
        write(table, {KEY: REFERENCE}, **content)
    elif content is not None:
        table.write_text(content)
    with caplog.at_level(logging.INFO, "lowrank_kernels"):
        for _ in range(3):
            assert lora_fields() == {}
    assert [words in record.getMessage() for record in caplog.records] == ([True] if words else [])
    assert words in tuned.describe("cpu") or "version 1" in words


def test_a_table_of_an_older_version_is_started_anew(table):
    table.write_text('{"cpu": {"conditions": {}, "entries": {"a": {"choice": "own_product"}}}}')
    dict(tune(table, work(9), 0.0, 60.0, CPU, settle=counted([])))
    found = json.loads(table.read_text())
    assert found["version"] == tuned.VERSION and list(found["cpu"]["entries"]) == [KEY]


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


def tiles_of_lora(settled, M=2048, R=16, dropout=False, aligned=True):
    return lora_tiles(TARGETS["sm_90"], M, 4096, 4096, R, torch.bfloat16, dropout, aligned=aligned, settled=settled)


def test_tiles_follow_the_table():
    rule, found = tiles_of_lora({}), tiles_of_lora({"strategy": "two_kernel", "BLOCK_M": 64, "num_warps": 4})
    assert rule.strategy == "library" and found.strategy == "two_kernel"
    assert found.main == replace(rule.main, BLOCK_M=64, num_warps=4) and found.main_dx.BLOCK_M == 64
    assert tiles_of_lora({"strategy": "fused"}).strategy == "fused"


@pytest.mark.parametrize("fields", [EAGER, OWN, {"BLOCK_M": 64}, {"strategy": "of the future", "BLOCK_M": 64}])
def test_what_the_table_says_of_no_strategy_leaves_the_rules(fields):
    assert tiles_of_lora(fields) == tiles_of_lora({})


@pytest.mark.parametrize(
    ("fields", "case"),
    [
        ({"strategy": "fused"}, {"dropout": True}),
        ({"strategy": "fused"}, {"R": 256}),
        ({"strategy": "two_kernel", "BLOCK_M": 64}, {"aligned": False}),
    ],
)
def test_tiles_that_do_not_fit_leave_the_rules(fields, case):
    assert tiles_of_lora(fields, **case) == tiles_of_lora({}, **case)


def test_tiles_of_blocks_follow_the_table():
    def tiles(settled, aligned=True):
        return block_grad_tiles(TARGETS["sm_90"], 8192, 41, 64, 64, torch.bfloat16, aligned=aligned, settled=settled)

    assert tiles({"BLOCK_M": 32, "splits": 1}) == replace(tiles({}), BLOCK_M=32, splits=1)
    assert tiles(REFERENCE) == tiles({}) and tiles({"splits": 1}, aligned=False) == tiles({}, aligned=False)


def tuned_plan(tunable, fields):
    """The plan of a call of a tunable op on an H100, where these fields are forced."""
    sizes = {"M": 512, "K": 4096, "N": 4096, "R": 8, "G": 4, "blocks": 41, "size": 64, "E": 8192}
    op, backward = tunable.op.removesuffix("_backward"), tunable.op.endswith("_backward")
    call = EXAMPLES[op].call(sizes, torch.bfloat16, torch.device("cuda"), backward=backward)
    with tuned.forcing(tunable.op) as force:
        force(fields)
        return plan(tunable.op, call, records=tunable.training, target=TARGETS["sm_90"])


@pytest.mark.parametrize(
    ("tunable", "fields"),
    [(tunable, fields) for tunable in tunables("cuda").values() for fields in tunable.candidates],
    ids=lambda value: value.op if hasattr(value, "op") else words(value),
)
def test_what_may_be_tuned_on_a_gpu_is_what_plans_take(tunable, fields, monkeypatch):
    monkeypatch.setattr(backend._extension, "why_no_cuda", lambda: "")
    assert words(fields) not in (RULE, "plain")
    if fields == EAGER and tunable.training:
        return  # the forward asks: test_a_call_that_records_gradients_follows_the_step_and_any_other_the_forward
    found = tuned_plan(tunable, fields)
    main = getattr(found.tiles, "main", found.tiles)
    for name, value in fields.items():
        holder = found if hasattr(found, name) else found.tiles if name == "strategy" else main
        assert getattr(holder, name) == value
    assert all(set(tunable.sizes) <= set(shape) for shape in shapes(tunable, "cuda"))
