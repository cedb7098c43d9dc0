"""Kernel variants that a tile rule can choose are compiled for every target and held to their budget.

`make test` compiles each kernel for every target, and each type and each constant of a kernel for one target at least;
`make nightly` compiles every variant for every target.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lowrank_kernels.cli.inspect import json_entries
from lowrank_kernels.families import NAMES
from lowrank_kernels.inspect.binaries import MATRIX_KINDS
from lowrank_kernels.inspect.budget import REGENERATE, worse
from lowrank_kernels.inspect.compile import Compiled, compile_launches, faults, predict
from lowrank_kernels.inspect.launches import Launch, recorded_launches
from lowrank_kernels.inspect.registry import ARCHITECTURES, family
from lowrank_kernels.inspect.triton_internals import TRITON_VERSION

BUDGET = json.loads(Path(__file__).with_name("budget.json").read_text())


@cache
def _launches(arch: str) -> tuple[tuple[str, Launch], ...]:
    """(family, launch) of every variant on a target."""
    return tuple((name, launch) for name in NAMES for launch in recorded_launches(family(name), arch))


@cache
def _covering() -> dict[str, list[tuple[str, Launch]]]:
    """By target, each kernel, and those launches that bring a type or a constant that no target has compiled yet."""
    chosen: dict[str, list[tuple[str, Launch]]] = {arch: [] for arch in ARCHITECTURES}
    seen: set[tuple[str, ...]] = set()
    for turn in range(max(len(_launches(arch)) for arch in ARCHITECTURES)):  # the targets in turn
        for arch in ARCHITECTURES:
            if turn >= len(_launches(arch)):
                continue
            name, launch = _launches(arch)[turn]
            settings = {(arch, launch.kernel)}
            for kind in ("signature", "constants"):
                settings |= {(launch.kernel, kind, f"{k}={v}") for k, v in getattr(launch, kind).items()}
            if settings - seen:
                chosen[arch].append((name, launch))
                seen |= settings
    return chosen


@cache
def _covering_results() -> dict[str, list[tuple[str, Compiled]]]:
    flat = [(arch, name, launch) for arch, chosen in _covering().items() for name, launch in chosen]
    found: dict[str, list[tuple[str, Compiled]]] = {arch: [] for arch in ARCHITECTURES}
    for (arch, name, _), result in zip(flat, compile_launches([launch for *_, launch in flat]), strict=True):
        found[arch].append((name, result))
    return found


@cache
def _every_result(arch: str) -> list[tuple[str, Compiled]]:
    results = compile_launches([launch for _, launch in _launches(arch)])
    return [(name, result) for (name, _), result in zip(_launches(arch), results, strict=True)]


def _compiled(arch: str, every: bool = False) -> list[tuple[str, Compiled]]:
    """(family, result) of the covering variants of a target, or of all; they compile together."""
    return _every_result(arch) if every else _covering_results()[arch]


def _budget_of(arch: str, every: bool) -> dict[str, Any]:
    names = {result.launch.name for _, result in _compiled(arch, every)}
    held = {k: v for k, v in BUDGET["variants"].items() if k.startswith(f"{arch} ") and (every or k in names)}
    return {**BUDGET, "variants": held}


covering_and_all = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.nightly)])


@covering_and_all
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_variant_is_refused_spills_overflows_or_misses_the_matrix_units(arch: str, every: bool) -> None:
    """Tiles are chosen so that this Triton spills nowhere; an older one spills a few words here and there."""
    spills = BUDGET["triton"] == TRITON_VERSION
    found = [fault for name, result in _compiled(arch, every) for fault in faults(family(name), result, spills=spills)]
    assert not found, "\n".join(found)


@covering_and_all
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_variant_gets_worse(arch: str, every: bool) -> None:
    found = list(worse(_budget_of(arch, every), [result for _, result in _compiled(arch, every)]))
    assert not found, "\n".join([*found, f"If this is meant, regenerate the budget: {REGENERATE}"])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_budget_names_what_is_launched(arch: str) -> None:
    first = {launch.variant: launch.name for _, launch in reversed(_launches(arch))}  # of what families share
    launched = set(first.values())
    named = {name for name in BUDGET["variants"] if name.startswith(f"{arch} ")}
    assert launched == named, f"regenerate the budget: {REGENERATE}"


def test_the_covering_variants_have_every_kernel_and_setting() -> None:
    def settings(launches: Iterable[tuple[str, Launch]]) -> set[tuple[str, str]]:
        return {(x.kernel, f"{k}={v}") for _, x in launches for k, v in (*x.signature.items(), *x.constants.items())}

    everything = [launch for arch in ARCHITECTURES for launch in _launches(arch)]
    assert settings(x for arch in ARCHITECTURES for x in _covering()[arch]) == settings(everything)
    for arch in ARCHITECTURES:
        assert {x.kernel for _, x in _covering()[arch]} == {x.kernel for _, x in _launches(arch)}


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
@covering_and_all
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_lrk_inspect_writes_as_json_is_what_the_budget_holds(arch: str, every: bool) -> None:
    results = [(family(name), result) for name, result in _compiled(arch, every)]
    written = json.loads(json.dumps(list(json_entries(results))))
    held = _budget_of(arch, every)["variants"]
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
        for name, launch in _launches(arch):
            prediction = predict(family(name), launch)
            assert prediction.nbytes > 0 and prediction.seconds > 0, launch.name


def test_one_kernel_forward_counts_its_tensors_once() -> None:
    (launch,) = (
        launch
        for _, launch in _launches("sm_90")
        if launch.kernel == "_lora_linear_fwd_kernel" and launch.case == "fused M=2048 R=16 bf16"
    )
    M, N, K, R = 2048, 4096, 4096, 16
    prediction = predict(family("lora"), launch)
    assert prediction.nbytes == 2 * (M * K + N * K + M * N + M * R + R * (K + N))
    assert prediction.flops == 2.0 * M * (N * K + R * (K + N))
