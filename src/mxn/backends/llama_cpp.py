"""llama.cpp's own server, `llama-server`: models as GGUF files, in one process of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mxn.backends.base import Backend, Capabilities, MemoryEstimate, Probe, ServerSpec, Support
from mxn.backends.host import available_memory_bytes, cpu_chip, resident_bytes
from mxn.backends.server_options import ServerOptions
from mxn.config.environment import variable
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.core.quantity import Provenance, Quantity
from mxn.energy.reader import PowerReader
from mxn.errors import BackendError, UnsupportedModelError

_EXECUTABLE = "llama-server"
_VARIABLE = "MXN_LLAMA_SERVER"
_PROBE_S = 1.5
_KV_BYTES_PER_ELEMENT = 2.0  # its cache is float16 unless told otherwise
_AUTO_KV_SHARE = 0.5
_QUANTISED = re.compile(r"[._-]((?:I?Q\d\w*)|BF16|F16|F32)\.gguf$", re.IGNORECASE)


class LlamaCppBackend(Backend):
    """`llama-server` on the host's processor. Options: gguf, executable, arguments, env.NAME, and the time limits."""

    name = "llama.cpp"

    def probe(self) -> Probe:
        path = _find("")
        if path is None:
            return Probe(
                state="absent",
                reason=f"no {_EXECUTABLE} on PATH; install llama.cpp, or name the program in {_VARIABLE}",
            )
        try:
            said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_PROBE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return Probe(state="broken", reason=f"{path} --version does not answer: {error}")
        text = said.stdout + said.stderr
        if said.returncode != 0:
            last = text.strip().splitlines()[-1:] or ["it said nothing"]
            return Probe(state="broken", reason=f"{path} --version ends with code {said.returncode}: {last[0]}")
        version = re.search(r"version: (.+)", text)
        versions = {"llama.cpp": version[1].strip()} if version else {}
        return Probe(state="active", reason=f"{path}, on the processor", versions=versions)

    def chips(self) -> Sequence[Chip]:
        return (cpu_chip(),) if self.probe().state == "active" else ()

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
        return Support(
            verdict="yes",
            reasons=(
                "it runs the quantisation of its GGUF file, and says when it starts if it knows the architecture",
            ),
            max_context=model.max_context,
        )

    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        slots, context = _division(model, settings, chip.memory_bytes)
        return MemoryEstimate(
            weights=Quantity.unavailable("B", "the size of the GGUF file, which is known when it is loaded"),
            kv_cache=Quantity(
                value=slots * context * model.kv_bytes_per_token(_KV_BYTES_PER_ELEMENT),
                unit="B",
                provenance=Provenance.ESTIMATED,
                source=f"{slots} slots of {context} tokens, float16",
            ),
            activations=Quantity.unavailable("B", "llama-server does not say before it runs"),
            overhead=Quantity.unavailable("B", "llama-server does not say before it runs"),
        )

    def power(self, chip: Chip) -> PowerReader:
        from mxn.energy.cpu import cpu_power_reader

        return cpu_power_reader(chip)

    def memory_used(self, chip: Chip, pid: int) -> Quantity:
        return resident_bytes(pid)

    def serve(self, model: Model, settings: LoadSettings, chips: Sequence[Chip]) -> ServerSpec:
        options = ServerOptions(settings.options)
        executable = options.text("executable")
        path = _find(executable)
        if path is None:
            raise BackendError(f"{executable or _EXECUTABLE} is not there; set {_VARIABLE} or the option executable")
        gguf = _gguf(options.text("gguf"), model)
        if settings.quantisation != "auto":
            raise UnsupportedModelError(
                f"llama.cpp runs a GGUF file as it is quantised, so {settings.quantisation} cannot be asked for; "
                f"leave it at auto, or name another file with the option gguf (now {gguf})"
            )
        slots, context = _division(model.spec, settings, available_memory_bytes())
        threads = settings.threads or chips[0].cores
        argv = [path, "--model", str(gguf), "--alias", model.name, "--host", "127.0.0.1", "--port", "{port}"]
        argv += ["--parallel", str(slots), "--ctx-size", str(slots * context)]
        argv += ["--threads", str(threads), "--threads-batch", str(threads)]
        argv += [] if settings.prefix_cache else ["--no-cache-prompt"]
        spec = ServerSpec(
            argv=(*argv, *options.words("arguments")),
            environment=(("LLAMA_API_KEY", "{key}"), *options.environment()),
            api_key="{key}",
            model=model.name,
            protocol="llama.cpp",
            max_num_seqs=slots,
            ready_timeout_s=options.seconds("ready_timeout_s", 600.0),
            stop_timeout_s=options.seconds("stop_timeout_s", 10.0),
            device=chips[0].uid,
            quantisation=_quantisation(gguf),
            threads=threads,
            max_context=context,
            weight_bytes=gguf.stat().st_size,
            kv_bytes=int(slots * context * model.spec.kv_bytes_per_token(_KV_BYTES_PER_ELEMENT)),
            notes=(f"GGUF file {gguf.name}; {slots} slots of {context} tokens",),
        )
        options.check_all_read(self.name)
        return spec


def _find(given: str) -> str | None:
    """The program's path: as given, else as the environment says, else on PATH."""
    return shutil.which(given or variable(_VARIABLE) or _EXECUTABLE)


def _gguf(given: str, model: Model) -> Path:
    """The GGUF file to load. Raises: ModelError's child that says where one can be had."""
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise BackendError(f"option gguf: no such file {path}")
        return path
    found = sorted(Path(model.folder).glob("*.gguf"))
    if not found:
        raise UnsupportedModelError(
            f"llama.cpp loads GGUF files and {model.name} came as safetensors; convert it with llama.cpp's "
            "convert_hf_to_gguf.py (and llama-quantize), then pass the file: --option gguf=FILE"
        )
    return found[0]


def _division(model: ModelSpec, settings: LoadSettings, free_bytes: int) -> tuple[int, int]:
    """Slots and tokens in each: its cache is cut into equal parts, so that no sequence can run out of room midway."""
    context = min(settings.context_length or model.max_context, model.max_context)
    per_token = model.kv_bytes_per_token(_KV_BYTES_PER_ELEMENT)
    if settings.kv_bytes is not None:
        num_tokens = settings.kv_bytes / per_token
    else:
        num_tokens = min(settings.auto_kv_tokens(context), _AUTO_KV_SHARE * free_bytes / per_token)
    if num_tokens < context:
        context = max(1, int(num_tokens))
    return max(1, min(settings.max_num_seqs, int(num_tokens // context))), context


def _quantisation(gguf: Path) -> str:
    """The kind that a file's name tells, as is custom."""
    found = _QUANTISED.search(gguf.name)
    return found[1].lower() if found else "as in the GGUF file"
