"""Triton kernels, one module per op. Imports triton only; installed as engine.triton_kernels."""
