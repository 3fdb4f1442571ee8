"""The ops' Triton kernels, one file each; `mxn_kernels.ops` has what they compute. Importing needs Triton."""

from mxn_kernels.errors import KernelUnavailable

try:
    import triton  # noqa: F401
except ImportError as fault:
    raise KernelUnavailable("the Triton kernels need triton: pip install 'triton>=3.6,<3.10'") from fault
