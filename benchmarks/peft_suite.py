"""PEFT's own LoRA tests, with and without `accelerate`: which fail with it alone?

    python benchmarks/peft_suite.py PEFT [-k EXPRESSION]

PEFT is a checkout of huggingface/peft; its tests need `pip install datasets diffusers parameterized`. Each run is a
process with no network, so what needs the Hub fails in both. In the second every model that ``get_peft_model`` or
``PeftModel.from_pretrained`` returns is accelerated.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

FILES = ("tests/test_custom_models.py", "tests/test_lora_variants.py")
_layers = 0


def pytest_configure() -> None:
    """As a plugin of the second run: accelerate what PEFT makes, before its tests import the functions."""
    import peft
    import peft.mapping_func

    made, loaded = peft.mapping_func.get_peft_model, peft.PeftModel.from_pretrained.__func__

    @functools.wraps(made)
    def get_peft_model(*args: Any, **options: Any) -> Any:
        return _accelerated(made(*args, **options))

    peft.get_peft_model = peft.mapping_func.get_peft_model = get_peft_model
    peft.PeftModel.from_pretrained = classmethod(lambda cls, *args, **kw: _accelerated(loaded(cls, *args, **kw)))


def _accelerated(model: Any) -> Any:
    from peft.tuners.lora import LoraLayer

    import lowrank_kernels as lk

    global _layers
    if any(isinstance(module, LoraLayer) for module in model.modules()):  # other methods have tests there, too
        _layers += len(lk.integrations.peft.accelerate(model).replaced)
    return model


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"{_layers} layers accelerated")


def run(peft: Path, keyword: str, *options: str) -> tuple[set[str], str]:
    """The tests that fail, and the last line of the run."""
    root = Path(__file__).resolve().parent
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(root), str(root.parent), os.environ.get("PYTHONPATH")))),
    }
    command = [sys.executable, "-m", "pytest", *FILES, "-q", "-p", "no:cacheprovider", "--tb=no", "-rfE", "-k", keyword]
    done = subprocess.run(
        [*command, *options], cwd=peft, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    lines = done.stdout.rstrip().splitlines()
    layers = [line for line in lines if "layers accelerated" in line]
    return set(re.findall(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", done.stdout, re.M)), "; ".join((*layers, lines[-1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peft", type=Path, help="a checkout of PEFT")
    parser.add_argument("-k", dest="keyword", default="LoraConfig or test_lora_variants", help="which tests")
    options = parser.parse_args()
    alone, said = run(options.peft, options.keyword)
    print(f"without: {said}", flush=True)
    accelerated, said = run(options.peft, options.keyword, "-p", "peft_suite")
    print(f"with:    {said}")
    for test in sorted(accelerated - alone):
        print(f"fails with accelerate alone: {test}")
    print(f"{len(accelerated - alone)} tests fail with accelerate alone, {len(alone - accelerated)} without it alone")
    return int(bool(accelerated - alone))


if __name__ == "__main__":
    raise SystemExit(main())
