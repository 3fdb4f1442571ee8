"""Child process that renders one model's chat template: `python -m mxn.server.template_worker MEMORY TIMEOUT OUTPUT`.

A template is code that came with a model. The sandbox keeps it from Python's objects but bounds neither time nor
memory, so it runs here, where a limit ends a process that holds nothing. Frames on stdin and stdout are a 4-byte
little-endian length and msgpack. The helpers are those that transformers gives to templates.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, BinaryIO, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import msgspec

LENGTH_BYTES = 4


class Setup(msgspec.Struct, tag=True):
    """First frame: the template and the special tokens that it may write."""

    template: str
    special_tokens: dict[str, str]


class Render(msgspec.Struct, tag=True):
    """One conversation to render."""

    messages: list[dict[str, str]]
    variables: dict[str, bool]


class Rendered(msgspec.Struct, tag=True):
    """The prompt, or the empty string after a `Setup`."""

    text: str


class Refused(msgspec.Struct, tag=True):
    """The template itself said no, through `raise_exception`."""

    message: str


class Failed(msgspec.Struct, tag=True):
    """The template cannot be compiled or does something that the sandbox or a limit forbids."""

    message: str


class RefusedByTemplate(jinja2.TemplateError):
    """Raised by a template's `raise_exception`."""


class GenerationTag(jinja2.ext.Extension):
    """Tolerates `{% generation %}`, which marks what the model wrote and changes nothing of the text."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> jinja2.Template:
    """A template compiled in the sandbox with the helpers of transformers."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], max_bytes: int) -> str:
    """The rendered text, given up as soon as it is longer than `max_bytes`."""
    parts: list[str] = []
    num_bytes = 0
    for part in template.generate(**variables):
        num_bytes += len(part.encode())
        if num_bytes > max_bytes:
            raise jinja2.TemplateRuntimeError(f"the rendered prompt is longer than {max_bytes} bytes")
        parts.append(part)
    return "".join(parts)


def _raise_exception(message: object) -> NoReturn:
    raise RefusedByTemplate(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form[:200])


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def read_frame(source: BinaryIO) -> bytes | None:
    """The next frame, or None at the end of the stream."""
    head = source.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    size = int.from_bytes(head, "little")
    frame = source.read(size)
    return frame if len(frame) == size else None


def _limit(memory_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the gateway's to handle


def _answer(template: jinja2.Template, setup: Setup, request: Render, max_bytes: int) -> Rendered | Refused | Failed:
    variables = {"tools": None, "documents": None, **setup.special_tokens, **request.variables}
    try:
        return Rendered(render(template, {**variables, "messages": request.messages}, max_bytes))
    except RefusedByTemplate as error:
        return Refused(str(error)[:500])
    except MemoryError:
        return Failed("it needs more memory than it may have")
    except Exception as error:  # whatever a template does wrong must end here
        return Failed(f"{type(error).__name__}: {error}"[:500])


def main() -> None:
    """Answers one frame for each frame until stdin ends. SIGALRM ends the process when a render takes too long."""
    memory_bytes, timeout_s, max_bytes = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    _limit(memory_bytes)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    decoder = msgspec.msgpack.Decoder(Setup | Render)
    template: jinja2.Template | None = None
    setup = Setup(template="", special_tokens={})
    while (frame := read_frame(source)) is not None:
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        answer: Rendered | Refused | Failed
        request = decoder.decode(frame)
        if isinstance(request, Setup):
            setup = request
            try:
                template = compile_template(setup.template)
                answer = Rendered("")
            except Exception as error:  # compiling runs constant expressions of the template
                answer = Failed(f"{type(error).__name__}: {error}"[:500])
        elif template is None:
            answer = Failed("it does not compile")
        else:
            answer = _answer(template, setup, request, max_bytes + len(frame))
        signal.setitimer(signal.ITIMER_REAL, 0)
        data = msgspec.msgpack.encode(answer)
        sink.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
        sink.flush()


if __name__ == "__main__":
    main()
