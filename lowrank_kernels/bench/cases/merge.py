"""Merging: its benchmark row, and what there is to tune."""

from __future__ import annotations

import lowrank_kernels as lk

from ...kernels import roofline
from ...reference import merge_lora_ref
from .bench import FACTORS, GPU_WIDTHS, REFERENCE, Bench, Tunable, shapes_of
from .lora import lora_inputs

BENCHES = (
    Bench(
        name="merge_lora_",
        shapes=shapes_of((2048, 2048, 16), (4096, 1024, 64), (1024, 4096, 8), (2049, 1000, 7), names="K N R"),
        gpu_shapes=shapes_of(*((k, n, r) for k, n in GPU_WIDTHS for r in (16, 64)), names="K N R"),
        make=lambda s, dtype, device: lora_inputs({"M": 1, **s}, dtype, device),
        providers={
            "plain": lambda i: (
                i["weight"].clone().add_((2.0 * (i["lora_b"].float() @ i["lora_a"].float())).to(i["weight"].dtype))
            ),
            "ours": lambda i, backend="auto": lk.merge_lora_(
                i["weight"].clone(), i["lora_a"], i["lora_b"], scaling=2.0, backend=backend
            ),
        },
        exact=lambda i: merge_lora_ref(i["weight"], i["lora_a"], i["lora_b"], scaling=2.0),
        nbytes=lambda s, size: size * (2 * s["N"] * s["K"] + s["R"] * (s["K"] + s["N"])),
        flops=lambda s: 2.0 * s["N"] * s["K"] * s["R"],
        launches=lambda t, s, dtype: ("", roofline.merge_lora(s["K"], s["N"], s["R"], dtype.itemsize)),
    ),
)

_TUNABLE = (Tunable("merge_lora_", "merge_lora_", FACTORS, (REFERENCE,)),)
TUNABLES = {"cpu": _TUNABLE, "cuda": _TUNABLE}
