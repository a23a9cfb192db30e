"""Running a command in this process."""

import json
import sys
import tempfile
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from collab_service.cli.main import main


@dataclass(frozen=True)
class Ended:
    """How a command has ended, and what it has said."""

    status: int
    out: str
    err: str


class Here:
    """Runs commands one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def run(self, *arguments: object, stdin: bytes | None = None) -> Ended:
        """Run a command to its end, with a file as its standard input where one is given."""
        self._capsys.readouterr()
        with self._monkeypatch.context() as patch, tempfile.TemporaryFile() as file:
            patch.setattr(sys, "argv", ["collab", *map(str, arguments)])
            if stdin is not None:
                file.write(stdin)
                file.seek(0)
                patch.setattr(sys, "stdin", file)
            with pytest.raises(SystemExit) as end:
                main()
            for thread in threading.enumerate():
                if thread.name == "standard-input":
                    thread.join()
        code = end.value.code
        output = self._capsys.readouterr()
        assert isinstance(code, int)
        assert "Traceback" not in output.err
        return Ended(code, output.out, output.err)

    def say(self, *arguments: object, stdin: bytes | None = None) -> str:
        """Run a command that has to succeed without complaint, and return what it has printed."""
        ended = self.run(*arguments, stdin=stdin)
        assert (ended.status, ended.err) == (0, "")
        return ended.out

    def json(self, *arguments: object, stdin: bytes | None = None) -> list[Any]:
        """Run a command that has to succeed with `--output json`, and return the objects that it has printed."""
        said = self.say(*arguments, "--output", "json", stdin=stdin)
        return [json.loads(line) for line in said.splitlines()]

    def refused(self, *arguments: object, status: int, stdin: bytes | None = None) -> str:
        """Run a command that has to fail with this status and say why in one sentence, and return that."""
        ended = self.run(*arguments, stdin=stdin)
        assert ended.status == status, ended
        assert ended.out == ""
        assert ended.err.startswith("collab: ")
        assert ended.err.endswith("\n")
        sentence = ended.err[len("collab: ") : -1]
        assert sentence.isprintable()
        return sentence
