"""The server's side: a Flower strategy for each rule."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import PrivacyBudgetExhausted
from flwr.serverapp.strategy import FedAvg, Result
from torch import nn

from ...adapt import adapt
from ...config import LoRAConfig
from ...federated import (
    Factors,
    average,
    fed_avg,
    fed_ex_lora,
    ffa_lora,
    flex_lora,
    random_blocks,
    svd_factors,
)
from ...finite import all_finite
from ...functional import write_blocks_
from ...init import init_factors_
from ...report import Report
from .adapter import (
    BLOCK,
    Layer,
    Tensors,
    assemble,
    cut,
    factor_layers,
    name_a,
    name_b,
    other_trained,
    ranked,
    start_without,
)
from .privacy import Privacy
from .records import bytes_of, record_of, tensors_of

logger = logging.getLogger("flwr")  # Flower's, which its logs of a run are made of
_NOT_LINEAR = ("lora_magnitude_vector", "lora_gate")
"""Tensors whose average is not that of the weights."""


class LowRankStrategy(FedAvg):
    """What all rules share: Flower's sampling, with adapters as named factors, checked, counted and kept on disk.

    A round: sampled clients get the factors, and what they have missed of that which earlier rounds left; each trains
    and sends back what it trained. A client is left out, by name and with the reason, and the round goes on, if it
    reports an error or sends nothing in time, other names, shapes or dtypes than asked for, NaN or Inf, or an update
    longer than ``max_norm``. With no client left, nothing changes.

    Args:
        model: the base; its layers are read, and it is as before afterwards.
        config: the layers. A client may have lower ranks (``client_app(rank=...)``), where the rule allows it.
        state: a file that is replaced whole after each round, and that a new run goes on from.
        max_norm: of ‖what a client sent - what it started from‖₂ over all its tensors; None: any.
        privacy: clip and add noise, for rules that release nothing but an average.
        seed: of the factors' start and all further draws.
        sampling: of Flower's ``FedAvg``: ``fraction_train``, ``min_train_nodes``, ``min_available_nodes``,
            ``fraction_evaluate``, ...

    Attributes:
        round: how many rounds are finished, over all runs that went on from one another.
        history: a dict a round: ``clients`` (examples, rank, norm, bytes and metrics, by name), ``left_out`` (reasons,
            by name), ``bytes_down``, ``bytes_up``, both of training alone; ``epsilon`` under ``privacy``.

    Raises:
        TypeError: a config that is no LoRAConfig.
        ValueError: layers on other modules than linears, DoRA's magnitudes or gates under a rule that promises an
            average of weights; ``privacy`` for a rule that releases more than an average; a state of another rule or
            adapter.
    """

    trains: ClassVar[str] = "both"
    """Which factors the clients train, "both" or "b"."""
    cut_by: ClassVar[str] = "first"
    """How factors are brought to a lower rank."""
    one_rank: ClassVar[bool] = False
    """True if all clients must have the server's ranks."""
    only_averages: ClassVar[bool] = True
    """True if no more than an average of what clients send is released."""
    any_tensor: ClassVar[bool] = False
    """True if tensors whose average is not that of the weights are averaged all the same."""

    def __init__(
        self,
        model: nn.Module,
        config: LoRAConfig,
        *,
        state: str | os.PathLike[str] | None = None,
        max_norm: float | None = None,
        privacy: Privacy | None = None,
        seed: int = 0,
        **sampling: Any,
    ) -> None:
        name = type(self).__name__
        if not isinstance(config, LoRAConfig):
            raise TypeError(f"{name}: expected config to be a LoRAConfig, got {type(config).__name__}")
        if privacy is not None and not self.only_averages:
            raise ValueError(f"{name}: expected no privacy: what this rule sends depends on each client by itself")
        if max_norm is not None and (
            isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not max_norm > 0.0
        ):
            raise ValueError(f"{name}: expected max_norm to be a number above 0, got {max_norm!r}")
        super().__init__(**sampling)
        self.config, self.seed, self.max_norm, self.privacy = config, seed, max_norm, privacy
        self.state = None if state is None else Path(state)
        self.round = 0
        self.history: list[dict[str, Any]] = []
        self.kept: list[Tensors] = []
        self.accountant = None if privacy is None else privacy.accountant()
        self._nodes: dict[int, dict[str, Any]] = {}
        self._asked: dict[int, dict[str, Any]] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            report = adapt(model, ranked(model, config, None))
        try:
            self._read(model)
            self.begin(model)
        finally:
            report.undo()

    def _read(self, model: nn.Module) -> None:
        self.layers: dict[str, Layer] = {}
        self.current: Tensors = {}
        for path, layer in factor_layers(model).items():
            self.layers[path] = Layer.of(layer)
            a, b = layer.factor_parameters()
            self.current |= {name_a(path): a.detach().float().clone(), name_b(path): b.detach().float().clone()}
        others = other_trained(model)
        self.others = list(others)
        bent = [other for other in self.others if other.endswith(_NOT_LINEAR)]
        if bent and not self.any_tensor:
            raise ValueError(
                f"{type(self).__name__}: expected tensors whose average is that of the weights, got {bent[0]}; use "
                f"FactorFedAvg, or a config without DoRA and gates"
            )
        self.current |= {other: p.detach().float().clone() for other, p in others.items()}
        self._groups: dict[Layer, list[str]] = {}
        for path, shape in self.layers.items():
            self._groups.setdefault(shape, []).append(path)

    # What a rule is.

    def begin(self, model: nn.Module) -> None:
        """Before the first round, while the model has its layers: where the clients start."""

    def rule(self, clients: Sequence[Factors], weights: Sequence[float], rank: int) -> tuple[Factors, Factors | None]:
        """The new factors of layers of one shape, and what W takes beside them.

        Args:
            rank: the server's; factors of a lower one get zeros.
        """
        return fed_avg(clients, weights), None

    def settle(self, new: Tensors) -> None:
        """What to do with them."""
        self.current |= new

    def sent(self) -> list[str]:
        """Names of the current tensors that go to a client in each round."""
        return [name for name in self.current if self.trains == "both" or not name.endswith(".lora_A.weight")]

    def trained(self) -> list[str]:
        """Names of those that come back."""
        return [name for name in self.current if self.trains == "both" or not name.endswith(".lora_A.weight")]

    def combine(self, clients: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        """The new values of what clients train: factors by the rule, a shape of layers at a time, the rest averaged."""
        new = {name: average([client[name] for client in clients], weights) for name in self.others}
        taken: Tensors = {}
        for shape, paths in self._groups.items():
            factors = []
            for client in clients:
                b = torch.stack([client[name_b(path)] for path in paths])
                owner = client if self.trains == "both" else self.current
                a = torch.stack([owner[name_a(path)] for path in paths])[:, : b.shape[-1]]
                factors.append(Factors(a, b, shape.scaling))
            mean, rest = self.rule(factors, weights, shape.r)
            missing = shape.r - mean.rank
            for path, a, b in zip(paths, mean.lora_a, mean.lora_b, strict=True):
                new[name_b(path)] = nn.functional.pad(b, (0, missing))
                if self.trains == "both":
                    new[name_a(path)] = nn.functional.pad(a, (0, 0, 0, missing))
            if rest is not None and rest.rank:
                for path, a, b in zip(paths, rest.lora_a, rest.lora_b, strict=True):
                    taken |= {name_a(path): a.clone(), name_b(path): b.clone()}
        if taken:
            self.kept.append(taken)
        return new

    def assemble(self, model: nn.Module) -> Report:
        """Put the current adapter into a fresh base model, in place; ``lk.merge_and_unload`` then makes it plain."""
        tensors = {name: self.current[name] for name in self.sent()}
        return assemble(model, self.config, tensors, self.kept, trains=self.trains, cut_by=self.cut_by)

    # A round, as Flower runs it.

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """As Flower's, from the round that ``state`` is at; ``initial_arrays`` are the strategy's own."""
        if initial_arrays is not None:
            raise ValueError(f"{type(self).__name__}.start: expected no initial_arrays: the strategy has its own")
        if self.resume():
            logger.info("Going on after round %d of %d, from %s", self.round, num_rounds, self.state)
        self._save()  # a place that cannot be written is told before a client works
        before = self.round
        evaluation = evaluate_fn and (lambda server_round, arrays: evaluate_fn(before + server_round, arrays))
        self._before = before
        return super().start(
            grid,
            self._arrays(),
            max(0, num_rounds - before),
            timeout,
            train_config,
            evaluate_config,
            evaluation,
        )

    _before = 0

    def _arrays(self) -> ArrayRecord:
        return record_of({name: self.current[name] for name in self.sent()})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._check_budget(len(messages))
        self._asked = {}
        return [self._ask(m, self._before + server_round, config, asked=self._asked) for m in messages]

    def _check_budget(self, sampled: int) -> None:
        """Raise PrivacyBudgetExhausted where a round with so many clients would exceed ``max_epsilon``."""
        if self.privacy is None or self.accountant is None or not sampled:
            return
        if sampled > self.privacy.population:
            raise ValueError(
                f"{type(self).__name__}: expected a population of at least the {sampled} clients of a round, got "
                f"{self.privacy.population}"
            )
        if self.privacy.max_epsilon is not None and self.accountant.would_exceed(self.privacy.event(sampled)):
            spent = self.accountant.get_privacy_spent()
            raise PrivacyBudgetExhausted(
                f"{type(self).__name__}: another round would exceed max_epsilon = {self.privacy.max_epsilon}; "
                f"{spent.epsilon:.4g} is spent, and the adapter of round {self.round} stays"
            )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        return [self._ask(m, self._before + server_round, config, asked={}) for m in messages]

    def _ask(
        self, message: Message, server_round: int, config: ConfigRecord, asked: dict[int, dict[str, Any]]
    ) -> Message:
        """The message to one node, in place of Flower's, which is the same for all."""
        node = message.metadata.dst_node_id
        known = self._nodes.setdefault(node, _unknown(node))
        first = known["kept"]
        missed = {
            f"{place}:{name}": t for place in range(first, len(self.kept)) for name, t in self.kept[place].items()
        }
        arrays = record_of(self._for_rank({name: self.current[name] for name in self.sent()}, known["rank"]))
        kept = record_of(missed)
        settings = {
            **config,
            "server-round": server_round,
            "trains": self.trains,
            "cut-by": self.cut_by,
            "kept-from": first,
            "kept-to": len(self.kept),
            "scalings": [self.layers[path].scaling for path in sorted(self.layers)],
        }
        content = RecordDict({"arrays": arrays, "kept": kept, "config": ConfigRecord(settings)})
        asking = Message(content, dst_node_id=node, message_type=message.metadata.message_type)
        asked[node] = {"kept": len(self.kept), "bytes": bytes_of(arrays, kept), "metadata": asking.metadata}
        return asking

    def _for_rank(self, tensors: Tensors, rank: int | None) -> Tensors:
        return tensors if rank is None else cut(tensors, self.layers, rank, self.cut_by)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        found: dict[str, dict[str, Any]] = {}
        left_out: dict[str, str] = {}
        up, silent = 0, set(self._asked)
        for node, reply in sorted(((self._node_of(r), r) for r in replies), key=lambda pair: pair[0]):
            if node in self._asked and node not in silent:
                logger.warning("A reply too many of %s is not looked at", self._nodes[node]["name"])
                continue
            silent.discard(node)
            try:
                client = self._usable(reply)
            except Exception as error:  # whatever a client sent, the round goes on
                known = self._nodes.setdefault(node, _unknown(node))
                known |= {"rank": None, "kept": 0}  # it may have lost what it kept, and have another rank
                left_out[_new_name(known["name"], node, left_out)] = _reason(error)
                continue
            known = self._nodes.setdefault(node, _unknown(node))
            name = _new_name(client.pop("name"), node, found)
            known |= {"rank": client["rank"], "kept": self._asked[node]["kept"], "name": name}
            client["bytes_down"] = self._asked[node]["bytes"]
            up += client["bytes_up"]
            found[name] = client
        for node in silent:
            left_out[_new_name(self._nodes[node]["name"], node, left_out)] = "no reply in time"
        for name, reason in left_out.items():
            logger.warning("Round %d goes on without %s: %s", self._before + server_round, name, reason)
        found = dict(sorted(found.items()))
        epsilon, nothing = None, "no client sent anything usable"
        if found:
            try:
                epsilon = self._combine(list(found.values()))
            except (ValueError, RuntimeError) as error:  # each is usable by itself, and together they overflow
                nothing, left_out = _reason(error), left_out | dict.fromkeys(found, _reason(error))
                found = {}
        if not found:
            logger.warning("Round %d changes nothing: %s", self._before + server_round, nothing)
        self.round = self._before + server_round
        record: dict[str, Any] = {
            "round": self.round,
            "clients": {n: {k: v for k, v in c.items() if k not in ("tensors", "start")} for n, c in found.items()},
            "left_out": left_out,
            "bytes_down": sum(asked["bytes"] for asked in self._asked.values()),
            "bytes_up": up,
        }
        if epsilon is not None:
            record["epsilon"] = epsilon
        logger.info("Round %d: %d bytes sent down, %d up", self.round, record["bytes_down"], up)
        self.history.append(record)
        self._save()
        return (self._arrays() if found else None), _weighted(
            [(c["num-examples"], c["metrics"]) for c in found.values()]
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        measured = []
        for reply in replies:
            try:
                if reply.has_error():
                    raise ValueError(reply.error.reason)
                measured.append(_metrics_of(reply))
            except Exception as error:
                known = self._nodes.get(reply.metadata.src_node_id) or _unknown(reply.metadata.src_node_id)
                logger.warning("Evaluation goes on without %s: %s", known["name"], _reason(error))
        return _weighted(measured)

    def _node_of(self, reply: Message) -> int:
        """Who was asked. Where a node is gone, the super-link replies in its place, and under its own number."""
        for node, asked in self._asked.items():
            if asked["metadata"].message_id and asked["metadata"].message_id == reply.metadata.reply_to_message_id:
                return node
        return 0 if reply.metadata.reply_to_message_id else reply.metadata.src_node_id

    def _usable(self, reply: Message) -> dict[str, Any]:
        """What a client sent. Raises where it is not what was asked for."""
        if reply.has_error():
            raise ValueError(f"it reports an error: {reply.error.reason}")
        if self._node_of(reply) not in self._asked:
            raise ValueError("it was not asked")
        examples, metrics = _metrics_of(reply)
        rank = self._rank_in(metrics)
        record = reply.content["arrays"]
        if not isinstance(record, ArrayRecord):
            raise ValueError(f"expected an ArrayRecord, got {type(record).__name__}")
        start = self._for_rank({name: self.current[name] for name in self.trained()}, rank)
        if set(record) != set(start):
            odd = sorted(set(record) ^ set(start))
            raise ValueError(f"expected {len(start)} tensors by name, got {len(record)}; first that differs: {odd[0]}")
        for name, array in record.items():
            if array.dtype != "float32" or tuple(array.shape) != tuple(start[name].shape):
                raise ValueError(
                    f"expected {name} of float32 {tuple(start[name].shape)}, got {array.dtype} {tuple(array.shape)}"
                )
            if len(array.data) > 4 * start[name].numel() + 1024:
                raise ValueError(f"expected {name} of {4 * start[name].numel()} bytes, got {len(array.data)}")
        tensors = tensors_of(record)
        for name, t in tensors.items():
            if t.dtype != torch.float32 or t.shape != start[name].shape:
                raise ValueError(
                    f"expected {name} of float32 {tuple(start[name].shape)}, got {t.dtype} {tuple(t.shape)}"
                )
            if not all_finite(t):
                raise ValueError(f"expected finite tensors, got NaN or Inf in {name}")
        norm = math.sqrt(sum(float((t.double() - start[name].double()).square().sum()) for name, t in tensors.items()))
        if self.max_norm is not None and norm > self.max_norm:
            raise ValueError(f"expected an update of a norm up to {self.max_norm}, got {norm:.4g}")
        told = reply.content.get("client")
        name = _line(str(told["name"]))[:80] if isinstance(told, ConfigRecord) and "name" in told else None
        return {
            "name": name or f"node {self._node_of(reply)}",
            "num-examples": examples,
            "rank": rank,
            "norm": norm,
            "bytes_up": bytes_of(record),
            "metrics": metrics,
            "tensors": tensors,
            "start": start,
        }

    def _rank_in(self, metrics: dict[str, float]) -> int | None:
        """Takes the rank out of what a client reports; None where no factors train."""
        rank = metrics.pop("rank", None)
        if not any(name.endswith(".lora_B.weight") for name in self.trained()):
            return None
        highest = max(shape.r for shape in self.layers.values())
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= highest:
            raise ValueError(f"expected its rank to be an integer from 1 to {highest}, got {rank!r}")
        if rank != highest and (self.one_rank or self.privacy is not None):
            raise ValueError(f"expected rank {highest}, as of all clients, got {rank}")
        return rank

    def _combine(self, clients: list[dict[str, Any]]) -> float | None:
        """Take the clients' tensors into the adapter. Returns ε where it is accounted for."""
        tensors, weights = [c["tensors"] for c in clients], [c["num-examples"] for c in clients]
        if self.privacy is None or self.accountant is None:
            self.settle(self.combine(tensors, weights))
            return None
        sampled = len(self._asked)
        unchanged = {name: self.current[name] for name in self.trained()}
        tensors = [self.privacy.clip(c["tensors"], c["start"]) for c in clients]
        tensors += [unchanged] * (sampled - len(tensors))
        new = self.combine(tensors, [1.0] * sampled)
        self.accountant.compose(self.privacy.event(sampled))  # first: nothing is released that is not accounted for
        self.privacy.noise_({name: new[name] for name in unchanged}, sampled)
        self.settle(new)
        spent = self.accountant.get_privacy_spent()
        logger.info(
            "Privacy spent: epsilon %.4g at delta %g, after %d rounds",
            spent.epsilon,
            spent.delta,
            spent.num_releases,
        )
        return spent.epsilon

    # On disk.

    def _what(self) -> dict[str, Any]:
        """What a state must be of, to be gone on from."""
        layers = {path: [shape.n, shape.k, shape.r, shape.scaling] for path, shape in self.layers.items()}
        return {"rule": type(self).__name__, "layers": layers, "others": sorted(self.others), "seed": self.seed}

    def _save(self) -> None:
        if self.state is None:
            return
        self.state.parent.mkdir(parents=True, exist_ok=True)
        whole = {
            "what": self._what(),
            "round": self.round,
            "current": self.current,
            "kept": self.kept,
            "history": self.history,
            "accountant": None if self.accountant is None else self.accountant.state_dict(),
        }
        aside = self.state.with_name(f".{self.state.name}.{os.getpid()}")
        try:
            with aside.open("wb") as file:
                torch.save(whole, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.state)
        finally:
            aside.unlink(missing_ok=True)

    def resume(self) -> bool:
        """Go on from the file ``state``; False where there is none yet.

        Raises:
            ValueError: it is of another rule, adapter, seed or privacy, or no such file.
        """
        if self.state is None or not self.state.exists():
            return False
        name = f"{type(self).__name__}: state {self.state}"
        try:
            whole = torch.load(self.state, map_location="cpu", weights_only=True)
            what, accounted = whole["what"], whole["accountant"]
            found = [whole[key] for key in ("round", "current", "kept", "history")]
            odd = [key for key, value in self._what().items() if what.get(key) != value]
        except Exception as error:
            raise ValueError(f"{name}: expected a file that a strategy wrote: {_reason(error)}") from None
        if odd or (accounted is None) is not (self.accountant is None):
            raise ValueError(f"{name}: expected that of this run, got another {', '.join(odd) or 'privacy'}")
        if self.accountant is not None:
            try:
                self.accountant.load_state_dict(accounted)
            except ValueError as error:
                raise ValueError(f"{name}: expected that of this run, got another privacy: {error}") from None
        self.round, self.current, self.kept, self.history = found
        return True


def _unknown(node: int) -> dict[str, Any]:
    """What is known of a node that has not sent anything usable yet."""
    return {"rank": None, "kept": 0, "name": f"node {node}"}


def _new_name(name: str, node: int, taken: Mapping[str, Any]) -> str:
    """What a node calls itself, with its number where another has that name."""
    while name in taken:
        name = f"{name} (node {node})"
    return name


def _line(text: str) -> str:
    """On one line, of what can be printed."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def _reason(error: Exception) -> str:
    """Its last words, on one line: where a client's traceback says what happened."""
    return _line(str(error))[-300:]


def _metrics_of(reply: Message) -> tuple[float, dict[str, float]]:
    """(number of examples, the other numbers) that a client reports."""
    record = reply.content["metrics"]
    if not isinstance(record, MetricRecord):
        raise ValueError(f"expected a MetricRecord, got {type(record).__name__}")
    metrics: dict[str, Any] = {k: v for k, v in record.items() if isinstance(v, (int, float))}
    examples = metrics.pop("num-examples", None)
    if examples is None or isinstance(examples, bool) or not 0 < examples <= 2**53:
        raise ValueError(f"expected num-examples to be a number above 0 and at most 2**53, got {examples!r}")
    return examples, metrics


def _weighted(measured: Sequence[tuple[float, Mapping[str, float]]]) -> MetricRecord | None:
    """The averages, by examples, of the metrics that all clients report."""
    if not measured:
        return None
    names = set.intersection(*(set(metrics) for _, metrics in measured)) - {"rank"}
    total = sum(examples for examples, _ in measured)
    return MetricRecord({name: sum(n * m[name] for n, m in measured) / total for name in sorted(names)})


class FactorFedAvg(LowRankStrategy):
    """FedAvg of A and of B by themselves: :func:`~lowrank_kernels.federated.fed_avg`. Takes DoRA's magnitudes too."""

    any_tensor = True


class FFALoRA(LowRankStrategy):
    """FFA-LoRA: one A, drawn once and frozen, and B averaged: :func:`~lowrank_kernels.federated.ffa_lora`. Exact."""

    trains = "b"

    def begin(self, model: nn.Module) -> None:
        self.kept.append({name_a(path): self.current[name_a(path)] for path in self.layers})

    def rule(self, clients: Sequence[Factors], weights: Sequence[float], rank: int) -> tuple[Factors, Factors | None]:
        return ffa_lora(clients, weights), None


class FedExLoRA(LowRankStrategy):
    """FedEx-LoRA: averaged factors, and W takes the rest: :func:`~lowrank_kernels.federated.fed_ex_lora`. Exact.

    Each round leaves a residual of rank (n - 1) R, which every client gets once. All clients have the server's ranks.
    """

    one_rank = True
    only_averages = False

    def rule(self, clients: Sequence[Factors], weights: Sequence[float], rank: int) -> tuple[Factors, Factors | None]:
        return fed_ex_lora(clients, weights)


class FlexLoRA(LowRankStrategy):
    """FlexLoRA: the best factors for the average of the weights: :func:`~lowrank_kernels.federated.flex_lora`.

    A client of a lower rank gets the best of its rank. Exact where the rank is that of the average.
    """

    cut_by = "svd"
    only_averages = False

    def rule(self, clients: Sequence[Factors], weights: Sequence[float], rank: int) -> tuple[Factors, Factors | None]:
        return flex_lora(clients, weights, rank=rank), None


class FeDeRA(LowRankStrategy):
    """FedAvg of factors that start from W's singular vectors, W keeping the rest (FeDeRA):
    :func:`~lowrank_kernels.federated.svd_factors`.

    What is taken out of W is where the factors start, so that it goes to a client once, and no factors beside it.
    """

    def begin(self, model: nn.Module) -> None:
        taken: Tensors = {}
        for path, layer in factor_layers(model).items():
            a, b, _ = svd_factors(layer.matrix, layer.r, scaling=layer.scaling, seed=self.seed)
            a, b = a.float(), b.float()
            self.current |= {name_a(path): a, name_b(path): b}
            taken |= {name_a(path): a, name_b(path): -b}
        self.kept.append(taken)

    def sent(self) -> list[str]:
        start = start_without(self.kept[0])
        return [
            name for name in super().sent() if name not in start or not torch.equal(self.current[name], start[name])
        ]


class FedRACLoRA(LowRankStrategy):
    """Fed-RAC-LoRA: a fresh A each round, shared and frozen, B from zero, and s B̄ A merged into W. Exact."""

    trains = "b"

    def begin(self, model: nn.Module) -> None:
        self._sample(1)

    def _sample(self, server_round: int) -> None:
        drawn = self._drawn(server_round)
        self.current |= drawn | {name_b(path): torch.zeros(shape.n, shape.r) for path, shape in self.layers.items()}
        self.kept.append(drawn)

    def _drawn(self, server_round: int) -> Tensors:
        """A fresh sample of every A, with orthonormal rows (kaiming where R > K)."""
        drawn: Tensors = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + server_round)
            for path, shape in self.layers.items():
                a, b = torch.empty(shape.r, shape.k), torch.empty(shape.n, shape.r)
                init_factors_(a, b, "orthonormal" if shape.r <= shape.k else "kaiming")
                drawn[name_a(path)] = a
        return drawn

    def sent(self) -> list[str]:
        return list(self.others)  # A is kept, B starts at zero

    def rule(self, clients: Sequence[Factors], weights: Sequence[float], rank: int) -> tuple[Factors, Factors | None]:
        return ffa_lora(clients, weights), None

    def settle(self, new: Tensors) -> None:
        self.current |= new
        self.kept.append({name_b(path): new[name_b(path)] for path in self.layers})
        self._sample(self.round + 2)  # this one is self.round + 1


class SLoRA(LowRankStrategy):
    """SLoRA: first some rounds of blocks of W, the same for all; then FedAvg of factors that start from their change.

    Args:
        sparse_rounds: of the first stage.
        density: the share of W that it trains, in blocks of 16 × 16.
        (the others as for :class:`LowRankStrategy`)

    The end of the first stage makes one matrix (N, K) at a time, to decompose it. Biases and whole modules train in the
    second stage.
    """

    def __init__(self, *args: Any, sparse_rounds: int = 1, density: float = 0.01, **settings: Any) -> None:
        if isinstance(sparse_rounds, bool) or not isinstance(sparse_rounds, int) or sparse_rounds < 1:
            raise ValueError(f"SLoRA: expected sparse_rounds to be an integer of at least 1, got {sparse_rounds!r}")
        self.sparse_rounds, self.density = sparse_rounds, density
        super().__init__(*args, **settings)

    @property
    def sparse(self) -> bool:
        """True in the first stage."""
        return any(name.endswith(".blocks") for name in self.current)

    def begin(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        index = {
            path: random_blocks((s.n, s.k), self.density, generator, size=BLOCK) for path, s in self.layers.items()
        }
        self.kept.append({f"{path}.block_index": i for path, i in index.items()})
        self.current |= {f"{path}.blocks": torch.zeros(len(i), BLOCK, BLOCK) for path, i in index.items()}

    def sent(self) -> list[str]:
        return [name for name in self.current if name.endswith(".blocks") or not self.sparse]

    def trained(self) -> list[str]:
        return self.sent()

    def combine(self, clients: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        if not self.sparse:
            return super().combine(clients, weights)
        return {name: average([client[name] for client in clients], weights) for name in self.sent()}

    def settle(self, new: Tensors) -> None:
        super().settle(new)
        if not self.sparse or self.round + 1 < self.sparse_rounds:
            return
        for path, shape in self.layers.items():
            change = torch.zeros(shape.n, shape.k)
            write_blocks_(change, self.current.pop(f"{path}.blocks"), self.kept[0][f"{path}.block_index"])
            a, b, _ = svd_factors(change, shape.r, scaling=shape.scaling, seed=self.seed)
            self.current |= {name_a(path): a, name_b(path): b}


STRATEGIES: Mapping[str, type[LowRankStrategy]] = {
    "fedavg": FactorFedAvg,
    "ffa-lora": FFALoRA,
    "fedex-lora": FedExLoRA,
    "flexlora": FlexLoRA,
    "federa": FeDeRA,
    "slora": SLoRA,
    "fed-rac-lora": FedRACLoRA,
}
"""By the word that names them in an app's settings."""
