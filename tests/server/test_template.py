"""Chat templates run in a child with limits, and behave as in transformers."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mxn.errors import RequestError
from mxn.server.settings import ServerSettings
from mxn.server.template import TemplateRenderer
from mxn.server.template_worker import compile_template, render

MESSAGES = [{"role": "user", "content": "hi"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@asynccontextmanager
async def renderer(template: str, **limits: Any) -> AsyncIterator[TemplateRenderer]:
    made = TemplateRenderer(template, SPECIAL, ServerSettings(**limits))
    try:
        yield made
    finally:
        await made.close()


async def rendered(template: str, messages: list[dict[str, str]] = MESSAGES, **variables: bool) -> str:
    async with renderer(template) as made:
        return await made.render(messages, variables)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<s>hi</s>"),
        ("{% if true %}\n  a\n{% endif %}\nb", "  a\nb"),
        ("    {% if true %}a{% endif %}", "a"),
        ("{{ {'b': 'ñ<', 'a': 1} | tojson }}", '{"b": "ñ<", "a": 1}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}x{% endgeneration %}", "x"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
        ("{{ nothing is defined }}[{{ nothing }}]", "False[]"),
        ("{{ enable_thinking }}", "True"),
    ],
)
async def test_templates_find_the_helpers_of_transformers(template: str, text: str) -> None:
    assert await rendered(template, enable_thinking=True) == text


async def test_a_template_may_refuse_a_conversation() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        await rendered("{{ raise_exception('roles must alternate') }}")
    assert caught.value.status == 400
    assert caught.value.param == "messages"


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ '{0.__class__}'.format('x') }}",
    "{{ '{0.__class__.__mro__}'.format_map({'0': 1}) }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['json'] }}",
    "{{ messages.__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ ().__class__.__base__.__subclasses__()[0]('id') }}",
    "{% for x in range(10**9) %}{% endfor %}",
]


@pytest.mark.parametrize("template", ESCAPES)
async def test_the_sandbox_lets_nothing_out(template: str) -> None:
    try:
        text = await rendered(template)
    except RequestError:
        return
    assert text.strip() in ("", "None"), text


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'x' * 10**12 }}",
        "{{ ('x' * 10**8) ~ ('y' * 10**8) ~ ('z' * 10**8) ~ ('w' * 10**9) }}",
        "{{ 9**(9**9) }}",
        "{% for a in range(9999) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ '%0999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
async def test_a_template_out_of_bounds_ends_in_two_seconds_while_the_loop_turns(template: str) -> None:
    longest_s, stop = 0.0, False

    async def heartbeat() -> None:
        nonlocal longest_s
        while not stop:
            started_s = time.perf_counter()
            await asyncio.sleep(0.005)
            longest_s = max(longest_s, time.perf_counter() - started_s)

    async with renderer(template, template_timeout_s=0.5) as made:
        await made.start()
        beating = asyncio.create_task(heartbeat())
        started_s = time.perf_counter()
        with pytest.raises(RequestError) as caught:
            await made.render(MESSAGES, {})
        assert time.perf_counter() - started_s < 2
        stop = True
        await beating
    assert caught.value.code == "chat_template_error"
    assert caught.value.status == 400
    assert longest_s < 0.45  # a loop that waited for the template would have stood still for 0.5 s


async def test_the_child_is_replaced_after_a_kill_and_the_next_conversation_is_served() -> None:
    template = "{% if messages[0].content == 'bomb' %}{{ 'x' * 10**12 }}{% for a in range(99999) %}"
    template += "{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}ok"
    async with renderer(template, template_timeout_s=0.3) as made:
        assert await made.render(MESSAGES, {}) == "ok"
        first = made.pid
        with pytest.raises(RequestError):
            await made.render([{"role": "user", "content": "bomb"}], {})
        assert await made.render(MESSAGES, {}) == "ok"
        assert made.pid is not None
        os.kill(made.pid, 9)
        await asyncio.sleep(0.05)
        assert await made.render(MESSAGES, {}) == "ok"
        assert made.pid != first


async def test_conversations_at_once_get_their_own_prompts() -> None:
    async with renderer("{{ messages[0].content }}") as made:
        texts = [str(i) for i in range(50)]
        found = await asyncio.gather(*(made.render([{"role": "user", "content": t}], {}) for t in texts))
    assert found == texts


async def test_a_cancelled_conversation_leaves_no_answer_for_the_next() -> None:
    async with renderer("{{ messages[0].content }}") as made:
        await made.start()
        for _ in range(5):
            waiting = asyncio.create_task(made.render([{"role": "user", "content": "old"}], {}))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert await made.render([{"role": "user", "content": "new"}], {}) == "new"


async def test_a_template_that_does_not_compile_is_told_to_the_client() -> None:
    async with renderer("{% if %}") as made:
        await made.start()
        with pytest.raises(RequestError, match="TemplateSyntaxError"):
            await made.render(MESSAGES, {})


async def test_the_child_sees_no_secrets_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MXN_API_KEY", "secret-key")
    async with renderer("x") as made:
        await made.render(MESSAGES, {})
        environment = Path(f"/proc/{made.pid}/environ").read_bytes()
        assert b"secret-key" not in environment
        limits = Path(f"/proc/{made.pid}/limits").read_text()
        assert re.search(r"Max address space\s+536870912", limits)
        pid = made.pid
    assert not Path(f"/proc/{pid}").exists()


def test_no_template_is_made_outside_the_sandbox() -> None:
    source = Path(__file__).parents[2] / "src" / "mxn"
    for path in source.rglob("*.py"):
        assert not re.search(r"(?<!Sandboxed)\bEnvironment\(", path.read_text()), path


@pytest.mark.torch
def test_prompts_equal_those_of_transformers() -> None:
    chat = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = [("system", "Be brief."), ("user", " hi\n"), ("assistant", "hello"), ("user", "1 < 2 & 'x'")]
    messages = [{"role": role, "content": content} for role, content in turns]
    for name, template in TEMPLATES.items():
        variables = {**SPECIAL, "add_generation_prompt": True, "enable_thinking": False}
        expected, _ = chat.render_jinja_template([messages], chat_template=template, **variables)
        given = {"tools": None, "documents": None, **variables, "messages": messages}
        assert render(compile_template(template), given, 100_000) == expected[0], name


TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'"
        " + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "headers": (
        "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
        "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}"
        "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    ),
    "block statements": """
{%- if messages[0].role == 'system' %}
    {{- '<|system|>' + messages[0].content }}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{% for m in rest %}
    {% if m.role == 'assistant' %}
        {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}
    {% else %}
<turn>{{ m.content | tojson }}</turn>
    {% endif %}
{% endfor %}
{%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\n\n</think>\n\n' }}
{%- endif %}""",
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}[{{ loop.index }}] {{ m.content }}"
        "{% if loop.last %}{% break %}{% endif %}|{% endfor %}{{ messages | map(attribute='role') | join(',') }}"
    ),
    "namespace and date": (
        "{% set ns = namespace(found=false) %}{% for m in messages %}{% if m.role == 'user' and not ns.found %}"
        "{% set ns.found = true %}{{ m.content.strip() }}{% endif %}{% endfor %}{{ strftime_now('%Y-%m-%d') }}"
    ),
}
"""How the templates of well-known families are built, in their own idioms."""
