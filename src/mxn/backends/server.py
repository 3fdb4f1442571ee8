"""Any server that speaks OpenAI's completions: started from a command line, or reached where it runs already."""

from __future__ import annotations

from collections.abc import Sequence

from mxn.backends.base import Backend, Capabilities, MemoryEstimate, Probe, ServerSpec, Support
from mxn.backends.host import cpu_chip
from mxn.backends.server_options import ServerOptions, no_estimate, served_name
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.energy.reader import PowerReader
from mxn.errors import BackendError


class ServerBackend(Backend):
    """A server named by its options; see `ServerOptions`. Takes the host's processor as its chip."""

    name = "server"

    def probe(self) -> Probe:
        return Probe(state="active", reason="any OpenAI-compatible server; needs the option command or url")

    def chips(self) -> Sequence[Chip]:
        return (cpu_chip(),)

    def capabilities(self, chip: Chip) -> Capabilities:
        return Capabilities(
            kv="own",
            has_mixed_steps=True,
            has_prefix_sharing=True,
            has_multi_token_verify=False,
            has_graph_capture=False,
            can_share_chip=True,
        )

    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        return Support(verdict="yes", reasons=("the server decides when it starts",), max_context=model.max_context)

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        return no_estimate("what the server takes is not known before it runs")

    def power(self, chip: Chip) -> PowerReader:
        from mxn.energy.cpu import cpu_power_reader

        return cpu_power_reader(chip)

    def serve(self, model: Model, settings: LoadSettings, chips: Sequence[Chip]) -> ServerSpec:
        options = ServerOptions(settings.options)
        command, url = options.words("command"), options.text("url")
        if bool(command) == bool(url):
            raise BackendError(
                "the server backend needs one of two options: command, with {port} where the port goes, or url; "
                f"got {'both' if command else 'neither'}"
            )
        values = {
            "{name}": model.name,
            "{folder}": model.folder,
            "{context}": str(min(settings.context_length or model.spec.max_context, model.spec.max_context)),
            "{max_num_seqs}": str(settings.max_num_seqs),
            "{threads}": str(settings.threads or chips[0].cores),
            "{kv_bytes}": "" if settings.kv_bytes is None else str(settings.kv_bytes),
        }
        if not values["{kv_bytes}"] and any("{kv_bytes}" in word for word in command):
            raise BackendError("the option command names {kv_bytes}; set kv_gib, or leave {kv_bytes} out")
        for placeholder, value in values.items():
            command = tuple(word.replace(placeholder, value) for word in command)
        spec = ServerSpec(
            argv=command,
            environment=options.environment(),
            url=url.rstrip("/").removesuffix("/v1") if url else "http://127.0.0.1:{port}",
            api_key=options.secret("key_variable"),
            model=served_name(options, model),
            protocol=options.one_of("protocol", ("completions", "llama.cpp")),
            extensions=options.extensions(),
            takes_token_ids=options.one_of("prompts", ("ids", "text")) == "ids",
            max_num_seqs=settings.max_num_seqs,
            ready_path=options.text("ready_path") or ("/health" if command else "/v1/models"),
            ready_timeout_s=options.seconds("ready_timeout_s", 600.0),
            stop_timeout_s=options.seconds("stop_timeout_s", 10.0),
            device=chips[0].uid if command else "wherever the server runs",
            quantisation="unknown",
            max_context=int(values["{context}"]),
        )
        options.check_all_read(self.name)
        return spec
