"""Flower's strategies, round by round, without the engine: what clients send, and what the server makes of it."""

from __future__ import annotations

import copy
import io
import math
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_kernels as lk
from lowrank_kernels.federated import fed_rac_lora_

pytest.importorskip("flwr", reason="needs the extra 'federated'")

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import PrivacyBudgetExhausted

from lowrank_kernels.integrations.flower import STRATEGIES, LowRankStrategy, Privacy, client_app
from tests.federated.in_process import InProcessGrid
from tests.federated.tiny_app.tiny.task import base, train

CONFIG = lk.LoRAConfig(r=4, alpha=12, target_modules=["0", "2"], bias="lora_only")
EXAMPLES = {1: 10, 2: 20, 3: 70}
RULES = list(STRATEGIES)


def fit(model: nn.Module, context: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
    node = context.node_id
    return EXAMPLES.get(node, 5), {"loss": train(model, 100 * node + settings["server-round"])}


def nudge(model: nn.Module, context: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """What costs nothing, where it does not matter how clients train."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.01 * context.node_id)
    return context.node_id, {"loss": 0.0}


def app(config: lk.LoRAConfig = CONFIG, work: Any = fit, **options: Any) -> Any:
    return client_app(lambda context: base(), config, work, **options)


def make(rule: str, nodes: int = 3, config: lk.LoRAConfig = CONFIG, **settings: Any) -> LowRankStrategy:
    settings = {"min_train_nodes": nodes, "min_available_nodes": nodes, "fraction_evaluate": 0.0} | settings
    return STRATEGIES[rule](base(), config, **settings)


def run(rule: str, rounds: int = 1, nodes: int = 3, spoil: Any = None, client: Any = None, **settings: Any) -> Any:
    strategy = make(rule, nodes, **settings)
    strategy.start(InProcessGrid(client or app(), nodes, spoil), num_rounds=rounds)
    return strategy


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The plain model's weights."""
    return {name: p.detach().clone() for name, p in lk.merge_and_unload(model).named_parameters()}


def weights_of(strategy: LowRankStrategy) -> dict[str, Tensor]:
    model = base()
    strategy.assemble(model)
    return merged(model)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


DIFFER = {1: 1, 2: 4, 3: 3}


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [
        ("fedex-lora", None),  # has one rank
        *((rule, ranks) for rule in ("ffa-lora", "flexlora", "fed-rac-lora") for ranks in (None, DIFFER)),
    ],
)
def test_an_exact_rule_averages_the_clients_weights(rule: str, ranks: dict[int, int] | None) -> None:
    config = lk.LoRAConfig(r=12 if rule == "flexlora" else 4, alpha=20, target_modules=["0", "2"], bias="lora_only")
    ranks = ranks or ({1: 4, 2: 4, 3: 4} if rule == "flexlora" else None)
    models: dict[int, dict[str, Tensor]] = {}

    def keep(model: nn.Module, context: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
        result = fit(model, context, settings)
        models[settings["server-round"], context.node_id] = merged(copy.deepcopy(model))
        return result

    client = app(config, keep, rank=lambda context: ranks and ranks[context.node_id])
    strategy = run(rule, 1, client=client, config=config)
    total = sum(EXAMPLES.values())
    for name, weight in weights_of(strategy).items():
        expected = sum(EXAMPLES[node] / total * models[1, node][name].double() for node in EXAMPLES)
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=3e-7)
    assert {c["rank"] for c in strategy.history[0]["clients"].values()} == set(ranks.values() if ranks else [4])


def test_fedavg_is_not_exact_and_the_difference_is_seen() -> None:
    torch_difference = weights_of(run("fedavg"))["0.weight"] - weights_of(run("fedex-lora"))["0.weight"]
    assert torch_difference.abs().max() > 1e-3


@pytest.mark.parametrize("rule", ["fedavg", "ffa-lora", "fedex-lora", "flexlora", "federa"])
def test_one_client_is_local_training_bit_for_bit(rule: str) -> None:
    strategy = make(rule, 1)
    local = base()
    strategy.assemble(local)  # the start; from here it is left alone
    strategy.start(InProcessGrid(app(), 1), num_rounds=3)
    for server_round in (1, 2, 3):
        train(local, 100 + server_round)
    found = base()
    strategy.assemble(found)
    assert equal(dict(found.named_parameters()), dict(local.named_parameters()))


def test_one_client_of_fed_rac_lora_is_a_local_chain_bit_for_bit() -> None:
    strategy = run("fed-rac-lora", 3, 1)
    local = base()
    samples = [entry for entry in strategy.kept if "0.lora_A.weight" in entry]
    for server_round in (1, 2, 3):
        report = lk.adapt(local, lk.LoRAConfig(r=4, alpha=12, target_modules=["0", "2"], bias="lora_only", train="b"))
        with torch.no_grad():
            for path in ("0", "2"):
                layer: Any = local.get_submodule(path)
                layer.lora_A.weight.copy_(samples[server_round - 1][f"{path}.lora_A.weight"])
        train(local, 100 + server_round)
        trained = {path: local.get_submodule(path).lora_B.weight.detach() for path in ("0", "2")}
        biases = {path: local.get_submodule(path).bias.detach().clone() for path in ("0", "2")}
        report.undo()
        for path, b in trained.items():
            linear: Any = local.get_submodule(path)
            fed_rac_lora_(linear.weight.data, samples[server_round - 1][f"{path}.lora_A.weight"], [b], scaling=3.0)
            linear.bias.data.copy_(biases[path])
    assert equal(weights_of(strategy), dict(local.named_parameters()))


@pytest.mark.parametrize("rule", RULES)
def test_a_client_with_nan_is_left_out_by_name_and_the_round_is_that_of_the_others(rule: str) -> None:
    def poison(node: int, server_round: int, reply: Message) -> Message:
        if node == 3:
            tensors = reply.content["arrays"].to_torch_state_dict()
            name = next(iter(tensors))
            tensors[name].view(-1)[0] = math.nan
            reply.content["arrays"] = ArrayRecord(tensors)
        return reply

    strategy, without = run(rule, 2, spoil=poison), run(rule, 2, nodes=2)
    assert [list(h["clients"]) for h in strategy.history] == [["client 0", "client 1"]] * 2
    for record in strategy.history:
        ((name, reason),) = record["left_out"].items()
        assert name in ("node 3", "client 2") and "expected finite tensors, got NaN or Inf in" in reason
    assert equal(weights_of(strategy), weights_of(without))


def rewritten(**changes: Any) -> Callable[[Message], None]:
    def spoil(reply: Message) -> None:
        for key, change in changes.items():
            content = dict(reply.content)
            content[key] = change(content[key])
            reply.content = RecordDict({k: v for k, v in content.items() if v is not None})

    return spoil


def arrays(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Message], None]:
    def spoil(record: ArrayRecord) -> ArrayRecord:
        return ArrayRecord({k: Array(v) for k, v in change({k: v.numpy() for k, v in record.items()}).items()})

    return rewritten(arrays=spoil)


def metrics(**values: Any) -> Callable[[Message], None]:
    return rewritten(metrics=lambda record: MetricRecord({**record, **values}))


def lies(data: bytes, **claims: Any) -> Callable[[Message], None]:
    """A right description of other bytes."""

    def spoil(record: ArrayRecord) -> ArrayRecord:
        first = record["0.lora_A.weight"]
        record["0.lora_A.weight"] = Array(
            **{"dtype": first.dtype, "shape": tuple(first.shape), "stype": first.stype, "data": data, **claims}
        )
        return record

    return rewritten(arrays=spoil)


def saved(array: np.ndarray, *, pickled: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=pickled)
    return buffer.getvalue()


NONSENSE = {
    "a name more": (
        arrays(lambda a: {**a, "x": np.zeros(2)}),
        "expected 6 tensors by name, got 7; first that differs: x",
    ),
    "a name less": (arrays(lambda a: dict(list(a.items())[1:])), "first that differs: 0.base_layer.bias"),
    "another name": (arrays(lambda a: {k.replace("lora_A", "lora_C"): v for k, v in a.items()}), "first that differs"),
    "a shape": (arrays(lambda a: {k: v[:1] for k, v in a.items()}), r"of float32 \(40,\), got float32 \(1,\)"),
    "transposed": (arrays(lambda a: {k: v.T.copy() for k, v in a.items()}), r"got float32 \(24, 4\)"),
    "float64": (arrays(lambda a: {k: v.astype("float64") for k, v in a.items()}), "got float64"),
    "integers": (arrays(lambda a: {k: v.astype("int32") for k, v in a.items()}), "got int32"),
    "infinity": (arrays(lambda a: {k: v * np.float32(math.inf) for k, v in a.items()}), "NaN or Inf"),
    "a long update": (arrays(lambda a: {k: v + 1e3 for k, v in a.items()}), "an update of a norm up to 50, got"),
    "no arrays": (rewritten(arrays=lambda record: None), "arrays"),
    "a record of another kind": (rewritten(arrays=lambda record: ConfigRecord({"a": 1})), "expected an ArrayRecord"),
    "no metrics": (rewritten(metrics=lambda record: None), "metrics"),
    "no examples": (metrics(**{"num-examples": 0}), "num-examples to be a number above 0 and at most 2\\*\\*53, got 0"),
    "examples that are NaN": (metrics(**{"num-examples": math.nan}), "num-examples"),
    "infinitely many": (metrics(**{"num-examples": math.inf}), "num-examples"),
    "more than can be counted": (metrics(**{"num-examples": 1e308}), "num-examples"),
    "a list of examples": (metrics(**{"num-examples": [1, 2]}), "num-examples"),
    "a rank": (metrics(rank=9), "rank to be an integer from 1 to 4, got 9"),
    "a rank of none": (metrics(rank=0), "got 0"),
    "half a rank": (metrics(rank=2.5), "got 2.5"),
    "garbage": (lies(b"nonsense"), ""),
    "a pickle": (lies(saved(np.array([object()], dtype=object), pickled=True)), "allow_pickle=False"),
    "another shape inside": (lies(saved(np.zeros((2, 3), np.float32))), r"got torch.float32 \(2, 3\)"),
    "another dtype inside": (lies(saved(np.zeros((4, 24), np.float64))[:1000]), ""),
    "too many bytes": (lies(saved(np.zeros((4000, 24), np.float32))), "of 384 bytes, got 384128"),
    "another serialisation": (lies(b"", stype="pickle"), "serialization"),
}


@pytest.mark.parametrize("case", NONSENSE)
def test_nonsense_is_left_out_with_the_reason_and_the_round_goes_on(case: str, caplog: Any) -> None:
    spoil, reason = NONSENSE[case]

    def third(node: int, server_round: int, reply: Message) -> Message:
        if node == 3 and server_round == 2:
            spoil(reply)
        return reply

    strategy = run("fedavg", 2, spoil=third, client=app(work=nudge), max_norm=50)
    assert [list(h["left_out"]) for h in strategy.history] == [[], ["client 2"]]
    assert re.search(reason, strategy.history[1]["left_out"]["client 2"]), strategy.history[1]["left_out"]
    assert list(strategy.history[1]["clients"]) == ["client 0", "client 1"]


def test_fedex_lora_leaves_out_a_client_of_another_rank() -> None:
    strategy = run("fedex-lora", client=app(work=nudge, rank=lambda context: 5 - context.node_id))
    assert strategy.history[0]["left_out"] == {
        f"node {node}": f"expected rank 4, as of all clients, got {5 - node}" for node in (2, 3)
    }


def test_an_error_in_a_clients_place_is_told_of_the_client() -> None:
    def gone(node: int, server_round: int, reply: Message) -> Message:
        if node == 3 and server_round == 2:
            error = Message(Error(5, "Node Unavailable"), reply_to=grid.asked[-1])
            error.metadata.__dict__["_src_node_id"] = 1  # the super-link's own number
            return error
        return reply

    grid = InProcessGrid(app(work=nudge), 3, gone)
    strategy = make("fedavg")
    strategy.start(grid, num_rounds=2)
    assert strategy.history[1]["left_out"] == {"client 2": "it reports an error: Node Unavailable"}
    assert list(strategy.history[1]["clients"]) == ["client 0", "client 1"]


def test_clients_of_one_name_are_told_apart() -> None:
    def poison(node: int, server_round: int, reply: Message) -> Message:
        return reply if server_round == 1 else Message(Error(0, "gone"), reply_to=grid.asked[-1])

    grid = InProcessGrid(app(work=nudge, name=lambda context: "hospital"), 3, poison)
    strategy = make("fedavg")
    strategy.start(grid, num_rounds=2)
    assert len(strategy.history[0]["clients"]) == 3 and len(strategy.history[1]["left_out"]) == 3


class Repeating(InProcessGrid):
    """Every reply arrives twice."""

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        return [twice for reply in super().send_and_receive(messages) for twice in (reply, reply)]


def test_a_reply_that_arrives_twice_counts_once() -> None:
    strategy = make("fedavg")
    strategy.start(Repeating(app(work=nudge), 3), num_rounds=2)
    assert [list(h["clients"]) for h in strategy.history] == [["client 0", "client 1", "client 2"]] * 2
    assert equal(weights_of(strategy), weights_of(run("fedavg", 2, client=app(work=nudge))))


def test_names_are_one_printable_line_and_hide_no_other_client() -> None:
    names = {1: "a", 2: "a (node 3)", 3: "a", 4: "b\n\x1b[31mWARNING : c"}
    client = app(work=nudge, name=lambda context: names[context.node_id])
    strategy = run("fedavg", nodes=4, client=client)
    assert sorted(strategy.history[0]["clients"]) == ["a", "a (node 3)", "a (node 3) (node 3)", "b [31mWARNING : c"]


def test_a_client_with_another_alpha_or_metrics_of_our_names_says_so() -> None:
    other = lk.LoRAConfig(r=4, alpha=13, target_modules=["0", "2"], bias="lora_only")
    left_out = run("fedavg", client=app(other, nudge)).history[0]["left_out"]
    assert left_out["node 1"].endswith("expected the server's scaling 3.0 of 0, got 3.25")
    for name in ("rank", "num-examples"):
        client = app(work=lambda model, context, settings, name=name: (1, {name: 2}))
        left_out = run("fedavg", client=client).history[0]["left_out"]
        assert left_out["node 1"].endswith(f"of other names than the client's own, got {name}")


def test_a_reply_to_an_earlier_round_is_left_out() -> None:
    earlier: list[Message] = []

    def late(node: int, server_round: int, reply: Message) -> Message:
        if node != 3:
            return reply
        earlier.append(reply)
        return earlier[0]

    strategy = run("fedavg", 2, spoil=late, client=app(work=nudge))
    assert list(strategy.history[1]["clients"]) == ["client 0", "client 1"]
    assert strategy.history[1]["left_out"] == {"node 0": "it was not asked", "client 2": "no reply in time"}


def test_updates_that_overflow_together_change_nothing() -> None:
    def huge(model: nn.Module, context: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
        nudge(model, context, settings)
        if settings["server-round"] == 1:
            dict(model.named_parameters())["0.lora_A.weight"].data.fill_(3e38 * (-1) ** context.node_id)
        return 1, {}

    strategy = run("fedex-lora", 2, nodes=2, client=app(work=huge))
    first, second = strategy.history
    assert not first["clients"] and "overflow torch.float32" in first["left_out"]["client 0"]
    assert len(second["clients"]) == 2 and all(t.isfinite().all() for t in weights_of(strategy).values())


def test_a_client_whose_rank_rises_is_back_after_a_round() -> None:
    now = {"rank": 1}
    strategy = make("flexlora")
    grid = InProcessGrid(app(work=nudge, rank=lambda context: now["rank"] if context.node_id == 3 else None), 3)
    strategy.start(grid, num_rounds=1)
    now["rank"] = 4
    strategy.start(grid, num_rounds=3)
    first, second, third = strategy.history
    assert first["clients"]["client 2"]["rank"] == 1 and list(second["left_out"]) == ["client 2"]
    assert third["clients"]["client 2"]["rank"] == 4


def test_silence_errors_and_no_one_left() -> None:
    def third(node: int, server_round: int, reply: Message) -> Message | None:
        return None if (node == 3 and server_round == 1) or server_round == 2 else reply

    def failing(model: nn.Module, context: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
        if context.node_id == 1 and settings["server-round"] == 3:
            raise RuntimeError("out of disk")
        return fit(model, context, settings)

    strategy = make("fedavg")
    grid = InProcessGrid(app(work=failing), 3, third)
    strategy.start(grid, num_rounds=1)
    assert strategy.history[0]["left_out"] == {"node 3": "no reply in time"}
    before = {name: t.clone() for name, t in strategy.current.items()}
    strategy.start(grid, num_rounds=2)
    assert not strategy.history[1]["clients"] and len(strategy.history[1]["left_out"]) == 3
    assert equal(before, strategy.current)
    strategy.start(grid, num_rounds=3)
    assert strategy.history[2]["left_out"] == {"client 0": "it reports an error: out of disk"}
    assert not equal(before, strategy.current)


@pytest.mark.parametrize("rule", RULES)
def test_a_run_that_was_stopped_goes_on_bit_for_bit(rule: str, tmp_path: Any, caplog: Any) -> None:
    whole = run(rule, 3)
    run(rule, 2, state=tmp_path / "server.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["server.pt"]
    later = run(rule, 3, state=tmp_path / "server.pt")  # clients whose contexts are empty
    assert [h["round"] for h in later.history] == [1, 2, 3] and later.round == 3
    assert equal(weights_of(whole), weights_of(later))
    finished = run(rule, 3, state=tmp_path / "server.pt")
    assert len(finished.history) == 3


def test_a_state_is_replaced_whole_or_not_at_all(tmp_path: Any, monkeypatch: Any) -> None:
    path = tmp_path / "server.pt"
    run("fedavg", 1, client=app(work=nudge), state=path)
    before = path.read_bytes()

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            run("fedavg", 2, state=path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["server.pt"]
    for rule, settings in (("ffa-lora", {}), ("fedavg", {"seed": 1}), ("fedavg", {"privacy": Privacy(1.0, 1.0, 3)})):
        with pytest.raises(ValueError, match=r"server.pt: expected that of this run, got another (rule|seed|privacy)"):
            run(rule, 2, state=path, **settings)
    whole = torch.load(path, weights_only=True)
    for foreign in (b"nonsense", before[: len(before) // 2], [1], {"what": 3}, {"what": whole["what"]}, {"round": 1}):
        if isinstance(foreign, bytes):
            path.write_bytes(foreign)
        else:
            torch.save(foreign, path)
        with pytest.raises(ValueError, match=r"server\.pt: expected a file that a strategy wrote"):
            run("fedavg", 2, state=path)


def test_a_state_that_cannot_be_written_is_told_before_any_work(tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    grid = InProcessGrid(app(work=nudge), 3)
    with pytest.raises(OSError, match="file"):
        make("fedavg", state=tmp_path / "file" / "server.pt").start(grid, num_rounds=1)
    assert not grid.asked


@pytest.mark.parametrize("rule", ["fedex-lora", "fed-rac-lora"])
def test_clients_that_missed_rounds_or_lost_their_context_catch_up(rule: str) -> None:
    strategy = make(rule, 4, min_train_nodes=2, fraction_train=0.5)
    seen: list[int] = []

    def check(model: nn.Module, context: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
        assert equal(merged(copy.deepcopy(model)), weights_of(strategy)), "the client's base is not the server's"
        seen.append(context.node_id)
        return fit(model, context, settings)

    grid = InProcessGrid(app(work=check), 4)
    strategy.start(grid, num_rounds=6)
    assert all(not h["left_out"] and len(h["clients"]) == 2 for h in strategy.history)
    kept = [m.metadata.dst_node_id for m in grid.asked if m.content["kept"]]
    assert len(seen) == 12 and set(kept) <= set(seen)

    node = seen[-1]
    grid.contexts[node].state = RecordDict()
    strategy._before = strategy.round
    strategy.fraction_train, strategy.min_train_nodes = 1.0, 4
    strategy.start(grid, num_rounds=8)
    lost, found = strategy.history[6:]
    assert (
        list(lost["left_out"]) == [f"client {node - 1}"] and "has lost them" in lost["left_out"][f"client {node - 1}"]
    )
    assert not found["left_out"] and len(found["clients"]) == 4


def test_a_client_of_a_lower_rank_sends_and_gets_less_from_its_second_round_on() -> None:
    ranks = {1: 1, 2: 4, 3: 2}
    strategy = run("flexlora", 2, client=app(work=nudge, rank=lambda context: ranks[context.node_id]))
    first, second = strategy.history[0]["clients"], strategy.history[1]["clients"]
    for node, r in ranks.items():
        name = f"client {node - 1}"
        own = 4 * (r * (24 + 40) + r * (40 + 40) + 80) + 128 * 6
        assert first[name]["bytes_up"] == second[name]["bytes_up"] == second[name]["bytes_down"] == own
        assert second[name]["rank"] == r
    assert first["client 0"]["bytes_down"] == 4 * (4 * 64 + 4 * 80 + 80) + 128 * 6


def test_bytes_are_those_of_the_formula() -> None:
    factors, b = 4 * 4 * (24 + 40 + 40 + 40), 4 * 4 * (40 + 40)
    bias, head = 4 * 80, 128
    expected = {
        "fedavg": (factors + bias + 6 * head, factors + bias + 6 * head),
        "ffa-lora": (b + bias + 4 * head, b + bias + 4 * head),
        "fedex-lora": (3 * factors + bias + 10 * head, factors + bias + 6 * head),
        "federa": (factors + bias + 6 * head, factors + bias + 6 * head),
        "fed-rac-lora": (factors + bias + 6 * head, b + bias + 4 * head),
    }
    first = run("federa", 1, client=app(work=nudge)).history[0]
    assert first["bytes_down"] == 3 * expected["federa"][0]  # the start goes once
    for rule, (down, up) in expected.items():
        second = run(rule, 2, client=app(work=nudge)).history[1]
        assert (second["bytes_down"], second["bytes_up"]) == (3 * down, 3 * up), rule


@pytest.mark.parametrize("rule", RULES)
def test_dora_is_averaged_where_nothing_exact_is_promised(rule: str) -> None:
    config = lk.DoRAConfig(r=4, alpha=12, target_modules=["0", "2"])
    if rule != "fedavg":
        with pytest.raises(ValueError, match=r"whose average is that of the weights, got 0\.lora_magnitude_vector"):
            make(rule, config=config)
        return
    strategy = run(rule, 2, client=app(config), config=config)
    assert not strategy.history[1]["left_out"]
    assert not torch.equal(strategy.current["0.lora_magnitude_vector"], base()[0].weight.norm(dim=1))  # type: ignore


@pytest.mark.parametrize("rule", RULES)
def test_the_servers_base_is_left_alone(rule: str) -> None:
    model = base()
    before = {name: p.clone() for name, p in model.named_parameters()}
    rng = torch.random.get_rng_state()
    STRATEGIES[rule](model, CONFIG)
    assert equal(dict(model.named_parameters()), before) and all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), rng)


@pytest.mark.parametrize("rule", RULES)
def test_factors_and_a_base_in_bfloat16_travel_as_float32(rule: str) -> None:
    config = lk.LoRAConfig(r=2, alpha=4, target_modules=["0"], dtype=torch.bfloat16)

    def work(model: nn.Module, context: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
        x = torch.randn(8, 24, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(context.node_id))
        model(x).square().mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p.sub_(p.grad)
        return 1, {}

    client = client_app(lambda context: base().bfloat16(), config, work)
    strategy = STRATEGIES[rule](base().bfloat16(), config, min_train_nodes=2, fraction_evaluate=0.0)
    strategy.start(InProcessGrid(client, 2), num_rounds=2)
    assert [h["left_out"] for h in strategy.history] == [{}, {}]


def test_other_layers_and_configs_are_refused() -> None:
    embedding = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="LoRA layers on linears, got other layers in 0"):
        STRATEGIES["fedavg"](embedding, lk.LoRAConfig(r=2, target_modules=["0", "1"]))
    assert type(embedding[0]) is nn.Embedding
    with pytest.raises(TypeError, match="expected config to be a LoRAConfig"):
        STRATEGIES["fedavg"](base(), lk.SVFTConfig())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sparse_rounds"):
        STRATEGIES["slora"](base(), CONFIG, sparse_rounds=0)
    for norm in (math.nan, 0.0, -1, True, "1"):
        with pytest.raises(ValueError, match="FactorFedAvg: expected max_norm to be a number above 0"):
            make("fedavg", max_norm=norm)
    with pytest.raises(ValueError, match="expected no initial_arrays"):
        make("fedavg").start(InProcessGrid(app(), 3), ArrayRecord())  # type: ignore[arg-type]


def test_evaluation_is_of_the_rounds_model_and_goes_on_without_a_client() -> None:
    def measure(model: nn.Module, context: Any, settings: dict[str, Any]) -> tuple[int, dict[str, float]]:
        if context.node_id == 2:
            raise RuntimeError("no data")
        return 10 * context.node_id, {"loss": float(context.node_id)}

    strategy = make("fedavg", fraction_evaluate=1.0, min_evaluate_nodes=3)
    result = strategy.start(InProcessGrid(app(evaluate=measure), 3), num_rounds=1)
    assert dict(result.evaluate_metrics_clientapp[1]) == {"loss": pytest.approx((10 * 1 + 30 * 3) / 40)}


# Differential privacy.


@pytest.mark.parametrize("rule", ["fedavg", "ffa-lora", "federa", "slora", "fed-rac-lora"])
def test_clipped_and_noised_averages(rule: str) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'federated'")
    privacy = Privacy(clipping_norm=0.5, noise_multiplier=1e-9, population=3)

    def silent(node: int, server_round: int, reply: Message) -> Message | None:
        return None if node == 2 else reply

    strategy = make(rule, privacy=privacy)
    start = {name: strategy.current[name].clone() for name in strategy.trained()}
    sent: dict[int, dict[str, Tensor]] = {}
    found: dict[str, Tensor] = {}

    def watch(node: int, server_round: int, reply: Message) -> Message | None:
        sent[node] = reply.content["arrays"].to_torch_state_dict()
        return silent(node, server_round, reply)

    settle = strategy.settle

    def keep(new: dict[str, Tensor]) -> None:
        found.update({name: t.clone() for name, t in new.items()})
        settle(new)

    strategy.settle = keep  # type: ignore[method-assign]
    strategy.start(InProcessGrid(app(), 3, watch), num_rounds=1)
    updates = {n: {k: t - start[k] for k, t in sent[n].items()} for n in (1, 3)}
    norms = {n: math.sqrt(sum(float(u.square().sum()) for u in updates[n].values())) for n in updates}
    assert max(norms.values()) > 0.5
    for name, t in found.items():
        expected = start[name] + sum(min(1.0, 0.5 / norms[n]) * updates[n][name] for n in (1, 3)) / 3
        torch.testing.assert_close(t, expected, rtol=1e-5, atol=1e-6)


def test_noise_is_of_the_deviation_that_is_accounted_for() -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'federated'")
    from dp_accounting import GaussianDpEvent
    from dp_accounting.rdp import RdpAccountant

    privacy = Privacy(clipping_norm=2.0, noise_multiplier=1.5, population=3, delta=1e-4)
    mean = {"a": torch.zeros(200, 300), "b": torch.zeros(1000)}
    privacy.noise_(mean, 3)
    assert mean["a"].std().item() == pytest.approx(1.5 * 2.0 / 3, rel=0.02) and abs(mean["a"].mean()) < 0.02
    again = {"a": torch.zeros(200, 300)}
    privacy.noise_(again, 3)
    assert not torch.equal(again["a"], mean["a"])

    strategy = run("ffa-lora", 3, privacy=privacy)
    accountant = RdpAccountant()
    for record in strategy.history:
        accountant.compose(GaussianDpEvent(1.5))
        assert record["epsilon"] == pytest.approx(accountant.get_epsilon(1e-4))


def test_the_budget_ends_a_run_and_outlives_it(tmp_path: Any) -> None:
    pytest.importorskip("dp_accounting", reason="needs the extra 'federated'")
    one = run("fedavg", 1, privacy=Privacy(1.0, 1.0, 3)).history[0]["epsilon"]
    settings = {"privacy": Privacy(1.0, 1.0, 3, max_epsilon=1.2 * one), "state": tmp_path / "server.pt"}
    run("fedavg", 1, **settings)
    with pytest.raises(PrivacyBudgetExhausted, match="another round would exceed max_epsilon"):
        run("fedavg", 2, **settings)
    grid = InProcessGrid(app(work=nudge), 3)
    with pytest.raises(ValueError, match="a population of at least the 3 clients of a round, got 2"):
        make("fedavg", privacy=Privacy(1.0, 1.0, 2)).start(grid, num_rounds=1)
    assert not grid.asked
    with pytest.raises(ValueError, match=r"expected that of this run, got another privacy: .*configuration"):
        run("fedavg", 2, **settings | {"privacy": Privacy(1.0, 1.0, 3, delta=1e-3)})
    for rule in ("fedex-lora", "flexlora"):
        with pytest.raises(ValueError, match="depends on each client by itself"):
            make(rule, privacy=Privacy(1.0, 1.0, 3))
    for bad in ({"clipping_norm": 0.0}, {"noise_multiplier": math.nan}, {"clipping_norm": True}):
        with pytest.raises(ValueError, match="Privacy: expected"):
            Privacy(**{"clipping_norm": 1.0, "noise_multiplier": 1.0, "population": 3, **bad})
