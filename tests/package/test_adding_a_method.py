"""docs/adding_a_method.md is true: its four files make a method, which runs like the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.patches import blocks_not_in, patched_copy, run_tests_in, touched_by

pytest.importorskip("transformers")


def test_the_page_shows_what_the_patch_adds() -> None:
    assert blocks_not_in("method.patch", "docs/adding_a_method.md") == (5, [])


def test_four_files_make_a_method_that_learns_stops_and_goes_on(tmp_path: Path) -> None:
    assert len(touched_by("method.patch")) <= 4
    tree = patched_copy(tmp_path, "method.patch", "tests/cli/test_train_methods.py")
    run_tests_in(tree, "-k", "toy", "tests/cli/test_toy.py", "tests/cli/test_train_methods.py")
