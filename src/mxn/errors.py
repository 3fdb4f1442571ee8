"""Every error a user, a file, a client or a driver can cause; messages say found, expected, available, what to do."""

from __future__ import annotations


class MxnError(Exception):
    """Base of all errors that mxn raises on purpose; its text is fit to be shown to a user."""


class ConfigError(MxnError):
    """A file or flag holds something that mxn cannot use; lists every fault found, one per line."""


class ModelError(MxnError):
    """A model card, its source or its files are missing, damaged or of a kind mxn refuses."""


class UnsupportedModelError(ModelError):
    """The architecture would be served wrongly by the chosen path, with the reason."""


class DownloadError(ModelError):
    """A file could not be fetched, or what arrived is not what the card promises."""


class BackendError(MxnError):
    """A backend is absent, broken or broke its contract."""


class ChipError(BackendError):
    """A chip is missing, lost, or lacks what was asked of it."""


class OutOfMemoryError(BackendError):
    """An allocation does not fit; names needed and available bytes."""


class ServerDiedError(BackendError):
    """A server that a replica stands for ended by itself; the text says how and quotes its last lines."""


class KernelUnavailableError(MxnError):
    """A kernel library cannot be built or run here, with the reason; callers take the next path and say so."""


class RequestError(MxnError):
    """A request is wrong; `param` names the field at fault.

    status: HTTP status the front door answers with.
    code: OpenAI's machine-readable error code, or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class OverloadedError(RequestError):
    """The queue is full; the client should come back after `retry_after_s` seconds."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, code="rate_limit_exceeded", status=429)
        self.retry_after_s = retry_after_s


class UnavailableError(RequestError):
    """Nothing can serve the request now: loading, draining or dead replicas."""

    def __init__(self, message: str, *, retry_after_s: float = 5.0) -> None:
        super().__init__(message, code="service_unavailable", status=503)
        self.retry_after_s = retry_after_s


class ReplicaDiedError(MxnError):
    """The replica process ended while it held the request; the text carries its last words."""
