"""The models, adapters and outputs that the engines are compared over, made in this package's environment."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import peft
import torch
import toy
import transformers
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.adapters.formats import gguf as gguf_format
from lowrank_kernels.integrations.transformers import load_language_model

HERE = Path(__file__).resolve().parent
VOCABULARY = 512
PROMPTS = 4

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rslora": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "patterns": {"r": 8, "lora_alpha": 16, "rank_pattern": {"0": 4}, "alpha_pattern": {"1": 5}},
    "rslora and patterns": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "rank_pattern": {"0": 4},
        "alpha_pattern": {"1": 5},
    },
    "dora": {"r": 8, "lora_alpha": 16, "use_dora": True},
}
"""Settings of PEFT's; "0" and "1" stand for the first two targets."""

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": (
        "Llama",
        {**_GROUPED, "head_dim": 16},
        ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "gate_proj"),
    ),
    "mistral": ("Mistral", {**_GROUPED, "head_dim": 16}, ("q_proj", "k_proj", "v_proj", "up_proj")),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 16}, ("q_proj", "k_proj", "o_proj", "down_proj")),
    "gemma": ("Gemma", {**_GROUPED, "head_dim": 16}, ("q_proj", "k_proj", "o_proj", "down_proj")),
    "gpt_neox": ("GPTNeoX", {**_SIZES, "rotary_pct": 0.5}, ("query_key_value", "dense", "dense_h_to_4h")),
}
"""{name: (prefix of transformers' classes, settings, targets)}."""


def tiny(name: str) -> nn.Module:
    torch.manual_seed(0)
    prefix, settings, _ = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(**settings)
    return getattr(transformers, f"{prefix}ForCausalLM")(config).float().eval()


def settings_of(kind: str, targets: tuple[str, ...]) -> dict[str, Any]:
    settings = dict(ADAPTERS[kind])
    for pattern in ("rank_pattern", "alpha_pattern"):
        if pattern in settings:
            settings[pattern] = {targets[int(i)]: value for i, value in settings[pattern].items()}
    return settings | {"target_modules": list(targets)}


@torch.no_grad()
def with_adapter(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Write a PEFT folder of an adapter that changes the outputs a lot."""
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for key, p in adapted.named_parameters():
        if "lora_B" in key:
            p.copy_(torch.randn_like(p) * (0.05 if p.shape[0] < 512 else 0.01))
        elif "magnitude" in key:
            p.mul_(0.8 + 0.4 * torch.rand_like(p))
    adapted.save_pretrained(str(folder))
    return adapted.unload()


def prompts(vocabulary: int) -> torch.Tensor:
    return torch.randint(3, vocabulary, (PROMPTS, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model: Any, adapter: Path | None, tokens: torch.Tensor) -> np.ndarray:
    """Of this package's layers, at the last position of each prompt; without an adapter the model's own."""
    report = None if adapter is None else lk.load_adapter(model, adapter)
    found = torch.stack([model(input_ids=row[None]).logits[0, -1] for row in tokens])
    if report is not None:
        report.undo()
    return found.float().numpy()


def case(folder: Path, model: str, kind: str, fault: str | None, ours: np.ndarray, **paths: Any) -> dict[str, Any]:
    name = f"{model} {kind}" + (f" fault {fault}" if fault else "")
    np.save(folder / f"{name}.ours.npy", ours)
    return {"name": name, "model": model, "adapter": kind, "fault": fault, **paths}


# ----------------------------------------------------------------------------------------------------------- llama.cpp


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """A conversion to GGUF that is wrong in one way."""
    if fault == "rows of q and k not permuted":
        with mock.patch.object(gguf_format, "_rows", lambda *_: (gguf_format._same, gguf_format._same)):
            yield
    elif fault == "scale without the root":
        with mock.patch.object(gguf_format, "_one_alpha", lambda a: (16.0, dict(a.modules))):
            yield
    else:
        yield


class TableGELU(nn.Module):
    """GELU as ggml computes it on a CPU: the tanh form, from a table of float16 by float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inside = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, inside))


def with_activation(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The model with the engine's form of GELU in the place of its own; the two differ by about 1e-3 of the outputs."""
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if "GELU" in type(child).__name__:
                setattr(module, key, kind())
    return model


def llama_cpp(folder: Path, python: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for name in models or ("smollm2", *MODELS):
        base = folder / f"{name}.gguf"
        if name == "smollm2":
            model, _ = load_language_model("smollm2", torch.float32)
            targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
        else:
            model, targets = tiny(name), MODELS[name][2]
            model.save_pretrained(str(folder / name))
            model = with_activation(model, TableGELU)
        subprocess.run([python, HERE / "gguf_base.py", folder, name, base, gguf_of_smollm2()], check=True)
        tokens = prompts(model.config.vocab_size)
        shared = {"base": str(base), "tokens": tokens.tolist(), "vocabulary": model.config.vocab_size}
        found.append(case(folder, name, "none", None, logits(model, None, tokens), path="", **shared))
        for kind in ADAPTERS:
            if kind == "dora":
                continue
            source = folder / f"{name} {kind}"
            model = with_adapter(model, source, **settings_of(kind, targets))
            ours = logits(model, source, tokens)
            faults: list[str | None] = [None]
            if name in ("smollm2", "llama", "mistral", "gpt_neox") and kind == "plain":
                faults.append("rows of q and k not permuted")
            faults += ["scale without the root"] if kind == "rslora" else []
            for fault in faults:
                target = folder / f"{name} {kind} {fault}.gguf"
                with planted(fault or ""):
                    lk.adapters.convert(source, target, to="gguf", base=model)
                found.append(case(folder, name, kind, fault, ours, path=str(target), **shared))
    return found


def gguf_of_smollm2() -> Path:
    from lowrank_kernels.integrations.transformers import _PACKAGED, _packaged_folder

    return _packaged_folder("smollm2") / _PACKAGED["smollm2"][1]


# ----------------------------------------------------------------------------------------------------------------- MLX


def mlx(folder: Path, python: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    for name in models or ("smollm2", "llama", "mistral", "qwen3", "gemma"):
        model = load_language_model("smollm2", torch.float32)[0] if name == "smollm2" else tiny(name)
        model = with_activation(model, nn.GELU) if name == "gemma" else model  # mlx-lm's Gemma has the exact form
        targets = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj") if name == "smollm2" else MODELS[name][2]
        model.save_pretrained(str(folder / name))
        settings = json.loads((folder / name / "config.json").read_text())
        # transformers 5 writes the base of the rotary embedding where mlx-lm does not look.
        settings["rope_theta"] = (settings.get("rope_parameters") or {}).get("rope_theta", 10000.0)
        (folder / name / "config.json").write_text(json.dumps(settings))
        tokens = prompts(model.config.vocab_size)
        shared = {"base": str(folder / name), "tokens": tokens.tolist()}
        found.append(case(folder, name, "none", None, logits(model, None, tokens), path="", **shared))
        for kind in ADAPTERS:
            source = folder / f"{name} {kind}"
            model = with_adapter(model, source, **settings_of(kind, targets))
            ours = logits(model, source, tokens)
            for fault in (None, "scale without the root") if kind == "rslora" else (None,):
                adapter = lk.adapters.read(source)
                target = folder / f"{name} {kind} {fault} mlx"
                lk.adapters.convert(without_root(adapter) if fault else adapter, target, to="mlx", base=model)
                found.append(case(folder, name, kind, fault, ours, path=str(target), **shared))
    return found


def without_root(adapter: lk.adapters.Adapter) -> lk.adapters.Adapter:
    """What a reader makes of an rsLoRA adapter that does not know √R."""
    wrong = {path: f._replace(scaling=f.scaling * f.rank**-0.5) for path, f in adapter.modules.items()}
    return replace(adapter, modules=wrong)


# ------------------------------------------------------------------------------------------- LyCORIS, diffusers, ONNX


def lycoris(folder: Path, python: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    targets = ("conv_in", "conv_down", "mix", "out")
    for kind in ADAPTERS:
        model, x = toy.made()
        source = folder / f"toy {kind}"
        with_adapter(model, source, **settings_of(kind, targets))
        model, x = toy.made()
        lk.load_adapter(model, source)
        with torch.no_grad():
            ours = model(x).numpy()
        for fault in (None, "scale without the root") if kind == "rslora" else (None,):
            adapter = lk.adapters.read(source)
            target = folder / f"toy {kind} {fault}.safetensors"
            lk.adapters.convert(without_root(adapter) if fault else adapter, target, to="kohya")
            found.append(case(folder, "toy", kind, fault, ours, path=str(target)))
    return found


def diffusers(folder: Path, python: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    targets = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1")
    found = []
    some = ("plain", "rslora", "rslora and patterns")
    for to, kinds in (("diffusers", ADAPTERS), ("diffusers portable", some), ("kohya portable", some)):
        for kind in kinds:
            for fault in (None, "scale without the root") if kind == "rslora" else (None,):
                name = f"unet {to} {kind}" + (f" fault {fault}" if fault else "")
                row = {"name": name, "model": f"unet, {to} file", "adapter": kind, "fault": fault}
                found.append(row | {"to": to, "settings": settings_of(kind, targets)})
    return found


class ToyLanguageModel(nn.Module):
    """Next-token scores of ids: tanh(mean(E[ids]) W1ᵀ) W2ᵀ."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 24)
        self.up, self.out = nn.Linear(24, 40, bias=False), nn.Linear(40, 97, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.up(self.embed(ids).mean(0, keepdim=True))))


@torch.no_grad()
def onnx(folder: Path, python: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    found = []
    tokens = prompts(97)
    for kind in ("plain", "rslora", "patterns", "rslora and patterns"):
        torch.manual_seed(0)
        model = ToyLanguageModel()
        for name in ("embed", "up", "out"):
            np.save(folder / f"{name}.npy", model.get_submodule(name).weight.numpy())
        source = folder / f"toy {kind}"
        model = with_adapter(model, source, **settings_of(kind, ("up", "out")))
        lk.load_adapter(model, source)
        rows = []
        for prompt in tokens:
            ids = prompt
            for _ in range(16):
                ids = torch.cat([ids, model(ids).argmax(1)])
            rows.append(ids[len(prompt) :])
        adapter = lk.adapters.read(source)
        shapes = {f"{p}.lora_A.weight": list(f.lora_a.T.shape) for p, f in adapter.modules.items()}
        shapes |= {f"{p}.lora_B.weight": list(f.lora_b.T.shape) for p, f in adapter.modules.items()}
        for fault in (None, "scale left out of B") if kind == "plain" else (None,):
            target = folder / f"toy {kind} {fault}.onnx_adapter"
            wrong = {p: f._replace(scaling=1.0) for p, f in adapter.modules.items()}
            lk.adapters.convert(lk.adapters.Adapter(wrong) if fault else adapter, target, to="onnx")
            paths = {"path": str(target), "shapes": shapes, "tokens": tokens.tolist()}
            found.append(case(folder, "toy", kind, fault, torch.stack(rows).numpy(), **paths))
    return found


PREPARE: dict[str, Callable[[Path, Path, Sequence[str]], list[dict[str, Any]]]] = {
    "llama_cpp": llama_cpp,
    "mlx": mlx,
    "lycoris": lycoris,
    "diffusers": diffusers,
    "onnx": onnx,
}
