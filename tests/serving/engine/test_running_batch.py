"""The engine: each row is its adapter's whatever runs beside it; settings, turns, memory, cancelling, failing."""

import copy
import random
import threading

import peft
import pytest
import torch

import lowrank_kernels as lk
from lowrank_kernels.serving import AdapterBank
from lowrank_kernels.serving.engine import Closed, Engine, Generation, QueueFull, attention
from tests.serving.tiny_model import make_model, make_tokenizer

PATIENCE = 60.0
NAMES = [None, "lora", "dora", "patterns", "bias", "rslora", "everywhere"]
PROMPTS = [[5] * 20, [5] * 20 + [9, 11, 4], [(7 * i) % 62 + 1 for i in range(31)], [8], [3, 1, 4, 1, 5, 9, 2, 6]]
MOST = 12


@pytest.fixture(scope="module")
def greedy(folders):
    """What merged models continue prompts with: the first ``count`` tokens."""
    models, known = {}, {}

    @torch.no_grad()
    def tokens(name, prompt, count):
        if name not in models:
            model = make_model()
            if name is not None:
                model = peft.PeftModel.from_pretrained(copy.deepcopy(model), folders[name]).merge_and_unload()
            models[name] = model.eval()
        key = name, tuple(prompt)
        if len(known.get(key, ())) < count:
            ids = torch.tensor([prompt])
            out = models[name].generate(input_ids=ids, max_new_tokens=max(count, MOST), do_sample=False)
            known[key] = out[0, len(prompt) :].tolist()
        return known[key][:count]

    return tokens


@pytest.fixture
def bank(model, folders):
    with AdapterBank(model) as bank:
        for name in NAMES[1:]:
            bank.load(name, folders[name])
        yield bank


@pytest.fixture
def engine(bank):
    engine = Engine(bank, make_tokenizer(), max_rows=8, max_queue=20, background=False)
    yield engine
    engine.close(drain=False)


def run(engine, *jobs):
    engine.submit(jobs)
    while engine.step():
        pass
    return [job.future.result(0) for job in jobs]


# ------------------------------------------------------------------------------------------------ rows and schedules


class Schedule:
    """Arrivals, cancels, adapters that are loaded, replaced and unloaded, between the steps of an engine."""

    def __init__(self, seed, bank, folders, greedy):
        self.random, self.bank, self.folders, self.greedy = random.Random(seed), bank, folders, greedy
        self.engine = Engine(
            bank,
            make_tokenizer(),
            max_rows=self.random.choice([2, 5, 5]),
            chunk_tokens=self.random.choice([5, 16, 128]),
            cache_tokens=self.random.choice([40, 40, 300]),
            max_length=40,
            background=False,
        )
        self.jobs = []

    def arrive(self):
        name, count = self.random.choice([*NAMES, "comes and goes"]), self.random.randint(1, 5)
        priority = self.random.choice([0, 0, 1])
        job = Generation(name, self.random.choice(PROMPTS), count, priority=priority)
        self.engine.submit([job])
        self.jobs.append((job, self.there if name == "comes and goes" else name))

    def cancel(self):
        if self.jobs:
            self.random.choice(self.jobs)[0].future.cancel()

    def load(self):
        self.there = self.random.choice(NAMES[1:])
        self.engine.load("comes and goes", self.folders[self.there])

    def unload(self):
        if "comes and goes" in self.bank.names():
            self.engine.unload("comes and goes")

    there = None

    def run(self):
        for _ in range(5):
            self.random.choices([self.arrive, self.cancel, self.load, self.unload], [8, 1, 1, 1])[0]()
            for _ in range(self.random.randint(0, 3)):
                self.engine.step()
        self.engine.close()
        for job, name in self.jobs:
            if job.future.cancelled():
                continue
            if job.adapter == "comes and goes":  # may have been replaced, or unloaded, while it waited
                if (error := job.future.exception(0)) is not None:
                    assert "expected the name of an adapter" in str(error)
                    continue
                wanted = [self.greedy(one, job.prompt, job.max_tokens) for one in NAMES[1:]]
                assert job.future.result(0).tokens in wanted
                continue
            assert job.future.result(0).tokens == self.greedy(name, job.prompt, job.max_tokens), (name, job)
        assert not self.engine.running and not self.engine.waiting
        assert all(not a.batches for a in self.bank._adapters.values())  # every lease was given back
        return self.engine.counts


def run_schedules(seeds, bank, folders, greedy, monkeypatch):
    preemptions = cached = 0
    for seed in seeds:
        monkeypatch.setattr(attention, "_GROWS_BY", (4, 64)[seed % 2])  # the first lets rows run out of memory
        counts = Schedule(seed, bank, folders, greedy).run()
        preemptions += counts["preemptions"]
        cached += counts["cached_prompt_tokens"]
    assert preemptions >= 10 and cached > 200  # both have happened


def test_each_row_is_its_merged_models_in_any_schedule(bank, folders, greedy, monkeypatch):
    run_schedules(range(300), bank, folders, greedy, monkeypatch)


@pytest.mark.nightly
def test_each_row_is_its_merged_models_in_ten_thousand_schedules(bank, folders, greedy, monkeypatch):
    run_schedules(range(1000, 11000), bank, folders, greedy, monkeypatch)


def test_a_short_row_does_not_wait_for_a_long_one(engine, greedy):
    long = Generation("lora", PROMPTS[3], 50)
    engine.submit([long])
    for _ in range(5):
        engine.step()
    short = Generation("dora", PROMPTS[4], 3)
    engine.submit([short])
    for _ in range(3):
        engine.step()
    assert short.future.result(0).tokens == greedy("dora", PROMPTS[4], 3)
    assert not long.future.done()


def test_a_prompt_in_chunks_lets_others_go_on(bank, greedy):
    engine = Engine(bank, make_tokenizer(), chunk_tokens=4, background=False)
    seen = []
    running = Generation("lora", PROMPTS[3], 12, on_delta=lambda delta: seen.append(len(delta.tokens)))
    engine.submit([running])
    engine.step()
    new = Generation("dora", PROMPTS[2], 2)
    engine.submit([new])
    for _ in range(5):
        engine.step()
    assert seen == [1] * 6 and not new.future.done()  # a token a step, while the prompt takes ten
    engine.close()
    assert new.future.result(0).tokens == greedy("dora", PROMPTS[2], 2)


def test_rows_that_begin_alike_compute_their_beginning_once(engine, greedy):
    jobs = [Generation("lora", PROMPTS[1], 3) for _ in range(4)]
    run(engine, *jobs)
    assert engine.counts["prompt_tokens"] == len(PROMPTS[1]) + 3
    assert engine.counts["cached_prompt_tokens"] == 3 * (len(PROMPTS[1]) - 1)
    for other in ("dora", None):  # not of another adapter
        assert run(engine, Generation(other, PROMPTS[1], 3))[0].tokens == greedy(other, PROMPTS[1], 3)
    assert engine.counts["cached_prompt_tokens"] == 3 * (len(PROMPTS[1]) - 1)


def test_a_beginning_is_known_by_its_adapters_content_not_by_its_name(engine, folders, greedy):
    engine.load("one", folders["lora"])
    run(engine, Generation("one", PROMPTS[0], 2))
    engine.load("one", folders["dora"])
    assert run(engine, Generation("one", PROMPTS[0], 4))[0].tokens == greedy("dora", PROMPTS[0], 4)
    assert engine.counts["cached_prompt_tokens"] == 0
    run(engine, Generation("lora", PROMPTS[0], 4))
    assert engine.counts["cached_prompt_tokens"] == len(PROMPTS[0]) - 1


def test_paused_rows_go_on_where_they_were(bank, monkeypatch):
    monkeypatch.setattr(attention, "_GROWS_BY", 4)
    engine = Engine(bank, make_tokenizer(), cache_tokens=70, max_length=64, background=False)
    jobs = [Generation(name, PROMPTS[4], 40, seed=i, temperature=0.5 * i) for i, name in enumerate(NAMES[:3])]
    together = [found.tokens for found in run(engine, *jobs)]
    assert engine.counts["preemptions"] >= 2
    alone = [run(engine, Generation(j.adapter, j.prompt, 40, seed=j.seed, temperature=j.temperature)) for j in jobs]
    assert together == [one[0].tokens for one in alone]


@pytest.mark.parametrize("chunk", [3, 128])
def test_paused_rows_tell_each_tokens_probability_once(bank, monkeypatch, chunk):
    monkeypatch.setattr(attention, "_GROWS_BY", 4)
    engine = Engine(bank, make_tokenizer(), chunk_tokens=chunk, cache_tokens=70, max_length=64, background=False)

    def jobs():
        return [Generation(name, PROMPTS[2], 25, logprobs=1, prompt_logprobs=True) for name in NAMES[:3]]

    together = run(engine, *jobs())
    assert engine.counts["preemptions"] >= 2
    for found, alone in zip(together, (run(engine, job)[0] for job in jobs()), strict=True):
        assert found.tokens == alone.tokens
        for reported, own in ((found.prompt_logprobs, alone.prompt_logprobs), (found.logprobs, alone.logprobs)):
            assert [one.token for one in reported] == [one.token for one in own]
            assert [one.logprob for one in reported[1:]] == pytest.approx([one.logprob for one in own[1:]], abs=1e-4)


def test_a_row_paused_in_its_prompt_tells_it_once(bank, monkeypatch):
    monkeypatch.setattr(attention, "_GROWS_BY", 4)
    engine = Engine(bank, make_tokenizer(), chunk_tokens=3, cache_tokens=70, max_length=64, background=False)
    earlier, told = Generation("lora", PROMPTS[4], 40), Generation("dora", PROMPTS[2], 2, prompt_logprobs=True)
    engine.submit([earlier])
    for _ in range(16):
        engine.step()
    (found,) = run(engine, told)  # the earlier one needs its memory before its prompt is through
    assert engine.counts["preemptions"] == 1
    assert [one.token for one in found.prompt_logprobs] == PROMPTS[2]


def test_priority_and_then_fair_turns(bank):
    engine = Engine(bank, make_tokenizer(), max_rows=1, background=False)
    ended = []
    jobs = [Generation("lora", PROMPTS[3], 4) for _ in range(4)] + [Generation("dora", PROMPTS[3], 4) for _ in range(2)]
    jobs.append(Generation("bias", PROMPTS[3], 1, priority=-1))
    for i, job in enumerate(jobs):
        job.future.add_done_callback(lambda _, i=i: ended.append(i))
    run(engine, *jobs)
    assert ended[0] == 6  # the urgent one
    assert {jobs[i].adapter for i in ended[1:3]} == {jobs[i].adapter for i in ended[3:5]} == {"lora", "dora"}
    engine.close()


def test_adapters_that_do_not_fit_the_budget_together_take_turns(model, folders, greedy):
    with AdapterBank(model) as bank:
        bank.load("dora", folders["dora"])
        bank.budget_bytes = bank.nbytes
        bank.load("again", folders["dora"])
        engine = Engine(bank, make_tokenizer(), background=False)
        jobs = [Generation(name, PROMPTS[4], 4) for name in ("dora", "again", "dora", None)]
        for job, found in zip(jobs, run(engine, *jobs), strict=True):
            assert found.tokens == greedy(job.adapter and "dora", PROMPTS[4], 4)
        bank.pin("again")
        (error,) = [Generation("dora", PROMPTS[4], 4)]
        engine.submit([error])
        engine.step()
        with pytest.raises(ValueError, match="expected room for 'dora'"):
            error.future.result(0)
        engine.close()


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_over_a_base_of_few_bits(model, folders, base):
    lk.quantize_(model, base)
    with AdapterBank(model) as bank:
        for name in ("lora", "dora"):
            bank.load(name, folders[name])
        wanted = []
        for name in ("lora", "dora", None):
            with bank.batch([name]):
                ids = torch.tensor([PROMPTS[4]])
                out = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
                wanted.append(out[0, len(PROMPTS[4]) :].tolist())
        engine = Engine(bank, make_tokenizer(), background=False)
        found = run(engine, *(Generation(name, PROMPTS[4], 6) for name in ("lora", "dora", None)))
        engine.close()
    assert [one.tokens for one in found] == wanted


def test_the_model_is_its_own_again(bank, alone):
    ids = torch.tensor([PROMPTS[2], PROMPTS[2]])
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    plain, own = bank.model.config._attn_implementation, bank.model(ids, attention_mask=mask).logits
    engine = Engine(bank, make_tokenizer(), background=False)
    assert torch.equal(bank.model(ids, attention_mask=mask).logits, own)  # while the engine has it, too
    engine.close()
    assert bank.model.config._attn_implementation == plain
    assert torch.equal(bank.model(ids, attention_mask=mask).logits, own)


# ------------------------------------------------------------------------------------------------------- settings


def test_ends(engine, greedy):
    whole = greedy("lora", PROMPTS[4], 12)
    at = next(i for i in range(2, 12) if whole[i] not in whole[:i])
    engine.ends = frozenset([whole[at]])
    stopped, ignored, late = run(
        engine,
        Generation("lora", PROMPTS[4], 12),
        Generation("lora", PROMPTS[4], 12, ignore_eos=True),
        Generation("lora", PROMPTS[4], 12, min_tokens=at + 2),
    )
    assert stopped.tokens == whole[:at] and stopped.finish_reason == "stop" and stopped.stop_reason is None
    assert ignored.tokens == whole and ignored.finish_reason == "length"
    assert late.tokens[:at] == whole[:at] and len(late.tokens) >= at + 2
    engine.ends = frozenset()
    (by_id,) = run(engine, Generation("lora", PROMPTS[4], 12, stop_token_ids=(whole[at],)))
    assert by_id.tokens == whole[: at + 1] and by_id.stop_reason == whole[at]
    assert by_id.text == engine.tokenizer.decode(whole[:at])


def test_natural_end_and_length(engine, greedy):
    (found,) = run(engine, Generation("lora", PROMPTS[2]))
    assert len(found.tokens) == engine.max_length - len(PROMPTS[2]) and found.finish_reason == "length"
    assert found.tokens[:12] == greedy("lora", PROMPTS[2], 12)


def test_draws_are_the_seeds_alone_and_follow_the_softmax(engine, alone):
    def job(seed, name="lora", count=6, **options):
        return Generation(name, PROMPTS[4], count, temperature=0.7, seed=seed, **options)

    by_itself = run(engine, job(5))[0].tokens
    mixed = run(engine, job(6), job(5), job(5, "dora"), Generation(None, PROMPTS[3], 9))
    assert mixed[1].tokens == by_itself and mixed[0].tokens != by_itself
    likeliest = run(engine, Generation("lora", PROMPTS[4], 6))[0].tokens
    narrow = [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}]
    assert [one.tokens for one in run(engine, *(job(9, **one) for one in narrow))] == [likeliest] * 3

    share = (alone("lora", torch.tensor([PROMPTS[4]]))[0, -1] / 0.7).softmax(0)
    engine.max_rows = engine.max_queue = count = 400

    def seen(**options):
        found = run(engine, *(job(seed, count=1, **options) for seed in range(count)))
        return torch.bincount(torch.tensor([one.tokens[0] for one in found]), minlength=64) / count

    assert float((seen() - share).abs().sum() / 2) < 0.2  # total variation; a wrong temperature is beyond it
    wrong = (alone("lora", torch.tensor([PROMPTS[4]]))[0, -1] / 7).softmax(0)
    assert float((seen() - wrong).abs().sum() / 2) > 0.25
    ordered, order = share.sort(descending=True)
    few = order[: int((ordered.cumsum(0) < 0.5).sum()) + 1]
    for options, allowed in (
        ({"top_k": 5}, order[:5]),
        ({"top_p": 0.5}, few),
        ({"min_p": 0.2}, order[ordered > ordered[0] / 5]),
    ):
        found = seen(**options)
        assert set(found.nonzero().flatten().tolist()) <= set(allowed.tolist()), options
        kept = share[allowed] / share[allowed].sum()
        assert float((found[allowed] - kept).abs().sum() / 2) < 0.2, options


def test_penalties_and_bias(engine, alone, greedy):
    first = greedy("lora", PROMPTS[4], 1)[0]
    (banned,) = run(engine, Generation("lora", PROMPTS[4], 8, logit_bias={first: -100.0}))
    assert first not in banned.tokens
    (wanted,) = run(engine, Generation("lora", PROMPTS[4], 8, logit_bias={7: 100.0}))
    assert wanted.tokens == [7] * 8
    (fresh,) = run(engine, Generation("lora", PROMPTS[4], 30, presence_penalty=1000.0))
    assert len(set(fresh.tokens)) == 30
    (spread,) = run(engine, Generation(None, PROMPTS[3], 40, frequency_penalty=1000.0, logit_bias={7: 500.0, 8: 500.0}))
    assert spread.tokens[:2] in ([7, 8], [8, 7])

    logits = alone("lora", torch.tensor([PROMPTS[4]]))[0, -1]
    seen = sorted(set(PROMPTS[4]))
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 3, logits[seen] * 3)
    (repeated,) = run(engine, Generation("lora", PROMPTS[4], 1, repetition_penalty=3.0))
    assert repeated.tokens == [int(logits.argmax())]


def test_logprobs(engine, alone, greedy):
    prompt, deltas = PROMPTS[4], []
    found, plain = run(
        engine,
        Generation("dora", prompt, 5, logprobs=3, prompt_logprobs=True, logit_bias={9: 50.0}, on_delta=deltas.append),
        Generation("dora", prompt, 5),
    )
    expected = alone("dora", torch.tensor([prompt + found.tokens]))[0].log_softmax(-1)
    assert found.tokens == [9] * 5 and not plain.logprobs  # reported before the bias
    reported = found.prompt_logprobs[1:] + found.logprobs
    assert [one.token for one in found.prompt_logprobs + found.logprobs] == prompt + found.tokens
    assert found.prompt_logprobs[0].logprob is None
    for one, row in zip(reported, expected, strict=False):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == row.topk(3).indices.tolist()
        assert [p for _, p in one.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
    assert [one for delta in deltas for one in delta.logprobs] == found.logprobs


def test_pieces_make_the_text(engine, greedy):
    whole = greedy("lora", PROMPTS[4], 12)
    text = engine.tokenizer.decode(whole)
    for stop, kept in ((), text), ((text[5:8],), text[: text.index(text[5:8])]), (("never",), text):
        deltas = []
        (found,) = run(engine, Generation("lora", PROMPTS[4], 12, stop=stop, on_delta=deltas.append))
        assert "".join(delta.text for delta in deltas) == found.text == kept
        assert [token for delta in deltas for token in delta.tokens] == found.tokens
        assert [delta.finish_reason for delta in deltas][:-1] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == found.finish_reason
    assert found.stop_reason is None and len(deltas) > 2


BAD = [
    ({"prompt": []}, "at least one token"),
    ({"max_tokens": 0}, "max_tokens of at least 1"),
    ({"prompt": [5] * 64}, "within 64 tokens"),
    ({"max_tokens": 60}, "within 64 tokens"),
    ({"prompt": [64]}, "expected token ids from 0 to 63"),
    ({"logit_bias": {-1: 1.0}}, "expected ids of logit_bias from 0 to 63"),
    ({"logit_bias": {1: float("inf")}}, "finite"),
    ({"temperature": float("nan")}, "finite"),
    ({"temperature": -1.0}, "temperature is out of range"),
    ({"top_p": 0.0}, "top_p is out of range"),
    ({"top_k": -1}, "top_k is out of range"),
    ({"min_p": 1.5}, "min_p is out of range"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is out of range"),
    ({"logprobs": 65}, "logprobs is out of range"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_settings(engine, change, message):
    with pytest.raises(ValueError, match=message):
        engine.submit([Generation("lora", **{"prompt": PROMPTS[4], "max_tokens": 5, **change})])
    assert engine.waiting == 0


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_rows": 0}, "max_rows to be at least 1"),
        ({"chunk_tokens": 0}, "chunk_tokens to be at least 1"),
        ({"max_queue": 0}, "max_queue to be at least 1"),
        ({"max_length": 65}, "at most the model's 64"),
        ({"cache_tokens": 63}, "cache_tokens for one row of max_length=64"),
    ],
)
def test_bad_limits(bank, limits, message):
    with pytest.raises(ValueError, match=message):
        Engine(bank, make_tokenizer(), **limits)


# -------------------------------------------------------------------------------------- cancelling, closing, failing


def test_a_cancelled_row_is_free_at_the_next_token(engine, greedy):
    engine.max_rows = 1
    long, after = Generation("lora", PROMPTS[3], 50), Generation("dora", PROMPTS[4], 2)
    engine.submit([long, after])
    engine.step()
    assert long.future.cancel()
    engine.step()
    engine.step()
    assert after.future.result(0).tokens == greedy("dora", PROMPTS[4], 2)


def test_what_is_wrong_with_one_row_is_told_to_that_one_alone(engine, greedy, monkeypatch):
    def fail(delta):
        raise OSError("gone")

    forward = engine._model.forward

    def forward_or_fail(tokens, spans, keep):
        if 42 in tokens:
            raise RuntimeError("no 42")
        return forward(tokens, spans, keep)

    monkeypatch.setattr(engine._model, "forward", forward_or_fail)
    names = ["lora", "dora", None, "bias", "gone"]
    jobs = [Generation(name, PROMPTS[4], 4) for name in names] + [Generation("lora", [42], 4)]
    jobs[3].on_delta = fail
    engine.submit(jobs)
    while engine.step():
        pass
    for job in jobs[:3]:
        assert job.future.result(0).tokens == greedy(job.adapter, job.prompt, 4)
    for job, error in zip(jobs[3:], ("gone", "expected the name of an adapter, got 'gone'", "no 42"), strict=True):
        with pytest.raises((OSError, ValueError, RuntimeError), match=error):
            job.future.result(0)
    assert engine.alive and not engine.running


def test_a_full_queue_takes_no_more(engine):
    engine.submit([Generation("lora", PROMPTS[3], 1)] * 1)
    with pytest.raises(QueueFull):
        engine.submit([Generation("lora", PROMPTS[3], 1) for _ in range(20)])
    assert engine.waiting == 1


@pytest.mark.parametrize("drain", [True, False])
def test_closing(bank, greedy, drain):
    engine = Engine(bank, make_tokenizer(), max_rows=2)
    jobs = [Generation("lora", PROMPTS[4], 12) for _ in range(6)]
    engine.submit(jobs)
    engine.close(drain=drain)
    for job in jobs:
        assert (job.future.cancelled() and not drain) or job.future.result(0).tokens == greedy("lora", PROMPTS[4], 12)
    assert drain or any(job.future.cancelled() for job in jobs)
    with pytest.raises(Closed):
        engine.submit([Generation("lora", PROMPTS[4], 1)])
    assert not engine.alive


def test_an_engine_that_fails_says_so_and_fails_its_requests(bank, monkeypatch):
    engine, told = Engine(bank, make_tokenizer()), threading.Event()
    engine.on_failure = lambda error: told.set()
    monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)
    job = Generation("lora", PROMPTS[4], 4)
    engine.submit([job])
    with pytest.raises(RuntimeError, match="the engine has failed: division by zero"):
        job.future.result(PATIENCE)
    assert told.wait(PATIENCE) and not engine.alive and isinstance(engine.failed, ZeroDivisionError)
    with pytest.raises(Closed):
        engine.submit([Generation("lora", PROMPTS[4], 4)])
    engine.close()
