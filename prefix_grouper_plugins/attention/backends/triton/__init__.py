"""Fused Triton kernels for the forward, dQ and dK/dV of a forest."""
