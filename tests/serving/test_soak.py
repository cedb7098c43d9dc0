"""The short form of ``benchmarks/soak_serving.py``."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

KINDS = {"right": 200, "cancelled": 10, "unloads": 5, "loads": 10, "corrupt refused": 5}
"""How often each of these has happened when the load ends."""


def test_some_load_leaves_nothing_wrong_lost_or_over_the_budget(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import soak_serving

    enough = threading.Event()

    class CountedSoak(soak_serving.Soak):
        def count(self, what, fault=None):
            super().count(what, fault)
            if all(self.counts[kind] >= least for kind, least in KINDS.items()) or self.faults:
                enough.set()

    def sleep(seconds):
        """The main thread, which ends the load, sleeps until there was enough of it; the others as they are told."""
        if threading.current_thread() is threading.main_thread():
            enough.wait(300)
        else:
            time.sleep(seconds)

    monkeypatch.setattr(soak_serving, "time", SimpleNamespace(sleep=sleep))
    found = CountedSoak(tmp_path, adapters=24, resident=5).run(0.0)
    assert not found["faults"] and not found["unaccounted"] and not found["stuck"], found
    assert found["adapter_bytes"] <= found["budget_bytes"]
    for kind, least in KINDS.items():
        assert found["counts"].get(kind, 0) >= least, (kind, found)
