"""What a compiled kernel is made of, read from its machine code with the tools that Triton carries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass

from .triton_internals import nvidia_tool

_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")

# Kinds of instruction, by what the disassembler calls them.
_NVIDIA_KINDS = {
    "HGMMA": re.compile(r"[HIQ]GMMA"),
    "tcgen05": re.compile(r"UTC\w*MMA"),
    "HMMA": re.compile(r"[HIQ]MMA"),
    "TMA": re.compile(r"UTMA(LDG|STG)"),
    "cp.async": re.compile(r"LDGSTS"),
    # Of global memory: in shared memory the compiler has its own, to hand out tensor memory.
    "atomic": re.compile(r"(ATOM|ATOMG|RED|REDG|UTMAREDG)"),
    "local": re.compile(r"(LDL|STL)"),
    "shared load": re.compile(r"(LDS|LDSM)"),
    "shared store": re.compile(r"(STS|STSM)"),
    "global load": re.compile(r"LDG"),
    "global store": re.compile(r"STG"),
    "barrier": re.compile(r"BAR"),
}
_AMD_KINDS = {
    "MFMA": re.compile(r"v_mfma\w*"),
    "cp.async": re.compile(r"(global|buffer)_load_lds\w*"),
    "atomic": re.compile(r"(global|buffer|flat)_atomic\w*"),
    "local": re.compile(r"scratch_(load|store)\w*"),
    "shared load": re.compile(r"ds_read\w*"),
    "shared store": re.compile(r"ds_write\w*"),
    "global load": re.compile(r"(global|buffer|flat)_load(?!_lds)\w*"),
    "global store": re.compile(r"(global|buffer|flat)_store\w*"),
    "barrier": re.compile(r"s_barrier"),
}
MATRIX_KINDS = ("HGMMA", "tcgen05", "HMMA", "MFMA")


@dataclass(frozen=True)
class BinaryFacts:
    """Registers a thread (on AMD vector and accumulation registers together), spilled bytes a thread, and how many
    instructions of each kind there are."""

    registers: int
    spills: int
    instructions: dict[str, int]


def _count(opcodes: list[str], kinds: dict[str, re.Pattern[str]]) -> dict[str, int]:
    seen = Counter(opcodes)
    return {kind: sum(n for opcode, n in seen.items() if pattern.fullmatch(opcode)) for kind, pattern in kinds.items()}


def cubin_facts(cubin: bytes) -> BinaryFacts:
    """Facts of an NVIDIA binary, from ``cuobjdump``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia_tool("cuobjdump"), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    resources = _RESOURCES.search(text)
    if resources is None:
        raise RuntimeError("cuobjdump printed no resource usage; its format may have changed")
    registers, stack, _, local = (int(n) for n in resources.groups())
    return BinaryFacts(registers, stack + local, _count(_SASS_LINE.findall(text), _NVIDIA_KINDS))


def amdgcn_facts(assembly: str) -> BinaryFacts:
    """Facts of an AMD kernel, from its assembly text and the metadata at its end."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found.group(1)) if found else 0

    opcodes = re.findall(r"^\s+([a-z]\w+)\b", assembly, re.MULTILINE)
    # Scalar registers spill into lanes of vector registers, which is no memory traffic.
    spills = max(4 * field("vgpr_spill_count"), field("private_segment_fixed_size"))
    # .vgpr_count holds vector and accumulation registers together: they come from one file.
    return BinaryFacts(field("vgpr_count"), spills, _count(opcodes, _AMD_KINDS))
