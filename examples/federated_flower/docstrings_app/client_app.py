"""A library's side."""

from flwr.clientapp import ClientApp

from lowrank_kernels.integrations.flower import client_app

from .task import config, fit, library_of, load


def app_for(rank: int | None = None) -> ClientApp:
    """The client, with layers of this rank, or of the run's."""
    return client_app(load, lambda context: config(rank or int(context.run_config["rank"])), fit, name=library_of)


app = app_for()
