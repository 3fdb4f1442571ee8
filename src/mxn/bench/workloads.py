"""The workloads of the serving benchmark, and prompts of exact token length to fill them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from mxn.bench.arrivals import ArrivalKind
from mxn.config.datasets import Dataset
from mxn.errors import ConfigError, ModelError

Api = Literal["completions", "chat"]
Headline = Literal["decode_tokens_per_s", "output_tokens_per_s", "prompt_tokens_per_s", "duration_s"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests and when they are sent; greedy, end of text ignored.

    arrival: "closed" sends the next request when one of `concurrency` ends. The others are open loops at `rate_per_s`
      (see `arrivals`), or at a trace's own times; nothing waits for the server then, and concurrency is 0.
    shared_tokens: leading prompt tokens that all requests of one repetition have in common.
    length_spread: prompt and output lengths are drawn evenly from the means -+ this share of them.
    turns: requests of one conversation, each with what was said before in front of it, `think_s` seconds apart.
    dataset: where lengths, texts or times come from, with its SHA-256; the token counts are means then.
    api: "chat" sends each prompt as a user's message; the server's template adds its tokens to the prompt's.
    headline: the figure the workload is run for.
    """

    name: str
    title: str
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    concurrency: int
    headline: Headline
    shared_tokens: int = 0
    arrival: ArrivalKind = "closed"
    rate_per_s: float | None = None
    burstiness: float = 1.0
    length_spread: float = 0.0
    turns: int = 1
    think_s: float = 0.0
    dataset: str = "synthetic"
    dataset_sha256: str = ""
    api: Api = "completions"

    @property
    def is_lower_better(self) -> bool:
        """True when a smaller headline is the better one."""
        return self.headline == "duration_s"

    @property
    def is_open(self) -> bool:
        """True when requests do not wait for others to end."""
        return self.arrival != "closed"


WORKLOADS = {
    w.name: w
    for w in (
        Workload(
            name="W1",
            title="one stream, 128 in + 128 out",
            num_requests=1,
            prompt_tokens=128,
            output_tokens=128,
            concurrency=1,
            headline="decode_tokens_per_s",
        ),
        Workload(
            name="W2c8",
            title="32 requests, 128 in + 64 out, 8 at a time",
            num_requests=32,
            prompt_tokens=128,
            output_tokens=64,
            concurrency=8,
            headline="output_tokens_per_s",
        ),
        Workload(
            name="W2c32",
            title="32 requests, 128 in + 64 out, 32 at a time",
            num_requests=32,
            prompt_tokens=128,
            output_tokens=64,
            concurrency=32,
            headline="output_tokens_per_s",
        ),
        Workload(
            name="W3",
            title="one prompt of 1024 tokens",
            num_requests=1,
            prompt_tokens=1024,
            output_tokens=1,
            concurrency=1,
            headline="prompt_tokens_per_s",
        ),
        Workload(
            name="W4",
            title="16 requests, 768 shared + 32 own in, 16 out, 4 at a time",
            num_requests=16,
            prompt_tokens=800,
            shared_tokens=768,
            output_tokens=16,
            concurrency=4,
            headline="duration_s",
        ),
        Workload(
            name="W4off",
            title="W4 with nothing in common: 16 requests, 800 own in, 16 out, 4 at a time",
            num_requests=16,
            prompt_tokens=800,
            output_tokens=16,
            concurrency=4,
            headline="duration_s",
        ),
        Workload(
            name="quick1",
            title="one stream, 64 in + 64 out",
            num_requests=1,
            prompt_tokens=64,
            output_tokens=64,
            concurrency=1,
            headline="decode_tokens_per_s",
        ),
        Workload(
            name="quick8",
            title="16 requests, 64 in + 32 out, 8 at a time",
            num_requests=16,
            prompt_tokens=64,
            output_tokens=32,
            concurrency=8,
            headline="output_tokens_per_s",
        ),
    )
}

SETS = {"quick": ("quick1", "quick8"), "all": ("W1", "W2c8", "W2c32", "W3", "W4", "W4off")}
"""Names that stand for several workloads."""


def parse_workloads(text: str) -> list[Workload]:
    """Workloads from a comma-separated list of names and sets."""
    names = [n for part in text.split(",") if part.strip() for n in SETS.get(part.strip(), (part.strip(),))]
    unknown = [n for n in names if n not in WORKLOADS]
    if unknown or not names:
        raise ConfigError(
            f"unknown workload {', '.join(unknown) or '(none given)'}; available: {', '.join((*WORKLOADS, *SETS))}"
        )
    return [WORKLOADS[n] for n in names]


def over_chat(workload: Workload) -> Workload:
    """The same workload through /v1/chat/completions."""
    return replace(workload, name=f"{workload.name}-chat", title=f"{workload.title}, as chats", api="chat")


def describe_workloads(
    *,
    concurrency: str | None,
    rate: str | None,
    arrival: str,
    burstiness: float,
    requests: int,
    prompt_tokens: int,
    output_tokens: int,
    spread: float,
    shared: int,
    turns: int,
    think_s: float,
    dataset: Dataset | None,
) -> list[Workload]:
    """One workload for every concurrency (closed loop) and every rate (open loop) of a sweep.

    A dataset's own lengths and times replace those described. Raises: ConfigError for what makes no sense together.
    """
    kinds = ("poisson", "gamma", "constant", "trace")
    if arrival not in kinds:
        raise ConfigError(f"--arrival {arrival!r} is unknown; available: {', '.join(kinds)}")
    has_times = dataset is not None and all(ask.at_s is not None for ask in dataset.asks)
    if arrival == "trace" and not has_times:
        raise ConfigError("--arrival trace takes the times of a dataset; give one that has them with --dataset")
    if concurrency and rate:
        raise ConfigError("--concurrency is a closed loop and --rate an open one; give one of them")
    shape: dict[str, Any] = {
        "num_requests": requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "headline": "output_tokens_per_s",
        "shared_tokens": shared,
        "length_spread": spread,
        "turns": turns,
        "think_s": think_s,
        "burstiness": burstiness,
    }
    if dataset is not None:
        prompts = [ask.prompt_tokens for ask in dataset.asks if ask.prompt_tokens]
        outputs = [ask.output_tokens for ask in dataset.asks if ask.output_tokens]
        shape |= {
            "num_requests": len(dataset.asks),
            "prompt_tokens": round(sum(prompts) / len(prompts)) if prompts else prompt_tokens,
            "output_tokens": round(sum(outputs) / len(outputs)) if outputs else output_tokens,
            "dataset": dataset.name,
            "dataset_sha256": dataset.sha256,
        }
    what = f"{shape['num_requests']} requests of {shape['prompt_tokens']} in + {shape['output_tokens']} out"
    if rate or arrival == "trace":
        rates: list[float | None] = list(_numbers("--rate", rate)) if rate else [None]
        return [
            Workload(
                name=f"{arrival}{f'-{one:g}' if one else ''}",
                title=f"{what}, {arrival} arrivals{f' at {one:g} a second' if one else ' at its own times'}",
                concurrency=0,
                arrival=arrival,  # type: ignore[arg-type]
                rate_per_s=one,
                **shape,
            )
            for one in rates
        ]
    levels = [int(one) for one in _numbers("--concurrency", concurrency or "8")]
    return [Workload(name=f"c{one}", title=f"{what}, {one} at a time", concurrency=one, **shape) for one in levels]


def _numbers(option: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError as err:
        raise ConfigError(f"{option} {text!r}: expected numbers separated by commas") from err
    if min(found) <= 0 or (option == "--concurrency" and any(one % 1 for one in found)):
        raise ConfigError(f"{option} {text!r}: expected {'whole ' if option == '--concurrency' else ''}numbers above 0")
    return found


class PromptMaker:
    """Prompts of an exact number of tokens whose text encodes back to exactly that number.

    Made of common English words that are one token each when a space precedes them, so that joining cannot merge them.
    Special tokens that the tokenizer puts around every text are counted in.
    """

    def __init__(self, tokenizer_folder: str | Path, *, seed: int) -> None:
        from tokenizers import Tokenizer

        path = Path(tokenizer_folder) / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"no tokenizer.json in {tokenizer_folder}; give the folder of the model being measured")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._random = random.Random(seed)
        words = WORDS.split()
        encoded = [self._tokenizer.encode(" " + word, add_special_tokens=False).ids for word in words]
        self._word_ids = [ids[0] for ids in encoded if len(ids) == 1]
        if len(self._word_ids) < 50:
            raise ModelError(
                f"only {len(self._word_ids)} of {len(words)} common words are single tokens of this tokenizer; "
                "expected at least 50 to make prompts of exact length"
            )
        self._num_special = len(self._tokenizer.encode("", add_special_tokens=True).ids)

    def make(self, workload: Workload) -> list[str]:
        """Fresh prompts for one repetition: the shared part is new too, so nothing of an earlier one is cached."""
        shared = self._words(max(0, workload.shared_tokens - self._num_special))
        num_own = workload.prompt_tokens - self._num_special - len(shared)
        return [self._text([*shared, *self._words(num_own)]) for _ in range(workload.num_requests)]

    def text(self, num_tokens: int, *, shared: Sequence[int] = (), is_first: bool = True) -> str:
        """A fresh prompt of so many tokens that begins with `shared` ids; special tokens count if it comes first."""
        num_own = num_tokens - (self._num_special if is_first else 0) - len(shared)
        ids = [*shared, *self._words(max(num_own, 0))][: max(num_tokens - self._num_special, 1)]
        return self._text(ids)

    def shared(self, num_tokens: int) -> list[int]:
        """Fresh ids for prompts to have in common."""
        return self._words(max(num_tokens - self._num_special, 0))

    def block(self, block_id: int, num_tokens: int) -> list[int]:
        """The ids of a named block: the same name gives the same ids in every repetition of every run."""
        return random.Random(f"block {block_id}").choices(self._word_ids, k=num_tokens)

    def length(self, mean: int, spread: float) -> int:
        """A length drawn evenly from mean -+ spread."""
        return max(1, round(mean * (1 + spread * self._random.uniform(-1, 1)))) if spread else mean

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt as a server would see it."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        return ids

    def _words(self, count: int) -> list[int]:
        return self._random.choices(self._word_ids, k=count)

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        num_tokens = len(self.encode(text))
        expected = len(ids) + self._num_special
        if num_tokens != expected:
            raise ModelError(f"a prompt made for {expected} tokens encodes to {num_tokens} with this tokenizer")
        return text


WORDS = """
time year people way day man thing woman life child world school state family student group country problem
hand part place case week company system program question work government number night point home water room
mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name president team minute idea
body information back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force education foot boy age policy music market sense
road form field light sound north south east west green white black small large early young important public
good new first last long great little own other old high different next big find give tell call try ask need
feel become leave put mean keep let begin seem help show hear play run move live believe bring happen write
provide sit stand lose pay meet include continue set learn lead understand watch follow stop create speak read
allow add spend grow open walk
"""
