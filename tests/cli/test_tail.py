"""`collab tail`: every event once, in order, whatever happens to the service; and what it says when it cannot go on."""

import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import pytest

from collab_service.cli.main import main
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.test_serve import assert_one_sentence
from tests.processes import COLLAB, ServeProcess, clean_environment
from tests.rpc.calls import TIMEOUT, append, new_session


class TailProcess:
    """A `collab tail`; its lines can be waited for."""

    def __init__(self, address: str, *arguments: object, **environment: str) -> None:
        """Start it."""
        self.process = subprocess.Popen(
            [*COLLAB, "tail", "--target", address, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=clean_environment(**environment),
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def line(self) -> str:
        """Wait for the next line and return it."""
        line = self._lines.get(timeout=TIMEOUT)
        assert line is not None, f"it has ended: {self.end()}"
        return line.removesuffix("\n")

    def has_shown_something(self) -> bool:
        """Tell whether there is a line to take."""
        return not self._lines.empty()

    def numbers(self, count: int) -> list[int]:
        """Wait for so many lines and return the numbers of their events."""
        return [int(self.line().split()[0]) for _ in range(count)]

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end and return what it has said since the last line."""
        assert self.process.stderr is not None
        status = self.process.wait(TIMEOUT)
        self._reader.join(TIMEOUT)
        rest = "".join(self._lines.get() or "" for _ in range(self._lines.qsize()))
        return subprocess.CompletedProcess(self.process.args, status, rest, self.process.stderr.read())

    def interrupt(self) -> None:
        """Press Ctrl-C, after which it has to end with status 0 and without another word."""
        self.process.send_signal(signal.SIGINT)
        result = self.end()
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.end()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def test_events_are_shown_as_they_come(server: ServeProcess, stub: CollabServiceStub) -> None:
    """What is there and then what comes, each once and in order, from the number that was asked for.

    Ctrl-C ends it with status 0 and without a word; the end of the session with status 4 and a sentence.
    """
    session_id = new_session(stub)
    first = append(stub, session_id, actor_id="ada", type="edit", json='{"text": "héllo"}').event
    append(stub, session_id, binary=bytes(1234))
    append(stub, session_id)
    with (
        TailProcess(server.grpc_address, session_id) as tail,
        TailProcess(server.grpc_address, session_id, "--since", 2) as later,
    ):
        at = first.create_time.ToDatetime().isoformat(timespec="microseconds")
        assert tail.line() == f'1  {at}Z  ada  edit  {{"text": "héllo"}}'
        assert re.fullmatch(r"2  \S+Z  -  -  1,234 bytes", tail.line())
        assert re.fullmatch(r"3  \S+Z  -  -  \{\}", tail.line())
        assert later.numbers(1) == [3]
        for number in range(4, 10):
            assert append(stub, session_id, actor_id="bob").event.server_seq == number
            assert (tail.numbers(1), later.numbers(1)) == ([number], [number])
        tail.interrupt()
        stub.DeleteSession(pb.DeleteSessionRequest(session_id=session_id), timeout=TIMEOUT)
        assert_one_sentence(later.end(), f"there is no session {session_id}", status=4)


def test_a_service_that_is_killed_is_followed_on(database_url: str, directory: Path) -> None:
    """`kill -9` of the service, three times, with events still on their way: each is shown once, and in order.

    And Ctrl-C ends it as well while there is no service.
    """
    address = "127.0.0.1:0"
    shown: list[int] = []
    with ExitStack() as stack:
        for turn in range(4):
            with (
                ServeProcess("--database-url", database_url, cwd=directory, grpc_address=address) as server,
                grpc.insecure_channel(server.grpc_address) as channel,
            ):
                address = server.grpc_address
                stub = CollabServiceStub(channel)
                if turn == 0:
                    session_id = new_session(stub)
                    tail = stack.enter_context(TailProcess(address, session_id))
                for _ in range(100):
                    append(stub, session_id)
                shown += tail.numbers(60 if turn < 3 else 400 - len(shown))
                server.process.kill()
                server.wait()
        assert shown == list(range(1, 401))
        tail.interrupt()


def test_nothing_an_author_wrote_reaches_the_terminal(server: ServeProcess, stub: CollabServiceStub) -> None:
    """An event is one line, of characters that only show: no escape sequence, no line break, no change of direction."""
    session_id = new_session(stub)
    json = '{\n\t"a":\r\n1, "b": "\u202e\u2066\u009b2J\x7f\u2028\u00ad\ufeff"}'
    append(stub, session_id, actor_id="\x1b[2Jada\n2  now  eve", type="\u009b31m\u202etide\x07\x08\u0085", json=json)
    append(stub, session_id, actor_id="bob\r", type="\x1b]0;title\x1b\\", json="{}\n")
    with TailProcess(server.grpc_address, session_id) as tail:
        lines = [tail.line(), tail.line()]
        tail.interrupt()
    assert [line.split()[0] for line in lines] == ["1", "2"]
    assert all(line.isprintable() for line in lines)
    for shown in (
        "\\x1b[2Jada 2  now  eve",
        "\\x9b31m\\u202etide\\x07\\x08\\x85",
        '{  "a":  1, "b": "\\u202e\\u2066\\x9b2J',
    ):
        assert shown in lines[0]
    assert lines[1].endswith("bob   \\x1b]0;title\\x1b\\  {} ")


def test_a_terminal_that_lacks_a_character(server: ServeProcess, stub: CollabServiceStub) -> None:
    """Where the terminal does not know all of Unicode, what it lacks is shown in some other way."""
    session_id = new_session(stub)
    for _ in range(2):
        append(stub, session_id, actor_id="Zoë", json='{"text": "語"}')
    with TailProcess(server.grpc_address, session_id, PYTHONIOENCODING="ascii") as tail:
        assert tail.numbers(2) == [1, 2]
        tail.interrupt()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """A function that runs the command in this process, which has to fail; it returns the status and what was said."""

    def run(*arguments: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["collab", "tail", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        output = capsys.readouterr()
        assert output.out == ""
        return end.value.code, output.err

    return run


def test_a_session_that_is_not_there_is_told(refused: Callable[..., tuple[Any, str]], server: ServeProcess) -> None:
    """A sentence says which."""
    status, said = refused("999999999", "--target", server.grpc_address)
    assert status == 4
    assert said == "collab: there is no session 999999999; see those there are with: collab session list\n"


def test_a_number_beyond_the_head_is_told(
    refused: Callable[..., tuple[Any, str]], server: ServeProcess, stub: CollabServiceStub
) -> None:
    """It is not waited for: a sentence says how far the session is."""
    session_id = append(stub, new_session(stub)).event.session_id
    status, said = refused(session_id, "--since", 2, "--target", server.grpc_address)
    assert status == 1
    assert re.fullmatch("collab: .*since_server_seq is 2, .*last number is 1\n", said)


def test_a_service_that_is_not_there_is_told(refused: Callable[..., tuple[Any, str]]) -> None:
    """Where there was none from the beginning, none is waited for."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        status, said = refused("1", "--target", address)
    assert status == 3
    assert re.fullmatch(f"collab: nothing that speaks gRPC answers at {address} .*collab serve\n", said)


def test_a_number_that_is_too_large_is_told(
    refused: Callable[..., tuple[Any, str]], server: ServeProcess, stub: CollabServiceStub
) -> None:
    """One that the service's numbers cannot reach is a mistake like others, and no reason for a traceback."""
    for arguments in ((2**63,), (new_session(stub), "--since", 2**63)):
        status, said = refused(*arguments, "--target", server.grpc_address)
        assert status in (1, 4)
        assert re.fullmatch(f"collab: .*{2**63}.*\n", said)


@pytest.mark.parametrize("more", [True, False], ids=["more comes", "nothing more comes"])
def test_a_reader_that_goes_away_ends_it(server: ServeProcess, stub: CollabServiceStub, more: bool) -> None:
    """`collab tail 1 | head -1` ends by itself, well and without a word, also when nothing more comes to be shown."""
    session_id = append(stub, new_session(stub)).event.session_id
    with (
        subprocess.Popen(
            [*COLLAB, "tail", "--target", server.grpc_address, str(session_id)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        ) as tail,
        subprocess.Popen(["head", "-n", "1"], stdin=tail.stdout, stdout=subprocess.PIPE, text=True) as head,
    ):
        try:
            assert tail.stdout is not None
            tail.stdout.close()  # head has it
            assert head.communicate(timeout=TIMEOUT)[0].startswith("1  ")
            if more:
                append(stub, session_id)
            assert tail.wait(TIMEOUT) == 0
            assert tail.stderr is not None
            assert tail.stderr.read() == ""
        finally:
            tail.kill()
