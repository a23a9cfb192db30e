"""`collab append`: one event with all that it can have, or everything that comes through a pipe, each line once."""

import base64
import json
import os
import random
import re
import select
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import grpc
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.gate import Gate, wait_until
from tests.cli.here import Here
from tests.cli.terminal import Terminal
from tests.cli.test_session import iso
from tests.memory import resident_kilobytes
from tests.processes import COLLAB, ServeProcess, clean_environment, collab
from tests.rpc.calls import TIMEOUT, append, events, new_session


def payloads(stub: CollabServiceStub, session_id: int) -> list[str]:
    """Return the JSON payloads of a session, in order; the numbers are checked."""
    stored = events(stub, session_id)
    assert [event.server_seq for event in stored] == list(range(1, len(stored) + 1))
    return [event.json for event in stored]


def count(stub: CollabServiceStub, session_id: int) -> int:
    """Return the number of a session's events."""
    return stub.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=TIMEOUT).session.last_server_seq


class Pipe:
    """A `collab append SESSION -` whose standard input is written bit by bit."""

    def __init__(self, address: str, session_id: int, *arguments: str) -> None:
        """Start it."""
        self.process = subprocess.Popen(
            [*COLLAB, "append", str(session_id), "-", "--target", address, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=clean_environment(),
        )

    @property
    def input(self) -> IO[bytes]:
        """Its standard input."""
        assert self.process.stdin is not None
        return self.process.stdin

    def write(self, text: str) -> None:
        """Write and do not keep anything back."""
        self.input.write(text.encode())
        self.input.flush()

    def end(self) -> tuple[int, str, str]:
        """Close its input, wait for its end, and return its status and what it has said."""
        output, errors = self.process.communicate(timeout=2 * TIMEOUT)
        return self.process.returncode, output.decode(), errors.decode()

    def __enter__(self) -> "Pipe":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_an_event_has_all_that_was_given(here: Here, stub: CollabServiceStub) -> None:
    """Payload, actor, type, counter and key are stored as they were given, and printed in the contract's JSON."""
    session_id = new_session(stub)
    text = ' {"b": 1.0,  "a": "é\\u0000", "a": 9007199254740993}'
    fields = ("--actor", "ada", "--type", "edit", "--client-seq", 0, "--key", "k 1")
    (printed,) = here.json("append", session_id, "--json", text, *fields)
    (event,) = events(stub, session_id)
    assert (event.json, event.actor_id, event.type) == (text, "ada", "edit")
    assert (event.client_seq, event.HasField("client_seq"), event.idempotency_key) == (0, True, "k 1")
    assert list(printed.items()) == [
        ("id", event.id),
        ("sessionId", session_id),
        ("actorId", "ada"),
        ("clientSeq", 0),
        ("serverSeq", 1),
        ("type", "edit"),
        ("payload", json.loads(text)),
        ("hash", None),
        ("signature", None),
        ("idempotencyKey", "k 1"),
        ("createdAt", iso(event.create_time)),
        ("chainHash", event.chain_hash.hex()),
    ]
    assert here.say("append", session_id, "--json", "{}") == f"Appended event 2 to session {session_id}\n"
    event = events(stub, session_id)[1]
    assert not (event.HasField("actor_id") or event.HasField("type") or event.HasField("client_seq"))


def test_a_file_is_appended_to_the_byte(here: Here, stub: CollabServiceStub, tmp_path: Path) -> None:
    """With `--file` the payload is what the file holds, a JSON object or with `--binary` anything, also nothing."""
    session_id = new_session(stub)
    file = tmp_path / "payload"
    text = '\n{"text":\r\n\t"héllo"}\n'
    file.write_bytes(text.encode())
    here.say("append", session_id, "--file", file)
    for content in (bytes(range(256)), b""):
        file.write_bytes(content)
        (printed,) = here.json("append", session_id, "--file", file, "--binary")
        assert (printed["payload"], base64.b64decode(printed["payloadBase64"])) == (None, content)
    stored = events(stub, session_id)
    assert stored[0].json == text
    assert [event.binary for event in stored[1:]] == [bytes(range(256)), b""]
    assert all(event.HasField("binary") for event in stored[1:])


def test_a_key_is_stored_once(here: Here, stub: CollabServiceStub) -> None:
    """The same event with the same key is not stored again, which is said; another one is a conflict."""
    session_id = new_session(stub)
    same = ("append", session_id, "--key", "k", "--json", '{"a":1}')
    (first,) = here.json(*same)
    assert here.say(*same) == f"Event 1 of session {session_id} has this key and content already\n"
    assert here.json(*same) == [first]
    assert "key" in here.refused(*same[:-1], '{"a":2}', status=5)
    assert count(stub, session_id) == 1


def test_an_append_can_be_conditional(here: Here, stub: CollabServiceStub) -> None:
    """With `--expect` it is appended only behind that number, 0 being an empty session; else nothing is, status 5."""
    session_id = new_session(stub)
    here.say("append", session_id, "--json", '{"n":1}', "--expect", 0)
    for number in (0, 2):
        assert "last number is 1" in here.refused("append", session_id, "--json", "{}", "--expect", number, status=5)
    here.say("append", session_id, "--json", '{"n":2}', "--expect", 1)
    assert payloads(stub, session_id) == ['{"n":1}', '{"n":2}']


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "append what?"),
        (("{}",), "what is {}?"),
        (("--json", "{}", "--file", "x"), "append what?"),
        (("--json", "{}", "-"), "append what?"),
        (("--file", "x", "-"), "append what?"),
        (("--json", "{}", "--binary"), "--binary goes with --file"),
        (("-", "--binary"), "--binary goes with --file"),
        (("-", "--key", "k"), "for one event, not for a pipe"),
        (("-", "--client-seq", 0), "for one event, not for a pipe"),
        (("-", "--expect", 0), "for one event, not for a pipe"),
    ],
)
def test_options_that_do_not_go_together(here: Here, arguments: tuple[object, ...], words: str) -> None:
    """They are told before anything is asked of the service."""
    assert words in here.refused("append", 1, *arguments, "--target", "127.0.0.1:1", status=2)


@pytest.mark.parametrize(
    ("option", "value"), [("--expect", "-1"), ("--client-seq", "x"), ("--batch", "0"), ("--batch", "1001")]
)
def test_numbers_that_are_none(here: Here, option: str, value: str) -> None:
    """What is no number, or out of its range, is a wrong command line, which names the option."""
    ended = here.run("append", 1, "--json", "{}", option, value)
    assert (ended.status, ended.out) == (2, "")
    assert option in ended.err


@pytest.mark.parametrize(
    "text", ["", " ", "[]", "1", '"a"', '{"a":1', "{}{}", "{'a':1}", '{"a":NaN}', '{"a":"\udcff"}']
)
def test_what_is_no_json_object(here: Here, stub: CollabServiceStub, text: str, tmp_path: Path) -> None:
    """Anything else as the payload is refused with a sentence, from the command line and from a file."""
    session_id = new_session(stub)
    here.refused("append", session_id, "--json", text, status=1)
    file = tmp_path / "payload"
    file.write_bytes(text.encode(errors="surrogateescape"))
    here.refused("append", session_id, "--file", file, status=1)
    assert count(stub, session_id) == 0


def test_files_that_cannot_be_read(here: Here, stub: CollabServiceStub, tmp_path: Path) -> None:
    """A file that is not there, a directory, and bytes that are no text are told by their name."""
    session_id = new_session(stub)
    for name, words in (("missing", "No such file"), (".", "Is a directory")):
        said = here.refused("append", session_id, "--file", tmp_path / name, status=1)
        assert said.startswith(f"cannot read {tmp_path / name}: {words}")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "--binary appends it as bytes" in here.refused("append", session_id, "--file", tmp_path / "bytes", status=1)


@pytest.mark.parametrize("field", ["actor", "type", "key"])
def test_a_field_that_is_not_valid(here: Here, stub: CollabServiceStub, field: str) -> None:
    """What the service refuses is told by the name of the field."""
    session_id = new_session(stub)
    for value in ("", "x" * 256):
        assert field in here.refused("append", session_id, "--json", "{}", f"--{field}", value, status=1)


def lines_of(texts: Sequence[str]) -> bytes:
    """Return lines as a pipe brings them."""
    return "".join(f"{text}\n" for text in texts).encode()


@pytest.mark.parametrize("batch", [100, 1000])
def test_a_pipe_is_appended_line_by_line(here: Here, stub: CollabServiceStub, batch: int) -> None:
    """Each line is an event, in order and to the letter, with the actor and type that were given, in batches."""
    session_id = new_session(stub)
    append(stub, session_id)
    texts = [f'{{"n": {n}, "text": "{"é" * (n % 50)}"}}' for n in range(3_000)]
    options = ("--actor", "ada", "--type", "edit", "--batch", batch)
    (told,) = here.json("append", session_id, "-", *options, stdin=lines_of(texts))
    assert told == {"sessionId": session_id, "events": 3_000, "firstServerSeq": 2, "lastServerSeq": 3_001}
    assert payloads(stub, session_id)[1:] == texts
    stored = events(stub, session_id, since_server_seq=1)
    assert {(event.actor_id, event.type) for event in stored} == {("ada", "edit")}
    if batch == 100:  # a time of creation for each append
        assert len({event.create_time.ToMicroseconds() for event in stored}) >= 30


def test_lines_as_other_systems_end_them(here: Here, stub: CollabServiceStub) -> None:
    """Blank lines are skipped, CRLF and spaces around an object are not part of it, the last line needs no end."""
    session_id = new_session(stub)
    said = here.say("append", session_id, "-", stdin=b'\n  \r\n{"n":1}\r\n\n\t{"n": 2} \n{"n":\r3}\n{"n":4}')
    assert re.fullmatch(rf"Appended 4 events in .*/s\) to session {session_id}; its last number is 4\n", said)
    assert payloads(stub, session_id) == ['{"n":1}', '{"n": 2}', '{"n":\r3}', '{"n":4}']


@pytest.mark.parametrize("text", [b"", b"\n\n \r\n"])
def test_an_empty_pipe(here: Here, stub: CollabServiceStub, text: bytes) -> None:
    """Nothing to append is no error, and is said."""
    session_id = new_session(stub)
    assert here.say("append", session_id, "-", stdin=text) == "There was nothing to append\n"
    (told,) = here.json("append", session_id, "-", stdin=text)
    assert told == {"sessionId": session_id, "events": 0, "firstServerSeq": None, "lastServerSeq": None}
    assert count(stub, session_id) == 0


@pytest.mark.parametrize("batch", [1, 2, 3, 1000])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b'{"n":', "must be the text of one JSON object"),
        (b"[1]", "must be the text of one JSON object"),
        (b"\xa0{}", "is not UTF-8"),
        ("\u00a0{}".encode(), "must be the text of one JSON object"),
        (b'{"text":"' + b"x" * 1_048_576 + b'"}', "must be at most 1048576 bytes"),
    ],
    ids=["half an object", "an array", "no UTF-8", "no space of JSON", "too large"],
)
def test_a_line_that_is_no_event(here: Here, stub: CollabServiceStub, batch: int, bad: bytes, words: str) -> None:
    """Exactly what is before it is stored, however it was batched, and a sentence names the line and how to go on."""
    session_id = new_session(stub)
    before = ["", '{"n":1}', "", '{"n":2}', '{"n":3}']
    text = lines_of(before) + bad
    for last in (False, True):  # in the middle, and as the last line, which has no end
        after = b"" if last else b'\n{"n":4}\n[]\n'
        said = here.refused("append", session_id, "-", "--batch", batch, stdin=text + after, status=1)
        assert said.startswith(f"line 6 {words}")
        assert said.endswith(
            "; the 3 events before are stored; correct it and go on with line 6: "
            f"tail -n +6 FILE | collab append {session_id} -"
        )
    assert payloads(stub, session_id) == 2 * ['{"n":1}', '{"n":2}', '{"n":3}']


def test_a_first_line_that_is_no_event(here: Here, stub: CollabServiceStub) -> None:
    """Then nothing is stored."""
    session_id = new_session(stub)
    said = here.refused("append", session_id, "-", stdin=b'{"n":1\n{}\n', status=1)
    assert said.startswith("line 1 ")
    assert said.endswith("; nothing was stored; correct it and try again")
    said = here.refused("append", session_id, "-", "--actor", "", stdin=b"{}\n{}\n", status=1)
    assert said == "line 1: actor_id must not be empty; nothing was stored; correct it and try again"
    assert count(stub, session_id) == 0


@pytest.mark.parametrize(("megabytes", "words"), [(9, "is refused: "), (68, "is longer than 67,108,864 bytes")])
def test_a_line_that_never_ends(here: Here, stub: CollabServiceStub, megabytes: int, words: str) -> None:
    """One that no message, or no memory, should hold is told like others, and what comes before it is stored."""
    session_id = new_session(stub)
    text = b'{"n":1}\n{"text":"' + megabytes * 1_000_000 * b"x" + b'"}\n{"n":2}'
    assert here.refused("append", session_id, "-", stdin=text, status=1).startswith(f"line 2 {words}")
    assert payloads(stub, session_id) == ['{"n":1}']


def test_closed_standard_input(server: ServeProcess, stub: CollabServiceStub) -> None:
    """`<&-` is told, and not waited for."""
    session_id = new_session(stub)
    result = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *COLLAB, "append", str(session_id), "-"],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=clean_environment(COLLAB_TARGET=server.grpc_address),
        check=False,
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "collab: standard input is closed, and there is nothing to read from\n"


def following(stub: CollabServiceStub, session_id: int) -> Iterator[str]:
    """Yield the payloads of a session as they come."""
    for message in stub.ListEvents(pb.ListEventsRequest(session_id=session_id, follow=True), timeout=TIMEOUT):
        yield from (event.json for event in message.events)


def test_slow_lines_are_appended_as_they_come(server: ServeProcess, stub: CollabServiceStub) -> None:
    """A line is stored before the next one is written, and half a line not before its other half has come."""
    session_id = new_session(stub)
    come = following(stub, session_id)
    with Pipe(server.grpc_address, session_id) as pipe:
        for n in range(5):
            pipe.write(f'{{"n":{n}}}\n{{"half":')
            assert next(come) == f'{{"n":{n}}}'
            pipe.write(f"{n}}}\n")
            assert next(come) == f'{{"half":{n}}}'
        status, out, err = pipe.end()
    assert (status, err) == (0, "")
    assert out.startswith("Appended 10 events in ")


def test_lines_typed_at_a_terminal(server: ServeProcess, stub: CollabServiceStub) -> None:
    """A person is told what to type and how to end, and nothing comes between what they type."""
    session_id = new_session(stub)
    come = following(stub, session_id)
    with Terminal(server.grpc_address, "append", session_id, "-") as terminal:
        terminal.wait_for("One JSON object a line; Ctrl-D ends.\r\n")
        for n in range(2):
            terminal.press(f'{{"n":{n}}}\n')
            assert next(come) == f'{{"n":{n}}}'
        terminal.press("\x04")
        status, shown = terminal.end()
    assert status == 0
    assert shown.splitlines()[1:3] == ['{"n":0}', '{"n":1}']
    assert shown.splitlines()[3].startswith("Appended 2 events in ")


def test_ctrl_c_while_nothing_comes(server: ServeProcess, stub: CollabServiceStub) -> None:
    """It ends at once, with status 130, and tells what is stored."""
    session_id = new_session(stub)
    come = following(stub, session_id)
    with Pipe(server.grpc_address, session_id) as pipe:
        pipe.write("\n{}\n")
        next(come)
        pipe.process.send_signal(signal.SIGINT)
        assert pipe.process.wait(TIMEOUT) == 130  # while its input is still open
        _, out, err = pipe.end()
    assert out == ""
    assert re.fullmatch(r"collab: interrupted; the event before is stored; go on with line 3: .*\n", err)


def test_ctrl_c_while_a_batch_is_on_its_way(
    server: ServeProcess, stub: CollabServiceStub, server_database_url: str
) -> None:
    """What the service already has is waited for, so that what is told to be stored, and where to go on, is true."""
    session_id = new_session(stub)
    with Gate(server_database_url, session_id, after=5) as gate, Pipe(server.grpc_address, session_id) as pipe:
        pipe.write("{}\n" * 5)
        come = following(stub, session_id)
        assert [next(come) for _ in range(5)] == ["{}"] * 5
        pipe.write("{}\n" * 5)
        gate.wait_for_knock()
        pipe.write('{"n":1}\n' * 5)  # read, but not yet sent
        pipe.process.send_signal(signal.SIGINT)
        gate.open()
        assert pipe.process.wait(TIMEOUT) == 130
        _, out, err = pipe.end()
    assert out == ""
    told = re.fullmatch(
        rf"collab: interrupted; the (\d+) events before are stored; go on with line (\d+): .* append {session_id} -\n",
        err,
    )
    assert told is not None, err
    assert int(told[1]) == count(stub, session_id)
    assert int(told[2]) == count(stub, session_id) + 1
    assert count(stub, session_id) in (10, 15)  # it may have sent some more before the signal came through


def test_ctrl_c_at_any_moment(server: ServeProcess, stub: CollabServiceStub) -> None:
    """In the middle of lines without end, too, what is told to be stored is what is stored."""
    for moment in (1, 1_500):
        session_id = new_session(stub)
        with Pipe(server.grpc_address, session_id, "--batch", str(random.randint(1, 50))) as pipe:
            pipe.write("".join(f'{{"n":{n}}}\n' for n in range(3_000)))
            come = following(stub, session_id)
            for _ in range(moment):
                next(come)
            pipe.process.send_signal(signal.SIGINT)
            assert pipe.process.wait(TIMEOUT) == 130
            _, _, err = pipe.end()
        stored = payloads(stub, session_id)
        assert stored == [f'{{"n":{n}}}' for n in range(len(stored))]
        those = "event before is" if len(stored) == 1 else f"{len(stored):,} events before are"
        assert err.startswith(f"collab: interrupted; the {those} stored; ")
        assert f"go on with line {len(stored) + 1:,}: tail -n +{len(stored) + 1} FILE" in err


def test_a_service_that_is_killed_is_waited_for(database_url: str, directory: Path) -> None:
    """Killed and started again on its port while lines come, it loses none and repeats none."""
    texts = [f'{{"n":{n}}}' for n in range(2_000)]
    address = "127.0.0.1:0"
    with ExitStack() as stack:
        with Stub(database_url, directory, address) as (server, stub):
            address = server.grpc_address
            session_id = new_session(stub)
            pipe = stack.enter_context(Pipe(address, session_id, "--batch", "7"))
            pipe.write("".join(f"{text}\n" for text in texts[:1_000]))
            come = following(stub, session_id)
            for _ in range(300):
                next(come)
            server.process.kill()
            server.wait()
        pipe.write("".join(f"{text}\n" for text in texts[1_000:]))
        with Stub(database_url, directory, address) as (_, stub):
            status, out, err = pipe.end()
            assert (status, err) == (0, "")
            assert out.startswith("Appended 2,000 events in ")
            assert payloads(stub, session_id) == texts


class Stub:
    """A server and a stub on it."""

    def __init__(self, database_url: str, directory: Path, address: str) -> None:
        self._server = ServeProcess("--database-url", database_url, cwd=directory, grpc_address=address)

    def __enter__(self) -> tuple[ServeProcess, CollabServiceStub]:
        self._server.__enter__()
        self._channel = grpc.insecure_channel(self._server.grpc_address)
        return self._server, CollabServiceStub(self._channel)

    def __exit__(self, *error: Any) -> None:
        self._channel.close()
        self._server.__exit__(*error)


@pytest.mark.long
def test_a_service_that_stays_away(database_url: str, directory: Path) -> None:
    """Where the answer to a batch is lost for good, Ctrl-C tells that it may be stored, and where to look."""
    with Stub(database_url, directory, "127.0.0.1:0") as (server, stub):
        session_id = new_session(stub)
        with (
            Gate(database_url, session_id, after=2) as gate,
            Pipe(server.grpc_address, session_id, "--batch", "2") as pipe,
        ):
            pipe.write("{}\n" * 4)
            gate.wait_for_knock()
            server.process.kill()
            server.wait()
            pipe.process.send_signal(signal.SIGINT)
            status = pipe.process.wait(TIMEOUT)
            _, out, err = pipe.end()
    assert (status, out) == (130, "")
    assert err == (
        "collab: interrupted; the 2 events before are stored, and some of the next may be: "
        f"look with: collab list {session_id} --since 2\n"
    )


def test_a_pipe_that_comes_faster_than_it_is_stored(
    server: ServeProcess, stub: CollabServiceStub, server_database_url: str
) -> None:
    """While the service does not go on, the pipe is not read on: neither lines nor blank ones fill the memory."""
    for line in (b'{"text":"%s"}\n' % (200 * b"x"), b"\n"):
        session_id = new_session(stub)
        with Gate(server_database_url, session_id, after=1) as gate, Pipe(server.grpc_address, session_id) as pipe:
            pipe.write("{}\n{}\n")
            gate.wait_for_knock()
            before = resident_kilobytes(pipe.process.pid)
            assert _fill(pipe.input.fileno(), line * 1_000, 30_000_000) < 30_000_000
            assert resident_kilobytes(pipe.process.pid) - before < 40_000
            pipe.process.kill()


def _fill(pipe: int, text: bytes, most: int) -> int:
    """Write into a pipe until nobody reads it any more, or `most` bytes; return how many those were."""
    os.set_blocking(pipe, False)
    written = 0
    while written < most and select.select([], [pipe], [], 1.0)[1]:
        written += os.write(pipe, text)
    return written


@pytest.mark.long
def test_a_hundred_thousand_lines(server: ServeProcess, stub: CollabServiceStub) -> None:
    """They are appended whole and in order, in memory that does not grow with them."""
    session_id = new_session(stub)
    texts = [f'{{"n":{n},"text":"{"x" * 500}"}}' for n in range(100_000)]
    with Pipe(server.grpc_address, session_id) as pipe:
        pipe.write("".join(f"{text}\n" for text in texts[:2_000]))
        wait_until(lambda: count(stub, session_id) == 2_000, "the first 2,000 lines")
        before = resident_kilobytes(pipe.process.pid)
        for start in range(2_000, 100_000, 14_000):
            pipe.write("".join(f"{text}\n" for text in texts[start : start + 14_000]))
            assert resident_kilobytes(pipe.process.pid) - before < 40_000
        status, out, err = pipe.end()
    assert (status, err) == (0, "")
    assert out.startswith("Appended 100,000 events in ")
    assert payloads(stub, session_id) == texts
    assert "is whole" in collab("verify", str(session_id), "--target", server.grpc_address).stdout
