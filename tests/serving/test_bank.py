"""AdapterBank: every row as its adapter alone, loading and evicting, failing closed, many threads."""

import copy
import json
import pickle
import shutil
import struct
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowrank_kernels as lk
from lowrank_kernels.serving import AdapterBank
from lowrank_kernels.serving.bank import BankLinear
from tests.serving.tiny_model import KINDS, make_model, write_adapter

MIXED = ["lora", None, "dora", "rslora", "patterns", "lora", "everywhere", "bias", None, "rank 16"]


def make_tokens(rows, length=9):
    return (torch.arange(rows * length).reshape(rows, length) * 7 + 3) % 64


def assert_rows_are_right(logits, names, tokens, alone):
    for row, name in enumerate(names):
        expected = alone(name, tokens[row : row + 1])[0]
        assert (logits[row] - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max())), (row, name)


@pytest.fixture
def bank(model, folders):
    with AdapterBank(model) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        yield bank


# ---------------------------------------------------------------------------------------------------------- batches


@torch.no_grad()
def test_every_row_is_its_adapter_alone(bank, alone):
    tokens = make_tokens(len(MIXED))
    with bank.batch(MIXED):
        logits = bank.model(tokens).logits
    assert_rows_are_right(logits, MIXED, tokens, alone)


@torch.no_grad()
def test_outside_of_a_batch_the_model_is_the_base(bank):
    tokens = make_tokens(3)
    expected = make_model()(tokens).logits
    assert torch.equal(bank.model(tokens).logits, expected)
    with bank.batch([None, None, None]):
        assert torch.equal(bank.model(tokens).logits, expected)


def test_generation_with_prompts_of_different_lengths(bank, alone, folders):
    names = ["lora", None, "dora", "everywhere"]
    tokens, lengths = make_tokens(4), (9, 5, 7, 3)
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    options = {"max_new_tokens": 6, "do_sample": False}
    with bank.batch(names):
        together = bank.model.generate(tokens * mask, attention_mask=mask, **options)
    for row, name in enumerate(names):
        alone(name, tokens[:1])  # makes the model
        one = make_model() if name is None else alone.models[name]
        expected = one.generate(input_ids=tokens[row : row + 1, -lengths[row] :], **options)
        assert together[row, -6:].tolist() == expected[0, -6:].tolist()


def test_several_samples_of_a_prompt(bank, alone):
    names, tokens = ["lora", "dora"], make_tokens(2)
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False}
    with bank.batch(names):
        together = bank.model.generate(tokens, **options)
    for row, name in enumerate(names):
        alone(name, tokens[:1])
        expected = alone.models[name].generate(input_ids=tokens[row : row + 1], **options)
        assert together[row].tolist() == expected[0].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16])
@torch.no_grad()
def test_half_precision(folders, alone, dtype):
    tokens = make_tokens(len(MIXED))
    with AdapterBank(make_model(dtype)) as bank:
        for name, folder in folders.items():
            bank.load(name, folder)
        with bank.batch(MIXED):
            logits = bank.model(tokens).logits
    for row, name in enumerate(MIXED):
        expected = alone(name, tokens[row : row + 1])[0]
        assert (logits[row].float() - expected).norm() <= 0.05 * expected.norm()


def test_bad_names(bank):
    with pytest.raises(ValueError, match="expected the name of an adapter, got 'nobody'; there are: lora, rslora"):
        bank.batch(["lora", "nobody"]).__enter__()
    with bank.batch(["lora", None]), pytest.raises(ValueError, match="there are 2 ids for 1 sequences"):
        bank.model(make_tokens(1, 5))
    assert all(a.batches == 0 for a in bank._adapters.values())


def test_gradients_do_not_reach_the_weights(bank):
    with bank.batch(["lora"]):
        bank.model(make_tokens(1)).logits.sum().backward()
    assert bank.model.model.layers[0].self_attn.q_proj.weight.grad is None


# -------------------------------------------------------------------------------------------------------- adapters


def test_only_targeted_linears_are_wrapped_and_close_puts_them_back(model, folders):
    before = {name: (type(m), id(m)) for name, m in model.named_modules()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    bank = AdapterBank(model)
    bank.load("lora", folders["lora"])
    wrapped = {name for name, m in model.named_modules() if isinstance(m, BankLinear)}
    assert wrapped == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"}
    bank.close()
    assert {name: (type(m), id(m)) for name, m in model.named_modules()} == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads


@torch.no_grad()
def test_loading_unloading_and_replacing(bank, alone, folders):
    tokens = make_tokens(1)
    bank.load("lora", folders["dora"])
    with bank.batch(["lora"]):
        assert_rows_are_right(bank.model(tokens).logits, ["dora"], tokens, alone)
    bank.unload("lora")
    assert "lora" not in bank.names() and bank.names()[0] == "rslora"
    with pytest.raises(ValueError, match="got 'lora'"):
        bank.unload("lora")
    assert bank.nbytes == sum(a.nbytes for a in bank._adapters.values())


@torch.no_grad()
def test_a_batch_keeps_the_adapters_it_started_with(bank, alone, folders):
    """Unloaded, replaced and crowded out in the middle of a batch."""
    names, tokens = ["lora", "dora", "bias"], make_tokens(3)
    with bank.batch(names):
        bank.unload("lora")
        bank.load("dora", folders["everywhere"])
        bank.unload("bias")
        for i in range(6):
            bank.load(f"more {i}", folders["rank 16"])
        assert_rows_are_right(bank.model(tokens).logits, names, tokens, alone)
        with bank.batch(["dora", None, "more 3"]):
            assert_rows_are_right(bank.model(tokens).logits, ["everywhere", None, "rank 16"], tokens, alone)
        assert_rows_are_right(bank.model(tokens).logits, names, tokens, alone)
    assert sum(a is not None for a in bank._slots) == len(bank.names())


def test_loading_in_the_background(model, folders):
    bank = AdapterBank(model)
    waiting = [bank.load(name, folder, wait=False) for name, folder in folders.items()]
    assert [future.result(timeout=60) for future in waiting] == [None] * len(waiting)
    assert bank.names() == list(folders)
    failing = bank.load("nothing", folders["lora"] / "nowhere", wait=False)
    with pytest.raises(ValueError, match="expected a folder"):
        failing.result(timeout=60)
    assert bank.names() == list(folders)
    bank.close()


# ---------------------------------------------------------------------------------------------------------- budget


def bytes_of(folder, model):
    with AdapterBank(model) as bank:
        bank.load("one", folder)
        return bank.nbytes


@torch.no_grad()
def test_the_least_recently_used_goes_and_comes_back(model, folders, alone):
    size = bytes_of(folders["lora"], model)
    tokens = make_tokens(1)
    with AdapterBank(model, budget_bytes=3 * size) as bank:
        for name in "abc":
            bank.load(name, folders["lora"])
        with bank.batch(["a"]):
            pass
        bank.load("d", folders["lora"])
        assert bank.resident() == ["c", "a", "d"] and bank.names() == list("abcd") and bank.nbytes == 3 * size
        with bank.batch(["b"]):
            assert_rows_are_right(bank.model(tokens).logits, ["lora"], tokens, alone)
        assert bank.resident() == ["a", "d", "b"]
        rows = [stack.lora_a.shape[0] for stack in bank._stacks.values()]
        assert set(rows) == {3 * 4}  # gaps are used again


@pytest.fixture
def bank_of_two(model, folders):
    """A bank with room for two adapters of the kind "lora", one of them pinned."""
    with AdapterBank(model, budget_bytes=2 * bytes_of(folders["lora"], model)) as bank:
        bank.load("pinned", folders["lora"], pin=True)
        bank.load("busy", folders["lora"])
        yield bank


def test_an_adapter_of_a_running_batch_is_not_evicted(bank_of_two, folders):
    with bank_of_two.batch(["busy"]):
        with pytest.raises(ValueError, match=r"expected room for 'more'.*pinned or in a running batch leave 0"):
            bank_of_two.load("more", folders["lora"])
        assert bank_of_two.names() == ["pinned", "busy"]
    bank_of_two.load("more", folders["lora"])
    assert bank_of_two.resident() == ["pinned", "more"]


def test_a_batch_of_more_than_there_is_room_for_is_refused(bank_of_two, folders):
    bank_of_two.load("more", folders["lora"])
    with pytest.raises(ValueError, match="expected room for 'busy'"), bank_of_two.batch(["pinned", "more", "busy"]):
        pass


def test_pins_are_taken_off_and_put_on(bank_of_two, folders):
    bank_of_two.load("more", folders["lora"])
    bank_of_two.pin("pinned", False)
    bank_of_two.pin("busy")
    assert bank_of_two.resident() == ["more", "busy"]
    with pytest.raises(ValueError, match="expected room for 'large'"):
        bank_of_two.load("large", folders["rank 16"])


def test_replacing_within_the_budget(model, folders):
    size = bytes_of(folders["lora"], model)
    with AdapterBank(model, budget_bytes=size) as bank:
        bank.load("a", folders["lora"])
        bank.load("a", folders["lora"])
        assert bank.resident() == ["a"]


@torch.no_grad()
def test_without_a_copy_on_the_host_the_folder_is_read_again(model, folders, alone):
    size = bytes_of(folders["lora"], model)
    tokens = make_tokens(1)
    with AdapterBank(model, budget_bytes=size, host_bytes=0) as bank:
        bank.load("a", folders["lora"])
        bank.load("b", folders["lora"])
        assert bank._adapters["a"].parts is None and bank._adapters["b"].parts is not None
        with bank.batch(["a"]):
            assert_rows_are_right(bank.model(tokens).logits, ["lora"], tokens, alone)


# ----------------------------------------------------------------------------------------------------- fails closed


def broken(kind, source, folder):
    """A copy of an adapter's folder with one thing wrong."""
    shutil.copytree(source, folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    first = sorted(tensors)[0]
    if kind == "no weights":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "header":
        weights.write_bytes(struct.pack("<Q", 2**60) + weights.read_bytes()[8:])
    elif kind == "json":
        config.write_text("{")
    elif kind == "method":
        config.write_text(json.dumps({**settings, "peft_type": "LOHA"}))
    elif kind == "feature":
        config.write_text(json.dumps({**settings, "layer_replication": [[0, 2]]}))
    elif kind == "biases":
        config.write_text(json.dumps({**settings, "bias": "lora_only", "target_modules": ["down_proj"]}))
        tensors = {k: v for k, v in tensors.items() if "down_proj" in k}
        save_file(tensors, weights)
    elif kind == "nan":
        tensors[first][0, 0] = float("nan")
        save_file(tensors, weights)
    elif kind == "integers":
        tensors[first] = tensors[first].long()
        save_file(tensors, weights)
    elif kind == "another model":
        save_file({k: torch.zeros(v.shape[0] + 1, v.shape[1]) for k, v in tensors.items()}, weights)
    elif kind == "missing":
        del tensors[first]
        save_file(tensors, weights)
    return folder


FAULTS = [
    ("no weights", "expected adapter_model.safetensors"),
    ("truncated", "safetensors"),
    ("header", "expected .* to start with a safetensors header"),
    ("json", "to hold JSON"),
    ("method", "expected an adapter of peft_type 'LORA', got 'LOHA'"),
    ("feature", "uses settings that are not supported: layer_replication"),
    ("biases", "trains biases of the base"),
    ("nan", "found NaN or Inf"),
    ("integers", "expected .* of F32, BF16, F16, F64, got I64"),
    ("another model", "expected .* of shape"),
    ("missing", "missing: base_model"),
]


@pytest.mark.parametrize(("kind", "message"), FAULTS)
@torch.no_grad()
def test_a_bad_folder_changes_nothing(kind, message, bank, folders, alone, tmp_path):
    source = folders["rslora"]
    bank.load("rslora", source)
    tokens, names = make_tokens(2), ["rslora", "lora"]
    before = bank.names(), bank.nbytes, bank._served
    with pytest.raises((ValueError, TypeError), match=message):
        bank.load("rslora", broken(kind, source, tmp_path / "bad"))
    assert (bank.names(), bank.nbytes, bank._served) == before
    with bank.batch(names):
        assert_rows_are_right(bank.model(tokens).logits, names, tokens, alone)


def test_bad_arguments(model):
    with pytest.raises(TypeError, match=r"AdapterBank: expected model to be a torch\.nn\.Module"):
        AdapterBank(None)
    for bad in (-1, 1.5, True):
        with pytest.raises(ValueError, match="AdapterBank: expected budget_bytes"):
            AdapterBank(model, bad)
    with pytest.raises(ValueError, match=r"AdapterBank\.load: expected a name"):
        AdapterBank(model).load("", "folder")


# ---------------------------------------------------------------------------------------------------------- threads


BATCHES_OF_A_CLIENT, CHANGES_OF_AN_OPERATOR = 40, 60


class Traffic:
    """Clients that run mixed batches while operators load, replace, unload and fail; what went wrong meanwhile.

    Each client ends after so many batches; each operator after so many changes, and not before the clients.
    """

    def __init__(self, bank, names, folders, alone, bad):
        self.bank, self.names, self.folders, self.bad = bank, names, folders, bad
        self.tokens = make_tokens(4, 5)
        self.expected = {
            kind: [alone(kind, self.tokens[row : row + 1])[0] for row in range(4)] for kind in [*KINDS, None]
        }
        self.wrong, self.served = [], 0
        self.clients_are_done, self.lock = threading.Event(), threading.Lock()

    def run(self, clients, operators):
        running = [threading.Thread(target=self.client, args=(i,)) for i in range(clients)]
        changing = [threading.Thread(target=self.operator, args=(10 + i,)) for i in range(operators)]
        for thread in running + changing:
            thread.start()
        for thread in running:
            thread.join(timeout=300)
        self.clients_are_done.set()
        for thread in changing:
            thread.join(timeout=300)
        self.stuck = [thread for thread in running + changing if thread.is_alive()]

    @torch.no_grad()
    def client(self, seed):
        generator = torch.Generator().manual_seed(seed)
        served = 0
        while served < BATCHES_OF_A_CLIENT and not self.wrong:
            picks = torch.randint(-1, len(self.names), (4,), generator=generator).tolist()
            asked = [None if i < 0 else self.names[i] for i in picks]
            try:
                with self.bank.batch(asked):
                    logits = self.bank.model(self.tokens).logits
            except ValueError as error:  # unloaded just now, or no room beside the other batches
                if "expected the name" not in str(error) and "expected room" not in str(error):
                    self.wrong.append(repr(error))
                continue
            except Exception as error:
                self.wrong.append(repr(error))
                continue
            for row, name in enumerate(asked):
                right = self.expected[None if name is None else name.split("/")[0]][row]
                if (logits[row] - right).abs().max() > 1e-5 * right.abs().max():
                    self.wrong.append((row, name))
            served += 1
        with self.lock:
            self.served += served

    def operator(self, seed):
        generator = torch.Generator().manual_seed(seed)
        changes = 0
        while (changes < CHANGES_OF_AN_OPERATOR or not self.clients_are_done.is_set()) and not self.wrong:
            name = self.names[int(torch.randint(len(self.names), (), generator=generator))]
            draw = float(torch.rand((), generator=generator))
            changes += 1
            try:
                if draw < 0.2:
                    self.bank.load(name, self.bad)
                elif draw < 0.5:
                    self.bank.unload(name)
                else:
                    self.bank.load(name, self.folders[name.split("/")[0]])
            except ValueError as error:
                if not any(words in str(error) for words in ("safetensors", "expected the name", "expected room")):
                    self.wrong.append(repr(error))


@pytest.fixture(scope="module")
def traffic(folders, alone, tmp_path_factory):
    """Four clients and two operators have been at a bank whose budget is less than all its adapters take."""
    budget = int(1.8 * sum(bytes_of(folders[kind], make_model()) for kind in KINDS))
    bank = AdapterBank(make_model(), budget)
    names = [f"{kind}/{i}" for i in range(3) for kind in KINDS]
    for name in names:
        bank.load(name, folders[name.split("/")[0]])
    bad = broken("truncated", folders["lora"], tmp_path_factory.mktemp("traffic") / "bad")
    traffic = Traffic(bank, names, folders, alone, bad)
    traffic.run(clients=4, operators=2)
    return traffic


def test_no_row_of_many_clients_is_anothers_while_adapters_come_and_go(traffic):
    assert not traffic.wrong, traffic.wrong[:3]
    assert not traffic.stuck
    assert traffic.served == 4 * BATCHES_OF_A_CLIENT


def test_no_adapter_stays_in_use_after_the_batches_of_many_clients(traffic):
    assert all(a is None or a.batches == 0 for a in traffic.bank._slots)


def test_the_budget_is_kept_while_adapters_come_and_go(traffic):
    bank = traffic.bank
    assert bank.nbytes <= bank.budget_bytes
    assert {a.name for a in bank._slots if a} == set(bank.resident())


def test_the_plan_of_a_batch_is_made_once(bank, monkeypatch):
    from lowrank_kernels.nn import rows

    made = []
    monkeypatch.setattr(rows, "plan_batch", lambda *a: made.append(a) or lk.plan_batch(*a))
    with torch.no_grad(), bank.batch(["lora", "dora"]):
        bank.model(make_tokens(2))
    assert len(made) == 1


def test_an_adapter_of_some_layers_alone_is_served(bank, tmp_path):
    folder = write_adapter(tmp_path / "one", r=2, target_modules=["gate_proj"], layers_to_transform=[0])
    bank.load("one", folder)
    alone, tokens = make_model(), make_tokens(2)
    assert [r.name for r in lk.load_adapter(alone, folder).replaced] == ["model.layers.0.mlp.gate_proj"]
    with torch.no_grad(), bank.batch([None, "one"]):
        torch.testing.assert_close(bank.model(tokens).logits[1], alone(tokens).logits[1], rtol=1e-5, atol=1e-5)


def test_a_head_of_the_adapters_own_is_refused(bank, tmp_path):
    folder = write_adapter(tmp_path / "head", r=2, target_modules=["gate_proj"], modules_to_save=["lm_head"])
    bank.load("head", folder)  # it is the base's own
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"][0, 0] += 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"weights of its own for lm_head \(modules_to_save.*a bank cannot serve it"):
        bank.load("other head", folder)
    assert "other head" not in bank.names()


# ------------------------------------------------------------------------------------------ weights and what is saved


def ways_to_change_a_weight():
    """Ways of changing a weight: some raise its version counter, some do not, some put another tensor in its place."""

    def in_place(model, name, value):
        with torch.no_grad():
            model.get_submodule(name).weight.copy_(value)

    def through_data(model, name, value):
        model.get_submodule(name).weight.data.copy_(value)

    def loaded(assign):
        def load(model, name, value):
            state = {**model.state_dict(), f"{name}.weight": value}
            model.load_state_dict(state, assign=assign)

        return load

    def fused_step(model, name, value):
        weight = model.get_submodule(name).weight
        weight.requires_grad_()
        weight.grad = (weight - value).detach()
        torch.optim.SGD([weight], lr=1.0, fused=True).step()
        weight.requires_grad_(False)
        weight.grad = None

    return {
        "in place": in_place,
        "through .data": through_data,
        "load_state_dict": loaded(False),
        "load_state_dict(assign=True)": loaded(True),
        "fused step": fused_step,
    }


@pytest.mark.parametrize("way", ways_to_change_a_weight())
@pytest.mark.parametrize("when", ["resident", "evicted", "read again"])
@torch.no_grad()
def test_dora_follows_a_weight_that_changes(way, when, folders):
    name, tokens, names = "model.layers.1.self_attn.q_proj", make_tokens(3), ["dora", None, "lora"]
    model, change = make_model(), ways_to_change_a_weight()[way]
    value = model.get_submodule(name).weight.clone()
    value[3, 5] += 2.0
    with AdapterBank(model, host_bytes=0 if when == "read again" else None) as bank, torch.no_grad():
        for key in ("lora", "dora"):
            bank.load(key, folders[key])
        with bank.batch(names):
            before = model(tokens).logits
        if when != "resident":
            bank.budget_bytes = bank.nbytes
            bank.load("in its place", folders["everywhere"])
            assert "dora" not in bank.resident()
            bank.budget_bytes = None
        change(model, name, value)
        with bank.batch(names):
            after = model(tokens).logits
        with bank.batch(names):
            again = model(tokens).logits
    fresh = make_model()
    fresh.get_submodule(name).weight.copy_(value)
    with AdapterBank(fresh) as bank:
        for key in ("lora", "dora"):
            bank.load(key, folders[key])
        with bank.batch(names):
            expected = fresh(tokens).logits
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(after, again) and not torch.allclose(after, before, rtol=1e-2)


def test_a_fingerprint_tells_every_change_of_a_weight():
    from lowrank_kernels.serving.fingerprint import fingerprint

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for n, k in ((3, 8), (4, 5), (2, 1), (1, 33)):
            weight = torch.randn(n, k).to(dtype)
            before = fingerprint(weight)
            assert torch.equal(before, fingerprint(weight.clone())) and before.shape == (n,)
            assert torch.equal(before, fingerprint(torch.cat([weight, weight], 1)[:, :k]))
            assert torch.equal(before[1:], fingerprint(weight[1:]))
            for i in range(n):
                for j in range(k):
                    other = weight.clone()
                    other[i, j] = torch.nextafter(other[i, j].float(), torch.tensor(9.0)).to(dtype) if k == 8 else 9.0
                    same = torch.equal(other, weight)
                    assert torch.equal(before, fingerprint(other)) == same
            if k > 8:
                assert not torch.equal(before, fingerprint(weight.flip(1)))


def test_a_bias_of_b_has_the_dtype_of_each_call_of_a_batch(model, folders):
    bank, tokens = AdapterBank(model), torch.randint(3, 60, (1, 5))
    bank.load("biased", folders["bias"])
    with torch.no_grad(), bank.batch(["biased"]):
        before = model(tokens).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(tokens)
    with torch.no_grad(), bank.batch(["biased"]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(tokens)
        assert torch.equal(model(tokens).logits, before)


def test_a_model_with_a_bank_says_why_it_cannot_be_copied(model, folders):
    bank = AdapterBank(model)
    bank.load("biased", folders["bias"])
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"close\(\) the bank first"):
            copied(model)
    bank.close()
    copy.deepcopy(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_fingerprint_tells_signs_and_exponents_that_change_together(dtype):
    from lowrank_kernels.serving.fingerprint import fingerprint

    weight = torch.randn(4, 64).to(dtype)
    before = fingerprint(weight)
    for columns in (slice(None), slice(1, None, 2), slice(3, None, 4), [3, 7], [1, 3], [0, 63], [31, 63]):
        for factor in (-1.0, 2.0, 0.5, -2.0):
            other = weight.clone()
            other[:, columns] *= factor
            assert (fingerprint(other) != before).all(), (columns, factor)


def test_a_fingerprint_without_a_product_of_integers_is_the_same():
    from lowrank_kernels.serving.fingerprint import _in_parts

    words, multipliers = torch.randint(-(2**63), 2**63 - 1, (7, 5)), torch.randint(-(2**63), 2**63 - 1, (5,))
    whole = _in_parts(words, multipliers, 1000, product=True)
    for at_once in (1, 5, 10, 1000):
        for product in (True, False):
            assert torch.equal(_in_parts(words, multipliers, at_once, product=product), whole)


def test_a_model_with_a_bank_is_saved_and_loaded_as_without(model, folders, tmp_path):
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with AdapterBank(model) as bank:
        bank.load("everywhere", folders["everywhere"])
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
        model.save_pretrained(tmp_path)
        changed = {key: t + 1 for key, t in before.items()}
        model.load_state_dict(changed)
        assert all(torch.equal(t, changed[key]) for key, t in model.state_dict().items())
    read = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(t, before[key]) for key, t in read.items())


# ----------------------------------------------------------------------------------- rows, threads, several banks


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generation_on_a_thread_has_the_batch_it_was_started_in(bank, options):
    names, tokens, found = ["lora", "dora"], make_tokens(2), []
    options = {"max_new_tokens": 4, "do_sample": False, **options}

    def generate():
        found.append(bank.model.generate(tokens, **options))

    with bank.batch(names):
        generate()
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
    assert torch.equal(*found)


@torch.no_grad()
def test_the_base_beside_a_batch_of_another_thread_is_asked_for(bank, alone):
    tokens, opened, done, failed = make_tokens(2), threading.Event(), threading.Event(), []

    def other():
        with torch.no_grad(), bank.batch(["lora", "dora"]):
            opened.set()
            done.wait(60)
            try:
                assert_rows_are_right(bank.model(tokens).logits, ["lora", "dora"], tokens, alone)
            except Exception as error:
                failed.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    opened.wait(60)
    try:
        with pytest.raises(
            RuntimeError, match=r"AdapterBank\.batch: expected a layer in thread 'MainThread' to run in"
        ):
            bank.model(tokens)
        with bank.batch([None]):
            assert_rows_are_right(bank.model(tokens).logits, [None, None], tokens, alone)
    finally:
        done.set()
        thread.join()
    assert not failed
    assert_rows_are_right(bank.model(tokens).logits, [None, None], tokens, alone)


@torch.no_grad()
def test_batches_of_two_banks_nest(bank, folders, alone):
    tokens = make_tokens(2)
    with AdapterBank(make_model()) as other:
        other.load("x", folders["bias"])
        with bank.batch(["lora", None]), other.batch([None, "x"]):
            assert_rows_are_right(bank.model(tokens).logits, ["lora", None], tokens, alone)
            assert_rows_are_right(other.model(tokens).logits, [None, "bias"], tokens, alone)


@torch.no_grad()
def test_a_batch_put_twice_is_refused(bank, alone):
    tokens, names = make_tokens(3), ["lora", "dora", "bias"]
    twice = torch.cat([tokens, tokens])
    with bank.batch(names), pytest.raises(ValueError, match="there are 3 ids for 6 sequences"):
        bank.model(twice)
    with bank.batch(names + names):
        assert_rows_are_right(bank.model(twice).logits, names + names, twice, alone)


@torch.no_grad()
def test_packed_sequences(bank, alone):
    """One row of tokens, whose position ids start again with each sequence: attention stays within it."""
    lengths, names, ends = (4, 6), ["lora", "dora"], [0, 4, 10]
    tokens = make_tokens(1, 10)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    with bank.batch(names, cu_seqlens=ends):
        logits = bank.model(tokens, position_ids=positions, use_cache=False).logits[0]
    for name, begin, end in zip(names, ends, ends[1:], strict=False):
        torch.testing.assert_close(logits[begin:end], alone(name, tokens[:, begin:end])[0], rtol=1e-4, atol=1e-4)


def test_recomputation_on_another_thread_has_the_batch_of_its_forward(bank):
    found = []
    for reentrant in (None, True, False):
        model = bank.model.train()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        inputs = model.get_input_embeddings()(make_tokens(2)).detach().requires_grad_()
        with bank.batch(["lora", "dora"]):
            loss = model(inputs_embeds=inputs).logits.square().sum()
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        found.append(inputs.grad)
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


# ---------------------------------------------------------------------------------------------- several linears in one


WIDTHS = {"q_proj": 12, "k_proj": 5, "v_proj": 7}


class Attention(torch.nn.Module):
    """Q, K and V as one linear, or apart with the same weights."""

    def __init__(self, fused):
        super().__init__()
        torch.manual_seed(0)
        whole = torch.nn.Linear(16, 24)
        if fused:
            self.qkv_proj = whole
        else:
            parts = zip(whole.weight.split((12, 5, 7)), whole.bias.split((12, 5, 7)), strict=True)
            for (name, n), (weight, bias) in zip(WIDTHS.items(), parts, strict=True):
                linear = torch.nn.Linear(16, n)
                linear.weight.data, linear.bias.data = weight.detach().clone(), bias.detach().clone()
                self.add_module(name, linear)

    def forward(self, x):
        linears = [self.qkv_proj] if hasattr(self, "qkv_proj") else [getattr(self, name) for name in WIDTHS]
        return torch.cat([linear(x) for linear in linears], dim=-1)


@torch.no_grad()
def test_adapters_of_the_whole_and_of_its_parts(tmp_path):
    """In one batch, on one base product: adapters trained on the fused linear, and on Q, K and V apart."""
    settings = {
        "whole": (True, lk.LoRAConfig(r=3, target_modules=("qkv_proj",), lora_bias=True)),
        "whole dora": (True, lk.DoRAConfig(r=2, target_modules=("qkv_proj",))),
        "q and v": (False, lk.LoRAConfig(r=4, target_modules=("q_proj", "v_proj"), rank_pattern={"v_proj": 6})),
        "k dora": (False, lk.DoRAConfig(r=2, target_modules=("k_proj",))),
        "all dora": (False, lk.DoRAConfig(r=2, target_modules=("q_proj", "k_proj", "v_proj"))),
    }
    alone, torch_model = {None: Attention(True)}, Attention(True)
    for i, (name, (fused, config)) in enumerate(settings.items()):
        torch.manual_seed(i)
        alone[name] = Attention(fused)
        lk.adapt(alone[name], config)
        for key, p in alone[name].named_parameters():
            if "lora_" in key:
                p.add_(0.3 * torch.randn_like(p))
        lk.save_adapter(alone[name], tmp_path / name)
    names = [*settings, None, "q and v"]
    x = torch.randn(len(names), 3, 16)
    with AdapterBank(torch_model, fused={"qkv_proj": WIDTHS}) as bank:
        for name in settings:
            bank.load(name, tmp_path / name)
        for _ in range(2):
            with bank.batch(names):
                y = bank.model(x)
            for row, name in enumerate(names):
                torch.testing.assert_close(y[row], alone[name].eval()(x[row]), rtol=1e-5, atol=1e-5, msg=str(name))
            bank.unload("whole dora")  # a gap in the stack, filled again
            bank.load("whole dora", tmp_path / "whole dora")
        assert bank._adapters["q and v"].nbytes == 4 * 6 * (3 * 16 + 24)
        assert bank._stacks["qkv_proj"].rows_used == 3 + 2 + 6 + 2 + 2
    assert isinstance(torch_model.qkv_proj, torch.nn.Linear) and not hasattr(torch_model, "q_proj")


def test_parts_that_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="AdapterBank: expected fused to name linears of the model, and 'mlp' names"):
        AdapterBank(Attention(True), fused={"mlp": {"gate": 1}})
    with pytest.raises(ValueError, match=r"parts of qkv_proj to have names of their own and widths that add up to 24"):
        AdapterBank(Attention(True), fused={"qkv_proj": {"q_proj": 12, "k_proj": 5}})
