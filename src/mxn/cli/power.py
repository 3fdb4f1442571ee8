"""Power readers for servers that run on this machine."""

from __future__ import annotations

from urllib.parse import urlsplit

from mxn.backends.registry import installed_backends, load_backend
from mxn.backends.survey import survey
from mxn.energy.reader import NullReader, PowerReader

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def local_readers(url: str, backend: str | None = None) -> tuple[PowerReader, ...]:
    """Readers for a server that runs on this machine, else one that says why there is none.

    backend: through which it runs its model, when that is known: then the chip that this backend takes is read. Without
    it every chip of the machine is, since nobody can say which of them works.
    """
    host = urlsplit(url).hostname or ""
    if host not in LOOPBACK:
        return (NullReader(f"{host} is another machine: its power cannot be read from here"),)
    if backend is not None and backend in installed_backends():
        own = load_backend(backend)
        if chips := own.chips():
            return (own.power(chips[0]),)
    readers: dict[str, PowerReader] = {}
    for name, said in survey().items():
        if said.is_scripted:
            continue
        for seen in said.chips:
            if seen.chip.uid not in readers:
                readers[seen.chip.uid] = load_backend(name).power(seen.chip)
    return tuple(readers.values()) or (NullReader("no backend is active here, so nobody can say what draws power"),)
