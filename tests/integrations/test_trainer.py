"""The example of examples/hf_trainer_methods.py, and a chain that Trainer resumes in the middle of a link."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

RESUMED = ("rac-lora", "xgblora", "lora-rite", "sora", "alora", "heterolora", "lamda", "loraprune", "galore", "gmt")
RESUMED += ("svft", "velora", "meft", "deft", "sherl")
ROOT = Path(__file__).resolve().parents[2]


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("hf_trainer_methods", ROOT / "examples" / "hf_trainer_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("method", ["lora-ga", *RESUMED])
def test_the_example_learns(method: str) -> None:
    before, after = load_example().train(method, steps=12)
    assert after < before


@pytest.mark.parametrize("method", RESUMED)
def test_trainer_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    example = load_example()

    def run(folder: Path, resume: str | None = None) -> dict[str, torch.Tensor]:
        model, data = example.base_model(None), example.Sequences(64)
        optimizer = example.setup(model, method, data, steps=16)  # links of 4
        schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, 12)
        arguments = transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=4,
            max_steps=12,
            save_steps=6,
            logging_steps=6,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        return {name: t.clone() for name, t in model.state_dict().items()}

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "part" / "checkpoint-6")
    resumed = run(tmp_path / "part", str(tmp_path / "part" / "checkpoint-6"))
    for name, t in whole.items():
        assert torch.equal(t, resumed[name]), name
