"""Layers: a frozen linear, embedding or convolution and its correction."""

from .block_sparse import BlockSparseLinear
from .coded import CodedLinear
from .conv import DoRAConv1d, DoRAConv2d, DoRAConv3d, LoRAConv1d, LoRAConv2d, LoRAConv3d
from .dora import DoRALinear
from .embedding import DoRAEmbedding, LoRAEmbedding
from .experts import LoRAExperts
from .lamda import LaMDALinear
from .lora import LoRALayer, LoRALinear
from .multi_lora import MultiLoRALinear, use_adapters
from .svft import SVFTLinear
from .velora import Projecting, VeLoRALinear

__all__ = [
    "BlockSparseLinear",
    "CodedLinear",
    "DoRAConv1d",
    "DoRAConv2d",
    "DoRAConv3d",
    "DoRAEmbedding",
    "DoRALinear",
    "LaMDALinear",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRAExperts",
    "LoRALayer",
    "LoRALinear",
    "MultiLoRALinear",
    "Projecting",
    "SVFTLinear",
    "VeLoRALinear",
    "use_adapters",
]
