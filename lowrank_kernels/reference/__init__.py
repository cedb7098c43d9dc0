"""Pure-PyTorch oracles: the formulas themselves, forward and explicit backward, in any float dtype."""

from .dora import dora_column_scale_ref, dora_linear_backward_ref, dora_linear_ref, dora_weight_norm_ref
from .dropout import dropout_keep_mask_ref
from .lora import lora_linear_backward_ref, lora_linear_ref
from .merge import merge_lora_ref, round_stochastically_ref

__all__ = [
    "dora_column_scale_ref",
    "dora_linear_backward_ref",
    "dora_linear_ref",
    "dora_weight_norm_ref",
    "dropout_keep_mask_ref",
    "lora_linear_backward_ref",
    "lora_linear_ref",
    "merge_lora_ref",
    "round_stochastically_ref",
]
