"""Stores tiles of rows into the paged cache, rounding to fp8 where the cache is."""

import torch
import triton
import triton.language as tl


def fp8_largest(dtype: torch.dtype) -> float:
    """Largest number of an fp8 dtype; 0 for others, which are stored as they are."""
    return torch.finfo(dtype).max if dtype.itemsize == 1 else 0.0


@triton.jit
def row_scale(largest_magnitude, scale_ptr, scale_offsets, mask, SCALE_MODE: tl.constexpr, FP8_LARGEST: tl.constexpr):
    """What each row is multiplied by before it is stored; a scale per row is written on the way."""
    factor = largest_magnitude * 0.0 + 1.0
    if SCALE_MODE == 1:
        factor = factor / tl.load(scale_ptr)
    if SCALE_MODE == 2:
        scale = largest_magnitude / FP8_LARGEST
        tl.store(scale_ptr + scale_offsets, scale, mask=mask)
        factor = tl.where(scale > 0.0, 1.0 / tl.where(scale > 0.0, scale, 1.0), 1.0)
    return factor


@triton.jit
def store_rows(rows, factor, ptrs, mask, FP8_LARGEST: tl.constexpr, INTERPRET: tl.constexpr):
    """Rows [R, D] times factor [R], clamped for fp8, stored in the dtype of the pointers."""
    if FP8_LARGEST > 0:
        rows = tl.clamp(rows.to(tl.float32) * factor[:, None], -FP8_LARGEST, FP8_LARGEST)
        if INTERPRET:
            rows = round_to_e4m3(rows, FP8_LARGEST)
    tl.store(ptrs, rows.to(ptrs.dtype.element_ty), mask=mask)


@triton.jit
def round_to_e4m3(x, FP8_LARGEST: tl.constexpr):
    """Nearest number of the format, of equals the even one, as fp32: the interpreter's own cast loses carries."""
    smallest_exponent: tl.constexpr = 127 - 6 if FP8_LARGEST > 240 else 127 - 7
    exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, smallest_exponent)
    step = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
    return ((x / step + 12582912.0) - 12582912.0) * step  # 1.5 * 2^23: fp32 has no digits behind the point there
