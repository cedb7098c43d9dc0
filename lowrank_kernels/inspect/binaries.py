"""What a compiled kernel is made of, read from its assembly and its binary with the tools that Triton carries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

from .triton_internals import nvidia_tool

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

# Kinds of instruction, as PTX and AMD's assembly call them. NVIDIA's carry the name of the machine instruction that
# ptxas makes of each: wgmma is HGMMA, mma.sync is HMMA.
_NVIDIA_KINDS = {
    "HGMMA": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma\b",
    "HMMA": r"mma\.sync",
    "TMA": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]",
    "atomic": r"(?:atom|red)\.(?![\w.]*shared)|cp\.reduce\.async",
    "shared load": r"ld\.shared|ldmatrix",
    "shared store": r"st\.shared|stmatrix",
    "global load": r"ld\.global",
    "global store": r"st\.global",
    "barrier": r"bar(?:rier)?\.",
}
_AMD_KINDS = {
    "MFMA": r"v_mfma",
    "cp.async": r"(?:global|buffer)_load_lds",
    "atomic": r"(?:global|buffer|flat)_atomic",
    "shared load": r"ds_read",
    "shared store": r"ds_write",
    "global load": r"(?:global|buffer|flat)_load_(?!lds)",
    "global store": r"(?:global|buffer|flat)_store",
    "barrier": r"s_barrier",
}
MATRIX_KINDS = ("HGMMA", "tcgen05", "HMMA", "MFMA")


@dataclass(frozen=True)
class BinaryFacts:
    """Registers a thread (on AMD vector and accumulation registers together), spilled bytes a thread, and how many
    instructions of each kind there are."""

    registers: int
    spills: int
    instructions: dict[str, int]


def _count(assembly: str, kinds: dict[str, str]) -> dict[str, int]:
    """Statements of each kind; a statement starts a line, after a predicate at most."""
    return {kind: len(re.findall(rf"^\s*(?:@!?%\w+\s+)?(?:{p})", assembly, re.MULTILINE)) for kind, p in kinds.items()}


def nvidia_facts(ptx: str, cubin: bytes) -> BinaryFacts:
    """Facts of an NVIDIA kernel: instructions from its PTX, resources from the binary, by ``cuobjdump``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia_tool("cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    resources = _RESOURCES.search(text)
    if resources is None:
        raise RuntimeError("cuobjdump printed no resource usage; its format may have changed")
    registers, stack, _, local = (int(n) for n in resources.groups())
    return BinaryFacts(registers, stack + local, _count(ptx, _NVIDIA_KINDS))


def amdgcn_facts(assembly: str) -> BinaryFacts:
    """Facts of an AMD kernel, from its assembly text and the metadata at its end."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    # Scalar registers spill into lanes of vector registers, which is no memory traffic.
    spills = max(4 * field("vgpr_spill_count"), field("private_segment_fixed_size"))
    # .vgpr_count holds vector and accumulation registers together: they come from one file.
    return BinaryFacts(field("vgpr_count"), spills, _count(assembly, _AMD_KINDS))
