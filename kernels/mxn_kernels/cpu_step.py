"""A whole decoder step in one call: embedding, layers over the paged cache, final norm, head for the rows asked for.

The arithmetic is that of `packed_linear`, `rms_norm` and `paged_attention`, on the same packed weights and caches; what
lies between them (rotation, activation, residuals) is computed in the order in which transformers' modules do. A row's
result depends on its own sequence alone, bit for bit: not on the batch, the threads, or how a prompt was cut.
"""

from __future__ import annotations

import ctypes

import torch

from mxn_kernels.cpu.library import Workspace, destroy_with
from mxn_kernels.cpu_decoder import Decoder, check_decoder, check_tensor, decoder_struct
from mxn_kernels.paged_attention import FAULTS, Fault, PagedBatch

STAGES = (
    "embedding",
    "norm and quantise",
    "q, k, v",
    "rotate and write",
    "attention",
    "merge of chunks",
    "output projection",
    "norm of results",
    "gate and up",
    "down",
    "head",
)
"""What `DecoderStep.profile` tells apart, in the order of StageKind in step.h."""


class DecoderStep:
    """A decoder bound to a workspace. Raises: ValueError naming the first part that does not fit the others."""

    def __init__(self, decoder: Decoder, workspace: Workspace) -> None:
        check_decoder(decoder)
        self.decoder, self.workspace = decoder, workspace
        self.hidden_size, self.vocab_size = decoder.embedding.shape[1], decoder.head.n
        self._struct, self._parts = decoder_struct(decoder)
        self._seconds: ctypes.Array[ctypes.c_double] | None = None
        self._plans = workspace.library.step_plans_create()
        if not self._plans:
            raise MemoryError("no memory for a step program")
        destroy_with(self, workspace.library.step_plans_destroy, self._plans)

    def __call__(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        batch: PagedBatch,
        logit_rows: torch.Tensor,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Args: token_ids, positions (T,) and logit_rows (R,): int64, contiguous. out: where logits are written.

        Returns: logits (R, vocabulary), `out` if given.

        Writes the tokens' keys and values at the batch's slots. A row depends on its own sequence alone, bit for bit.
        Raises: ValueError on any index outside its table; nothing is written then.
        """
        logits = torch.empty(logit_rows.shape[0], self.vocab_size) if out is None else out
        check_tensor("out", logits, (logit_rows.shape[0], self.vocab_size))
        self._run(positions, batch, logit_rows, logits, token_ids=token_ids, last_layer=len(self.decoder.layers))
        return logits

    def greedy(
        self, token_ids: torch.Tensor, positions: torch.Tensor, batch: PagedBatch, logit_rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same step where only the likeliest token of each row is wanted: logits never leave the caches of a core.

        Returns: token ids (R,) int64, of equals the first, and their logits (R,) float32; a logit is not finite where
          any of its row is not.
        """
        rows = logit_rows.shape[0]
        chosen = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
        whole = len(self.decoder.layers)
        self._run(positions, batch, logit_rows, _no_logits(), chosen=chosen, token_ids=token_ids, last_layer=whole)
        return chosen

    def start_profile(self) -> None:
        """From now on the time of every stage is noted, and what was noted before is forgotten."""
        self._seconds = (ctypes.c_double * (len(STAGES) + 1))()

    def profile(self) -> dict[str, float]:
        """Seconds by stage since `start_profile`, empty without it. They add up to the whole of the steps.

        A stage's seconds are those of all threads, divided by their number; what the threads spent waiting for each
        other, waking up and making lists is "waiting".
        """
        if self._seconds is None:
            return {}
        *stages, whole = self._seconds
        return dict(zip(STAGES, stages, strict=True)) | {"waiting": whole - sum(stages)}

    def stop_profile(self) -> None:
        """Notes nothing any more."""
        self._seconds = None

    def embed(self, token_ids: torch.Tensor, positions: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
        """The hidden states (T, hidden size) that the first layer sees."""
        out = torch.empty(token_ids.shape[0], self.hidden_size)
        self._run(positions, batch, _no_rows(), _no_logits(), token_ids=token_ids, hidden_out=out)
        return out

    def run_layer(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor, batch: PagedBatch) -> torch.Tensor:
        """Hidden states (T, hidden size) after one layer, keys and values written."""
        out, span = torch.empty_like(hidden), {"first_layer": layer, "last_layer": layer + 1}
        self._run(positions, batch, _no_rows(), _no_logits(), hidden=hidden, hidden_out=out, **span)
        return out

    def project(
        self, hidden: torch.Tensor, positions: torch.Tensor, batch: PagedBatch, logit_rows: torch.Tensor
    ) -> torch.Tensor:
        """Logits (R, vocabulary) of rows of the last layer's hidden states."""
        logits = torch.empty(logit_rows.shape[0], self.vocab_size)
        self._run(positions, batch, logit_rows, logits, hidden=hidden)
        return logits

    def _run(
        self,
        positions: torch.Tensor,
        batch: PagedBatch,
        logit_rows: torch.Tensor,
        logits: torch.Tensor,
        *,
        chosen: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
        token_ids: torch.Tensor | None = None,
        hidden: torch.Tensor | None = None,
        hidden_out: torch.Tensor | None = None,
        first_layer: int = 0,
        last_layer: int = 0,
    ) -> None:
        for name, tensor in (("positions", positions), ("token_ids", token_ids), ("logit_rows", logit_rows)):
            rows = logit_rows.shape[0] if name == "logit_rows" else batch.num_tokens
            if tensor is not None and (
                tensor.dtype is not torch.int64 or tensor.shape != (rows,) or not tensor.is_contiguous()
            ):
                raise ValueError(
                    f"{name} must be contiguous int64 ({rows},), found {tensor.dtype} {tuple(tensor.shape)}"
                )
        shape = (batch.num_tokens, self.hidden_size)
        if hidden is not None and (
            hidden.dtype is not torch.float32 or hidden.shape != shape or not hidden.is_contiguous()
        ):
            raise ValueError(f"hidden must be contiguous float32 {shape}, found {hidden.dtype} {tuple(hidden.shape)}")
        step = _StepInput(
            *(None if t is None else t.data_ptr() for t in (token_ids, hidden, positions)),
            batch.address,
            *(None if t is None else t.data_ptr() for t in (logit_rows, logits, *chosen, hidden_out)),
            None if self._seconds is None else ctypes.addressof(self._seconds),
            logit_rows.shape[0],
            first_layer,
            last_layer,
        )
        fault = Fault()
        pointers = (ctypes.addressof(part) for part in (self._struct, step, fault))
        kind = self.workspace.library.step(self.workspace.handle, self._plans, *pointers)
        if kind:
            if kind not in FAULTS:
                raise MemoryError(f"can't allocate memory for a step of {batch.num_tokens} tokens")
            raise ValueError(FAULTS[kind].format(index=fault.index, found=fault.found, limit=fault.limit))


def _no_rows() -> torch.Tensor:
    return torch.empty(0, dtype=torch.int64)


def _no_logits() -> torch.Tensor:
    return torch.empty(0)


class _StepInput(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("token_ids", "hidden", "positions", "batch", "logit_rows", "logits")],
        *[(name, ctypes.c_void_p) for name in ("chosen", "chosen_logits", "hidden_out", "profile")],
        *[(name, ctypes.c_int32) for name in ("num_logit_rows", "first_layer", "last_layer")],
    ]
