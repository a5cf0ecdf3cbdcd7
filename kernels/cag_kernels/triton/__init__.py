"""Kernels for NVIDIA GPUs. Each serves an op of the package above, whose reference says what it means."""
