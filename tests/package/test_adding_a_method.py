"""docs/adding_a_method.md is true: its four files make a method, which runs like the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.patches import blocks_not_in, patched_copy, run_tests_in, touched_by

pytest.importorskip("transformers")


def test_the_page_shows_what_the_patch_adds() -> None:
    assert blocks_not_in("method.patch", "docs/adding_a_method.md") == (5, [])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patched_copy(tmp_path_factory.mktemp("method"), "method.patch", "tests/cli/test_train_methods.py")


def test_four_files_make_a_method(tree: Path) -> None:
    assert len(touched_by("method.patch")) <= 4
    run_tests_in(tree, "tests/cli/test_toy.py")


@pytest.mark.nightly  # of the suite that all methods share; test_four_files_make_a_method runs the method's own tests
def test_it_learns_stops_and_goes_on_like_the_others(tree: Path) -> None:
    run_tests_in(tree, "-k", "toy", "tests/cli/test_train_methods.py")
