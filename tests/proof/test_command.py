"""`lrk doctor` and `lrk inspect`, and what the command does with mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_kernels.cli import COMMANDS, main


def test_help_imports_no_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import sys\nfrom lowrank_kernels.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in sys.modules if m.startswith('lowrank_kernels.cli.')], 'triton' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert all(command.name in found for command in COMMANDS)
    assert found.splitlines()[-1] == "[] False"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "--arch", "sm_91"], "lrk: inspect: expected --arch to be one of sm_80,"),
        (["inspect", "--op", "nothing"], "lrk: inspect: expected an op family of"),
        (["inspect", "--arch", "sm_90", "--kernel", "nothing"], "lrk: inspect: no kernel's name contains 'nothing'"),
        (["inspect", "--op", "lora", "--write-budget", "x"], "lrk: inspect: expected --write-budget without --op"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(words)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="sm_91"):
        main(["inspect", "--arch", "sm_91", "--debug"])


def test_inspect_under_the_interpreter_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["inspect"]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_inspect_prints_a_table_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "all.json", tmp_path / "binaries"
    arguments = ["--op", "lora", "--arch", "sm_90", "--kernel", "up_add"]
    assert main(["inspect", *arguments, "--json", str(file), "--save-cubins", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("HGMMA" in line for line in lines) and max(map(len, lines)) <= 140
    entries = json.loads(file.read_text())
    assert entries and all(e["kernel"] == "_lora_up_add_kernel" and e["spills"] == 0 for e in entries)
    binaries = list(folder.iterdir())
    assert len(binaries) == len(entries) and all(b.read_bytes()[:4] == b"\x7fELF" for b in binaries)


def test_doctor_names_every_path_and_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in ("triton", "GPU", "C++ ops", "CUDA C++", "lora_linear", "float64", "Optional packages", "peft"):
        assert words in text
