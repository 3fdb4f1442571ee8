"""Deployments on the server backend: a real gateway side, a real replica process, a real server behind it."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mxn.core.model import Model
from mxn.core.request import FinishReason, SamplingParams, SequenceOutput, SequenceRequest
from mxn.errors import ReplicaDiedError
from mxn.fleet.deployment import Deployment
from mxn.fleet.fleet import Fleet
from mxn.fleet.spec import DeploymentSpec
from mxn.fleet.stream import SequenceStream

UPSTREAM = Path(__file__).with_name("upstream.py")
IDS = "return_token_ids,return_tokens_as_token_ids,ignore_eos,stop_token_ids,top_k,min_p,repetition_penalty,min_tokens"
EOS = (256, 258)
Make = Callable[..., DeploymentSpec]


def plain(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "stop_token_ids": EOS, **fields})


@pytest.fixture
def serve(fake_deployment: Make) -> Make:
    """Makes specs whose model runs in the small server of this folder; keywords as for `fake_deployment`."""

    def make(*arguments: str, options: dict[str, object] | None = None, **fields: object) -> DeploymentSpec:
        command = shlex.join([sys.executable, str(UPSTREAM), "--port", "{port}", *arguments])
        given = {"command": command, "stop_timeout_s": 5, **(options or {})}
        if "url" in given:
            del given["command"]
        return fake_deployment(options=given, backend="server", **fields)

    return make


@asynccontextmanager
async def running(*specs: DeploymentSpec) -> AsyncIterator[list[Deployment]]:
    fleet = Fleet(specs)
    await fleet.start()
    try:
        yield fleet.deployments
    finally:
        await fleet.stop(drain_s=5)


async def outputs_of(stream: SequenceStream) -> list[SequenceOutput]:
    return [output async for output in stream]


def tokens_of(outputs: list[SequenceOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


def text_of(outputs: list[SequenceOutput]) -> str:
    return "".join(output.text or "" for output in outputs)


def expected(prompt: list[int], count: int) -> list[int]:
    return [(sum(prompt) + i) % 250 for i in range(count)]


def letters(ids: list[int]) -> str:
    return "".join(chr(97 + i % 26) for i in ids)


def processes(*names: str) -> list[psutil.Process]:
    """Processes below this one whose command line holds all of the names."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if all(name in line for name in names):
            found.append(process)
    return found


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        await asyncio.sleep(0.02)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def upstream_of(deployment: Deployment) -> str:
    """Base URL of the server behind a deployment."""
    assert deployment.info is not None
    for process in psutil.Process(deployment.info.pid).children(recursive=True):
        line = process.cmdline()
        if "warden.py" not in " ".join(line) and "--port" in line:
            return f"http://127.0.0.1:{line[line.index('--port') + 1]}"
    raise AssertionError("no server found")


def state_of(deployment: Deployment) -> dict[str, Any]:
    with httpx.Client(trust_env=False, verify=False) as client:
        answer: dict[str, Any] = client.get(upstream_of(deployment) + "/state").json()
    return answer


# ---------------------------------------------------------------- tokens and text


async def test_token_ids_come_back_as_the_server_made_them(serve: Make) -> None:
    async with running(serve(options={"extensions": IDS})) as [deployment]:
        prompts = [[i, i + 1, 3] for i in range(6)]
        results = await asyncio.gather(*(outputs_of(deployment.submit(p, plain())) for p in prompts))
        assert [tokens_of(outputs) for outputs in results] == [expected(p, 8) for p in prompts]
        assert {outputs[-1].finish_reason for outputs in results} == {FinishReason.LENGTH}
        assert all(output.text is None for outputs in results for output in outputs)
        assert results[0][-1].num_cached_tokens == 3
        assert deployment.stats.num_output_tokens == 48
        assert deployment.stats.num_prompt_tokens == 18
        assert deployment.stats.num_finished == 6
        assert deployment.info is not None
        assert deployment.info.kv_bytes is None


async def test_text_of_a_plain_server_is_passed_on_with_its_own_count(serve: Make) -> None:
    async with running(serve()) as [deployment]:
        outputs = await outputs_of(deployment.submit([1, 2, 3], plain()))
        assert text_of(outputs) == letters(expected([1, 2, 3], 8))
        assert sum(output.num_tokens for output in outputs) == 8
        assert state_of(deployment)["last"]["prompt"] == [1, 2, 3]
        assert deployment.info is not None
        assert any("counted by the server" in note for note in deployment.info.notes)


async def test_tokens_of_a_server_that_never_counts_are_counted_here(serve: Make) -> None:
    async with running(serve("--no-usage")) as [deployment]:
        outputs = await outputs_of(deployment.submit([1, 2, 3], plain()))
        assert sum(output.num_tokens for output in outputs) == 8  # one byte, one token


async def test_prompts_go_as_text_where_the_server_takes_no_ids(serve: Make) -> None:
    async with running(serve(options={"prompts": "text"})) as [deployment]:
        await outputs_of(deployment.submit(list(b"hello"), plain()))
        assert isinstance(state_of(deployment)["last"]["prompt"], str)


async def test_llama_servers_protocol_gives_text_ids_logprobs_and_counts(serve: Make) -> None:
    spec = serve("--protocol", "llama.cpp", options={"protocol": "llama.cpp"})
    async with running(spec) as [deployment]:
        outputs = await outputs_of(deployment.submit([5, 6], plain(num_logprobs=1, seed=2**40)))
        assert tokens_of(outputs) == expected([5, 6], 8)
        assert text_of(outputs) == letters(expected([5, 6], 8))
        assert sum(output.num_tokens for output in outputs) == 8
        logprobs = [entry for output in outputs for entry in output.logprobs]
        assert [entry.token_id for entry in logprobs] == expected([5, 6], 8)
        assert logprobs[0].top == ((11, -0.5),)
        sent = state_of(deployment)["last"]
        assert 0 <= sent["seed"] < 2**32 - 1
        assert sent["samplers"][:2] == ["penalties", "temperature"]
        assert sent["ignore_eos"] is False
        assert "cache_prompt" not in sent


async def test_prefixes_are_not_reused_once_a_second_tenant_is_seen(serve: Make) -> None:
    spec = serve("--protocol", "llama.cpp", options={"protocol": "llama.cpp"})
    async with running(spec) as [deployment]:
        for salt, is_off in (("a", False), ("a", False), ("b", True), ("a", True)):
            await outputs_of(deployment.submit([5, 6], plain(), cache_salt=salt))
            assert (state_of(deployment)["last"].get("cache_prompt") is False) == is_off


async def test_the_tenants_salt_is_passed_on_where_the_server_takes_it(serve: Make) -> None:
    async with running(serve(options={"extensions": "cache_salt"})) as [deployment]:
        await outputs_of(deployment.submit([1], plain(), cache_salt="tenant"))
        assert state_of(deployment)["salts"] == ["tenant"]


@pytest.mark.parametrize("protocol", ["completions", "llama.cpp"])
async def test_an_end_token_comes_with_the_last_output(serve: Make, protocol: str) -> None:
    options = {"protocol": protocol, **({"extensions": IDS} if protocol == "completions" else {})}
    async with running(serve("--eos-at", "3", "--protocol", protocol, options=options)) as [deployment]:
        stream = deployment.submit([1, 2], plain())
        outputs = await outputs_of(stream)
        assert tokens_of(outputs) == [*expected([1, 2], 3), 256]
        assert outputs[-1].token_ids[-1] == 256
        assert outputs[-1].finish_reason is FinishReason.STOP


async def test_a_stop_token_that_the_server_does_not_know_ends_the_sequence_here(serve: Make) -> None:
    spec = serve("--protocol", "llama.cpp", "--token-ms", "5", options={"protocol": "llama.cpp"})
    async with running(spec) as [deployment]:
        stops = (*EOS, expected([7], 4)[-1])
        outputs = await outputs_of(deployment.submit([7], plain(max_tokens=500, stop_token_ids=stops)))
        assert tokens_of(outputs) == expected([7], 4)
        assert text_of(outputs) == letters(expected([7], 3))
        assert outputs[-1].finish_reason is FinishReason.STOP
        await until(lambda: state_of(deployment)["num_running"] == 0)
        assert state_of(deployment)["num_tokens"] < 50


# ---------------------------------------------------------------- what cannot be served


@pytest.mark.parametrize(
    ("protocol", "field", "sampling"),
    [
        ("completions", "top_k", plain(top_k=5)),
        ("completions", "min_p", plain(min_p=0.1)),
        ("completions", "repetition_penalty", plain(repetition_penalty=1.1)),
        ("completions", "min_tokens", plain(min_tokens=2)),
        ("completions", "logprobs", plain(num_logprobs=0)),
        ("completions", "echo", plain(num_prompt_logprobs=0)),
        ("completions", "ignore_eos", plain(stop_token_ids=())),
        ("completions", "stop_token_ids", plain(stop_token_ids=(*EOS, 7))),
        ("llama.cpp", "min_tokens", plain(min_tokens=2)),
        ("llama.cpp", "presence_penalty", plain(presence_penalty=0.5)),
        ("llama.cpp", "frequency_penalty", plain(frequency_penalty=0.5)),
        ("llama.cpp", "echo", plain(num_prompt_logprobs=0)),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_name(
    fake_model: Model, protocol: str, field: str, sampling: SamplingParams
) -> None:
    from mxn.backends.base import ServerSpec
    from mxn.engine.proxy.dialects import DIALECTS
    from mxn.engine.tokenizer import Tokenizer
    from mxn.errors import RequestError

    spec = ServerSpec(
        argv=(),
        model="m",
        protocol=protocol,
        max_num_seqs=1,
        device="x",
        quantisation="x",
        max_context=99,  # type: ignore[arg-type]
    )
    dialect = DIALECTS[protocol](spec, Tokenizer.load(fake_model.folder))
    with pytest.raises(RequestError, match=field) as caught:
        dialect.body(SequenceRequest(seq_id=1, prompt_token_ids=[1], sampling=sampling))
    assert caught.value.param == field
    dialect.body(SequenceRequest(seq_id=1, prompt_token_ids=[1], sampling=plain()))


async def test_a_refused_sequence_harms_no_other(serve: Make) -> None:
    async with running(serve()) as [deployment]:
        good = asyncio.create_task(outputs_of(deployment.submit([1], plain())))
        bad = await outputs_of(deployment.submit([1], plain(top_k=3)))
        assert bad[-1].finish_reason is FinishReason.ERROR
        assert "top_k is not supported" in (bad[-1].error or "")
        assert text_of(await good) == letters(expected([1], 8))


async def test_the_servers_own_refusal_is_passed_on(serve: Make) -> None:
    async with running(serve()) as [deployment]:
        [output] = await outputs_of(deployment.submit([1] * 1200, plain()))
        assert output.finish_reason is FinishReason.ERROR
        assert "HTTP 400: the prompt is too long for me" in (output.error or "")


async def test_the_replicas_own_boundary_holds_whatever_the_server_would_do(serve: Make) -> None:
    async with running(serve("--max-len", "20")) as [deployment]:
        outputs = await outputs_of(deployment.submit([1] * 15, plain(max_tokens=50)))
        assert sum(output.num_tokens for output in outputs) == 5
        [wrong] = await outputs_of(deployment.submit([1, 9999], plain()))
        assert "token ids in 0..258" in (wrong.error or "")
        replica = deployment.keepers[0].replica
        assert replica is not None
        request = SequenceRequest(seq_id=10**6, prompt_token_ids=[1] * 20, sampling=plain())
        [long] = await outputs_of(replica.submit(request))
        assert "the limit is 19" in (long.error or "")
        assert text_of(await outputs_of(deployment.submit([1], plain()))) == letters(expected([1], 8))


async def test_an_error_inside_a_stream_ends_it(serve: Make) -> None:
    async with running(serve("--error-after", "3")) as [deployment]:
        outputs = await outputs_of(deployment.submit([1], plain()))
        assert outputs[-1].finish_reason is FinishReason.ERROR
        assert "out of luck" in (outputs[-1].error or "")
        assert deployment.state == "ready"


# ---------------------------------------------------------------- cancelling, waiting, draining


async def test_an_abort_reaches_the_server(serve: Make) -> None:
    async with running(serve("--token-ms", "10")) as [deployment]:
        stream = deployment.submit([1], plain(max_tokens=5000))
        await anext(stream)
        neighbour = asyncio.create_task(outputs_of(deployment.submit([2], plain())))
        stream.abort()
        assert text_of(await neighbour) == letters(expected([2], 8))
        await until(lambda: state_of(deployment)["num_running"] == 0)
        assert state_of(deployment)["num_disconnects"] == 1
        assert state_of(deployment)["num_tokens"] < 100
        assert deployment.stats.num_aborted == 1


async def test_no_more_run_at_once_than_the_server_takes_and_the_urgent_go_first(serve: Make) -> None:
    async with running(serve("--token-ms", "20", max_num_seqs=1)) as [deployment]:
        order: list[int] = []

        async def ask(number: int, priority: int, max_tokens: int = 2) -> None:
            await outputs_of(deployment.submit([number], plain(max_tokens=max_tokens), priority=priority))
            order.append(number)

        first = asyncio.create_task(ask(1, 0, max_tokens=100))
        await until(lambda: state_of(deployment)["num_running"] == 1)
        rest = [asyncio.create_task(ask(number, priority)) for number, priority in ((2, 5), (3, 0), (4, -5))]
        waiting = deployment.submit([5], plain(), priority=9)
        waiting.abort()
        await asyncio.gather(first, *rest)
        assert order == [1, 4, 3, 2]
        assert deployment.stats.num_aborted == 1
        assert deployment.stats.num_started == 4
        assert deployment.stats.queue_s > 3 * 0.5  # three waited for most of a sequence of 100 tokens in 20 ms each


async def test_stopping_lets_sequences_finish_and_leaves_no_process(serve: Make) -> None:
    fleet = Fleet([serve("--token-ms", "10")])
    await fleet.start()
    [deployment] = fleet.deployments
    pids = [process.pid for process in processes("upstream.py")]
    assert len(pids) == 2  # the warden and the server
    task = asyncio.create_task(outputs_of(deployment.submit([1], plain(max_tokens=30))))
    await until(lambda: deployment.stats.num_output_tokens or deployment.stats.num_running)
    await fleet.stop(drain_s=10)
    assert text_of(await task) == letters(expected([1], 30))
    assert all(is_gone(pid) for pid in pids)


# ---------------------------------------------------------------- starts that fail


async def test_a_server_that_fails_to_start_is_quoted_with_its_root_cause(serve: Make) -> None:
    async with running(serve("--fail", "ValueError: no weights in this folder")) as [deployment]:
        assert deployment.state == "failed"
        assert "ended with exit code 1: ValueError: no weights in this folder; its last lines:" in deployment.reason
        assert "starting with process id" in deployment.reason


async def test_a_command_that_is_not_there_is_named(serve: Make) -> None:
    spec = serve(options={"command": "no-such-server --port {port}"})
    async with running(spec) as [deployment]:
        assert "no-such-server: cannot be started: No such file or directory" in deployment.reason


async def test_a_server_that_is_never_ready_is_stopped_after_its_limit(serve: Make) -> None:
    started_s = time.monotonic()
    async with running(serve("--never-ready", options={"ready_timeout_s": 1})) as [deployment]:
        assert "was not ready after 1 s" in deployment.reason
        assert "HTTP 503" in deployment.reason
        assert "starting with process id" in deployment.reason
        assert time.monotonic() - started_s < 20
        assert not processes("upstream.py")


async def test_a_model_that_the_server_does_not_list_is_named(serve: Make) -> None:
    async with running(serve("--model", "other")) as [deployment]:
        assert 'serves no model "fake-model"; it lists other' in deployment.reason


async def test_the_servers_own_limit_of_context_counts(serve: Make) -> None:
    async with running(serve("--max-len", "100")) as [deployment]:
        assert deployment.max_context == 100


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"command": ""}, "needs one of two options: command"),
        ({"colour": "red"}, "does not know the option colour"),
        ({"extensions": "top_k,sparkle"}, "names sparkle"),
        ({"ready_timeout_s": "soon"}, "expected seconds above 0"),
        ({"protocol": "grpc"}, "expected completions or llama.cpp"),
        ({"key_variable": "NO_SUCH_VARIABLE"}, "NO_SUCH_VARIABLE, which is not set"),
        ({"command": "server 'open"}, "not a command line"),
    ],
)
async def test_wrong_options_are_named(serve: Make, options: dict[str, object], fault: str) -> None:
    async with running(serve(options=options)) as [deployment]:
        assert fault in deployment.reason


async def test_the_key_made_for_a_start_is_sent(serve: Make) -> None:
    os_key = {"key_variable": "MXN_TEST_SERVER_KEY"}
    spec = serve("--key", "s3cret", options=os_key, environment={"MXN_TEST_SERVER_KEY": "s3cret"})
    async with running(spec) as [deployment]:
        assert text_of(await outputs_of(deployment.submit([1], plain()))) == letters(expected([1], 8))


# ---------------------------------------------------------------- deaths


async def test_a_server_that_dies_fails_its_streams_with_its_words_and_is_started_again(serve: Make) -> None:
    async with running(serve("--die-after", "20", "--token-ms", "5")) as [deployment]:
        with pytest.raises(ReplicaDiedError, match="the upstream chip is gone"):
            await outputs_of(deployment.submit([1], plain(max_tokens=500)))
        await until(lambda: deployment.state == "ready" and deployment.num_restarts == 1)
        assert text_of(await outputs_of(deployment.submit([1], plain()))) == letters(expected([1], 8))


async def test_a_killed_server_is_told_by_its_signal(serve: Make) -> None:
    async with running(serve("--token-ms", "20", restart_delays_s=())) as [deployment]:
        stream = deployment.submit([1], plain(max_tokens=500))
        await anext(stream)
        [server] = [p for p in processes("upstream.py") if "warden.py" not in " ".join(p.cmdline())]
        server.kill()
        with pytest.raises(ReplicaDiedError, match="ended with signal 9"):
            await outputs_of(stream)


async def test_a_server_that_stops_in_the_middle_of_an_answer_is_ended_and_started_again(serve: Make) -> None:
    async with running(serve("--hang-after", "3", stall_s=0.3)) as [deployment]:
        with pytest.raises(ReplicaDiedError):
            await outputs_of(deployment.submit([1], plain(max_tokens=500)))
        await until(lambda: deployment.num_restarts == 1 and deployment.is_ready)


async def test_a_server_that_answers_is_not_taken_for_hung_during_a_long_prompt(serve: Make) -> None:
    async with running(serve("--token-ms", "7000", stall_s=6.5)) as [deployment]:
        assert text_of(await outputs_of(deployment.submit([1], plain(max_tokens=1)))) == letters(expected([1], 1))
        assert deployment.num_restarts == 0


async def test_a_server_that_runs_elsewhere_is_watched(serve: Make) -> None:
    port = 20000 + os.getpid() % 20000
    process = subprocess.Popen([sys.executable, str(UPSTREAM), "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        spec = serve(options={"url": f"http://127.0.0.1:{port}/v1", "ready_timeout_s": 5}, restart_delays_s=())
        async with running(spec) as [deployment]:
            assert deployment.state == "ready", deployment.reason
            assert text_of(await outputs_of(deployment.submit([1], plain()))) == letters(expected([1], 8))
            process.kill()
            process.wait()
            outputs = await outputs_of(deployment.submit([1], plain()))
            assert outputs[-1].finish_reason is FinishReason.ERROR
            await until(lambda: deployment.state == "failed", seconds=40)
            assert "has not answered" in deployment.reason or "was not ready" in deployment.reason
    finally:
        process.kill()
        process.wait()


GATEWAY = """
import asyncio, json, sys
from mxn.core.chip import Chip
from mxn.core.model import LoadSettings, Model, ModelSpec
from mxn.fleet.spec import DeploymentSpec
from mxn.fleet.fleet import Fleet

async def main():
    command, folder = sys.argv[1:]
    spec = ModelSpec(architecture="fake", num_layers=1, hidden_size=1, vocab_size=259, num_heads=1, num_kv_heads=1,
                     key_dim=1, value_dim=1, max_context=2048, num_parameters=None)
    model = Model(name="fake-model", folder=folder, revision="r", spec=spec)
    chip = Chip(uid="c", kind=None, name="c", vendor="c", memory_bytes=1, cores=1)
    settings = LoadSettings(options=(("command", command), ("stop_timeout_s", "1")))
    spec = DeploymentSpec.single(name="fake-model", model=model, backend="server", chips=[chip], settings=settings)
    fleet = Fleet([spec])
    await fleet.start()
    print(json.dumps({"pid": fleet.deployments[0].info.pid}), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("victim", ["gateway", "replica", "both", "warden"])
@pytest.mark.parametrize("manner", ["polite", "stubborn"])
def test_no_process_of_a_server_outlives_who_started_it(
    fake_model: Model, tmp_path: Path, victim: str, manner: str
) -> None:
    """Whoever is killed with SIGKILL, the server goes, and with it a process it put into a session of its own."""
    note = tmp_path / "pids"
    arguments = ["--grandchild", str(note), *(["--ignore-sigterm"] if manner == "stubborn" else [])]
    command = shlex.join([sys.executable, str(UPSTREAM), "--port", "{port}", *arguments])
    gateway = subprocess.Popen(
        [sys.executable, "-c", GATEWAY, command, fake_model.folder], stdout=subprocess.PIPE, text=True
    )
    try:
        assert gateway.stdout is not None
        line = gateway.stdout.readline()
        replica = int(line.split(":")[1].strip(" }\n"))
        [warden] = [p for p in psutil.Process(replica).children() if "warden.py" in " ".join(p.cmdline())]
        server, grandchild = (int(pid) for pid in note.read_text().split())
        victims = {
            "gateway": [gateway.pid],
            "replica": [replica],
            "both": [replica, gateway.pid],
            "warden": [warden.pid],
        }
        for pid in victims[victim]:
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 15
        left = {server, grandchild} if victim != "warden" else {server}
        while left := {pid for pid in left if not is_gone(pid)}:
            assert time.monotonic() < deadline, f"processes {left} are still there"
            time.sleep(0.05)
        if victim == "warden":
            psutil.Process(grandchild).kill()
    finally:
        gateway.kill()
        gateway.wait()
        if gateway.stdout is not None:
            gateway.stdout.close()


async def test_joules_of_the_servers_chip_are_booked_and_those_of_its_sequences_are_not_known(serve: Make) -> None:
    async with running(serve()) as [deployment]:
        assert deployment.info is not None
        assert deployment.info.power_source != "none"
        outputs = await outputs_of(deployment.submit([1, 2, 3], plain()))
        assert outputs[-1].energy_j is None
        await until(lambda: deployment.stats.chip_energy_j)
        assert (deployment.stats.chip_energy_j or 0) > 0
        assert deployment.stats.request_energy_j is None
