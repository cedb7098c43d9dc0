"""The grouped C++ kernels beside `lora_linear`'s, called on one segment after another, where segments are long.

    python benchmarks/grouped_beside_lora.py

All take turns with the base product, `torch.nn.functional.linear`, and figures are ratios of medians to its. Pairs
compute the same sums. On a processor with AMX, and in bfloat16, `lora_linear`'s kernels use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cost_over_frozen import conditions

import lowrank_kernels as lk
from lowrank_kernels import _extension
from lowrank_kernels.bench import interleaved

WIDTH, RANK = 2048, 16


def candidates(dtype: torch.dtype, rows: int, adapters: int) -> dict[str, Callable[[], Any]]:
    ops = torch.ops.lowrank_kernels
    x, y = torch.randn(rows, WIDTH).to(dtype), torch.randn(rows, WIDTH).to(dtype)
    weight = (torch.randn(WIDTH, WIDTH) / WIDTH**0.5).to(dtype)
    stack = lk.LoRAStack.from_factors(
        ((torch.randn(RANK, WIDTH) / WIDTH**0.5).to(dtype), torch.randn(WIDTH, RANK).to(dtype), 1.0)
        for _ in range(adapters)
    )
    plan = lk.plan_batch(torch.arange(adapters).repeat_interleave(rows // adapters), adapters)
    order, bounds, tiles = (t[0] for t in plan[1:])
    p = ops.multi_lora_down(x, stack.lora_a, stack.table, RANK, order, tiles, None, None)
    segments = [
        (slice(i * rows // adapters, (i + 1) * rows // adapters), slice(i * RANK, (i + 1) * RANK))
        for i in range(adapters)
    ]
    half = p.to(dtype)
    return {
        "base": lambda: torch.nn.functional.linear(x, weight),
        "down": lambda: ops.multi_lora_down(x, stack.lora_a, stack.table, RANK, order, tiles, None, None),
        "lora down": lambda: [ops.lora_down(x[m], stack.lora_a[r], False) for m, r in segments],
        "up": lambda: ops.multi_lora_up_(
            y, p, stack.lora_b, stack.table, stack.scalings, order, tiles, None, None, None, None, None, None
        ),
        "lora up": lambda: [ops.lora_up_(y[m], half[m], stack.lora_b[r], False) for m, r in segments],
        "grad": lambda: ops.multi_lora_grad(
            x, p, stack.table, stack.scalings, order, bounds, None, None, None, adapters * RANK, dtype
        ),
        "lora grad": lambda: [ops.lora_grad(x[m], half[m], None, 1.0, False, None, 0.0, dtype) for m, _ in segments],
    }


def main() -> None:
    if not _extension.available():
        raise SystemExit(_extension.reason())
    torch.set_num_threads(2)
    torch.manual_seed(0)
    print(conditions(), _extension.cpu_isa())
    for dtype in (torch.bfloat16, torch.float32):
        for rows, adapters in ((256, 1), (1024, 1), (1024, 8)):
            found = interleaved(candidates(dtype, rows, adapters), 4.0, torch.device("cpu"))
            base = found.pop("base").median
            ratios = ", ".join(f"{name} {sample.median / base:.2f}" for name, sample in found.items())
            print(f"{str(dtype).removeprefix('torch.')}, {rows} rows, {adapters} adapters: {ratios}", flush=True)


if __name__ == "__main__":
    main()
