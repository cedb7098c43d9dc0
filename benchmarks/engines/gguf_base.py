"""In the environment of llama.cpp: a base model as a GGUF file of float32.

    python gguf_base.py FOLDER NAME TARGET VOCABULARY_GGUF

"smollm2" is the packaged file with its codes widened; another NAME is a folder of transformers' in FOLDER, converted
by llama.cpp's own converter (from the source of llama-cpp-python), with the first tokens of the packaged vocabulary.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np

SOURCE = "llama-cpp-python==0.3.36"


def widened(source: Path, target: Path) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    copy_fields(reader, writer, lambda name: True)
    for tensor in reader.tensors:
        wide = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(wide, dtype=np.float32))
    finish(writer)


def copy_fields(reader, writer, wanted, size=None) -> None:
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type") or not wanted(name):
            continue
        value, inner = field.contents(), field.types[1] if len(field.types) > 1 else None
        if size and isinstance(value, list):
            if name.endswith("merges"):
                continue
            value = value[:size]
        writer.add_key_value(name, value, field.types[0], inner)


def finish(writer) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converter(folder: Path) -> Path:
    """The folder of llama.cpp's converter."""
    home = folder.parent / "llama.cpp" if (folder.parent / "llama.cpp").exists() else folder / "llama.cpp"
    if not home.exists():
        get = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary=:all:",
        ]
        subprocess.run([*get, "--dest", folder, SOURCE], check=True)
        (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as files:
            for member in files:
                _, _, inner = member.name.partition("/vendor/llama.cpp/")
                if inner.startswith(("conversion/", "gguf-py/")):
                    member.name = inner
                    files.extract(member, home, filter="data")
    return home


def converted(folder: Path, name: str, target: Path, vocabulary: Path) -> None:
    import conversion
    import torch

    config = json.loads((folder / name / "config.json").read_text())
    kind = conversion.get_model_class(config["architectures"][0])
    reader = gguf.GGUFReader(vocabulary)

    class Model(kind):
        model_arch = kind.model_arch

        def set_vocab(self):
            copy_fields(reader, self.gguf_writer, lambda key: key.startswith("tokenizer."), config["vocab_size"])
            self.gguf_writer.add_token_merges(["a b"])

    with torch.inference_mode():
        settings = kind.load_hparams(folder / name, False)
        # transformers 5 writes GPT-NeoX' rotary share under another name than the converter reads.
        settings.setdefault("rotary_pct", (settings.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0))
        Model(folder / name, gguf.LlamaFileType.ALL_F32, target, hparams=settings).write()


if __name__ == "__main__":
    folder, name, target, packaged = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    home = converter(folder)
    sys.path[:0] = [str(home), str(home / "gguf-py")]  # the converter's own gguf
    import gguf

    widened(packaged, target) if name == "smollm2" else converted(folder, name, target, packaged)
