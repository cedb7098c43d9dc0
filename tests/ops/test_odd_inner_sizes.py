"""bfloat16 with an odd inner size never reaches the library's product where the processor has AMX.

oneDNN reads an element past each row there and multiplies it by zero, so that a NaN beside a row gets into it (torch
2.14.1). What runs is read from the profiler; on other processors AMX is only claimed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels import tuned

dense_weights = importlib.import_module("lowrank_kernels.weights.dense")  # beside the function of that name
BF16 = torch.bfloat16
M, K, N, R = 12, 33, 49, 7


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dense_weights, "_has_amx", lambda: True)
    tuned.forget()
    yield
    tuned.forget()


def beside_nan(*shape: int) -> torch.Tensor:
    """A matrix whose rows have NaN after them."""
    memory = torch.full((*shape[:-1], shape[-1] + 1), float("nan"), dtype=BF16)
    memory[..., :-1] = torch.randn(shape)
    return memory[..., :-1]


def calls() -> dict[str, object]:
    torch.manual_seed(0)
    x, w, dy = beside_nan(M, K), beside_nan(N, K), torch.randn(M, N).to(BF16)
    a, b, m = torch.randn(R, K).to(BF16), torch.randn(N, R).to(BF16), torch.rand(N)
    stack = lk.LoRAStack.from_factors([(a, b, 1.0), (a[:3], b[:, :3], 1.0)])
    dora = lk.LoRAStack.from_factors([(a, b, 1.0, m)])
    ids, none = torch.arange(M) % 2, torch.zeros(M, dtype=torch.int64)
    index = torch.tensor([[0, 0], [3, 2]], dtype=torch.int32)
    trained = {"lora_a": a.clone().requires_grad_(), "lora_b": b.clone().requires_grad_()}
    blocks = torch.zeros(2, 16, 16, requires_grad=True)
    drop = {"dropout_p": 0.2, "dropout_seed": 3}
    for t in (stack, dora):
        t.lora_a.requires_grad_()
        t.lora_b.requires_grad_()
    return {
        "lora": lambda: lk.lora_linear(x, w, a, b),
        "lora, trained": lambda: lk.lora_linear(x.requires_grad_(), w, **trained).backward(dy),
        "lora, dropout": lambda: lk.lora_linear(x.requires_grad_(), w, **trained, **drop).backward(dy),
        "dora": lambda: lk.dora_linear(x, w, a, b, m),
        "dora, trained": lambda: lk.dora_linear(x.requires_grad_(), w, **trained, magnitude=m).backward(dy),
        "dora, base dropped": lambda: lk.dora_linear(
            x.requires_grad_(), w, **trained, magnitude=m, **drop, dropout_base=True
        ).backward(dy),
        "many": lambda: lk.multi_lora_linear(x, w, stack, ids),
        "many, trained": lambda: lk.multi_lora_linear(x.requires_grad_(), w, stack, ids).backward(dy),
        "many, dora": lambda: lk.multi_lora_linear(x.requires_grad_(), w, dora, none).backward(dy),
        "blocks": lambda: lk.block_sparse_linear(x.requires_grad_(), w, blocks, index).backward(dy),
    }


@pytest.mark.parametrize("choice", [None, {"base": "own"}, {"base": "library"}, {"eager": True}])
@pytest.mark.parametrize("name", list(calls()))
@pytest.mark.usefixtures("amx")
def test_the_library_multiplies_none_of_them(name: str, choice: tuned.Fields | None) -> None:
    ops = [f"{op}{way}" for op in ("lora_linear", "dora_linear", "multi_lora_linear") for way in ("", "_backward")]
    with ExitStack() as stack:
        for op in ops:
            stack.enter_context(tuned.forcing(op))(choice)
        with torch.profiler.profile(record_shapes=True) as profile:
            calls()[name]()  # type: ignore[operator]
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    products = [
        e for e in events if e.name() in ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear")
    ]
    unsafe = [(e.name(), e.shapes()) for e in products if "c10::BFloat16" in e.dtypes()]
    odd = [(op, shapes) for op, shapes in unsafe if any(s and s[-1] % 2 for s in shapes[:2])]
    assert not odd


def test_elsewhere_the_library_may() -> None:
    """The test above sees a product where there is one."""
    with torch.profiler.profile(record_shapes=True) as profile:
        torch.nn.functional.linear(torch.randn(3, 5).to(BF16), torch.randn(4, 5).to(BF16))
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    assert any(e.name() == "aten::linear" and "c10::BFloat16" in e.dtypes() for e in events)
