"""Ops registered with torch: the only place of the package that registers anything."""

from importlib import import_module

from ..families import NAMES

for _name in NAMES:
    import_module(f"{__name__}.{_name}")
