"""Folders made to hang, to fill the memory or to slip through: refused in words, quickly, with nothing changed."""

import copy
import json
import os
import pickle
import re
import shutil
import socket
import struct
import sys
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import lowrank_kernels as lk
from lowrank_kernels.adapters.folder import CONFIG_FILE, WEIGHTS_FILE, read_header, read_json
from lowrank_kernels.config import LoRAConfig
from lowrank_kernels.patterns import FilePattern
from lowrank_kernels.serving import AdapterBank
from lowrank_kernels.smt.delta import load_delta, save_delta

SECONDS = 10  # of the processor: an endless search is the fault, not a slow or busy machine
MEMORY = 64 << 20


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(32, 32), nn.Linear(32, 32)


def make_model():
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(2))
    return model


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    model = make_model()
    lk.adapt(model, LoRAConfig(r=2, target_modules=("q_proj", "v_proj")))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
    return lk.save_adapter(model, tmp_path_factory.mktemp("sound") / "adapter")


@pytest.fixture(scope="module")
def sound_delta(tmp_path_factory):
    model = make_model()
    names = [f"layers.{i}.{m}_proj" for i in range(2) for m in "qv"]
    selection = lk.smt.BlockSelection({n: torch.tensor([[0, 1]]) for n in names}, dict.fromkeys(names, (32, 32)), 16)
    lk.adapt(model, lk.SMTConfig(selection=selection))
    return save_delta(model, tmp_path_factory.mktemp("sound") / "delta")


# ------------------------------------------------------------------------------------------- what is done to a folder


def config(**changes):
    def edit(folder):
        file = folder / CONFIG_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return edit


def config_text(old, new, file=CONFIG_FILE):
    def edit(folder):
        text = (folder / file).read_text()
        changed = re.sub(old, lambda _: new, text, count=1)
        assert changed != text
        (folder / file).write_text(changed)

    return edit


def config_bytes(content, file=CONFIG_FILE):
    return lambda folder: (folder / file).write_bytes(content)


def header(change, file=WEIGHTS_FILE):
    """The safetensors header, as a dict to change or as text to write."""

    def edit(folder):
        whole = (folder / file).read_bytes()
        length = struct.unpack("<Q", whole[:8])[0]
        found = json.loads(whole[8 : 8 + length])
        text = change(found)
        text = (json.dumps(found) if text is None else text).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])

    return edit


def first(found):
    return next(entry for name, entry in found.items() if name != "__metadata__")


def set_first(**changes):
    return header(lambda found: first(found).update(changes))


def twice(found):
    name = next(name for name in found if name != "__metadata__")
    return json.dumps(found)[:-1] + f', "{name}": {json.dumps(found[name])}}}'


def overlap(found):
    a, b = [entry for name, entry in found.items() if name != "__metadata__"][:2]
    b["data_offsets"] = a["data_offsets"] = [0, a["data_offsets"][1] - a["data_offsets"][0]]


def sparse(size, file=WEIGHTS_FILE):
    return lambda folder: os.truncate(folder / file, size)


def sparse_and_claimed(shape):
    """A tensor of a terabyte, which the file has, as a hole."""

    def edit(folder):
        def claim(found):
            name = next(name for name in found if name != "__metadata__")
            found.clear()
            found[name] = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * shape[0] * shape[1]]}

        header(claim)(folder)
        length = struct.unpack("<Q", (folder / WEIGHTS_FILE).read_bytes()[:8])[0]
        os.truncate(folder / WEIGHTS_FILE, 8 + length + 4 * shape[0] * shape[1])

    return edit


def base_copy_of_a_terabyte(folder):
    side = 1 << 19

    def claim(found):
        end = max(entry["data_offsets"][1] for name, entry in found.items() if name != "__metadata__")
        name = "base_model.model.layers.0.q_proj.base_layer.weight"
        found[name] = {"dtype": "F32", "shape": [side, side], "data_offsets": [end, end + 4 * side * side]}

    header(claim)(folder)
    os.truncate(folder / WEIGHTS_FILE, (folder / WEIGHTS_FILE).stat().st_size + 4 * side * side)


def instead(name, make):
    def edit(folder):
        (folder / name).unlink()
        make(folder / name)

    return edit


def loop(path):
    path.symlink_to(path.with_name("other"))
    path.with_name("other").symlink_to(path)


def linked_out(name):
    def edit(folder):
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return edit


def bind(path):
    path = os.path.relpath(path)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path)


HUGE = int("7" * 400)
DEEP = "[" * 100_000
HOSTILE = {
    # patterns
    "backreference": (config(target_modules=r"(.*)\1"), "target_modules: .*backreferences"),
    "condition": (config(target_modules=r"(a)?(?(1)b|c)"), "target_modules: .*conditions"),
    "flags": (config(target_modules="(?i).*q_proj"), "target_modules: .*flags such as"),
    "local flags": (config(exclude_modules="(?i:.*q_proj)"), "exclude_modules: .*flags such as"),
    "flags in a rank pattern": (config(rank_pattern={"(?i)q_proj": 2}), "rank_pattern: .*flags such as"),
    "repeats in repeats": (config(target_modules="(((.a?)+b?)+c?)+"), "target_modules: .*matched in 20000 steps"),
    "counted repeats": (config(target_modules="(((.?x?){999}){999}){999}"), "target_modules: .*matched in 20000 steps"),
    "many repeats": (config(alpha_pattern={".?" * 9000: 1}), "alpha_pattern: .*matched in 20000 steps"),
    "a repeat without end": (config(target_modules="a{99999999999999999999}"), "target_modules: .*regular expression"),
    "deep pattern": (config(target_modules="(" * 3000 + ")" * 3000), "target_modules: "),
    "long pattern": (config(target_modules="a" * 100_000), "target_modules: expected a pattern of at most 65536"),
    "half a pattern": (config(rank_pattern={"a)|(b": 2}), "rank_pattern: expected a regular expression"),
    "many patterns": (config(rank_pattern={f"p{i}": 2 for i in range(3000)}), "rank_pattern of at most 2000"),
    "many slow patterns": (config(rank_pattern={f"(a+{i})+b": 2 for i in range(99)}), "20000 steps together"),
    "many names": (config(target_modules=[f"n{i}" for i in range(20_000)]), "target_modules of at most 10000"),
    "ranks that disagree": (
        config(rank_pattern={"q_proj": 3, r"layers\.0\..*": 4}),
        r"rank_pattern in .* to give layers\.0\.q_proj one value, got 'q_proj': 3 and 'layers\\\\.0\\\\..\*': 4",
    ),
    "alphas that disagree": (
        config(alpha_pattern={".*_proj": 1.0, "v_proj": 2}),
        r"alpha_pattern in .* to give layers\.0\.v_proj one value, got '.\*_proj': 1.0 and 'v_proj': 2",
    ),
    # numbers
    "a rank that is a list": (config(r=[2]), r"r to be an integer of at least 1, got \[2\]"),
    "a rank that is a float": (config(r=2.0), r"r to be an integer of at least 1, got 2\.0"),
    "a rank that is true": (config(r=True), "r to be an integer of at least 1, got True"),
    "a negative rank": (config(r=-2), "r to be an integer of at least 1, got -2"),
    "a huge rank": (config(r=2**40), "r to be at most 2147483647"),
    "a rank of 400 digits": (config(r=HUGE), "r to be at most 2147483647"),
    "an alpha of 400 digits": (config(lora_alpha=HUGE), "alpha to be a finite number"),
    "an alpha that is text": (config(lora_alpha="16"), "alpha to be a finite number, got '16'"),
    "an alpha that is true": (config(lora_alpha=True), "alpha to be a finite number, got True"),
    "an alpha beyond float32": (
        config(lora_alpha=1e300),
        r"alpha / r to be a number that float32 can hold, got 1e\+300",
    ),
    "an alpha beyond float64": (config_text(r'"lora_alpha": [^,]+', '"lora_alpha": 1e999'), "alpha to be a finite"),
    "an alpha that is infinite": (config_text(r'"lora_alpha": [^,]+', '"lora_alpha": Infinity'), "Infinity is not a"),
    "NaN in a setting that says nothing": (
        config_text(r'"task_type": null', '"task_type": NaN'),
        "NaN is not a number",
    ),
    "5000 digits": (config_text(r'"r": 2', '"r": ' + "1" * 5000), "to hold JSON"),
    "a rank pattern with a float": (
        config(rank_pattern={"q_proj": 8.0}),
        r"rank_pattern\['q_proj'\]: expected r .*8\.0",
    ),
    "a rank pattern with zero": (config(rank_pattern={"q_proj": 0}), r"rank_pattern\['q_proj'\]: expected r .*got 0"),
    "an alpha pattern with text": (config(alpha_pattern={"q": "1"}), r"alpha_pattern\['q'\]: expected alpha"),
    "an alpha pattern beyond float32": (
        config(alpha_pattern={"q": 1e300}),
        r"alpha_pattern\['q'\]: expected alpha / r",
    ),
    "dropout that is null in a list": (config(lora_dropout=[None]), r"0 <= dropout < 1, got \[None\]"),
    # kinds
    "targets that are a dict": (config(target_modules={"q_proj": 1}), "target_modules to be names"),
    "targets that are numbers": (config(target_modules=[1]), r"target_modules to be names.*got \[1\]"),
    "targets that are nested": (config(target_modules=[["q_proj"]]), "target_modules to be names"),
    "exclusions that are true": (config(exclude_modules=True), "exclude_modules to be names"),
    "a pattern that is a list": (config(alpha_pattern=[1]), "alpha_pattern to be a dict"),
    "a bias mode that is a dict": (config(bias={"none": 1}), "bias to be one of"),
    "a switch that is text": (config(use_rslora="false"), "rslora to be True or False"),
    "DoRA that is text": (config(use_dora="no"), "use_dora to be true or false, got 'no'"),
    "a method that is a list": (config(peft_type=["LORA"]), r"peft_type 'LORA', got \['LORA'\]"),
    # JSON
    "a key twice": (config_text("{", '{"r": 2, '), "the key 'r' is there twice"),
    "a key twice further in": (
        config_text(r'"rank_pattern": \{\}', '"rank_pattern": {"a": 2, "a": 3}'),
        "'a' is there",
    ),
    "deep config": (config_bytes(DEEP.encode()), "to hold JSON"),
    "deep within a setting": (config_text(r'"rank_pattern": \{\}', f'"rank_pattern": {DEEP}'), "to hold JSON"),
    "empty config": (config_bytes(b""), "to hold JSON"),
    "a byte order mark": (config_bytes(b"\xef\xbb\xbf{}"), "to hold JSON"),
    "UTF-16": (config_bytes("{}".encode("utf-16")), "to hold JSON"),
    "Latin-1": (config_bytes(b'{"peft_type": "\xe9"}'), "to hold JSON"),
    "a config that is a number": (config_bytes(b"3"), "JSON object, got int"),
    "a sparse config": (sparse(1 << 40, CONFIG_FILE), "of at most 2097152 bytes, got 1099511627776"),
    "half surrogates": (config(target_modules=["\ud800"]), "replaces nothing"),
    # header
    "a tensor twice": (header(twice), "is there twice"),
    "overlapping": (header(overlap), "one tensor after another"),
    "offsets out of range": (set_first(data_offsets=[1 << 40, (1 << 40) + 256]), "one tensor after another"),
    "offsets backwards": (set_first(data_offsets=[256, 0]), "in -256 bytes"),
    "offsets that are negative": (set_first(data_offsets=[-256, 0]), "expected dtype, shape and data_offsets"),
    "offsets that are text": (set_first(data_offsets="0"), "expected dtype, shape and data_offsets"),
    "three offsets": (set_first(data_offsets=[0, 1, 2]), "expected dtype, shape and data_offsets"),
    "a shape that is a number": (set_first(shape=64), "expected dtype, shape and data_offsets"),
    "a shape of floats": (set_first(shape=[2.0, 32]), "expected dtype, shape and data_offsets"),
    "a shape of 400 digits": (set_first(shape=[HUGE, 0]), "expected dtype, shape and data_offsets"),
    "a shape that overflows": (set_first(shape=[1 << 62, 1 << 62]), "whole safetensors file"),
    "an entry that is a list": (
        header(lambda found: json.dumps({"a": []})),
        "expected dtype, shape and data_offsets of a",
    ),
    "a dtype that is a list": (set_first(dtype=[]), "expected dtype, shape and data_offsets"),
    "a dtype that nobody knows": (set_first(dtype="F1"), "dtype that is known"),
    "metadata that is a list": (header(lambda found: found.update(__metadata__=[])), "__metadata__ of"),
    "a header that is a list": (header(lambda found: "[]"), "JSON object, got list"),
    "a deep header": (header(lambda found: DEEP), "whole safetensors file"),
    "NaN in a header": (header(lambda found: '{"a": NaN}'), "NaN is not a number"),
    "a header of 3 MiB": (
        header(lambda found: json.dumps({str(i): {} for i in range(300_000)})),
        "header that is within",
    ),
    "a header that is said to be larger": (
        config_bytes(struct.pack("<Q", 2**63), WEIGHTS_FILE),
        "header that is within",
    ),
    "a sparse file": (sparse(1 << 40), "whole safetensors file: its tensors have"),
    "a sparse tensor of a terabyte": (sparse_and_claimed([1 << 19, 1 << 19]), "missing: "),
    "a base weight of a terabyte": (base_copy_of_a_terabyte, "to be the model's own value"),
    "no weights in the file": (config_bytes(b"", WEIGHTS_FILE), "header that is within"),
    # files
    "a loop of links": (instead(WEIGHTS_FILE, loop), f"expected .*{WEIGHTS_FILE}"),
    "a loop of links for a config": (instead(CONFIG_FILE, loop), f"expected .*{CONFIG_FILE}"),
    "a link to a device": (instead(WEIGHTS_FILE, lambda p: p.symlink_to("/dev/zero")), "to be a regular file"),
    "a link out for a config": (linked_out(CONFIG_FILE), "to be in its folder, got a link"),
    "a link out": (linked_out(WEIGHTS_FILE), "to be in its folder, got a link"),
    "a pipe for a config": (instead(CONFIG_FILE, os.mkfifo), "to be a regular file"),
    "a pipe": (instead(WEIGHTS_FILE, os.mkfifo), "to be a regular file"),
    "a folder for a config": (instead(CONFIG_FILE, os.mkdir), "to be a regular file"),
    "a folder for weights": (instead(WEIGHTS_FILE, os.mkdir), "to be a regular file"),
    "a socket": (instead(WEIGHTS_FILE, bind), "to be a regular file"),
    "nothing": (lambda folder: shutil.rmtree(folder), "expected a folder"),
    "a file for a folder": (lambda folder: (shutil.rmtree(folder), folder.touch()), "expected a folder"),
    "a folder that links to itself": (lambda folder: (shutil.rmtree(folder), folder.symlink_to(folder)), "a folder"),
}


def assert_refused(model, call, match):
    """Soon, with little memory, in words that name the place, and with the model as it was."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = [id(module) for module in model.modules()]
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises((ValueError, TypeError), match=match) as error:
            call()
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < SECONDS
    assert type(error.value) in (ValueError, TypeError) and len(str(error.value)) < 4000
    assert [id(module) for module in model.modules()] == modules
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_adapter_is_refused(kind, sound, tmp_path):
    edit, match = HOSTILE[kind]
    folder = shutil.copytree(sound, tmp_path / "adapter")
    edit(folder)
    model = make_model()
    assert_refused(model, lambda: lk.load_adapter(model, folder), match)
    bank = AdapterBank(model)
    assert_refused(model, lambda: bank.load("a", folder), match)
    assert bank.names() == []


def test_the_sound_ones_load(sound, sound_delta):
    assert len(lk.load_adapter(make_model(), sound).replaced) == 4
    assert len(load_delta(make_model(), sound_delta).replaced) == 4


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b"])
def test_paths_that_cannot_be(path):
    for load in (lk.load_adapter, load_delta):
        with pytest.raises(ValueError, match=r"expected a folder|null byte"):
            load(make_model(), path)


# --------------------------------------------------------------------------------------------------------------- deltas

DELTA_CONFIG, DELTA_FILE = "smt_config.json", "smt_delta.safetensors"


def delta(change):
    def edit(folder):
        found = json.loads((folder / DELTA_CONFIG).read_text())
        change(found)
        (folder / DELTA_CONFIG).write_text(json.dumps(found))

    return edit


def module(**changes):
    return delta(lambda found: found["modules"]["layers.0.q_proj"].update(changes))


def delta_header(name, **changes):
    return header(lambda found: found[name].update(changes), DELTA_FILE)


def huge_blocks(folder):
    """Of a terabyte, which the file has, as a hole."""
    side = 1 << 19
    delta(lambda found: found.update(block_size=[side, side]))(folder)
    os.truncate(folder / DELTA_FILE, 1 << 40)


def many_blocks(folder):
    n, found = 1 << 30, {}
    names = list(json.loads((folder / DELTA_CONFIG).read_text())["modules"])
    end = 0
    for name in names:
        for key, dtype, shape in (("blocks", "F32", [n, 16, 16]), ("block_index", "I32", [n, 2])):
            begin, end = end, end + 4 * n * (256 if key == "blocks" else 2)
            found[f"{name}.{key}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(found).encode()
    (folder / DELTA_FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(folder / DELTA_FILE, 8 + len(text) + end)


HOSTILE_DELTAS = {
    "a key twice": (config_text("{", '{"format": "x", ', DELTA_CONFIG), "'format' is there twice"),
    "deep config": (config_bytes(DEEP.encode(), DELTA_CONFIG), "to hold JSON"),
    "a list": (config_bytes(b"[]", DELTA_CONFIG), "JSON object, got list"),
    "not text": (config_bytes(b"\xff\xfe", DELTA_CONFIG), "to hold JSON"),
    "NaN": (config_bytes(b'{"format": NaN}', DELTA_CONFIG), "NaN is not a number"),
    "a sparse config": (sparse(1 << 40, DELTA_CONFIG), "of at most"),
    "a dtype that is a list": (module(dtype=["float32"]), "shape, dtype and sha256"),
    "a shape that is true": (module(shape=[True, 32]), "shape, dtype and sha256"),
    "a shape that is not the model's": (module(shape=[HUGE, 32]), r"layers\.0\.q_proj has the shape"),
    "a hash that is a number": (module(sha256=3), "shape, dtype and sha256"),
    "modules that are a list": (delta(lambda found: found.update(modules=["a"])), "shape, dtype and sha256"),
    "a module that is not there": (
        delta(lambda found: found["modules"].update(x=first(found["modules"]))),
        "linear at x",
    ),
    "a block size of 400 digits": (delta(lambda found: found.update(block_size=[HUGE, 16])), "within the largest"),
    "blocks of a terabyte": (huge_blocks, "within the largest"),
    "a billion blocks": (many_blocks, r"block_index of shape \(n, 2\), I32, n from 1 to 4"),
    "a block size that does not fit": (delta(lambda found: found.update(block_size=[32, 32])), "blocks of shape"),
    "a tensor twice": (header(twice, DELTA_FILE), "is there twice"),
    "overlapping": (header(overlap, DELTA_FILE), "whole safetensors file"),
    "an index of floats": (delta_header("layers.0.q_proj.block_index", dtype="F32"), "block_index of shape"),
    "blocks of integers": (delta_header("layers.0.q_proj.blocks", dtype="I32"), "blocks of one float dtype"),
    "a sparse file": (sparse(1 << 40, DELTA_FILE), "whole safetensors file: its tensors have"),
    "a link out": (linked_out(DELTA_FILE), "to be in its folder, got a link"),
    "a link out for a config": (linked_out(DELTA_CONFIG), "to be in its folder, got a link"),
    "a loop of links": (instead(DELTA_FILE, loop), f"expected .*{DELTA_FILE}"),
    "a pipe": (instead(DELTA_FILE, os.mkfifo), "to be a regular file"),
    "a pipe for a config": (instead(DELTA_CONFIG, os.mkfifo), "to be a regular file"),
    "nothing": (lambda folder: shutil.rmtree(folder), "expected a folder"),
}


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", HOSTILE_DELTAS)
def test_a_delta_is_refused(kind, force, sound_delta, tmp_path):
    edit, match = HOSTILE_DELTAS[kind]
    folder = shutil.copytree(sound_delta, tmp_path / "delta")
    edit(folder)
    model = make_model()
    assert_refused(model, lambda: load_delta(model, folder, force=force), match)


# ------------------------------------------------------------------------------------------------------------- patterns


class Deep(nn.Module):
    """A thousand modules with the names of a language model's, and no memory to speak of."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList()
        for _ in range(125):
            layer = nn.Module()
            for part, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
                inner = nn.Module()
                for name in names:
                    inner.add_module(f"{name}_proj", nn.Linear(1, 1, bias=False))
                layer.add_module(part, inner)
            self.model.layers.append(layer)


SLOW = [  # of which ``re`` needs a step for every way to match
    "(a+)+$",
    "(.*)*x",
    "(.+)+x",
    "(.|..)*x",
    "([a-z.]+)*$",
    r"(\w+\.?)+x",
    "(.*a){25}x",
    ".*" * 12 + "x",
    r"^(([a-z])+.)+[A-Z]([a-z])+$",
    "(.?){40}.{40}x",
    "(?=(.+)+x).*",
    "(x+x+)+y",
]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_slow_pattern_is_answered_or_refused(pattern, sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    config(target_modules=pattern)(folder)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"steps|replaces nothing|missing: "):
        lk.load_adapter(Deep(), folder)
    config(target_modules=["q_proj"], rank_pattern={pattern: 2}, alpha_pattern={pattern: 2, "y": 3})(folder)
    with pytest.raises(ValueError, match=r"steps|missing: "):
        lk.load_adapter(Deep(), folder)
    assert time.process_time() - start < SECONDS


UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp"
    r"|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)
ORDINARY = [
    r".*\.(q|v)_proj",
    r"model\.layers\.(1|2)\..*proj$",
    r"^(?!.*mlp).*proj$",
    r".*(?<!gate)_proj",
    r"model\.layers\.\d+\.self_attn\.[qv]_proj",
    r"model\.layers\.(?:1[0-9]|[2-9])\.(mlp|self_attn)\.(?P<which>up|q)_proj",
    r"(?:model\.)?layers.*?\.(?:q|k)_proj",
    r".*\b(?:q|up)_proj\b",
    r"(?:[a-z_]+\.|\d{1,3}\.)+q_proj",
    UNSLOTH,
]


@pytest.mark.parametrize("pattern", ORDINARY)
def test_an_ordinary_pattern_matches_what_re_matches(pattern):
    names = [name for name, _ in Deep().named_modules() if name]
    wanted = [name for name in names if re.fullmatch(pattern, name)]
    assert wanted and [name for name in names if FilePattern(pattern).fullmatch(name)] == wanted
    prefixed = rf"(?:.*\.)?(?:{pattern})"
    assert all(FilePattern(pattern).matches_ending(n) == bool(re.fullmatch(prefixed, n)) for n in names)


PIECES = [
    r"a",
    r"b",
    r".",
    r"\.",
    r"\w",
    r"\W",
    r"\d",
    r"\D",
    r"\s",
    r"[ab]",
    r"[^a]",
    r"[a-c.]",
    r"[^\w]",
    r"^",
    r"$",
    r"\A",
    r"\Z",
    r"\b",
    r"\B",
    r"(?=a)",
    r"(?!b.)",
    r"(?<=a)",
    r"(?<!b)",
    r"(?<=.b)",
    r"|",
]
REPEATS = ["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{2,}", "{0,2}?"]


@torch.no_grad()
def test_what_a_file_may_say_is_matched_as_re_does():
    """Patterns and names drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def draw(some):
        return some[torch.randint(len(some), (), generator=generator)]

    def pattern(depth):
        parts = []
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            inner = f"(?:{pattern(depth - 1)})" if depth and draw([True, False]) else draw(PIECES)
            repeat = (
                "" if inner == "|" or inner.startswith(("^", "$", r"\A", r"\Z", r"\b", r"\B", "(?<")) else draw(REPEATS)
            )
            parts.append(inner + repeat)
        return "".join(parts)

    compared = matched = 0
    for _ in range(4000):
        text = pattern(3)
        try:
            found, expected = FilePattern(text), re.compile(text)
        except (ValueError, re.error) as error:
            assert "steps" in str(error), text
            continue
        for _ in range(8):
            name = "".join(draw("ab.1_") for _ in range(int(torch.randint(1, 8, (), generator=generator))))
            assert found.fullmatch(name) == bool(expected.fullmatch(name)), (text, name)
            ending = re.fullmatch(rf"(?:.*\.)?(?:{text})", name)
            assert found.matches_ending(name) == bool(ending), (text, name)
            compared += 1
            matched += found.fullmatch(name)
    assert compared > 10_000 and 0.05 < matched / compared < 0.95


def test_a_file_pattern_is_a_string_and_says_what_it_cannot_have():
    for same in (copy.deepcopy(FilePattern("a|b")), pickle.loads(pickle.dumps(FilePattern("a|b")))):
        assert type(same) is FilePattern and same.fullmatch("b") and not same.fullmatch("ab")
    assert FilePattern("a|b") == "a|b" and json.dumps(FilePattern("a|b")) == '"a|b"'
    for pattern, why in (("(a)\\1", "backreferences"), ("(a)?(?(1)b)", "conditions"), ("(?x)a", "flags")):
        with pytest.raises(ValueError, match=why):
            FilePattern(pattern)


# --------------------------------------------------------------------------------------------- what is not hostile


def test_patterns_that_overlap_and_agree_are_read(sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    config(alpha_pattern={"q_proj": 3, r"layers\.0\.q_.*": 3.0, "v_proj": 5}, rank_pattern={".*_proj": 2, "q_proj": 2})(
        folder
    )
    model = make_model()
    lk.load_adapter(model, folder)
    assert [layer.alpha for layer in model.layers[0].children()] == [3, 5]


@pytest.mark.parametrize("alpha", [0, -3, 1.5])
def test_alphas_that_are_right(alpha, sound, tmp_path):
    folder = shutil.copytree(sound, tmp_path / "adapter")
    config(lora_alpha=alpha)(folder)
    model, x = make_model(), torch.randn(3, 32)
    base = model.layers[0].q_proj(x)
    lk.load_adapter(model, folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    a, b = (tensors[f"base_model.model.layers.0.q_proj.lora_{f}.weight"] for f in "AB")
    torch.testing.assert_close(model.layers[0].q_proj(x), base + alpha / 2 * (x @ a.T @ b.T), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 8.0}, r"LoRAConfig: expected r to be an integer of at least 1, got 8\.0"),
        ({"r": True}, "LoRAConfig: expected r to be an integer"),
        ({"r": 2**40}, "LoRAConfig: expected r to be at most 2147483647"),
        ({"alpha": 1e300}, r"LoRAConfig: expected alpha / r to be a number that float32 can hold, got 1e\+300"),
        ({"alpha": 10**400}, "LoRAConfig: expected alpha to be a finite number"),
        ({"alpha": True}, "LoRAConfig: expected alpha to be a finite number"),
        ({"alpha": 1e39, "r": 8, "rslora": True}, r"LoRAConfig: expected alpha / sqrt\(r\)"),
        ({"alpha": 1e39, "r": 8, "rank_pattern": {"q": 1}}, "LoRAConfig: expected alpha / r"),
        ({"rank_pattern": {"q": 8.0}}, r"LoRAConfig: rank_pattern\['q'\]: expected r to be an integer"),
        ({"rank_pattern": {"q": 2**40}}, r"LoRAConfig: rank_pattern\['q'\]: expected r to be at most"),
        ({"alpha_pattern": {"q": None}}, r"LoRAConfig: alpha_pattern\['q'\]: expected alpha to be a finite"),
        ({"alpha_pattern": {"q": float("inf")}}, r"LoRAConfig: alpha_pattern\['q'\]: expected alpha to be a finite"),
        ({"target_modules": "a{99999999999999999999}"}, "LoRAConfig: expected target_modules to hold a regular"),
        pytest.param(
            {"rank_pattern": {"(?i)q": 2}},
            "LoRAConfig: expected rank_pattern to hold a regular",
            marks=pytest.mark.skipif(
                sys.version_info < (3, 11), reason="Python 3.10 takes flags anywhere in a pattern"
            ),
        ),
    ],
)
def test_settings_in_python(settings, words):
    with pytest.raises(ValueError, match=words):
        LoRAConfig(**settings)


def test_a_flag_before_a_target_is_fine_in_python():
    model = make_model()
    assert len(lk.adapt(model, LoRAConfig(target_modules="(?i).*Q_PROJ", r=2)).replaced) == 2


def test_readers_read_what_they_should(sound, tmp_path):
    assert read_json(sound / CONFIG_FILE)["r"] == 2
    found = read_header(sound / WEIGHTS_FILE, 8)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tuple(t.shape) for name, t in load_file(sound / WEIGHTS_FILE).items()
    }
