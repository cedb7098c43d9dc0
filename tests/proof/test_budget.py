"""Every kernel variant that a tile rule can choose is compiled for every target and held to its budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from lowrank_kernels.cli.inspect import json_entries
from lowrank_kernels.families import NAMES
from lowrank_kernels.inspect.binaries import MATRIX_KINDS
from lowrank_kernels.inspect.budget import REGENERATE, worse
from lowrank_kernels.inspect.compile import Compiled, compile_launches, faults, predict
from lowrank_kernels.inspect.launches import recorded_launches
from lowrank_kernels.inspect.registry import ARCHITECTURES, family
from lowrank_kernels.inspect.triton_internals import TRITON_VERSION

BUDGET = json.loads(Path(__file__).with_name("budget.json").read_text())


@cache
def _compiled(arch: str) -> tuple[tuple[str, Compiled], ...]:
    """(family, result) of every variant on a target; families compile together."""
    launches = [(name, launch) for name in NAMES for launch in recorded_launches(family(name), arch)]
    results = compile_launches([launch for _, launch in launches])
    return tuple((name, result) for (name, _), result in zip(launches, results, strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_variant_is_refused_spills_overflows_or_misses_the_matrix_units(arch: str) -> None:
    """Tiles are chosen so that this Triton spills nowhere; an older one spills a few words here and there."""
    spills = BUDGET["triton"] == TRITON_VERSION
    found = [fault for name, result in _compiled(arch) for fault in faults(family(name), result, spills=spills)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_variant_gets_worse(arch: str) -> None:
    found = list(worse(BUDGET, [result for _, result in _compiled(arch)]))
    assert not found, "\n".join([*found, f"If this is meant, regenerate the budget: {REGENERATE}"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: {"registers": r.registers + 1}, "registers"),
        (lambda r: {"spills": 8}, "spills 8, budget 0"),
        (lambda r: {"shared_bytes": r.shared_bytes + 16}, "shared"),
        (lambda r: {"instructions": {**r.instructions, "HGMMA": r.count("HGMMA") - 1}}, "HGMMA"),
        (lambda r: {"instructions": {**r.instructions, "HGMMA": 0, "HMMA": 9}}, "matrix instructions"),
    ],
)
def test_the_budget_notices(change: Callable[[Compiled], dict[str, object]], words: str) -> None:
    results = [result for _, result in _compiled("sm_90")]
    index = next(i for i, r in enumerate(results) if r.launch.kernel == "_lora_linear_fwd_kernel")
    results[index] = replace(results[index], **change(results[index]))  # type: ignore[arg-type]
    budget = {**BUDGET, "triton": TRITON_VERSION}
    assert any(words in line for line in worse(budget, results))


@pytest.mark.skipif(BUDGET["triton"] != TRITON_VERSION, reason="the budget is of another Triton")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_lrk_inspect_writes_as_json_is_what_the_budget_holds(arch: str) -> None:
    results = [(family(name), result) for name, result in _compiled(arch)]
    written = json.loads(json.dumps(list(json_entries(results))))
    held = {name: values for name, values in BUDGET["variants"].items() if name.startswith(f"{arch} ")}
    assert {e["name"] for e in written} == held.keys()
    for e in written:
        matrix = {kind: count for kind, count in e["instructions"].items() if kind in MATRIX_KINDS and count}
        figures = {"registers": e["registers"], "spills": e["spills"], "shared": e["shared_bytes"], "matrix": matrix}
        assert (e["arch"], figures) == (arch, held[e["name"]]), f"{e['name']}: regenerate the budget: {REGENERATE}"


def test_a_refused_variant_is_a_fault() -> None:
    (name, result), *_ = _compiled("sm_90")
    (fault,) = faults(family(name), replace(result, error="the compiler aborted"))
    assert fault == f"{result.launch.name}: the compiler aborted"


def test_every_kernel_has_a_prediction() -> None:
    for arch in ARCHITECTURES:
        for name, result in _compiled(arch):
            prediction = predict(family(name), result.launch)
            assert prediction.nbytes > 0 and prediction.seconds > 0, result.launch.name


def test_one_kernel_forward_counts_its_tensors_once() -> None:
    (launch,) = (
        r.launch
        for _, r in _compiled("sm_90")
        if r.launch.kernel == "_lora_linear_fwd_kernel" and r.launch.case == "fused M=2048 R=16 bf16"
    )
    M, N, K, R = 2048, 4096, 4096, 16
    prediction = predict(family("lora"), launch)
    assert prediction.nbytes == 2 * (M * K + N * K + M * N + M * R + R * (K + N))
    assert prediction.flops == 2.0 * M * (N * K + R * (K + N))
