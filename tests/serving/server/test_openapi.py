"""Requests drawn from the OpenAPI document: none makes the server fail, or answer what the document does not have."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)

HOOKS = """
import schemathesis

@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict) and isinstance(body.get("model"), str):
        body["model"] = "lora"  # a drawn name is nobody's
    return body
"""


@pytest.mark.nightly
def test_requests_drawn_from_the_document(url, tmp_path):
    """Known bad requests are in test_refusals.py, known good ones in test_completions.py and test_chat.py."""
    pytest.importorskip("schemathesis")
    beside = Path(sys.executable).parent
    command = shutil.which("schemathesis", path=str(beside))
    assert command is not None
    (tmp_path / "hooks.py").write_text(HOOKS)
    run = subprocess.run(
        [
            command,
            "run",
            f"{url.removesuffix('/v1')}/openapi.json",
            f"--checks={','.join(CHECKS)}",
            "--phases=coverage,fuzzing",
            "--max-time=60",
            "--generation-deterministic",
            "--no-color",
        ],
        cwd=tmp_path,
        env=os.environ | {"SCHEMATHESIS_HOOKS": "hooks", "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout
