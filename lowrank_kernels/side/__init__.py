"""Side paths: narrow networks beside frozen layers, which gradients need not pass."""

from .folder import load_sherl, save_sherl
from .sherl import SHERLConfig, SideFeature, SideMerge, SideStack, late_targets, sherl

__all__ = ["SHERLConfig", "SideFeature", "SideMerge", "SideStack", "late_targets", "load_sherl", "save_sherl", "sherl"]
