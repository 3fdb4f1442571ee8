"""The adapter interface, version 1: what a chip's backend gives to mxn.

A backend names the chips it can reach, says which models they can run, and then does one of two things: it loads a
model as an `Executor`, which mxn's own engine drives step by step (as an `Embedder` where the model makes vectors), or
it describes a `ServerSpec`, a server of its own that mxn launches, watches and speaks OpenAI's protocol with. Values
are frozen dataclasses of plain types. Nothing here imports torch; a backend imports heavy libraries inside `load`
only, which runs in the replica's own process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

from mxn.backends.contract import API_VERSION, check_class, check_version
from mxn.core.batch import StepBatch, StepResult
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec, Task
from mxn.core.quantity import Quantity
from mxn.energy.reader import PowerReader
from mxn.errors import BackendError

__all__ = [  # API_VERSION is defined where it is checked
    "API_VERSION",
    "Backend",
    "Capabilities",
    "Embedder",
    "Executor",
    "ExecutorInfo",
    "KVCopy",
    "LoadProgress",
    "MemoryEstimate",
    "PagedKV",
    "PendingStep",
    "Probe",
    "ServerSpec",
    "SlotKV",
    "Support",
    "WarmUp",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """Whether a backend can be used on this host, found without loading anything heavy.

    state: active (usable), absent (its chip or library is not here; that is normal), broken (here but unusable).
    reason: one sentence for a person, with what to do when not active.
    versions: library name to version.
    """

    state: Literal["active", "absent", "broken"]
    reason: str
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """Whether a model can run on a chip through a backend, with every reason for a no or a degraded yes."""

    verdict: Literal["yes", "no", "degraded"]
    reasons: tuple[str, ...] = ()
    quantisations: tuple[str, ...] = ()
    max_context: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a backend can do on a chip, whatever the model; the planner, the engine and the conformance kit read it.

    kv: how the KV cache is divided: "paged", "slots", or "own" for a server that keeps it to itself.
    has_mixed_steps: prompt chunks and decoding sequences may share a step.
    has_prefix_sharing: sequences may read the same cached prefix (paged), or a copy of it (slots).
    has_multi_token_verify: a decoding sequence may be given several tokens in one step.
    has_graph_capture: steps are captured or compiled ahead, so `warm_up` takes noticeable time.
    can_share_chip: several replicas may hold the same chip.
    is_scripted: tokens are made up, not computed from the model's weights, as on a simulated chip for tests; nobody is
      served by it who did not ask for it by name.
    dtypes, quantisations: names as in `LoadSettings.quantisation`.
    tasks: what it loads models for; "embed" means that `load` gives an `Embedder` for a model that embeds.
    """

    kv: Literal["paged", "slots", "own"]
    has_mixed_steps: bool
    has_prefix_sharing: bool
    has_multi_token_verify: bool
    has_graph_capture: bool
    can_share_chip: bool
    is_scripted: bool = False
    dtypes: tuple[str, ...] = ()
    quantisations: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ("generate",)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Bytes a loaded model will take on a chip, part by part.

    loading: the most that is held at once while it is loaded, all parts together, the KV cache left out; None where
      that is no more than what stays.
    """

    weights: Quantity
    kv_cache: Quantity
    activations: Quantity
    overhead: Quantity
    loading: Quantity | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PagedKV:
    """KV cache in blocks of `block_size` tokens; ids 0 .. num_blocks - 1 are all usable."""

    num_blocks: int
    block_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotKV:
    """KV cache as whole-sequence slots of `max_tokens` tokens."""

    num_slots: int
    max_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCopy:
    """Copies the KV of the first `num_tokens` tokens of a block or slot to another, over all layers."""

    source: int
    destination: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUp:
    """What warming up did: names of what was compiled or captured, seconds, and memory seen afterwards."""

    compiled: tuple[str, ...]
    seconds: float
    memory_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutorInfo:
    """What was chosen at load time; shown by `mxn status` and stamped on every benchmark row.

    program: how a step is computed ("step program", "transformers modules", ...).
    notes: one sentence for every choice or fallback a person may want to know of.
    """

    attention: str
    quantisation: str
    device: str
    threads: int | None
    weight_bytes: int
    kv_bytes: int
    max_context: int
    vocab_size: int
    program: str = "unknown"
    notes: tuple[str, ...] = ()


class PendingStep(Protocol):
    """A step that was submitted."""

    def result(self) -> StepResult:
        """Waits for the step and answers as `Executor.execute` does, errors included. Called at most once."""
        ...


class Executor(ABC):
    """A model loaded on chips. One thread calls it; sequences are told apart only by their KV placement.

    One that defines `submit` runs steps in the order in which they are submitted, and lets the engine prepare a step
    while the chip runs the one before.
    """

    kv: PagedKV | SlotKV
    info: ExecutorInfo

    def __init_subclass__(cls) -> None:
        check_class(cls, Executor)

    @abstractmethod
    def warm_up(self) -> WarmUp:
        """Compiles, captures and touches what requests will need, so the first request is as fast as later ones."""

    @abstractmethod
    def execute(self, batch: StepBatch) -> StepResult:
        """Computes every token of the batch and draws the next one where asked.

        A sequence that cannot go on (NaN in its logits, say) is named in `StepResult.failed`; the others are unharmed.
        Raises: OutOfMemoryError when the step did not fit and nothing was changed; ChipError when the chip is lost.
        """

    def submit(self, batch: StepBatch) -> PendingStep:
        """Starts a step and returns while the chip runs it; only where a chip works apart from the host.

        At most one step is submitted beyond the one whose result is awaited, and none beyond a step with a sequence
        that is not `is_plain`. `token_ids` may be `(PENDING,)`: the token is then taken where the chip left it. A
        sequence that drew none (it failed) may compute anything; nobody reads it. The batch is valid during the call
        only, but for sequences that are not plain.
        Raises: as `execute`, for what is known at once.
        """
        raise BackendError(f"{type(self).__name__} submits no steps; it executes them")

    @abstractmethod
    def copy_kv(self, copies: Sequence[KVCopy]) -> None:
        """Copies KV between blocks or slots, in order. A paged executor may copy whole blocks."""

    @abstractmethod
    def close(self) -> None:
        """Gives memory back. Safe to call twice."""


class Embedder(ABC):
    """A model loaded on chips that makes one vector of each text. One thread calls it; it keeps nothing between calls.

    dimensions: numbers in a vector. In `info`, `max_context` is the longest text in tokens and `kv_bytes` is 0.
    """

    dimensions: int
    info: ExecutorInfo

    def __init_subclass__(cls) -> None:
        check_class(cls, Embedder)

    @abstractmethod
    def warm_up(self) -> WarmUp:
        """Compiles and touches what requests will need, so the first request is as fast as later ones."""

    @abstractmethod
    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        """One vector per text, in order: float32, little endian, of length 1 where the model says so.

        A vector depends on its own text only, whatever else is in the batch.

        Args: batch: token ids of each text with the model's special tokens, at most `info.max_context`, at least one.
        Raises: OutOfMemoryError when the batch did not fit; ChipError when the chip is lost.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives memory back. Safe to call twice."""


Extension = Literal[
    "cache_salt",
    "ignore_eos",
    "min_p",
    "min_tokens",
    "repetition_penalty",
    "return_token_ids",
    "return_tokens_as_token_ids",
    "stop_token_ids",
    "top_k",
]
"""Fields that vLLM added to OpenAI's completions; other servers take some of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSpec:
    """A server to launch and watch, or one that runs already, and how to speak to it.

    In `argv`, `environment`, `url` and `api_key`, "{port}" stands for a free loopback port and "{key}" for a secret
    made for this start.

    argv: what to start; none of its processes outlives the replica. Empty: nothing is started.
    environment: variables beside the replica's own.
    url: where it listens, without a path. api_key: sent as a bearer token; empty sends none.
    model: the name it knows the model by.
    protocol: "completions" is OpenAI's POST /v1/completions, streamed; "llama.cpp" is llama-server's POST /completion.
    extensions: request fields it understands beyond OpenAI's, for "completions"; what needs another is refused by name.
      With "return_token_ids" its answers carry token ids, which mxn turns into text; otherwise its text is passed on.
    refused: OpenAI's own fields that it cannot serve all the same, such as "logit_bias".
    takes_token_ids: prompts are sent as token ids; otherwise as text, for its own tokenizer.
    max_num_seqs: sequences it runs at once; more wait in mxn's line.
    ready_path: answers 200 once requests are served. ready_timeout_s: how long that may take.
    stop_timeout_s: between the polite signal and the kill.
    device, quantisation, threads, max_context, weight_bytes, kv_bytes, notes: as in `ExecutorInfo`; None where the
      server decides and does not say. `max_context` is lowered when its list of models names a shorter one.
    """

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    url: str = "http://127.0.0.1:{port}"
    api_key: str = ""
    model: str
    protocol: Literal["completions", "llama.cpp"] = "completions"
    extensions: tuple[Extension, ...] = ()
    refused: tuple[str, ...] = ()
    takes_token_ids: bool = True
    max_num_seqs: int
    ready_path: str = "/health"
    ready_timeout_s: float = 600.0
    stop_timeout_s: float = 10.0
    device: str
    quantisation: str
    threads: int | None = None
    max_context: int
    weight_bytes: int | None = None
    kv_bytes: int | None = None
    notes: tuple[str, ...] = ()


LoadProgress = Callable[[str, float], None]
"""Called with (phase, fraction in 0..1) while loading; phases such as "kernels", "weights", "kv-cache"."""


class Backend(ABC):
    """One way of running models on some chips. Found through the entry point group `mxn.backends`.

    api_version: of this interface, that the class was written for; one that names none was written for the first.
    """

    name: ClassVar[str]
    api_version: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        check_version(cls, cls.api_version)
        check_class(cls, Backend, one_of=("load", "serve"))

    @abstractmethod
    def probe(self) -> Probe:
        """Says whether this backend works here. Under two seconds, without torch; never raises for absence."""

    @abstractmethod
    def chips(self) -> Sequence[Chip]:
        """The chips it reaches on this host. Empty unless `probe` says active."""

    @abstractmethod
    def capabilities(self, chip: Chip) -> Capabilities:
        """What it can do on the chip; a pure function of its argument."""

    @abstractmethod
    def supports(self, model: ModelSpec, chip: Chip) -> Support:
        """Whether the chip can run the model, with reasons; a pure function of its arguments."""

    @abstractmethod
    def estimate(self, model: ModelSpec, settings: LoadSettings, chip: Chip) -> MemoryEstimate:
        """Memory the model will take when loaded so; every part says where its figure comes from."""

    @abstractmethod
    def power(self, chip: Chip) -> PowerReader:
        """The best power reader for the chip; a `NullReader` with the reason where there is none."""

    def memory_used(self, chip: Chip, pid: int) -> Quantity:
        """Bytes of the chip's memory that a process and its children hold now, counted by the driver or the system.

        A replica's own figures are compared with it. Unavailable, with the reason, where there is no such meter.
        """
        return Quantity.unavailable("B", f"the {self.name} backend reads no memory meter")

    def import_ahead(self) -> None:  # noqa: B027  (a backend may well have nothing to import)
        """Imports what `load` will need. Runs in a replica's process that has no model yet and may never get one.

        Nothing may be taken of a chip here.
        """

    def load(
        self, model: Model, settings: LoadSettings, chips: Sequence[Chip], progress: LoadProgress
    ) -> Executor | Embedder:
        """Loads the model: an `Embedder` when its task is to embed, else an `Executor`.

        Runs in the replica's process. A backend has either this or `serve`.

        Raises: UnsupportedModelError with the reason; OutOfMemoryError; ModelError for damaged files.
        """
        raise BackendError(f'backend "{self.name}" loads no executor; it describes a server')

    def serve(self, model: Model, settings: LoadSettings, chips: Sequence[Chip]) -> ServerSpec:
        """Describes the server that serves the model. Runs in the replica's process, which then launches it.

        Raises: UnsupportedModelError with the reason; BackendError naming what is not installed.
        """
        raise BackendError(f'backend "{self.name}" describes no server; it loads an executor')
