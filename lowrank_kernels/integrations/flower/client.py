"""The client's side: a Flower ClientApp that trains with this package's layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from ...config import LoRAConfig
from ...nn.lora import LoRALayer
from .adapter import assemble, block_layers, factor_layers, ranked, trained_tensors
from .records import record_of, tensors_of

KEPT = "lowrank-kept"
"""Where a client's context keeps what earlier rounds have left."""

Work = Callable[[nn.Module, Context, dict[str, Any]], tuple[int, dict[str, float]]]


def client_app(
    load: Callable[[Context], nn.Module],
    config: LoRAConfig | Callable[[Context], LoRAConfig],
    fit: Work,
    *,
    evaluate: Work | None = None,
    rank: Callable[[Context], int | None] = lambda context: None,
    name: Callable[[Context], str] | None = None,
) -> ClientApp:
    """A ClientApp for any strategy of this package.

    In each round: the base model is loaded, W gets the changes that earlier rounds have left, the layers of ``config``
    get the server's factors, ``fit`` trains what requires a gradient, and that goes back, in float32. An optimizer's
    state does not outlive a round.

    Args:
        load: (context) -> the base model, which is changed in place: a fresh one, or a copy.
        config: the layers, the same as the server's; or (context) -> that, to read the run's settings.
        fit: (model, context, settings) -> (number of examples, metrics). ``settings`` are those of the strategy's
            ``train_config``, with ``server-round``.
        evaluate: the same, to measure the round's model.
        rank: (context) -> the highest rank of this client's layers, such as
            ``lambda context: context.node_config["rank"]``; None: the server's. s stays.
        name: (context) -> what the server's reports call this client; by default "client" and its partition or node.

    The context keeps what changes W, or is shared by all, from round to round. A client that has lost it (it was
    started anew) says so in an error; the server leaves it out of that round and sends it everything in the next.
    """
    app = ClientApp()

    def run(message: Message, context: Context, work: Work) -> tuple[ArrayRecord, MetricRecord]:
        settings = dict(message.content["config"])
        kept = _kept(message, context, settings)
        model = load(context)
        trains = str(settings["trains"])
        own = ranked(model, config(context) if callable(config) else config, rank(context), trains)
        tensors = tensors_of(message.content["arrays"])
        report = assemble(model, own, tensors, kept, trains=trains, cut_by=str(settings["cut-by"]))
        rank_now = {}
        if not block_layers(model):
            layers = factor_layers(model)
            rank_now = {"rank": max(layer.r for layer in layers.values())}
            _check_scalings(layers, settings["scalings"])
        examples, metrics = work(model, context, settings)
        taken = sorted({"num-examples", "rank"} & set(metrics))
        if taken:
            raise ValueError(f"client_app: expected metrics of other names than the client's own, got {taken[0]}")
        trained = record_of(trained_tensors(model))
        report.undo()  # else model and report hold each other, until Python looks for cycles
        return trained, MetricRecord({"num-examples": examples, **rank_now, **metrics})

    @app.train()
    def train(message: Message, context: Context) -> Message:
        trained, metrics = run(message, context, fit)
        content = {
            "arrays": trained,
            "metrics": metrics,
            "client": ConfigRecord({"name": client_name(context, name)}),
        }
        return Message(RecordDict(content), reply_to=message)

    if evaluate is not None:
        measure = evaluate

        @app.evaluate()
        def measured(message: Message, context: Context) -> Message:
            _, metrics = run(message, context, measure)
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _check_scalings(layers: Mapping[str, LoRALayer], expected: Sequence[float]) -> None:
    """Raise ValueError for an s that is not the server's: equal factors would be other changes of W."""
    for (path, layer), s in zip(sorted(layers.items()), expected, strict=True):
        if not math.isclose(layer.scaling, s, rel_tol=1e-9):
            raise ValueError(f"client_app: expected the server's scaling {s} of {path}, got {layer.scaling}")


def client_name(context: Context, name: Callable[[Context], str] | None = None) -> str:
    if name is not None:
        return name(context)
    return f"client {context.node_config.get('partition-id', context.node_id)}"


def _kept(message: Message, context: Context, settings: dict[str, Any]) -> list[dict[str, Tensor]]:
    """What earlier rounds have left, with what this message adds; kept in the context for the next."""
    first, last = int(settings["kept-from"]), int(settings["kept-to"])
    held = {key: array for key, array in context.state.get(KEPT, ArrayRecord()).items() if int(_place(key)) < first}
    if {int(_place(key)) for key in held} != set(range(first)):
        raise ValueError(
            f"client_app: expected the changes of {first} entries in this client's context, which has lost them"
        )
    held |= message.content["kept"]
    context.state[KEPT] = ArrayRecord(held)
    entries: list[dict[str, Tensor]] = [{} for _ in range(last)]
    for key, tensor in tensors_of(context.state[KEPT]).items():
        entries[int(_place(key))][key.partition(":")[2]] = tensor
    return entries


def _place(key: str) -> str:
    return key.partition(":")[0]
