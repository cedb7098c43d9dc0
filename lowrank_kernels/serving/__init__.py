"""Serving: one frozen model, many adapters, each sequence of a batch with its own."""

from .bank import AdapterBank

__all__ = ["AdapterBank"]
