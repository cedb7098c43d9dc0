"""Who may import whom, read from the source, and what an import of the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_kernels

ROOT = Path(lowrank_kernels.__file__).parent
OPTIONAL = {"transformers", "peft", "safetensors", "matplotlib", "numpy", "scipy", "sklearn", "tqdm", "gguf", "flwr"}
OPTIONAL |= (WEB := {"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"})

# layer -> what it may import: parts of this package, and packages from outside.
ALLOWED = {
    "families": (set(), set()),
    "reference": (set(), {"torch"}),
    "_extension": (set(), {"torch"}),
    "cpp": (set(), {"torch"}),
    "weights": ({"cpp", "_extension", "finite", "kernels"}, {"torch", "safetensors", "gguf"}),
    "finite": (set(), {"torch"}),
    "tuned": ({"_extension"}, {"torch"}),
    "kernels": ({"tuned"}, {"torch", "triton"}),
    "ops": ({"families", "reference", "kernels", "weights", "cpp", "tuned", "_extension"}, {"torch"}),
    "stack": (set(), {"torch"}),
    "gradients": (set(), {"torch"}),
    "functional": ({"ops", "stack", "weights"}, {"torch"}),
    "blocks": ({"functional", "ops", "reference", "weights"}, {"torch"}),
    "fuse": ({"blocks", "names", "nn", "reference", "report"}, {"torch"}),
    "merge": ({"finite", "ops"}, {"torch"}),
    "report": ({"weights"}, {"torch"}),
    "init": ({"names", "finite", "gradients", "nn", "functional", "merge"}, {"torch"}),
    "nn": ({"blocks", "finite", "functional", "init", "merge", "stack", "weights"}, {"torch"}),
    "rider": (set(), {"torch"}),
    "losses": ({"config", "names", "patterns"}, {"torch"}),
    "chain": ({"names", "finite", "nn", "init", "merge", "rider"}, {"torch"}),
    "federated": ({"finite", "merge", "nn", "weights"}, {"torch"}),
    "optim": ({"finite", "functional", "names", "nn", "rider"}, {"torch"}),
    "patterns": (set(), set()),
    "config": ({"nn", "init", "patterns"}, {"torch"}),
    "names": (set(), {"torch"}),
    "read_weights": ({"nn"}, {"torch"}),
    "adapt": ({"names", "config", "nn", "read_weights", "report"}, {"torch"}),
    "quantize": ({"adapt", "config", "names", "nn", "read_weights", "report", "weights"}, {"torch"}),
    "base_only": ({"adapt", "names", "nn"}, {"torch"}),
    "unload": ({"fuse", "names", "adapt", "finite", "functional", "nn", "weights"}, {"torch"}),
    "adapters": (
        {"names", "adapt", "config", "finite", "functional", "nn", "patterns", "report", "weights"},
        {"torch", "safetensors", "gguf"},
    ),
    "smt": (
        {"names", "adapt", "adapters", "config", "finite", "functional", "gradients", "nn", "report", "weights"},
        {"torch", "safetensors", "tqdm", "matplotlib"},
    ),
    "merge_checkpoint": ({"adapters", "finite", "functional", "smt", "weights"}, {"torch", "safetensors"}),
    "allocate": ({"adapt", "config", "finite", "names", "nn", "rider"}, {"torch", "tqdm"}),
    "layer_stack": ({"names"}, {"torch"}),
    "over_base": (
        {"adapt", "adapters", "finite", "layer_stack", "names", "report", "weights"},
        {"torch", "safetensors"},
    ),
    "reversible": ({"layer_stack", "names", "nn", "over_base", "report"}, {"torch"}),
    "side": ({"layer_stack", "names", "nn", "over_base", "report"}, {"torch"}),
    "prune": ({"functional", "names", "nn", "rider", "unload"}, {"torch"}),
    "distributed": ({"names", "nn", "report"}, {"torch"}),
    # The engine stands on transformers' attention interface, as the bank stands on torch's modules.
    "serving": (
        {"names", "adapters", "config", "functional", "nn", "stack", "weights"},
        {"torch", "transformers", "llguidance", *WEB},
    ),
    "bench": (None, {"torch", "matplotlib"}),
    "integrations": (None, None),
    "inspect": (
        {"families", "kernels", "ops", "reference", "functional", "stack", "weights"},
        {"torch", "triton", "numpy"},
    ),
    "cli": (None, None),
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, whether it is a part of this package) of every import in a file."""
    package = path.relative_to(ROOT.parent).with_suffix("").parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, False))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            targets = [node.module] if node.module else [alias.name for alias in node.names]
            found += [(".".join((*base, target)), True) for target in targets]
    return [(name, own or name.split(".")[0] == "lowrank_kernels") for name, own in found]


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = [path for path in sorted(ROOT.rglob("*.py")) if layer_of(path) != "__init__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_layer_imports_only_what_it_may(path):
    layer = layer_of(path)
    own_allowed, outside_allowed = ALLOWED[layer]
    for name, own in imports(path):
        parts = name.split(".")
        if own and own_allowed is not None and len(parts) > 1:
            assert parts[1] == layer or parts[1] in own_allowed, f"{layer} imports {name}"
        elif not own and outside_allowed is not None and parts[0] not in sys.stdlib_module_names:
            assert parts[0] in outside_allowed, f"{layer} imports {name}"


def test_only_ops_register_with_torch():
    for path in FILES:
        if layer_of(path) not in ("ops", "inspect"):
            assert "torch.library" not in path.read_text(), path


def test_only_the_server_knows_of_http():
    for path in FILES:
        if not path.relative_to(ROOT).as_posix().startswith(("serving/server/", "cli/serve.py")):
            assert not {name.split(".")[0] for name, _ in imports(path)} & WEB, path


def test_import_brings_in_no_optional_package_and_no_cuda():
    script = (
        "import sys, torch; before = set(sys.modules); import lowrank_kernels;"
        f"loaded = {{name.split('.')[0] for name in set(sys.modules) - before}} & {OPTIONAL!r};"
        "assert not loaded, loaded; assert not torch.cuda.is_initialized(); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
