"""OpenVINO GenAI's safetensors: PEFT's names and shapes, of which it reads no scale: s stands in B."""

from __future__ import annotations

from pathlib import Path

from ..adapter import Adapter, Factors
from ..folder import PREFIX
from .format import FACTORS_OF_LINEARS, Format, Options, is_file, names_in, paired, save_tensors, tensors_of

_ENDS = {".lora_A.weight": "a", ".lora_B.weight": "b"}


def write(adapter: Adapter, path: Path, options: Options) -> None:
    tensors = {
        f"{PREFIX}{name}.{key}": t for name, f in adapter.modules.items() for key, t in f.folded().tensors().items()
    }
    save_tensors(path, tensors, {"format": "pt"})


def read(path: Path, options: Options) -> Adapter:
    with tensors_of(path) as file:
        tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = paired(path, tensors, _ENDS)
    return Adapter({name: Factors(own["a"], own["b"], 1.0) for name, own in found.items()}, origin=str(path))


def is_one(path: Path) -> bool:
    """True for a safetensors file of PEFT's names that stands alone, without PEFT's config beside it."""
    if not is_file(path, ".safetensors") or (path.parent / "adapter_config.json").exists():
        return False
    return any(name.startswith(PREFIX) and ".lora_A." in name for name in names_in(path))


FORMAT = Format(
    "openvino",
    ".safetensors",
    is_one,
    write,
    read,
    FACTORS_OF_LINEARS,
    "OpenVINO GenAI",
)
