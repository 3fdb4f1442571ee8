"""Workspaces over every instruction set this CPU can run, each a library of its own."""

from __future__ import annotations

import platform

import pytest
from mxn_kernels import KernelUnavailable
from mxn_kernels.cpu import ISAS, Workspace, load_library

IS_ARM = platform.machine() == "aarch64"


@pytest.fixture(params=[isa for isa in ISAS if (isa == "neon") == IS_ARM])
def workspace(request: pytest.FixtureRequest) -> Workspace:
    """Two threads, so that every path that divides work is taken."""
    try:
        assert load_library(request.param).isa == request.param
    except KernelUnavailable as error:
        pytest.skip(f"{request.param}: {error}")
    return Workspace(2, request.param)
