"""docs/adding_an_op.md is true: its fifteen files make an op, which passes what every op must."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.patches import blocks_not_in, patched_copy, run_in, run_tests_in, touched_by

RANDOM_CALLS = """
from tests.fuzz import calls, check
check.FAMILIES = {"scaled": calls.FAMILIES["scaled"]}
faults = [fault for seed in range(200) for fault in check.faults(seed, ("auto", "cpu", "reference"))]
assert not faults, faults
"""


def test_the_page_shows_what_the_patch_adds() -> None:
    count, missing = blocks_not_in("op.patch", "docs/adding_an_op.md")
    assert count == 9 and missing == []


def test_the_page_names_every_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adding_an_op.md").read_text()
    assert [name for name in touched_by("op.patch") if f"`{name}`" not in page] == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patched_copy(tmp_path_factory.mktemp("op"), "op.patch", "tests", "docs", "README.md")


def test_fifteen_files_make_an_op_that_is_exact(tree: Path) -> None:
    assert len(touched_by("op.patch")) <= 15
    run_tests_in(tree, "tests/ops/test_scaled.py")


@pytest.mark.nightly  # the suites of all ops; test_fifteen_files_make_an_op_that_is_exact runs the op's own
def test_it_passes_what_every_op_must(tree: Path) -> None:
    suites = ("tests/ops/test_every_family.py", "tests/ops/test_arguments.py")
    tables = ("tests/package/test_families.py", "tests/bench/test_bench.py", "tests/proof/test_capture.py")
    run_tests_in(tree, "-k", "scaled or test_families", *suites, *tables)


@pytest.mark.nightly  # random calls beside those of test_fifteen_files_make_an_op_that_is_exact
def test_its_random_calls_agree_with_float64(tree: Path) -> None:
    run_in(tree, "-c", RANDOM_CALLS)


def test_doctor_explains_it(tree: Path) -> None:
    call = "from lowrank_kernels.cli import main; raise SystemExit(main())"
    said = run_in(tree, "-c", call, "doctor", "--explain", "scaled_product M=16 K=2048 N=2048", "--training")
    page = (Path(__file__).parents[2] / "docs" / "adding_an_op.md").read_text()
    assert said in page
