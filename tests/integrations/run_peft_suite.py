"""Run PEFT's own tests with every LoRA layer on this package's op.

    python -m pip download peft==0.21.2 --no-binary :all: --no-deps && tar xf peft-0.21.2.tar.gz
    python tests/integrations/run_peft_suite.py peft-0.21.2/tests -k "lora or Lora or LoRA" [--plain] [pytest's options]

PEFT's source distribution carries its tests; they need ``diffusers``, ``datasets`` and ``parameterized``. Whenever
PEFT puts LoRA layers into a model (get_peft_model, from_pretrained, add_adapter, inject_adapter_in_model, ...),
``accelerate`` runs on that model. ``--plain`` leaves that out, to see what fails without us. Nothing is downloaded:
tests that need a model of the Hub fail in both runs, unless HF_HUB_OFFLINE=0 is set. Files that need one in nearly
every test are left out, unless they are named.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Those that build their own small models, all or most of the time.
LORA_FILES = (
    "test_custom_models.py",
    "test_lora_variants.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_initialization.py",
    "test_bdlora.py",
    "test_loraplus.py",
    "test_lorafa.py",
    "test_lora_ga.py",
    "test_velora.py",
)


def accelerate_everything(calls: Counter[str]) -> None:
    """Accelerate after every injection of LoRA layers, and count which forward runs."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.lora.model import LoraModel

    from lowrank_kernels.integrations import peft as integration

    inject = LoraModel.inject_adapter

    @functools.wraps(inject)
    def inject_and_accelerate(self, model, *args, **kwargs):
        result = inject(self, model, *args, **kwargs)
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            integration.accelerate(model)
        return result

    op, theirs = integration.lora_linear, integration.PeftLinear.forward

    def counted_op(*args, **kwargs):
        calls["on the op"] += 1
        return op(*args, **kwargs)

    def counted_theirs(self, *args, **kwargs):
        calls["on PEFT's forward"] += 1
        return theirs(self, *args, **kwargs)

    LoraModel.inject_adapter = inject_and_accelerate
    integration.lora_linear = counted_op
    integration.PeftLinear.forward = counted_theirs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", type=Path, help="the tests folder of a checkout or source distribution of PEFT's")
    parser.add_argument("--plain", action="store_true", help="without this package, for comparison")
    options, rest = parser.parse_known_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import pytest

    calls: Counter[str] = Counter()
    if not options.plain:
        accelerate_everything(calls)
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        shutil.copytree(options.tests, tests)
        (tests / "__init__.py").touch()  # the tests import each other as a package, and the archive leaves this out
        named = any(argument.endswith(".py") or "::" in argument for argument in rest)
        files = [] if named else [f"tests/{name}" for name in LORA_FILES if (tests / name).exists()]
        os.chdir(folder)
        sys.path.insert(0, folder)
        code = pytest.main(["-p", "no:cacheprovider", "--rootdir", folder, "-W", "ignore", *files, *rest])
    print("lora.Linear calls " + (", ".join(f"{n} {where}" for where, n in sorted(calls.items())) or "not counted"))
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
