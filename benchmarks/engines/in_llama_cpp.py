"""In the environment of llama.cpp: log-probabilities of every next token, by xllamacpp on the CPU."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import xllamacpp


def log_probabilities(case):
    settings = xllamacpp.CommonParams()
    settings.model.path = case["base"]
    settings.n_ctx, settings.n_parallel, settings.warmup = 256, 1, False
    settings.cpuparams.n_threads = 1
    settings.verbosity = -1
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if case["path"]:
        settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(case["path"], 1.0)]
    server = xllamacpp.Server(settings)
    rows = []
    for tokens in case["tokens"]:
        asked = {
            "prompt": tokens,
            "n_predict": 1,
            "n_probs": case["vocabulary"],
            "temperature": 1.0,
            "cache_prompt": False,
        }
        answer = server.handle_completions({**asked, "samplers": [], "seed": 0})
        found = answer.get("completion_probabilities") or answer["choices"][0]["logprobs"]["content"]
        row = np.full(case["vocabulary"], np.nan)
        for entry in found[0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    return np.stack(rows)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    said = {"versions": {"xllamacpp": version("xllamacpp"), "gguf": version("gguf")}, "errors": {}}
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            np.save(folder / f"{case['name']}.theirs.npy", log_probabilities(case))
        except Exception as error:
            said["errors"][case["name"]] = f"{type(error).__name__}: {error}"
    (folder / "said.json").write_text(json.dumps(said))
