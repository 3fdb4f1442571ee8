"""What the kernels raise besides ValueError."""


class KernelUnavailable(Exception):
    """A kernel library cannot be built or run on this machine; the text says why and what would help."""
