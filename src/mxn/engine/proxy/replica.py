"""A replica whose model runs in a server: what a worker holds in place of an engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial

from mxn.backends.base import Backend, LoadProgress, ServerSpec
from mxn.energy.attribution import ChipMeter
from mxn.energy.reader import NullReader
from mxn.energy.together import together
from mxn.energy.window import PROVENANCE
from mxn.engine.channel import ReplicaChannel
from mxn.engine.messages import Load, ReplicaInfo
from mxn.engine.proxy.dialects import DIALECTS, Dialect
from mxn.engine.proxy.process import ServerProcess
from mxn.engine.proxy.proxy import Proxy
from mxn.engine.tokenizer import Tokenizer
from mxn.errors import BackendError


class ServerReplica:
    """A server that is ready, and the proxy that speaks to it."""

    def __init__(self, server: ServerProcess, make_proxy: Callable[[], Proxy]) -> None:
        self._server = server
        self._make_proxy = make_proxy

    @classmethod
    def start(
        cls,
        backend: Backend,
        message: Load,
        is_wanted: Callable[[], bool],
        progress: LoadProgress,
        load_s: dict[str, float],
    ) -> tuple[ServerReplica, ReplicaInfo]:
        """Starts the backend's server and waits until it is ready, or is not wanted any more.

        Raises: MxnError with the cause; nothing is left running then.
        """
        model = message.model
        spec = backend.serve(model, message.settings, message.chips)
        dialect = DIALECTS[spec.protocol](spec, Tokenizer.load(model.folder))
        progress("server", 0.0)
        server = ServerProcess(spec)
        try:
            server.wait_until_ready(is_wanted=is_wanted)
            max_context = _max_context(server, spec)
        except BaseException:
            server.stop()
            raise
        progress("server", 1.0)
        info = _describe(message, spec, dialect, server, max_context, load_s)
        meter = _meter(backend, message, server)
        if meter is not None:
            info.power_source, info.power_provenance = meter.reader.name, PROVENANCE[meter.reader.kind]
        make_proxy = partial(
            Proxy, server, dialect, max_num_seqs=spec.max_num_seqs, max_context=max_context, meter=meter
        )
        return cls(server, make_proxy), info

    def serve(self, channel: ReplicaChannel) -> bool:
        """Handles the gateway's messages until told to stop, which is True, or until the gateway is gone.

        Raises: ServerDiedError; OSError when the gateway cannot be written to.
        """
        return asyncio.run(self._make_proxy().serve(channel))

    def abort_all(self) -> None:
        """Nothing: what `serve` had asked the server for ended with it."""

    def close(self) -> None:
        """Ends the server."""
        self._server.stop()


def _meter(backend: Backend, message: Load, server: ServerProcess) -> ChipMeter | None:
    """What meters the server's chips; None for a server that mxn did not start, whose chips may be anywhere."""
    if not server.is_own:
        return None
    power = together([backend.power(chip) for chip in message.chips])
    return None if isinstance(power, NullReader) else ChipMeter(power, share=message.chip_share)


def _max_context(server: ServerProcess, spec: ServerSpec) -> int:
    """The longest sequence that both the specification and the server's list of models allow."""
    models = server.served_models()
    if not models:
        return spec.max_context
    if spec.model not in models:
        raise BackendError(
            f'{server.name} serves no model "{spec.model}"; it lists {", ".join(models)}; '
            "name one of them in options.model"
        )
    return min(spec.max_context, models[spec.model] or spec.max_context)


def _describe(
    message: Load, spec: ServerSpec, dialect: Dialect, server: ServerProcess, max_context: int, load_s: dict[str, float]
) -> ReplicaInfo:
    counted = "by mxn, from its token ids" if dialect.has_token_ids else "by the server"
    return ReplicaInfo(
        pid=os.getpid(),
        backend=message.backend,
        attention="the server's own",
        quantisation=spec.quantisation,
        device=spec.device,
        threads=spec.threads,
        weight_bytes=spec.weight_bytes,
        kv_bytes=spec.kv_bytes,
        num_blocks=0,
        block_size=0,
        max_context=max_context,
        vocab_size=dialect.tokenizer.vocab_size,
        program="the server's own",
        notes=[*spec.notes, f"served by {server.name} over HTTP; output tokens are counted {counted}"],
        load_s={phase: round(s, 4) for phase, s in load_s.items()},
        refused=sorted(dialect.refused()),
    )
