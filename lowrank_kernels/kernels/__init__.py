"""Triton kernels and their launchers, one file an op family; tile choices stand beside them."""
