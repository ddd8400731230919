"""Kernels: compare (with SDPA, FlexAttention, torch.compile), tune (tiles), aot (registers, spills)."""
