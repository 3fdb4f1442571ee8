"""Builds the CPU kernel library for the CPU at hand and keeps it in the user's cache.

The file name holds a digest of the sources, the flags, the compiler's version and the CPU, so a binary made with
-march=native is never run on another CPU, and a changed source is never served by an old binary.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mxn_kernels import environment
from mxn_kernels.cpu import gemm_tiles, group_tiles
from mxn_kernels.errors import KernelUnavailable

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "src"
GENERATED = {"gemm_tiles.inc": gemm_tiles.generate, "group_tiles.inc": group_tiles.generate}
"""Files that the sources include and Python writes."""

FLAGS = ("-std=c++17", "-O3", "-march=native", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
BUILD_TIMEOUT_S = 300

ISAS = {"avx512": (), "avxvnni": ("-mno-avx512f",), "avx2": ("-mno-avx512f", "-mno-avxvnni"), "neon": ()}
"""Instruction sets, best first, and what to add to the flags of a CPU that could do more."""

NEEDED = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "f16c", "fma"},
    "avxvnni": {"avx2", "avx_vnni", "f16c", "fma"},
    "avx2": {"avx2", "f16c", "fma"},
    "neon": {"asimd", "asimddp"},
}

LEAST = {"x86_64": "avx2", "aarch64": "neon"}
"""The instruction set below which a machine is refused."""


X86_IDENTITY = ("vendor_id", "cpu family", "model", "model name", "stepping")


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """What decides whether a native binary fits: model name and feature flags as the kernel reports them."""

    model: str
    flags: frozenset[str]
    machine: str = "x86_64"

    @staticmethod
    def detect() -> Cpu:
        """Raises: KernelUnavailable on anything but Linux on x86-64 or 64-bit Arm."""
        if platform.system() != "Linux" or platform.machine() not in LEAST:
            found = f"{platform.system()} on {platform.machine()}"
            raise KernelUnavailable(f"the CPU kernels need Linux on {' or '.join(LEAST)}, found {found}")
        return Cpu.parse(Path("/proc/cpuinfo").read_text())

    @staticmethod
    def parse(cpuinfo: str) -> Cpu:
        """The first processor of a /proc/cpuinfo text."""
        fields = dict(line.split(":", 1) for line in cpuinfo.split("\n\n")[0].splitlines() if ":" in line)
        named = {key.strip(): value.strip() for key, value in fields.items()}
        is_arm = "Features" in named
        parts = ("implementer", "architecture", "variant", "part", "revision")
        keys = [f"CPU {part}" for part in parts] if is_arm else X86_IDENTITY
        return Cpu(
            model=" ".join(named.get(key, "") for key in keys),
            flags=frozenset(named.get("Features" if is_arm else "flags", "").split()),
            machine="aarch64" if is_arm else "x86_64",
        )

    def isas(self) -> list[str]:
        """The instruction sets this CPU can run, best first."""
        return [isa for isa in ISAS if NEEDED[isa] <= self.flags]


def best_isa(cpu: Cpu | None = None) -> str:
    """Raises: KernelUnavailable if the CPU lacks AVX2, F16C or FMA, or on Arm the NEON dot product."""
    cpu = cpu or Cpu.detect()
    if not cpu.isas():
        needed = NEEDED[LEAST[cpu.machine]]
        missing = ", ".join(sorted(needed - cpu.flags))
        raise KernelUnavailable(f"the CPU kernels need {', '.join(sorted(needed))}; {cpu.model} lacks {missing}")
    return cpu.isas()[0]


def build(isa: str, *, extra_flags: tuple[str, ...] = ()) -> Path:
    """Returns the path of the library, built now if the cache lacks it or holds a damaged one (about five seconds).

    Args: isa: a key of ISAS. extra_flags: for sanitizer builds.
    Raises: KernelUnavailable naming what is missing: instruction set, compiler, or a folder to write to.
    """
    cpu = Cpu.detect()
    if isa not in cpu.isas():
        raise KernelUnavailable(f"instruction set {isa!r} is not available; this CPU has: {', '.join(cpu.isas())}")
    compiler, version = _compiler()
    flags = (*FLAGS, *ISAS[isa], *extra_flags)
    name = f"mxn-cpu-{isa}-{_digest(flags, version, cpu)}.so"
    folder = _cache_folder()
    path = folder / name
    with _lock(folder / f"{name}.lock"):
        if not _is_whole(path):
            _compile(compiler, flags, path)
    return path


def _digest(flags: tuple[str, ...], version: str, cpu: Cpu) -> str:
    parts = [*flags, version, cpu.model, *sorted(cpu.flags), *(generate() for generate in GENERATED.values())]
    for source in sorted(SOURCES.iterdir()):
        parts += [source.name, source.read_text()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _compiler() -> tuple[str, str]:
    wanted = [name for name in (environment.compiler(), "g++", "c++") if name]
    for name in wanted:
        command = shutil.which(name)
        if command:
            shown = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
            if shown.returncode == 0:
                return command, shown.stdout.splitlines()[0]
    raise KernelUnavailable(f"no C++ compiler found (tried {', '.join(wanted)}); install g++ or set CXX")


def _cache_folder() -> Path:
    """The user's cache, or a private temporary folder if that cannot be written."""
    preferred = environment.cache_home() / "mxn" / "kernels"
    try:
        preferred.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=preferred):
            return preferred
    except OSError as error:
        reason = error
    fallback = Path(tempfile.gettempdir()) / f"mxn-kernels-{os.getuid()}"
    try:
        fallback.mkdir(mode=0o700, exist_ok=True)
        found = fallback.lstat()
        # Anyone may write to the temporary folder: run only what nobody else could have put there.
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            fallback = Path(tempfile.mkdtemp(prefix="mxn-kernels-"))
        with tempfile.TemporaryFile(dir=fallback):
            pass
    except OSError as error:
        raise KernelUnavailable(f"no folder to build kernels in: {preferred}: {reason}; {fallback}: {error}") from error
    logger.warning("cannot write to %s (%s); building kernels in %s", preferred, reason, fallback)
    return fallback


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One builder at a time, across processes; the file stays, since removing it would let two in."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Builds beside `path` and renames, so a reader sees a whole library or none."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        work = Path(folder)
        for name, generate in GENERATED.items():
            (work / name).write_text(generate())
        sources = [str(source) for source in sorted(SOURCES.glob("*.cpp"))]
        command = [compiler, *flags, f"-I{SOURCES}", f"-I{work}", *sources, "-o", str(work / path.name)]
        logger.info("building CPU kernels: %s", path.name)
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise KernelUnavailable(f"{compiler} did not finish in {BUILD_TIMEOUT_S} s") from error
        if done.returncode != 0:
            raise KernelUnavailable(f"{compiler} failed on the CPU kernels:\n{done.stderr.strip()[-2000:]}")
        built = work / path.name
        built.write_bytes(_sealed(built.read_bytes()))
        os.replace(built, path)


def _sealed(library: bytes) -> bytes:
    """The library with its own digest at the end, where the loader does not look: a torn file would crash it."""
    return library + hashlib.sha256(library).digest()


def _is_whole(path: Path) -> bool:
    try:
        found = path.read_bytes()
    except OSError:
        return False
    return found == _sealed(found[: -hashlib.sha256().digest_size])
