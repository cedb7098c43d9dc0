"""In the environment of mlx-lm: logits at the last position of each prompt, on the CPU, in float32."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def logits(case):
    model, _ = load_model(Path(case["base"]))
    if case["path"]:
        model = load_adapters(model, case["path"])
    model.eval()
    return np.stack([np.array(model(mx.array([tokens]))[0, -1].astype(mx.float32)) for tokens in case["tokens"]])


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    folder = Path(sys.argv[1])
    said = {"versions": {"mlx": version("mlx"), "mlx-lm": version("mlx-lm")}, "errors": {}}
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            np.save(folder / f"{case['name']}.theirs.npy", logits(case))
        except Exception as error:
            said["errors"][case["name"]] = f"{type(error).__name__}: {error}"
    (folder / "said.json").write_text(json.dumps(said))
