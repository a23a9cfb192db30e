"""A `collab` that runs in the tests' own process, which takes a tenth of the time that a process takes."""

import os

import pytest

from tests.cli.here import Here
from tests.processes import ServeProcess


@pytest.fixture
def here(server: ServeProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs commands on the shared server."""
    for name in os.environ:
        if name.startswith("COLLAB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLLAB_TARGET", server.grpc_address)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Here(monkeypatch, capsys)
