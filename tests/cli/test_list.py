"""`collab list` and `collab tail`: what is asked for, for people on a terminal, for pipes, and for programs."""

import base64
import json
import re
import subprocess
import unicodedata
from typing import Any

import pytest

from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.here import Here
from tests.cli.terminal import Terminal
from tests.cli.test_session import iso, unique
from tests.cli.test_tail import TailProcess
from tests.processes import COLLAB, ServeProcess, clean_environment
from tests.rpc.calls import TIMEOUT, append, events, new_session


@pytest.fixture
def session_id(stub: CollabServiceStub) -> int:
    """A session with ten events, of the types a, b, a, b …, the last one of no type."""
    session_id = new_session(stub)
    for n in range(1, 11):
        fields: dict[str, Any] = {} if n == 10 else {"type": "ab"[(n - 1) % 2], "actor_id": f"actor-{n}"}
        append(stub, session_id, json=f'{{"n":{n}}}', **fields)
    return session_id


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (("--since", 7), [8, 9, 10]),
        (("--since", 10), []),
        (("--limit", 2), [1, 2]),
        (("--limit", 0), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (("--limit", 100), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (("--types", "b"), [2, 4, 6, 8]),
        (("--types", "b,a"), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (("--types", "c"), []),
        (("--since", 2, "--limit", 2, "--types", "b"), [4, 6]),
    ],
)
def test_what_is_asked_for_is_listed(
    here: Here, session_id: int, options: tuple[object, ...], expected: list[int]
) -> None:
    """`--since`, `--limit` and `--types` choose, each alone and all together, in text as in JSON."""
    assert [event["serverSeq"] for event in here.json("list", session_id, *options)] == expected
    assert [int(line.split()[0]) for line in here.say("list", session_id, *options).splitlines()] == expected


def test_json_is_the_contracts(here: Here, stub: CollabServiceStub) -> None:
    """`--output json` prints the event object of the HTTP API in a line, whatever white space the payload has."""
    room = unique()
    session_id = new_session(stub, room=room)
    fields: dict[str, Any] = {"actor_id": "ada", "client_seq": 0, "type": "edit", "hash": "", "idempotency_key": "k"}
    append(stub, session_id, json='{\r\n\t"text":\n"é\\n",\n"n":1.0}', signature=b"\x00\xff", **fields)
    append(stub, session_id, binary=b"\x00\x01\xff")
    first, second = here.json("list", room)
    event, binary = events(stub, session_id)
    assert list(first.items()) == [
        ("id", event.id),
        ("sessionId", session_id),
        ("actorId", "ada"),
        ("clientSeq", 0),
        ("serverSeq", 1),
        ("type", "edit"),
        ("payload", {"text": "é\n", "n": 1.0}),
        ("hash", ""),
        ("signature", base64.b64encode(b"\x00\xff").decode()),
        ("idempotencyKey", "k"),
        ("createdAt", iso(event.create_time)),
        ("chainHash", event.chain_hash.hex()),
    ]
    assert list(second.items()) == [
        ("id", binary.id),
        ("sessionId", session_id),
        ("actorId", None),
        ("clientSeq", None),
        ("serverSeq", 2),
        ("type", None),
        ("payload", None),
        ("hash", None),
        ("signature", None),
        ("idempotencyKey", None),
        ("createdAt", iso(binary.create_time)),
        ("chainHash", binary.chain_hash.hex()),
        ("payloadBase64", "AAH/"),
    ]
    line = here.say("list", session_id, "--limit", 1, "-o", "json")
    assert '"payload":{  \t"text": "é\\n", "n":1.0},' in line  # the text as it is, but for the line breaks


def test_json_is_utf_8_everywhere(server: ServeProcess, stub: CollabServiceStub) -> None:
    """Programs get UTF-8 where the terminal's encoding is another; people get what it has, and escapes for the rest."""
    session_id = new_session(stub)
    append(stub, session_id, json='{"text":"é😀"}')
    command = [*COLLAB, "list", str(session_id), "--target", server.grpc_address]
    environment = clean_environment(PYTHONIOENCODING="latin-1")
    printed = subprocess.check_output([*command, "-o", "json"], env=environment, timeout=TIMEOUT)
    assert json.loads(printed.decode())["payload"] == {"text": "é😀"}
    printed = subprocess.check_output(command, env=environment, timeout=TIMEOUT)
    assert printed.decode("latin-1").endswith('{"text":"é\\U0001f600"}\n')


def test_json_on_a_terminal(server: ServeProcess, stub: CollabServiceStub) -> None:
    """There, what could move the cursor or hide something is escaped, and the JSON still says the same."""
    session_id = new_session(stub)
    text = "\x7f\u009b2J\u202e\u2028\U000e0001é"
    append(stub, session_id, json=f'{{\t"text":\n"{text}"}}', actor_id="\x1b[2J\u009b")
    with Terminal(server.grpc_address, "list", session_id, "-o", "json") as terminal:
        status, shown = terminal.end()
    assert status == 0
    assert shown.removesuffix("\n").replace("\t", "").isprintable()
    assert "\x1b" not in terminal.text
    event = json.loads(shown)
    assert (event["payload"], event["actorId"]) == ({"text": text}, "\x1b[2J\u009b")


def test_tail_begins_where_it_is_told(server: ServeProcess, stub: CollabServiceStub) -> None:
    """With `--new` it shows what comes from now on, and no event from before; by room, and by type, in JSON."""
    room = unique()
    session_id = new_session(stub, room=room)
    append(stub, session_id, type="b")
    with TailProcess(server.grpc_address, room, "--new", "--types", "a,b", "--output", "json") as tail:
        head = 1
        while not tail.has_shown_something():  # nobody can see from outside when it has begun
            head = append(stub, session_id, type="b").event.server_seq
        first = json.loads(tail.line())["serverSeq"]
        assert first > 1
        assert [json.loads(tail.line())["serverSeq"] for _ in range(first, head)] == list(range(first + 1, head + 1))
        append(stub, session_id, type="c")
        append(stub, session_id, type="a", json='{"n":\n3}')
        event = json.loads(tail.line())
        assert (event["serverSeq"], event["type"], event["payload"]) == (head + 2, "a", {"n": 3})
        tail.interrupt()


def test_where_to_begin_is_told_once(here: Here) -> None:
    """`--since` and `--new` together are a mistake."""
    assert here.refused("tail", 1, "--since", 1, "--new", status=2) == "give either --since or --new"


def cells(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


_COLOUR = re.compile(r"\x1b\[[0-9;]*\b(3[0-7]|9[0-7]|38;[0-9;]+)m")


@pytest.mark.parametrize("columns", [60, 100])
def test_a_terminal_gets_a_table(server: ServeProcess, stub: CollabServiceStub, columns: int) -> None:
    """Columns in line below a header, in colours, each event in one line that is cut at the edge of the terminal."""
    session_id = new_session(stub)
    append(stub, session_id, actor_id="ada", type="edit", json='{"text": "short"}')
    append(stub, session_id, json=f'{{"text": "{"long " * 100}"}}')
    append(stub, session_id, actor_id="ada", type="edit", json=f'{{"text": "{"語" * 100}"}}')
    append(stub, session_id, binary=bytes(1_000))
    with Terminal(server.grpc_address, "list", session_id, columns=columns) as terminal:
        status, shown = terminal.end()
    assert status == 0
    assert _COLOUR.search(terminal.text)
    lines = shown.splitlines()
    assert len(lines) == 5
    assert [line.split()[0] for line in lines] == ["seq", "1", "2", "3", "4"]
    assert all(cells(line) <= columns for line in lines)
    assert [line.endswith("…") for line in lines[1:4]] == [columns == 60, True, True]
    assert lines[0].split() == ["seq", "time", "actor", "type", "…" if columns == 60 else "payload"]
    for word, cell in (("time", "20"), ("actor", "ada"), ("type", "edit")):
        assert lines[1].index(cell) == lines[0].index(word)
    if columns == 100:
        assert lines[1].index("{") == lines[2].index("{") == lines[4].index("1,000 bytes") == lines[0].index("payload")


def test_a_list_of_sessions_on_a_terminal(server: ServeProcess, stub: CollabServiceStub) -> None:
    """With NO_COLOR it is a table without colours."""
    owner = unique("ada")
    session_id = new_session(stub, owner_id=owner, language_id=3)
    options = ("session", "list", "--owner", owner)
    with Terminal(server.grpc_address, *options, columns=120, NO_COLOR="1") as terminal:
        status, shown = terminal.end()
    assert status == 0
    assert not _COLOUR.search(terminal.text)
    head, line = shown.splitlines()
    assert head.split() == ["id", "events", "last", "active", "language", "owner", "room"]
    assert (int(line.split()[0]), line.split()[-1]) == (session_id, "-")
    assert line.index(owner) == head.index("owner")


def test_progress_is_shown_and_goes(server: ServeProcess, session_id: int) -> None:
    """Work that may be long has a bar on a terminal, of which nothing is left, and the cursor is there again."""
    with Terminal(server.grpc_address, "verify", session_id) as terminal:
        status, shown = terminal.end()
    assert status == 0
    assert "━" in terminal.text
    assert terminal.text.rindex("\x1b[?25h") > terminal.text.rindex("\x1b[?25l")
    assert "\x1b[2K" in terminal.text[terminal.text.rindex("━") :]  # the line is erased
    assert [line for line in shown.split("\r")[-1].splitlines() if line] == shown.split("\r")[-1].splitlines()


def test_a_pipe_has_no_colours(here: Here, session_id: int) -> None:
    """Neither what is printed nor what is said is coloured where no terminal is, whatever TERM says."""
    for arguments in (("list",), ("verify",), ("session", "show"), ("list", "--since", 99), ("list", "--help")):
        ended = here.run(*arguments, session_id)
        assert ended.out or ended.err
        assert "\x1b" not in ended.out + ended.err


@pytest.mark.parametrize(
    ("arguments", "redirection", "words"),
    [
        (("list",), ">&-", "standard output is closed"),
        (("list",), ">/dev/full", "cannot write to standard output: No space left"),
        (("list", "-o", "json"), ">/dev/full", "cannot write to standard output: No space left"),
        (("session", "show"), ">/dev/full", "cannot write to standard output: No space left"),
    ],
)
def test_output_that_cannot_be_written(
    server: ServeProcess, session_id: int, arguments: tuple[str, ...], redirection: str, words: str
) -> None:
    """A disk that is full, and an output that is closed, are told, with status 1."""
    command = [*COLLAB, *arguments, str(session_id), "--target", server.grpc_address]
    shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command]
    result = subprocess.run(
        shell, capture_output=True, text=True, timeout=TIMEOUT, env=clean_environment(), check=False
    )
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch(f"collab: {words}.*\n", result.stderr)


@pytest.mark.parametrize("output", ["text", "json"])
def test_a_reader_that_goes_away_ends_it(server: ServeProcess, stub: CollabServiceStub, output: str) -> None:
    """`collab list 1 | head -n 1` ends without a word, however much there is."""
    session_id = new_session(stub)
    for _ in range(10):
        append(stub, session_id, json=f'{{"text": "{"x" * 100_000}"}}')
    command = [*COLLAB, "list", str(session_id), "--target", server.grpc_address, "--output", output]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environment()
        ) as listing,
        subprocess.Popen(["head", "-n", "1"], stdin=listing.stdout, stdout=subprocess.PIPE, text=True) as head,
    ):
        assert listing.stdout is not None
        assert listing.stderr is not None
        listing.stdout.close()  # head has it
        assert head.communicate(timeout=TIMEOUT)[0].count("\n") == 1
        assert listing.wait(TIMEOUT) == 1
        assert listing.stderr.read() == ""
