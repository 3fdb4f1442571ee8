"""C++ kernels for x86-64 CPUs: built on demand for the CPU at hand, loaded through ctypes."""

from mxn_kernels.cpu.build import ISAS, best_isa
from mxn_kernels.cpu.library import Library, Workspace, load_library

__all__ = ["ISAS", "Library", "Workspace", "best_isa", "load_library"]
