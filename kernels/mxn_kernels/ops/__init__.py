"""The ops: for each, what it computes, the checks of its arguments, the choice of who computes it, and a plain torch
reference.

Needs torch alone; an implementation's own libraries are imported when it is chosen (see `mxn_kernels.select`).
"""

from mxn_kernels.ops.copy_blocks import copy_blocks
from mxn_kernels.ops.move_blocks import move_blocks
from mxn_kernels.ops.paged_decode import paged_decode
from mxn_kernels.ops.ragged_prefill import ragged_prefill
from mxn_kernels.ops.rms_norm import rms_norm
from mxn_kernels.ops.rope import rope
from mxn_kernels.ops.sample import sample
from mxn_kernels.ops.shared_prefix_decode import shared_prefix_decode
from mxn_kernels.ops.silu_mul import silu_mul
from mxn_kernels.ops.swap_blocks import HostTier
from mxn_kernels.ops.write_kv import write_kv

__all__ = [
    "HostTier",
    "copy_blocks",
    "move_blocks",
    "paged_decode",
    "ragged_prefill",
    "rms_norm",
    "rope",
    "sample",
    "shared_prefix_decode",
    "silu_mul",
    "write_kv",
]
