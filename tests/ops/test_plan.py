"""A plan says what really runs: over ops, shapes, dtypes, inference and steps, with a table and without one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lowrank_kernels as lk
from lowrank_kernels import _extension, functional, tuned, weights
from lowrank_kernels.cli import main
from lowrank_kernels.cpp import cpp
from lowrank_kernels.ops import block_sparse, dora, lora, merge, multi_lora
from lowrank_kernels.ops.planning import Meta, Plan, plan

_extension.require("lora_linear_inference")
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = [
    {"M": M, "K": K, "N": N, "R": R}
    for M, K, N, R in ((1, 64, 48, 4), (16, 64, 48, 70), (200, 33, 49, 7), (0, 8, 8, 2))
]
TABLES: dict[str, tuned.Fields | None] = {
    "no table": None,
    "own": {"base": "own"},
    "library": {"base": "library"},
    "reference": {"backend": "reference"},
    "eager": {"eager": True},
}
OPS_OF_EXTENSION = (
    "block_grad_",
    "dora_backward",
    "dora_column_scale_remembering",
    "dora_down_grad",
    "dora_linear_fused",
    "dora_linear_remembering",
    "dora_norm",
    "dora_scale_grad",
    "dora_up_",
    "frozen_product",
    "frozen_product_coded",
    "lora_backward",
    "lora_backward_coded",
    "lora_down",
    "lora_down_grad",
    "lora_grad",
    "lora_grad_x",
    "lora_grad_x_coded",
    "lora_linear_fused",
    "lora_linear_inference",
    "lora_linear_coded",
    "lora_up_",
    "merge_rows_",
    "multi_lora_add_",
    "multi_lora_down",
    "multi_lora_grad",
    "multi_lora_linear_inference",
    "multi_lora_up_",
)
OWN_BASE = {
    "dora_linear_fused",
    "dora_linear_remembering",
    "frozen_product",
    "lora_linear_fused",
    "lora_linear_inference",
    "multi_lora_linear_inference",
}


class Ran:
    """What ran since the last :meth:`again`, by name: ops of the extension, products with W, references, our ops."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def again(self) -> None:
        self.names.clear()

    def any(self, *names: str) -> bool:
        return any(name in self.names for name in names)

    @property
    def reference(self) -> bool:
        return any(name.endswith(("_ref", "_ref_")) for name in self.names)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    found = Ran()

    def watch(holder: Any, name: str, said: str | None = None) -> None:
        function = getattr(holder, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            found.names.append(said or name)
            return function(*args, **kwargs)

        monkeypatch.setattr(holder, name, watched)

    for name in OPS_OF_EXTENSION:
        watch(cpp, name)
    for name in ("product", "grad_product"):
        watch(weights._dense, name)
    for module in (lora, dora, multi_lora, merge, block_sparse):
        for name in [name for name in vars(module) if name.endswith(("_ref", "_ref_"))]:
            watch(module, name)
    watch(functional, "lora_linear_eager")
    for name in ("call_lora_linear", "call_dora_linear", "call_multi_lora_linear"):
        watch(functional, name)
    return found


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """The plan's fields for every class of every op here; the lookup itself is tested in tests/bench/test_tune.py."""
    fields = TABLES[request.param]
    if fields is None:
        yield
        return
    ops = ("lora_linear", "dora_linear", "multi_lora_linear", "dora_weight_norm", "block_sparse_weight_grad")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            tuned, "settled", lambda op, *of: (fields if op.removesuffix("_backward") in ops else {}, "table")
        )
        tuned.forget()
        yield
    tuned.forget()


def operands(s: dict[str, int], dtype: torch.dtype, training: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((s["M"], s["K"]), (s["N"], s["K"]), (s["R"], s["K"]), (s["N"], s["R"]))
    x, w, a, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    return x.requires_grad_(training), w, a.requires_grad_(training), b.requires_grad_(training)


def agrees_with_forward(made: Plan, ran: Ran) -> None:
    """Backend and who made which product of x Wᵀ + s P Bᵀ."""
    assert ran.reference == (made.backend == "reference" and not made.eager)
    assert made.backend in ("reference", "cpu")
    if made.backend != "cpu" or made.eager:
        return
    own = ran.any(*OWN_BASE)
    assert own == (made.base == "own") and ran.any("product") == (made.base == "library")
    if made.op != "multi_lora_linear":
        assert (own or ran.any("lora_down")) == (made.down == "own")
        assert (own or ran.any("lora_up_", "dora_up_")) == (made.up == "own")


def agrees_with_backward(made: Plan, ran: Ran) -> None:
    assert ran.reference == (made.backend == "reference")
    if made.backend != "cpu":
        return
    whole = ran.any("lora_backward", "dora_backward")  # all products in one call
    assert (whole or ran.any("lora_grad_x")) == (made.base == "own")
    assert ran.any("grad_product") == (made.base == "library")
    if made.op != "multi_lora_linear":
        assert (whole or ran.any("lora_down_grad", "dora_down_grad", "lora_down")) == (made.down == "own")
        assert (whole or ran.any("lora_grad_x", "lora_up_")) == (made.up == "own")
        assert (whole or ran.any("lora_grad")) == (made.grad == "own")


def step(y: Tensor, ran: Ran) -> None:
    ran.again()
    y.backward(torch.ones_like(y))


GRID = pytest.mark.parametrize("training", [False, True], ids=["inference", "step"])


@GRID
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("table")
def test_lora(sizes: dict[str, int], dtype: torch.dtype, training: bool, ran: Ran) -> None:
    x, w, a, b = operands(sizes, dtype, training)
    made = plan("lora_linear", lora.LoRALinear(x, w, a, b, None, None, 1.0, 0.0, None, False, "auto"), records=training)
    y = lk.lora_linear(x, w, a, b)
    assert ran.any("lora_linear_eager") == made.eager
    assert ran.any("call_lora_linear") == (not made.eager and not made.direct)
    agrees_with_forward(made, ran)
    if training and not made.eager:
        step(y, ran)
        p = a.detach()[:, :1].T.expand(len(x), sizes["R"])
        needs = (True, True, True, False, False)
        call = lora.LoRALinearBackward(torch.ones_like(y), x, w, a, b, None, p, 1.0, 0.0, None, needs, "auto")
        agrees_with_backward(plan("lora_linear_backward", call), ran)


@GRID
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("table")
def test_dora(sizes: dict[str, int], dtype: torch.dtype, dropout_p: float, training: bool, ran: Ran) -> None:
    x, w, a, b = operands(sizes, dtype, training)
    m = torch.rand(sizes["N"])
    rest = (None, None, None, None, 1.0, dropout_p, None, False, True, training, "auto")
    made = plan("dora_linear", dora.DoRALinear(x, w, a, b, m, *rest), records=training)
    y = lk.dora_linear(x, w, a, b, m, dropout_p=dropout_p, dropout_seed=1)
    assert ran.any("call_dora_linear") == (not made.direct)
    agrees_with_forward(made, ran)
    assert ran.any("dora_linear_fused") == (made.norm == "inside")
    assert ran.any("dora_norm") == (made.norm != "inside" and made.norm.backend == "cpu")
    if training:
        step(y, ran)
        n, needs = torch.ones(sizes["N"]), (True, True, True, False, False)
        dy = torch.ones_like(y)
        call = dora.DoRALinearBackward(
            dy, x, w, a, b, n, n, dy, None, 1.0, dropout_p, None, False, True, needs, m.dtype, "auto"
        )
        agrees_with_backward(plan("dora_linear_backward", call), ran)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("table")
def test_dora_in_evaluation(sizes: dict[str, int], dtype: torch.dtype, ran: Ran) -> None:
    x, w, a, b = operands(sizes, dtype, False)
    m, cache = torch.rand(sizes["N"]), functional.ScaleCache()
    rest = (None, None, None, None, 1.0, 0.0, None, False, True, False, "auto")
    made = plan("dora_linear", dora.DoRALinear(x, w, a, b, m, *rest))
    lk.dora_linear(x, w, a, b, m, scale_cache=cache)
    assert ran.any("dora_linear_remembering", "dora_column_scale_remembering") == made.remembers
    assert ran.any("call_dora_linear") == (not made.remembers)
    agrees_with_forward(made, ran)


@GRID
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.usefixtures("table")
def test_many_adapters(sizes: dict[str, int], dtype: torch.dtype, training: bool, ran: Ran) -> None:
    x, w, a, b = operands(sizes, dtype, training)
    stack = lk.LoRAStack.from_factors([(a.detach(), b.detach(), 1.0)])
    ids = torch.zeros(len(x), dtype=torch.int64)
    of_stack = stack.lora_a, stack.lora_b, None, None, stack.table, stack.scalings, stack.max_rank, None
    call = multi_lora.MultiLoRALinear(x, w, *of_stack, ids, *(None,) * 8, False, False, "auto")
    made = plan("multi_lora_linear", call, records=training)
    lk.multi_lora_linear(x, w, stack, ids)
    assert ran.any("call_multi_lora_linear") == (not made.direct)
    agrees_with_forward(made, ran)
    if made.backend == "cpu":
        assert ran.any("multi_lora_add_", "multi_lora_linear_inference") == made.unsorted
        assert ran.any("multi_lora_down") == (not made.unsorted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("table")
def test_norm_and_merge_and_blocks(dtype: torch.dtype, ran: Ran) -> None:
    x, w, a, b = operands(SIZES[0], dtype, False)
    made = plan("dora_weight_norm", dora.DoRAWeightNorm(w, a, b, 1.0, None, None, "auto"))
    lk.functional.dora_weight_norm(w, a, b)
    assert ran.any("dora_norm") == (made.backend == "cpu") and ran.reference == (made.backend == "reference")
    ran.again()
    merged = plan("merge_lora_", merge.MergeLoRA(w, a, b, 1.0, None, None, None, "auto"))  # type: ignore[arg-type]
    lk.merge_lora_(w, a, b)
    assert ran.any("merge_rows_") == (merged.backend == "cpu" and merged.base == "own")
    assert ran.reference == (merged.backend == "reference")
    ran.again()
    index, dy = torch.zeros(1, 2, dtype=torch.int32), x[:, :48].contiguous()
    call = block_sparse.BlockSparseWeightGrad(x, dy, index, 16, 16, dtype, "auto")
    of_blocks = plan("block_sparse_weight_grad", call)
    lk.functional.block_sparse_weight_grad(x, dy, index, 16)
    assert ran.any("block_grad_") == (of_blocks.backend == "cpu")
    assert ran.reference == (of_blocks.backend == "reference")


def test_a_plan_is_made_once_for_all_calls_with_its_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    decide = lora.plan_lora_linear.decide
    monkeypatch.setattr(lora.plan_lora_linear, "decide", lambda *a: made.append(1) or decide(*a))
    tuned.forget()
    for _ in range(3):
        for rows in (5, 6):
            x, w, a, b = operands({"M": rows, "K": 24, "N": 16, "R": 3}, torch.float32, True)
            lk.lora_linear(x, w, a, b)
    assert len(made) == 2
    tuned.forget()
    lk.lora_linear(x, w, a, b)
    assert len(made) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c._replace(x=c.x.T.contiguous().T),
        lambda c: c._replace(weight=c.weight.T.contiguous().T),
        lambda c: c._replace(lora_a=c.lora_a.double()),
        lambda c: c._replace(bias=torch.ones(48)),
        lambda c: c._replace(dropout_p=0.5),
        lambda c: c._replace(backend="reference"),
        lambda c: c._replace(x=c.x.clone().requires_grad_()),
    ],
)
def test_other_metadata_is_planned_apart(change: Any) -> None:
    x, w, a, b = operands(SIZES[1], torch.float32, False)
    call = lora.LoRALinear(x, w, a, b, None, None, 1.0, 0.0, None, False, "auto")
    first = lora.plan_lora_linear(call)
    again = lora.plan_lora_linear(change(call))
    assert lora.plan_lora_linear(call) is first and again is not first


def test_the_scaling_is_no_part_of_a_plan() -> None:
    x, w, a, b = operands(SIZES[1], torch.float32, False)
    plans = [
        lora.plan_lora_linear(lora.LoRALinear(x, w, a, b, None, None, scaling, 0.0, None, False, "auto"))
        for scaling in (1.0, 0.25)
    ]
    assert plans[0] is plans[1]


# ------------------------------------------------------------------------------------------------- lrk doctor --explain


def explained(capsys: pytest.CaptureFixture[str], *words: str) -> list[list[str]]:
    assert main(["doctor", "--explain", *words]) == 0
    return [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]


def test_explain_prints_the_plan_that_a_call_gets(capsys: pytest.CaptureFixture[str]) -> None:
    x, w, a, b = operands({"M": 16, "K": 64, "N": 48, "R": 4}, torch.bfloat16, False)
    made = lora.plan_lora_linear(lora.LoRALinear(x, w, a, b, None, None, 1.0, 0.0, None, False, "auto"))
    assert made is not None
    lines = explained(capsys, "lora_linear M=16 K=64 N=48 R=4", "--dtype", "bfloat16")
    assert lines[1:] == [[reason.field, reason.value, reason.why] for reason in made.reasons]


def test_explain_says_what_the_table_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tune.json"
    monkeypatch.setenv(tuned.FLAG, str(path))
    entry = {"lora_linear float32 M=16 K=64 N=64": {"plan": {"base": "library"}}}
    tuned.write_table(path, {"cpu": {"conditions": tuned.conditions("cpu"), "entries": entry}})
    assert json.loads(path.read_text())["version"] == tuned.VERSION
    tuned.forget()
    lines = explained(capsys, "lora_linear M=16 K=64 N=48 R=4")
    monkeypatch.undo()
    tuned.forget()
    assert ["base", "library", "table of lrk tune"] in lines


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_explain_predicts_bytes_flops_and_time_of_a_gpu_that_is_not_here(
    arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    words = ("lora_linear M=16 K=2048 N=2048 R=16", "--dtype", "bfloat16", "--device", f"cuda:{arch}", "--training")
    lines = [" ".join(line) for line in explained(capsys, *words)]
    assert any(line.startswith("tiles ") for line in lines) and "backward" in lines
    assert any("MB" in line and "GFLOP" in line and "µs" in line for line in lines)


def test_a_meta_knows_whether_hardware_can_copy_tiles_of_it() -> None:
    whole = Meta.contiguous(8, 64, dtype=torch.bfloat16, device=CPU)
    assert whole.describable and whole.whole and whole.as_operand() == whole
    assert not whole._replace(aligned=False).describable
    assert not Meta.contiguous(8, 7, dtype=torch.bfloat16, device=CPU).describable
    assert not Meta.contiguous(0, 64, dtype=torch.bfloat16, device=CPU).describable
    turned = Meta.of(torch.empty(64, 8, dtype=torch.bfloat16).T)
    assert not turned.describable and turned.as_operand().describable
