"""In the environment of LyCORIS: a toy's outputs with a file in kohya's format."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import toy
from lycoris import create_lycoris_from_weights


@torch.no_grad()
def outputs(case):
    model, x = toy.made()
    network, _ = create_lycoris_from_weights(1.0, case["path"], model)
    network.apply_to()
    network.eval()
    return model(x).numpy()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    said = {"versions": {"lycoris-lora": version("lycoris-lora")}, "errors": {}}
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            np.save(folder / f"{case['name']}.theirs.npy", outputs(case))
        except Exception as error:
            said["errors"][case["name"]] = f"{type(error).__name__}: {error}"
    (folder / "said.json").write_text(json.dumps(said))
