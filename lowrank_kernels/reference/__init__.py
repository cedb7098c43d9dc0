"""Pure-PyTorch oracles: the formulas themselves, forward and explicit backward, in any float dtype."""

from .block_sparse import (
    block_adamw_ref_,
    block_sparse_linear_backward_ref,
    block_sparse_linear_ref,
    block_sparse_weight_grad_ref,
    read_blocks_ref,
    write_blocks_ref_,
)
from .conv import lora_conv_ref
from .dora import dora_column_scale_ref, dora_linear_backward_ref, dora_linear_ref, dora_weight_norm_ref
from .dropout import dropout_keep_mask_ref
from .embedding import lora_embedding_ref
from .galore import galore_adam_ref, rotate_moments_ref
from .importance import lora_importance_ref
from .lora import lora_linear_backward_ref, lora_linear_ref
from .magnitude import magnitude_histogram_ref
from .merge import merge_lora_ref, round_stochastically_ref
from .multi_lora import multi_lora_linear_backward_ref, multi_lora_linear_ref
from .svft import svft_linear_backward_ref, svft_linear_ref, svft_matrix_ref
from .velora import (
    velora_linear_ref,
    velora_project_ref,
    velora_reconstruct_ref,
    velora_vector_ref,
    velora_weight_grad_ref,
)

__all__ = [
    "block_adamw_ref_",
    "block_sparse_linear_backward_ref",
    "block_sparse_linear_ref",
    "block_sparse_weight_grad_ref",
    "dora_column_scale_ref",
    "dora_linear_backward_ref",
    "dora_linear_ref",
    "dora_weight_norm_ref",
    "dropout_keep_mask_ref",
    "galore_adam_ref",
    "lora_conv_ref",
    "lora_embedding_ref",
    "lora_importance_ref",
    "lora_linear_backward_ref",
    "lora_linear_ref",
    "magnitude_histogram_ref",
    "merge_lora_ref",
    "multi_lora_linear_backward_ref",
    "multi_lora_linear_ref",
    "read_blocks_ref",
    "rotate_moments_ref",
    "round_stochastically_ref",
    "svft_linear_backward_ref",
    "svft_linear_ref",
    "svft_matrix_ref",
    "velora_linear_ref",
    "velora_project_ref",
    "velora_reconstruct_ref",
    "velora_vector_ref",
    "velora_weight_grad_ref",
    "write_blocks_ref_",
]
