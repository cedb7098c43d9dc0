"""Every op family of ``lowrank_kernels.families`` is in every suite, table and page that all families must be in."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import lowrank_kernels
from lowrank_kernels import functional, reference
from lowrank_kernels.bench.cases import OPS as BENCHES
from lowrank_kernels.bench.cases import tunables
from lowrank_kernels.families import CUDA_CPP, FAMILIES, FUNCTIONS, NAMES, OPS, Family
from lowrank_kernels.inspect.registry import family as inspected
from lowrank_kernels.ops.backend import why_not
from lowrank_kernels.ops.examples import EXAMPLES
from lowrank_kernels.ops.planning import plan
from lowrank_kernels.weights import FORMATS
from tests.fuzz.calls import FAMILIES as DRAWN
from tests.ops.test_arguments import FUNCTIONS as WITH_WRONG_ARGUMENTS
from tests.ops.test_every_family import LINEARS

PACKAGE = Path(lowrank_kernels.__file__).parent
TESTS = Path(__file__).parents[1]
EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@EACH
def test_a_family_has_one_name_in_every_folder(family: Family) -> None:
    folders = ["reference", "ops", "bench/cases", "inspect", *(["kernels"] if family.triton else [])]
    if any(name.endswith("_linear") for name in (*family.ops, *family.beside)):
        folders.append("nn")
    places = [PACKAGE / folder / f"{family.name}.py" for folder in folders]
    places += [TESTS / "problems" / f"{family.name}.py", TESTS / "ops" / f"test_{family.name}.py"]
    assert [place for place in places if not place.exists()] == []


def test_no_module_of_a_family_is_left_out_of_the_list() -> None:
    for folder in (PACKAGE / "bench" / "cases", TESTS / "problems"):
        found = {path.stem for path in folder.glob("*.py")} - {"__init__", "bench"}
        assert found == set(NAMES), folder


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_is_there_and_refuses_every_wrong_argument_by_name(name: str) -> None:
    assert hasattr(lowrank_kernels, name) or hasattr(functional, name)
    assert name in WITH_WRONG_ARGUMENTS


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_formula_in_the_reference(op: str) -> None:
    assert hasattr(reference, f"{op.rstrip('_')}_ref")


def test_every_op_has_a_row_in_the_benchmark() -> None:
    over_formats = {f"{op}_{name}" for op in OPS for name in FORMATS}
    assert set(OPS) <= set(BENCHES) <= set(OPS) | over_formats


def test_every_op_is_tuned_where_it_has_kernels() -> None:
    on_gpu = {op for family in FAMILIES if family.triton for op in family.ops}
    for device_type, ops in (("cpu", set(OPS)), ("cuda", on_gpu)):
        known = tunables(device_type)
        assert {name.removesuffix("_backward") for name in known} == ops, device_type
        assert {tunable.bench for tunable in known.values()} == ops


@EACH
def test_every_family_is_inspected(family: Family) -> None:
    found = inspected(family.name)
    assert found.name == family.name and found.traced
    assert any(True for _ in found.cases()) == family.triton == bool(found.work)


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_explained_as_it_is_planned(op: str) -> None:
    assert set(EXAMPLES) == set(OPS)
    example = EXAMPLES[op]
    call = example.call(dict.fromkeys(example.sizes.split(), 32), torch.float32, torch.device("cpu"))
    made = plan(op, call)
    assert made.op == op and "backend" in {reason.field for reason in made.reasons}


@EACH
def test_a_kernel_that_is_not_there_is_refused_with_the_reason(family: Family) -> None:
    for op in family.ops:
        if not family.triton:
            assert "has no Triton kernel" in str(why_not(op, "triton", "cuda", torch.float32))
        if op not in CUDA_CPP:
            assert "has no CUDA C++ kernel" in str(why_not(op, "cuda", "cuda", torch.float32))


@EACH
def test_every_family_has_problems_and_random_calls(family: Family) -> None:
    assert list(importlib.import_module(f"tests.problems.{family.name}").problems())
    assert family.name in DRAWN


def test_every_linear_may_be_changed_in_place() -> None:
    assert {name for name in FUNCTIONS if name.endswith("_linear")} == LINEARS.keys()


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_in_the_readme_with_a_page_that_names_it(op: str) -> None:
    root = PACKAGE.parent
    rows = [line for line in (root / "README.md").read_text().splitlines() if re.match(rf"\|.*`lk\.{op}`", line)]
    pages = [page for row in rows for page in re.findall(r"\]\((docs/[\w/]+\.md)", row)]
    assert any(re.search(rf"\b{op}\b", (root / page).read_text()) for page in pages), (rows, pages)
