"""`lrk train --method meft`: its options, and what is said of a run that had gone further."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.cli.test_train_methods import command, last_line, tiny_task  # noqa: F401


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--meft", "3", "--adapter-size", "4"), "--adapter-size: is not an option of --meft 3, which has no adapters"),
        (("--meft-lambda", "nan"), "--meft-lambda: expected a finite number other than 0, got 'nan'"),
        (("--meft-beta", "0"), "--meft-beta: expected a finite number other than 0, got '0'"),
        (("--meft-beta", "x"), "--meft-beta: expected a finite number other than 0, got 'x'"),
    ],
)
def test_options_of_meft_that_do_not_fit_are_told_in_one_line(
    more: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in last_line(capsys, "meft", *more)


def test_a_stop_before_where_a_run_is_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = str(tmp_path / "state.pt")
    for stop in ("3", "2"):
        assert command("meft", "--checkpoint", state, "--stop-after", stop, steps=4) == 0
        assert "stopped after step 3 of 4" in capsys.readouterr().out
