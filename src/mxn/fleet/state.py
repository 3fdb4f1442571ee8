"""What a gateway leaves for the one that follows it: a private folder with a lock, sockets, logs and a state file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

import msgspec

from mxn import __version__
from mxn.config.environment import runtime_dir
from mxn.errors import ConfigError

log = logging.getLogger(__name__)

FORMAT = 1
MAX_SOCKET_PATH = 100
"""Bytes that a Unix socket's path may have on every system, with room to spare: Linux takes 107, macOS 103."""
_LONGEST_NAME = 24


class ReplicaRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A replica process that the next gateway may take over.

    started: when the system says that the process began; with the pid it names one process for ever.
    key: hash of what it was started for. socket, log: names of files in the folder.
    """

    pid: int
    started: str
    key: str
    model: str
    socket: str
    log: str


class FleetState(msgspec.Struct, kw_only=True):
    """What survives a gateway. cordoned: chips that get no new replica, each with the reason."""

    format: int = FORMAT
    mxn: str = __version__
    replicas: list[ReplicaRecord] = []
    cordoned: dict[str, str] = {}


class RuntimeFolder:
    """The folder of one mxn.yaml, held by one gateway at a time. Nobody but its owner can look into it."""

    def __init__(self, path: Path) -> None:
        """Takes the folder. Raises: ConfigError when another gateway holds it, or when it is not this user's alone."""
        self.path = path
        _make_private(path)
        self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise ConfigError(
                f"this file is being served by process {holder} already: `mxn apply` changes what it serves; "
                "serve a copy of the file to run it twice"
            ) from None
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        self.state = self._read()
        self._has_warned = False

    @classmethod
    def of(cls, config: Path) -> RuntimeFolder:
        """The folder that belongs to a configuration file, the same at every start."""
        name = hashlib.sha256(os.fsencode(config.resolve())).hexdigest()[:12]
        base = runtime_dir()
        if len(os.fsencode(base / name)) + 1 + _LONGEST_NAME > MAX_SOCKET_PATH:
            # No socket's path fits there. The short folder is one per user and base, and must be the user's own too.
            apart = hashlib.sha256(os.fsencode(base)).hexdigest()[:8]
            base = Path(tempfile.gettempdir()) / f"mxn-{os.getuid()}-{apart}"
        return cls(base / name)

    def save(self) -> None:
        """Writes the state, whole or not at all. A full disk is reported once and stops nothing."""
        path, new = self.path / "state.json", self.path / "state.json.new"
        try:
            with new.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(self.state), indent=1))
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
            self._has_warned = False
        except OSError as error:
            if not self._has_warned:
                log.error("%s: cannot be written (%s): a restarted gateway may not find all replicas", path, error)
            self._has_warned = True

    def close(self) -> None:
        """Lets another gateway take the folder."""
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def _read(self) -> FleetState:
        path = self.path / "state.json"
        try:
            state = msgspec.json.decode(path.read_bytes(), type=FleetState)
        except FileNotFoundError:
            return FleetState()
        except (OSError, msgspec.DecodeError) as error:
            log.warning("%s: not read (%s); replicas that it named end by themselves", path, error)
            return FleetState()
        if (state.format, state.mxn) != (FORMAT, __version__):
            log.warning("%s: written by mxn %s; its replicas end by themselves", path, state.mxn)
            return FleetState(cordoned=state.cordoned)
        return state


def process_start(pid: int) -> str | None:
    """When a process began, as the system counts; None when it runs no more. Not moved by a change of the clock."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else fields[19].decode()
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return None
    except (OSError, IndexError):
        return None
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


def _make_private(path: Path) -> None:
    """Makes the folder if it is missing. Raises: ConfigError when others could get in, or put another in its place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.mkdir(exist_ok=True, mode=0o700)
        above, own = path.parent.lstat(), path.lstat()
        is_shared = bool(above.st_mode & 0o022) and not above.st_mode & stat.S_ISVTX
        if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.getuid() or above.st_uid not in (0, own.st_uid):
            raise ConfigError(f"{path} belongs to somebody else; set MXN_RUNTIME_DIR to a folder of your own")
        if is_shared:
            raise ConfigError(f"{path.parent} can be written by others; set MXN_RUNTIME_DIR to a folder of your own")
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be made ({error.strerror or error}); set MXN_RUNTIME_DIR to a folder of your own"
        ) from error
