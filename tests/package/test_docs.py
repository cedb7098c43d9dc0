"""The pages: links lead somewhere, and files that they name are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lowrank_kernels import cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        place, _, heading = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), link
        assert not heading or heading in anchors(target), link


def test_the_files_that_contributing_names_are_there() -> None:
    named = re.findall(r"`((?:[\w.]+/)+[\w.]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert named
    for place in named:
        assert (ROOT / place).exists() or (ROOT / "lowrank_kernels" / place).exists(), place


def test_the_page_of_tuning_shows_what_doctor_prints_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "tuning.md").read_text()
    ((command, shown),) = re.findall(r"\$ lrk (doctor --explain .*--device cuda:.*)\n((?:.*\n)*?)```", page)
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out == shown
