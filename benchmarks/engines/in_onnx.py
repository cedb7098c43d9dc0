"""In the environment of ONNX Runtime: greedy tokens of a toy language model with a file as the active adapter."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

MADE = 16


def graph(folder, shapes):
    """Next-token scores of ids: tanh(mean(E[ids]) W1) W2, with factors as inputs that have a default."""
    weights = {name: np.load(folder / f"{name}.npy") for name in ("embed", "up", "out")}
    initial = [numpy_helper.from_array(np.ascontiguousarray(w.T if n != "embed" else w), n) for n, w in weights.items()]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["length"])]
    for name, shape in shapes.items():
        initial.append(numpy_helper.from_array(np.zeros(shape, np.float32), name))
        inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    nodes = [
        helper.make_node("Gather", ["embed", "ids"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["x"], axes=[0], keepdims=1),
    ]
    for name, x, y in (("up", "x", "h"), ("out", "t", "scores")):
        nodes += [
            helper.make_node("MatMul", [x, name], [f"{name}.base"]),
            helper.make_node("MatMul", [x, f"{name}.lora_A.weight"], [f"{name}.down"]),
            helper.make_node("MatMul", [f"{name}.down", f"{name}.lora_B.weight"], [f"{name}.delta"]),
            helper.make_node("Add", [f"{name}.base", f"{name}.delta"], [y]),
        ]
    nodes.insert(6, helper.make_node("Tanh", ["h"], ["t"]))
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, weights["out"].shape[0]])]
    made = helper.make_graph(nodes, "toy", inputs, outputs, initial)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def greedy(folder, case):
    session = onnxruntime.InferenceSession(graph(folder, case["shapes"]).SerializeToString())
    options = onnxruntime.RunOptions()
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(case["path"])
    options.add_active_adapter(adapter)
    rows = []
    for prompt in case["tokens"]:
        ids = list(prompt)
        for _ in range(MADE):
            (scores,) = session.run(None, {"ids": np.array(ids, np.int64)}, options)
            ids.append(int(scores[0].argmax()))
        rows.append(ids[len(prompt) :])
    return np.array(rows)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    said = {"versions": {"onnxruntime": version("onnxruntime"), "onnx": onnx.__version__}, "errors": {}}
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            np.save(folder / f"{case['name']}.theirs.npy", greedy(folder, case))
        except Exception as error:
            said["errors"][case["name"]] = f"{type(error).__name__}: {error}"
    (folder / "said.json").write_text(json.dumps(said))
