"""Federated low-rank tuning on Flower: a strategy for each rule of ``lowrank_kernels.federated``, and the client's app.

The server sends factors, the clients train them with this package's layers, and nothing of the size of W travels. What
changes W for all clients (FedEx-LoRA's residuals, Fed-RAC-LoRA's merges) goes to each client once, as factors, and
stays in its Flower context.
"""

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise ImportError(
        "lowrank_kernels.integrations.flower: expected Flower 1.42; pip install 'lowrank_kernels[federated]'"
    ) from error

from .adapter import assemble
from .client import client_app
from .privacy import Privacy
from .strategies import (
    STRATEGIES,
    FactorFedAvg,
    FeDeRA,
    FedExLoRA,
    FedRACLoRA,
    FFALoRA,
    FlexLoRA,
    LowRankStrategy,
    SLoRA,
)

__all__ = [
    "STRATEGIES",
    "FFALoRA",
    "FactorFedAvg",
    "FeDeRA",
    "FedExLoRA",
    "FedRACLoRA",
    "FlexLoRA",
    "LowRankStrategy",
    "Privacy",
    "SLoRA",
    "assemble",
    "client_app",
]
