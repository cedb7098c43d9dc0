"""bfloat16 and float16 on processors without tile instructions: a LoRA linear beside plain PyTorch.

    python benchmarks/half_without_tiles.py [--json FILE]

Runs itself once for each instruction set, with ours and PyTorch's kernels, MKL and oneDNN held to it. oneDNN is off
where PyTorch asks the processor for more than that before it calls it: AVX-512 FP16 for float16, AVX-512 for bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cost_over_frozen import conditions

from lowrank_kernels import _extension
from lowrank_kernels.bench import OPS, interleaved
from lowrank_kernels.bench.run import call_of

HELD = {
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}
WITH_ONEDNN = {("avx512", "bfloat16")}
SHAPES = ((1, 1024, 1024), (16, 1024, 1024), (64, 1024, 1024), (16, 2048, 2048))


def measure(isa: str) -> list[dict[str, Any]]:
    if _extension.cpu_isa() != isa or torch.backends.cpu.get_cpu_capability().lower() != isa:
        raise SystemExit(f"this processor, or this build, does not run {isa}: {_extension.cpu_isa()}")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    op, rows = OPS["lora_linear"], []
    for dtype in ("bfloat16", "float16"):
        torch.backends.mkldnn.enabled = (isa, dtype) in WITH_ONEDNN
        for tokens, k, n in SHAPES:
            shape = {"M": tokens, "K": k, "N": n, "R": 16}
            inputs = op.make(shape, getattr(torch, dtype), torch.device("cpu"))
            for mode, trained in (("inference", ()), ("training", op.trained)):
                calls = {name: call_of(op.providers[name], inputs, trained) for name in ("plain", "ours")}
                found = interleaved(calls, 1.0, torch.device("cpu"))
                ratio, spread = found["ours"].over(found["plain"])
                times = {f"{name}_us": sample.median * 1e6 for name, sample in found.items()}
                rows.append(
                    {"isa": isa, "dtype": dtype, **shape, "mode": mode, "over_plain": ratio, "spread": spread, **times}
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--isa", choices=HELD, help="of one child")
    args = parser.parse_args()
    if args.isa:
        print(json.dumps(measure(args.isa)))
        return
    rows = []
    for isa, held in HELD.items():
        environment = {**os.environ, **held, "ATEN_CPU_CAPABILITY": isa, "LRK_CPU_ISA": isa, "LRK_TUNE_FILE": ""}
        command = [sys.executable, __file__, "--isa", isa]
        rows += json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)
    for row in rows:
        print(
            f"{row['isa']} {row['dtype']} M={row['M']} K={row['K']} N={row['N']} {row['mode']}: "
            f"plain {row['plain_us']:.0f} us, ours {row['ours_us']:.0f} us"
        )
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
