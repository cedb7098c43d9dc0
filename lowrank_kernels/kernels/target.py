"""What a tile rule may know of a device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Target:
    """A device, as far as tile choices depend on it.

    Attributes:
        arch: "sm_80", "sm_90", "sm_100", "sm_120", "gfx942", …; "interpreter" on a CPU.
        num_sms: processors that can each run at least one program at a time.
        shared_bytes: shared memory that one program may use.
        tma: tensor descriptors are copied by hardware.
        copy_bytes_per_s, matrix_flops_per_s: ceilings of the roofline (half precision, dense).
    """

    arch: str
    num_sms: int
    shared_bytes: int
    tma: bool
    copy_bytes_per_s: float
    matrix_flops_per_s: float


# Ceilings: sm_90 as measured on an H100 (copy, bfloat16 matrix product); the others are the vendors' data-sheet peaks
# times the share of its data sheet that the H100 reached (0.90 of 3.35 TB/s, 0.81 of 989 TFLOP/s).
TARGETS = {
    t.arch: t
    for t in (
        Target("sm_80", 108, 166912, False, 1.8e12, 250e12),
        Target("sm_86", 82, 101376, False, 0.84e12, 115e12),
        Target("sm_89", 128, 101376, False, 0.9e12, 134e12),
        Target("sm_90", 132, 232448, True, 3.0e12, 798e12),
        Target("sm_100", 148, 232448, True, 7.2e12, 1820e12),
        Target("sm_120", 170, 101376, True, 1.6e12, 170e12),
        Target("gfx942", 304, 65536, False, 4.8e12, 1050e12),
        Target("interpreter", 4, 232448, False, 3.0e12, 798e12),
    )
}


def _known_arch(name: str, capability: tuple[int, int]) -> str:
    """The listed target nearest below a device: tile choices for it are right there too."""
    if name.startswith("gfx"):
        return "gfx942"
    major, minor = capability
    if major == 8:
        return {0: "sm_80", 9: "sm_89"}.get(minor, "sm_86")
    return "sm_120" if major >= 12 else "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_86"


@cache
def target_of(device: torch.device) -> Target:
    """The target of a torch device; its own processor count where it has one."""
    if device.type != "cuda":
        return TARGETS["interpreter"]
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    known = TARGETS[_known_arch(name, (properties.major, properties.minor))]
    return Target(
        known.arch,
        properties.multi_processor_count,
        known.shared_bytes,
        known.tma,
        known.copy_bytes_per_s,
        known.matrix_flops_per_s,
    )
