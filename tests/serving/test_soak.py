"""The short form of ``benchmarks/soak_serving.py``."""

from pathlib import Path


def test_a_few_seconds_of_load(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from soak_serving import Soak

    found = Soak(tmp_path, adapters=24, resident=5).run(4.0)
    assert not found["faults"] and not found["unaccounted"] and not found["stuck"], found
    assert found["adapter_bytes"] <= found["budget_bytes"]
    for kind in ("right", "cancelled", "unloads", "loads", "corrupt refused"):
        assert found["counts"].get(kind, 0) > 0, (kind, found)
