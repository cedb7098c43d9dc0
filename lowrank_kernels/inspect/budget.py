"""The budget of compiled kernels: what every variant may use at most, checked in beside the tests.

Regenerate with ``lrk inspect --write-budget tests/proof/budget.json`` and read the difference before committing it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .binaries import MATRIX_KINDS
from .compile import Compiled
from .triton_internals import TRITON_VERSION

REGENERATE = "lrk inspect --write-budget tests/proof/budget.json"


def entry(compiled: Compiled) -> dict[str, Any]:
    """What the budget holds of one variant."""
    matrix = {kind: compiled.count(kind) for kind in MATRIX_KINDS if compiled.count(kind)}
    shared = compiled.shared_bytes
    return {"registers": compiled.registers, "spills": compiled.spills, "shared": shared, "matrix": matrix}


def write_budget(path: Path, results: Iterable[Compiled]) -> None:
    """One line a variant, sorted, so that a difference reads well; one that two families launch, once."""
    entries = sorted({c.launch.name: entry(c) for c in results}.items())
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in entries)
    path.write_text(f'{{\n "triton": "{TRITON_VERSION}",\n "variants": {{\n{lines}\n }}\n}}\n')


def worse(budget: dict[str, Any], results: Iterable[Compiled]) -> Iterator[str]:
    """How the results fall behind the budget: more registers, spills or shared memory, fewer matrix instructions
    or other ones, and variants that only one of them has.

    Another Triton allocates registers differently: then only the kinds of matrix instructions are compared.
    """
    variants, same_triton = budget["variants"], budget["triton"] == TRITON_VERSION
    seen = set()
    for compiled in results:
        name = compiled.launch.name
        seen.add(name)
        if name not in variants:
            yield f"{name}: not in the budget"
            continue
        now, then = entry(compiled), variants[name]
        if now["matrix"].keys() != then["matrix"].keys():
            yield f"{name}: matrix instructions {now['matrix']}, budget {then['matrix']}"
        if not same_triton:
            continue
        for what in ("registers", "spills", "shared"):
            if now[what] > then[what]:
                yield f"{name}: {what} {now[what]}, budget {then[what]}"
        for kind, count in then["matrix"].items():
            if now["matrix"].get(kind, 0) < count:
                yield f"{name}: {now['matrix'].get(kind, 0)} {kind}, budget {count}"
    archs = {name.split()[0] for name in seen}
    for name in variants:
        if name not in seen and name.split()[0] in archs:
            yield f"{name}: in the budget, and no launch asks for it any more"
