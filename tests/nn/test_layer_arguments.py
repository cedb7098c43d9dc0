"""Every setting of every layer: a wrong one is refused in a message that names it, and the linear is left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import lowrank_kernels as lk

NAN, INF = float("nan"), float("inf")
FLAG = ["no", 1, None, torch.tensor(True)]
RANK = [None, 0, -1, 2.0, "4", True, NAN]
ALPHA = [None, "16", NAN, INF, 1e300, True]
DROPOUT = [None, "0.1", NAN, 1.0, -0.1, True]
DTYPE = ["float32", torch.int8, 3]
LORA = {
    "r": RANK,
    "alpha": ALPHA,
    "dropout": DROPOUT,
    "rslora": FLAG,
    "init": ["svd", None, 3],
    "train": ["all", None],
    "dtype": DTYPE,
}
INDEX = [None, "a", [[9, 0]], [[0, -1]], [[0, 0], [0, 0]], [0, 0], [[0.5, 0.0]], torch.zeros(0, 2)]
BLOCK_SIZE = [None, 0, 8, 17, True, (16,), (16, 8), "16", 16.0]

# constructor, settings that fit, wrong values by name, what the messages begin with
LAYERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], dict[str, list[Any]]]] = {
    "LoRALinear": (lk.nn.LoRALinear.from_linear, {}, {**LORA, "lora_bias": FLAG}),
    "DoRALinear": (
        lk.nn.DoRALinear.from_linear,
        {},
        {**LORA, "dropout_base": FLAG, "detach_norm": FLAG, "lora_bias": [True]},
    ),
    "BlockSparseLinear": (
        lk.nn.BlockSparseLinear.from_linear,
        {"block_index": [[0, 0]], "block_size": 16},
        {"block_index": INDEX, "block_size": BLOCK_SIZE, "dtype": DTYPE},
    ),
    "MultiLoRALinear": (
        lk.nn.MultiLoRALinear.from_linear,
        {"ranks": (2, 3)},
        {
            "ranks": [None, 3, (0,), (2.0,), ("2",), ()],
            "alpha": ALPHA,
            "rslora": FLAG,
            "dora": FLAG,
            "dropout": [None, "a", NAN, 1.0, (0.1,), (0.1, 1.0), (0.1, "b")],
            "init": ["svd", None],
            "dtype": DTYPE,
            "slices": [(3, 4), "ab", (24.0, 8.0), (40, -8)],
        },
    ),
}
CALLED_OTHERWISE = {"ranks": "r(anks)?", "lora_bias": "lora_bias"}


def _cases() -> Iterator[Any]:
    for name, (_, _, wrong) in LAYERS.items():
        for setting, values in wrong.items():
            for value in values:
                yield pytest.param(name, setting, value, id=f"{name}-{setting}-{value!r:.40}")


@pytest.mark.parametrize(("name", "setting", "value"), list(_cases()))
def test_a_wrong_setting_is_refused_by_name(name: str, setting: str, value: Any) -> None:
    make, fitting, _ = LAYERS[name]
    linear = nn.Linear(16, 32)
    before = linear.weight.detach().clone()
    said = CALLED_OTHERWISE.get(setting, setting)
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: expected .*\b{said}\b"):
        make(linear, **{**fitting, setting: value})
    assert linear.weight.requires_grad and linear.bias.requires_grad and torch.equal(linear.weight, before)


@pytest.mark.parametrize("name", LAYERS)
def test_the_settings_that_fit_are_taken(name: str) -> None:
    make, fitting, _ = LAYERS[name]
    make(nn.Linear(16, 32), **fitting)
