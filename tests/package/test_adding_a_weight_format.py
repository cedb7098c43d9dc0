"""docs/adding_a_weight_format.md is true: its three files make a format that ops and layers take."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.patches import blocks_not_in, patched_copy, run_tests_in, touched_by


def test_the_page_shows_what_the_patch_adds() -> None:
    count, missing = blocks_not_in("weight.patch", "docs/adding_a_weight_format.md")
    assert count == 3 and missing == []


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patched_copy(tmp_path_factory.mktemp("weight"), "weight.patch", "tests")


def test_three_files_make_a_format(tree: Path) -> None:
    assert len(touched_by("weight.patch")) <= 3
    run_tests_in(tree, "tests/weights/test_transposed.py")
