"""A client."""

from lowrank_kernels.integrations.flower import client_app

from .task import CONFIG, base, fit

app = client_app(base, CONFIG, fit)
