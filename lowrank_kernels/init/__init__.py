"""Starting points of the factors."""

from .factors import INITS, init_factors_

__all__ = ["INITS", "init_factors_"]
