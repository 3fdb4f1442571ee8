"""Runs a server so that none of its processes outlives this one's stdin. A script on the standard library alone.

    python warden.py GRACE_S COMMAND ARGUMENT...

The end of stdin, which comes however the parent ends, or SIGTERM asks the command to stop: SIGTERM to it, and SIGKILL
to it and all that came from it after GRACE_S seconds. When the command ends by itself, whatever it left behind is
killed. On Linux this process adopts orphans, so processes in other sessions are found too; elsewhere the command's
process group is what is killed. Exits with the command's code, or 128 and the number of the signal that ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_NOT_FOUND = 127


def main() -> int:
    """Runs the command of this process's arguments; returns its exit code."""
    grace_s, command = float(sys.argv[1]), sys.argv[2:]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    news, waker = os.pipe()
    os.set_blocking(waker, False)
    signal.set_wakeup_fd(waker)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    child = _start(command)
    status = _watch(child, news, grace_s)
    _kill_all(child)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _start(command: list[str]) -> int:
    """Starts the command in a session of its own and returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # should this process be killed itself
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]}: cannot be started: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(_NOT_FOUND)


def _watch(child: int, news: int, grace_s: float) -> int:
    """Waits for the child's end, asking for it when told to. Returns its wait status; of a child that had to be killed,
    that of SIGKILL."""
    watched, deadline_s = [0, news], None
    while True:
        for pid, status in _reap():
            if pid == child:
                return status
        left_s = None if deadline_s is None else deadline_s - time.monotonic()
        if left_s is not None and left_s <= 0:
            return int(signal.SIGKILL)
        ready, _, _ = select.select(watched, [], [], left_s)
        is_over = 0 in ready and not os.read(0, 4096)
        signals = os.read(news, 4096) if news in ready else b""
        is_over |= signal.SIGTERM in signals or signal.SIGINT in signals
        if is_over and deadline_s is None:
            deadline_s = time.monotonic() + grace_s
            watched = [news]
            os.kill(child, signal.SIGTERM)


def _reap() -> list[tuple[int, int]]:
    """Process ids and wait statuses of children that have ended, adopted ones included."""
    ended = []
    with contextlib.suppress(ChildProcessError):
        while (one := os.waitpid(-1, os.WNOHANG))[0]:
            ended.append(one)
    return ended


def _kill_all(child: int) -> None:
    """Kills the child's process group, and on Linux every other descendant, until there is none."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    while children := _children():  # the children of a killed child come to us, and are killed next
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        _reap()


def _children() -> list[int]:
    """Living children of this process, as /proc tells; none where there is no /proc."""
    found = []
    for name in os.listdir("/proc") if os.path.isdir("/proc/self") else ():
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
                if int(parent) == os.getpid() and state != b"Z":
                    found.append(int(name))
    return found


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
