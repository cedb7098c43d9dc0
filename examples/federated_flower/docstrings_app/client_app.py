"""A library's side."""

from lowrank_kernels.integrations.flower import client_app

from .task import config, fit, library_of, load

app = client_app(load, lambda context: config(int(context.run_config["rank"])), fit, name=library_of)
