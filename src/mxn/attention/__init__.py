"""Attention over a paged KV cache: one interface, a plain-torch reference, and the kernels of `mxn_kernels`."""
