"""Models over several processes: tensor parallelism of adapted models. FSDP2 and DDP need nothing from here."""

from .tensor_parallel import parallelize

__all__ = ["parallelize"]
