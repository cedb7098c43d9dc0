"""Flower's grid, message by message in this process: what an engine does, without the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity


class InProcessGrid:
    """Nodes 1 to n, each with a context of its own.

    Args:
        spoil: (node, round, reply) -> what arrives in place of a client's reply; None: nothing.
    """

    def __init__(
        self, app: ClientApp, nodes: int, spoil: Callable[[int, int, Message], Message | None] | None = None
    ) -> None:
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 0  # which a message is made with
        self.app, self.spoil = app, spoil
        self.contexts = {
            node: Context(0, node, {"partition-id": node - 1, "num-partitions": nodes}, RecordDict(), {})
            for node in range(1, nodes + 1)
        }
        self.asked: list[Message] = []

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append(message)
            message.metadata.__dict__["_message_id"] = f"{len(self.asked)}"
            try:
                reply: Any = self.app(message, self.contexts[node])
            except Exception as error:
                reply = Message(Error(0, str(error)), reply_to=message)
            if self.spoil is not None:
                reply = self.spoil(node, int(message.content["config"]["server-round"]), reply)
            if reply is not None:
                replies.append(reply)
        return replies
