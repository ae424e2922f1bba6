"""Triton kernels, installed as `biper_engine.kernels`.

They import triton and torch only, and nothing imports them before a Triton backend is asked for.
"""
