"""How many warps a processor can hold of a kernel, from registers, shared and tensor memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """Limits of one streaming multiprocessor (or compute unit); registers are 32 bits, memory in bytes."""

    warps: int
    programs: int
    registers: int
    register_unit: int
    shared_bytes: int
    shared_reserved: int
    warp_size: int = 32
    max_registers: int = 255


# CUDA C++ Programming Guide, table of technical specifications per compute capability; AMD CDNA 3 ISA, section 3.
PROCESSORS = {
    "sm_80": Processor(64, 32, 65536, 256, 167936, 1024),
    "sm_86": Processor(48, 16, 65536, 256, 102400, 1024),
    "sm_89": Processor(48, 24, 65536, 256, 102400, 1024),
    "sm_90": Processor(64, 32, 65536, 256, 233472, 1024),
    "sm_100": Processor(64, 32, 65536, 256, 233472, 1024),
    "sm_120": Processor(48, 32, 65536, 256, 102400, 1024),
    "gfx942": Processor(32, 32, 131072, 512, 65536, 0, warp_size=64, max_registers=512),
}
TENSOR_MEMORY_COLUMNS = 512


def programs_per_processor(
    arch: str, num_warps: int, registers: int, shared_bytes: int, tensor_memory_columns: int = 0
) -> int:
    """How many programs one processor can hold at a time; 0: it cannot hold one."""
    p = PROCESSORS[arch]
    registers_a_warp = -(-max(registers, 1) * p.warp_size // p.register_unit) * p.register_unit
    limits = [p.programs, p.warps // num_warps, p.registers // (registers_a_warp * num_warps)]
    if shared_bytes + p.shared_reserved:
        limits.append(p.shared_bytes // (shared_bytes + p.shared_reserved))
    if tensor_memory_columns:
        limits.append(TENSOR_MEMORY_COLUMNS // tensor_memory_columns)
    return min(limits)


def occupancy(arch: str, num_warps: int, registers: int, shared_bytes: int, tensor_memory_columns: int = 0) -> float:
    """Resident warps over the most that the processor can hold."""
    programs = programs_per_processor(arch, num_warps, registers, shared_bytes, tensor_memory_columns)
    return programs * num_warps / PROCESSORS[arch].warps
