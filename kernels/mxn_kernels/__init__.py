"""Kernels for mxn, usable without it: one op per file, a public wrapper beside a plain-torch reference.

The CPU ops are C++ built on first use (`mxn_kernels.cpu`). Nothing here imports mxn.
"""

from mxn_kernels.errors import KernelUnavailable

__all__ = ["KernelUnavailable"]
__version__ = "0.1.0"
