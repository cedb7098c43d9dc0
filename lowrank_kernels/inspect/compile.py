"""Ahead-of-time compilation of kernel launches, with no device, and what the binaries say."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import triton
from triton.compiler import ASTSource

from ..kernels.roofline import launch_seconds
from ..kernels.target import TARGETS
from .binaries import MATRIX_KINDS, amdgcn_facts, nvidia_facts
from .launches import Launch
from .occupancy import occupancy
from .registry import OpFamily
from .triton_internals import gpu_target


@dataclass(frozen=True)
class Compiled:
    """A launch and what its compiler made of it; ``error`` when it made nothing.

    Attributes:
        registers, spills: a thread's registers, and the bytes that it spills.
        shared_bytes: shared memory of a program.
        tensor_memory: tensor-memory columns of a program (sm_100).
        occupancy: resident warps over the most possible.
        instructions: how many there are of each kind (``binaries``).
    """

    launch: Launch
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    tensor_memory: int = 0
    occupancy: float = 0.0
    instructions: dict[str, int] | None = None
    binary: bytes = b""
    error: str | None = None

    def count(self, kind: str) -> int:
        return (self.instructions or {}).get(kind, 0)

    @property
    def matrix(self) -> str:
        """Its matrix instructions, as "HGMMA 8"; "-" without any."""
        found = [f"{kind} {self.count(kind)}" for kind in MATRIX_KINDS if self.count(kind)]
        return ", ".join(found) or "-"


def compile_launch(launch: Launch) -> Compiled:
    """Compile one launch in this process. The compiler's errors are returned, its crashes are not caught."""
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), dict(launch.attributes))
    try:
        binary = triton.compile(source, target=gpu_target(launch.arch), options=dict(launch.options))
    except Exception as error:
        cause = error.__cause__ or error
        last = str(cause).strip().splitlines() or [type(cause).__name__]
        return Compiled(launch, error=f"{type(error).__name__}: {last[-1]}")
    if "cubin" in binary.asm:
        code = binary.asm["cubin"]
        facts = nvidia_facts(binary.asm["ptx"], code)
    else:
        code = binary.asm["hsaco"]
        facts = amdgcn_facts(binary.asm["amdgcn"])
    shared = binary.metadata.shared
    tensor_memory = getattr(binary.metadata, "tmem_size", None) or 0
    return Compiled(
        launch,
        facts.registers,
        facts.spills,
        shared,
        tensor_memory,
        occupancy(launch.arch, binary.metadata.num_warps, facts.registers, shared, tensor_memory),
        facts.instructions,
        code,
    )


def _pool(workers: int) -> ProcessPoolExecutor:
    # Fresh interpreters: a forked one would inherit the locks of torch's threads.
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _alone(launch: Launch) -> Compiled:
    with _pool(1) as pool:
        try:
            return pool.submit(compile_launch, launch).result()
        except BrokenProcessPool:
            return Compiled(launch, error="the compiler aborted")


def compile_launches(
    launches: Iterable[Launch], workers: int = 2, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Compiled]:
    """Compile launches in ``workers`` processes, equal variants once. A launch that kills the compiler is named.

    Returns:
        One result a launch, in their order.
    """
    launches = list(launches)
    distinct = {launch.variant: launch for launch in reversed(launches)}
    done: dict[tuple[object, ...], Compiled] = {}
    suspects: list[Launch] = []
    with _pool(workers) as pool:
        waiting: dict[Future[Compiled], Launch] = {pool.submit(compile_launch, x): x for x in distinct.values()}
        while waiting:
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                launch = waiting.pop(future)
                try:
                    done[launch.variant] = future.result()
                except BrokenProcessPool:
                    suspects.append(launch)
            progress(len(done), len(distinct))
    for launch in suspects:  # one of them took the others down with it
        done[launch.variant] = _alone(launch)
        progress(len(done), len(distinct))
    return [done[launch.variant] for launch in launches]


_NEWEST = {"sm_90": "HGMMA", "sm_100": "tcgen05", "gfx942": "MFMA"}


@dataclass(frozen=True)
class Prediction:
    """Bytes and FLOPs of a launch, and the seconds that the target's roofline gives them."""

    nbytes: int
    flops: float
    seconds: float


def predict(family: OpFamily, launch: Launch) -> Prediction:
    """Each tensor argument once (twice where it is updated in place), the products' FLOPs, and the roofline's time."""
    work = family.work[launch.kernel]
    tensors = launch.tensors
    nbytes = sum(t.nbytes * (2 if name in work.in_place else 1) for name, t in tensors.items())
    flops = work.flops({**launch.arguments, **{k: v for k, v in tensors.items()}})
    itemsize = min((t.dtype.itemsize for t in tensors.values() if t.dtype.is_floating_point), default=4)
    return Prediction(nbytes, flops, launch_seconds(TARGETS[launch.arch], nbytes, flops, itemsize))


def faults(family: OpFamily, compiled: Compiled, *, spills: bool = True) -> Iterator[str]:
    """Faults that no variant may have, whatever the budget says. ``spills=False`` allows spilled registers."""
    launch, target = compiled.launch, TARGETS[compiled.launch.arch]
    if compiled.error is not None:
        yield f"{launch.name}: {compiled.error}"
        return
    if spills and compiled.spills:
        yield f"{launch.name}: spills {compiled.spills} bytes a thread ({compiled.registers} registers)"
    if compiled.shared_bytes > target.shared_bytes:
        yield f"{launch.name}: {compiled.shared_bytes} bytes of shared memory, {target.shared_bytes} allowed"
    if compiled.count("atomic"):
        yield f"{launch.name}: {compiled.count('atomic')} atomics in global memory"
    if not compiled.occupancy:
        yield f"{launch.name}: does not fit on a processor"
    work = family.work[launch.kernel]
    first = next((t for t in launch.tensors.values() if t.dtype.is_floating_point), None)
    if work.matrix and first is not None and first.dtype.itemsize == 2:
        newest = _NEWEST.get(launch.arch, "HMMA")
        if compiled.matrix == "-":
            yield f"{launch.name}: no matrix instructions"
        elif work.main and not compiled.count(newest):
            yield f"{launch.name}: {compiled.matrix} and no {newest}"
        if launch.arguments.get("USE_TMA") and not compiled.count("TMA"):
            yield f"{launch.name}: descriptors, and no TMA copies"
