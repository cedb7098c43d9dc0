"""Load on the engine and the bank for a while: nothing wrong, nothing lost, memory flat. A tiny Llama on a CPU.

    python benchmarks/soak_serving.py [--minutes 20] [--threads 2] [--json FILE]

Clients ask for adapters at random (few of them often, most rarely), some rows for the base, and cancel some requests;
operators load, replace and unload adapters, and try corrupt folders, all with a budget for a tenth of the adapters.
Every completion is compared with that of a model into which its adapter alone was merged. Ends with 1 if a row was
wrong, a request was lost, something failed as it should not have, or memory grew.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotDoneError  # the built-in TimeoutError from Python 3.11 on
from pathlib import Path
from typing import Any

import torch

import lowrank_kernels as lk
from lowrank_kernels.serving import AdapterBank
from lowrank_kernels.serving.engine import Engine, Generation, QueueFull

RANKS = (1, 2, 3, 5, 7, 8, 16)
TOKENS = 6
MARGIN = 1e-3  # between the two likeliest tokens of what is compared, far above rounding


class NoTokenizer:
    """Token ids alone."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, tokens: list[int], **_: Any) -> str:
        return ""


def make_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def make_adapter(base: Any, folder: Path, number: int) -> Any:
    """Write a random adapter; returns the model with it merged."""
    torch.manual_seed(number)
    model = copy.deepcopy(base)
    kind = lk.DoRAConfig if number % 4 == 3 else lk.LoRAConfig
    targets = (("q_proj", "v_proj"), ("q_proj", "down_proj"), ("o_proj", "up_proj"))[number % 3]
    lk.adapt(model, kind(r=RANKS[number % len(RANKS)], target_modules=targets))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                p.normal_(0.0, 0.2)
    lk.save_adapter(model, folder)
    for layer in [m for m in model.modules() if isinstance(m, (lk.nn.LoRALinear, lk.nn.DoRALinear))]:
        layer.merge_()
    return model


@torch.no_grad()
def continued(model: Any, seed: int) -> tuple[list[int], list[int]]:
    """A prompt, and what the model continues it with, clearly."""
    draw = random.Random(seed)
    while True:
        prompt = [draw.randrange(1, 256) for _ in range(draw.randrange(1, 12))]
        made = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        first, second = torch.stack(made.logits)[:, 0].topk(2).values.unbind(1)
        if float((first - second).min()) > MARGIN:
            return prompt, made.sequences[0, len(prompt) :].tolist()


def outcome(future: Future[Any], seconds: float = 60.0) -> Any:
    """The future's result, waited for in steps: a process that is stopped for a while has not waited meanwhile."""
    for _ in range(int(10 * seconds)):
        with contextlib.suppress(NotDoneError):
            return future.result(0.1)
    raise NotDoneError


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Soak:
    """The clients and the operators, and what they saw."""

    def __init__(self, folder: Path, adapters: int, resident: int) -> None:
        base = make_model()
        self.names = [f"adapter-{i}" for i in range(adapters)]
        self.folder = folder
        merged = [make_adapter(base, folder / name, i) for i, name in enumerate(self.names)]
        self.expected: dict[str | None, tuple[list[int], list[int]]] = {
            name: continued(model, i) for i, (name, model) in enumerate(zip(self.names, merged, strict=True))
        }
        self.expected[None] = continued(base, adapters)
        del merged
        self.bank = AdapterBank(base, host_bytes=0)
        sizes = []
        for name in self.names:
            before = self.bank.nbytes
            self.bank.load(name, folder / name)
            sizes.append(self.bank.nbytes - before)
        self.bank.budget_bytes = resident * max(sizes)
        self.bank.load(self.names[0], folder / self.names[0])  # evicts down to the budget
        self.engine = Engine(self.bank, NoTokenizer(), max_rows=min(16, resident), max_queue=64, cache_tokens=2048)
        self.corrupt = folder / "corrupt"
        self.corrupt.mkdir()
        for file in (folder / self.names[0]).iterdir():
            (self.corrupt / file.name).write_bytes(file.read_bytes()[: -9 if file.suffix == ".safetensors" else None])
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []

    def count(self, what: str, fault: object = None) -> None:
        with self.lock:
            self.counts[what] += 1
            if fault is not None and len(self.faults) < 20:
                self.faults.append(f"{what}: {fault!r}")

    def client(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self.stop.is_set():
            jobs = []
            for _ in range(draw.randrange(1, 5)):
                place = int(len(self.names) * draw.random() ** 3)
                name = None if draw.random() < 0.1 else self.names[place]
                jobs.append(Generation(name, self.expected[name][0], draw.randrange(1, TOKENS + 1)))
            try:
                self.engine.submit(jobs)
            except QueueFull:
                self.count("queue full")
                continue
            for job in jobs:
                self.count("asked")
                if draw.random() < 0.1:
                    time.sleep(draw.random() * 0.02)
                    job.future.cancel()
            for job in jobs:
                try:
                    tokens = outcome(job.future).tokens
                except CancelledError:
                    self.count("cancelled")
                except ValueError as error:
                    unloaded = "expected the name" in str(error)
                    self.count("unloaded" if unloaded else "failed", None if unloaded else error)
                except NotDoneError:
                    self.count("lost", job.adapter)
                except Exception as error:
                    self.count("failed", error)
                else:
                    right = tokens == self.expected[job.adapter][1][: job.max_tokens]
                    self.count("right" if right else "wrong", None if right else (job.adapter, tokens))

    def operator(self, seed: int) -> None:
        draw = random.Random(seed)
        while not self.stop.is_set():
            name, what = draw.choice(self.names), draw.random()
            try:
                if what < 0.2:
                    self.bank.load(name, self.corrupt)
                    self.count("corrupt folder taken", name)
                elif what < 0.4:
                    self.bank.unload(name)
                    self.count("unloads")
                    time.sleep(draw.random() * 0.01)
                    self.bank.load(name, self.folder / name)
                else:
                    self.bank.load(name, self.folder / name)
                    self.count("loads")
            except ValueError as error:
                known = {"safetensors": "corrupt refused", "expected the name": "not there", "room for": "no room"}
                kind = next((kind for words, kind in known.items() if words in str(error)), None)
                self.count(kind or "failed", None if kind else error)
            except Exception as error:
                self.count("failed", error)
            time.sleep(draw.random() * 0.02)

    def run(self, seconds: float, clients: int = 4, operators: int = 2) -> dict[str, Any]:
        """Load for so long; what was seen."""
        threads = [threading.Thread(target=self.client, args=(i,)) for i in range(clients)]
        threads += [threading.Thread(target=self.operator, args=(100 + i,)) for i in range(operators)]
        for thread in threads:
            thread.start()
        memory, samples = [], 200
        for _ in range(samples):  # a process that is stopped for a while goes on where it was
            memory.append(resident_bytes())
            time.sleep(seconds / samples)
        self.stop.set()
        for thread in threads:
            thread.join(120)
        self.engine.close()
        ends = sum(self.counts[kind] for kind in ("right", "wrong", "cancelled", "unloaded", "failed", "lost"))
        quarter = max(1, len(memory) // 4)
        early, late = (statistics.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:]))
        found = {
            "seconds": seconds,
            "adapters": len(self.names),
            "budget_bytes": self.bank.budget_bytes,
            "adapter_bytes": self.bank.nbytes,
            "engine": self.engine.counts,
            "counts": dict(sorted(self.counts.items())),
            "unaccounted": self.counts["asked"] - ends,
            "memory": {"second_quarter": early, "last_quarter": late, "growth": late / early - 1},
            "stuck": sum(thread.is_alive() for thread in threads),
            "faults": self.faults,
        }
        self.bank.close()
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--resident", type=int, default=20, help="adapters that the budget holds (default 20)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from cost_over_frozen import conditions

    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        found = Soak(Path(folder), args.adapters, args.resident).run(60 * args.minutes)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps({"conditions": conditions(), **found}, indent=1) + "\n")
    bad = found["faults"] or found["unaccounted"] or found["stuck"] or found["memory"]["growth"] > 0.05
    return 1 if bad or found["adapter_bytes"] > found["budget_bytes"] else 0


if __name__ == "__main__":
    sys.exit(main())
