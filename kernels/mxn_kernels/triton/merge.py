"""Adds up attention over parts of the same tokens, by their log-sum-exps, in fp32 and in the order of the parts."""

import torch
import triton
import triton.language as tl

from mxn_kernels.triton.launch import launch

CHUNK = 16  # parts read at a time


def merge(partial_out: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Args: partial_out (P, S, heads, V) fp32, partial_lse (P, S, heads) fp32: -inf where a part saw nothing, and then
    its
    values are not read. Fills out (S, heads, V) and lse (S, heads).
    """
    num_parts, num_seqs, num_heads, value_dim = partial_out.shape
    launch(
        _merge_kernel,
        (num_heads, num_seqs),
        options={"num_warps": 4 if value_dim > 64 else 2},
        out_ptr=out,
        lse_ptr=lse,
        partial_out_ptr=partial_out,
        partial_lse_ptr=partial_lse,
        num_parts=num_parts,
        stride_on=out.stride(0),
        stride_oh=out.stride(1),
        stride_ln=0 if lse is None else lse.stride(0),
        stride_pp=partial_out.stride(0),
        stride_pn=partial_out.stride(1),
        stride_ph=partial_out.stride(2),
        stride_mp=partial_lse.stride(0),
        stride_mn=partial_lse.stride(1),
        DV=value_dim,
        BLOCK_DV=triton.next_power_of_2(value_dim),
        BLOCK_P=max(CHUNK, triton.next_power_of_2(num_parts)),
        CHUNK=CHUNK,
        HAS_LSE=lse is not None,
    )


@triton.jit(do_not_specialize=["num_parts", "stride_mp"])  # these follow the batch
def _merge_kernel(
    out_ptr,
    lse_ptr,
    partial_out_ptr,
    partial_lse_ptr,
    num_parts,
    stride_on,
    stride_oh,
    stride_ln,
    stride_pp,
    stride_pn,
    stride_ph,
    stride_mp,
    stride_mn,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_LSE: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    seq = tl.program_id(1).to(tl.int64)
    dims = tl.arange(0, BLOCK_DV)
    partial_lse_ptr += seq * stride_mn + head
    partial_out_ptr += seq * stride_pn + head * stride_ph

    parts = tl.arange(0, BLOCK_P).to(tl.int64)
    all_lse = tl.load(partial_lse_ptr + parts * stride_mp, mask=parts < num_parts, other=float("-inf"))
    largest = tl.max(all_lse, 0)
    base = tl.where(largest == float("-inf"), 0.0, largest)

    total = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, num_parts, CHUNK):
        chunk = first + tl.arange(0, CHUNK).to(tl.int64)
        chunk_lse = tl.load(partial_lse_ptr + chunk * stride_mp, mask=chunk < num_parts, other=float("-inf"))
        weights = tl.exp(chunk_lse - base)
        is_read = (chunk_lse > float("-inf"))[:, None] & (dims[None, :] < DV)
        values = tl.load(partial_out_ptr + chunk[:, None] * stride_pp + dims[None, :], mask=is_read, other=0.0)
        acc += tl.sum(values * weights[:, None], 0)
        total += tl.sum(weights, 0)
    divisor = tl.where(total > 0.0, total, 1.0)
    tl.store(
        out_ptr + seq * stride_on + head * stride_oh + dims,
        (acc / divisor).to(out_ptr.dtype.element_ty),
        mask=dims < DV,
    )
    if HAS_LSE:
        tl.store(lse_ptr + seq * stride_ln + head, largest + tl.log(divisor))
