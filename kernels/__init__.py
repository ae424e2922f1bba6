"""Triton kernels, installed as `biper_engine.kernels`.

They import only triton and torch, and nothing imports them until the Triton backend is needed.
"""
