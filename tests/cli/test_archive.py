"""`collab export`, `import` and `verify`: a session in a file, without loss; nothing half-written passes for whole."""

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collab_service.cli.archive import end_line, event_line, header_line, open_archive
from collab_service.cli.failure import CommandError
from collab_service.client import Event, LogCheck, NewEvent, Session
from collab_service.model.chain import chain_next, content_digest
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.gate import Gate
from tests.cli.here import Here
from tests.cli.test_append import Stub
from tests.cli.test_session import is_there, stored, unique
from tests.conftest import TRACES
from tests.processes import COLLAB, ServeProcess, clean_environment, collab
from tests.rpc.calls import TIMEOUT, append, events, new_session
from tests.rpc.content import content_of
from tests.tcp import TcpProxy
from tests.waiting import until

_START = datetime(2024, 1, 2, 3, 4, 5, 678901, UTC)

# What a JSON object's text can be, to the letter.
NASTY = [
    "{}",
    ' \t\r\n{"a" :\r\n\t1.0 }\n ',
    '{"number":9007199254740993,"more":1e400,"less":-0.0,"zero":1.00}',
    '{"a":1,"a":2,"\\u0061":3}',
    '{"text":"\\u0000\\ud83d\\ude00\\/\\n\\r"}',
    '{"text":"é😀\u2028\u2029\u0085\ufeff\u202e\x7f"}',
    '{"payloadText":"x","end":{"events":1}}',
    '{"deep":' + 126 * "[" + 126 * "]" + "}",
]


def session_of(events: Sequence[Event], session_id: int = 7, room: str | None = None) -> Session:
    """Return the session that has these events."""
    check = LogCheck(session_id)
    for event in events:
        check.add(event)
    return Session(session_id, None, None, room, _START, _START, 1, check.last_server_seq, check.chain_hash)


def log_of(contents: Sequence[NewEvent], session_id: int = 7) -> list[Event]:
    """Return events with these contents, numbered and chained."""
    chain = LogCheck(session_id).chain_hash
    log = []
    for number, content in enumerate(contents, 1):
        created_at = _START + timedelta(microseconds=number // 2)
        micros = (created_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        chain = chain_next(chain, session_id, number, micros, content_digest(content))
        fields = (content.payload, content.actor_id, content.client_seq, content.type, content.hash)
        key = content.idempotency_key
        log.append(Event(100 + number, session_id, number, created_at, chain, *fields, content.signature, key))
    return log


def archive_of(events: Sequence[Event], session: Session | None = None) -> list[bytes]:
    """Return the lines of a whole archive."""
    session = session_of(events) if session is None else session
    check = LogCheck(session.id)
    for event in events:
        check.add(event)
    return [header_line(session), *map(event_line, events), end_line(check)]


def read(file: Path) -> list[Event]:
    """Return the events of an archive that has to be whole."""
    with open_archive(file) as archive:
        return list(archive.whole())


@st.composite
def json_objects(draw: st.DrawFn) -> str:
    """Draw the text of a JSON object, with any white space, numbers as they may be written, and keys that repeat."""
    space = st.text(" \t\r\n", max_size=2)
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)

    def written(value: str, escaped: bool) -> str:
        return json.dumps(value, ensure_ascii=escaped).replace("/", "\\/" if escaped else "/")

    words = st.sampled_from(["1.0", "-0", "1E+2", "9007199254740993", "null", "true", "[ ]", "{\n}", '"\\u0000"'])
    values = words | st.builds(written, text, st.booleans())
    members = draw(st.lists(st.tuples(space, st.builds(written, text, st.booleans()), space, space, values, space)))
    return draw(space) + "{" + ",".join(
        f"{a}{key}{b}:{c}{value}{d}" for a, key, b, c, value, d in members
    ) + draw(space) + "}" + draw(space)  # fmt: skip


_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
_contents = st.builds(
    NewEvent,
    st.sampled_from(NASTY) | json_objects() | st.binary(max_size=5),
    actor_id=st.none() | _texts,
    client_seq=st.none() | st.integers(0, 2**63 - 1),
    type=st.none() | _texts,
    hash=st.none() | _texts,
    signature=st.binary(max_size=5),
    idempotency_key=st.none() | _texts,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(_contents, max_size=5))
def test_an_archive_loses_nothing(tmp_path: Path, contents: list[NewEvent]) -> None:
    """Whatever events hold, they come back from the file as they were, and each is a line of JSON in it."""
    log = log_of(contents)
    lines = archive_of(log)
    file = tmp_path / "session.jsonl"
    file.write_bytes(b"".join(lines))
    assert read(file) == log
    assert file.read_bytes().splitlines(keepends=True) == lines
    for line, event in zip(lines[1:-1], log, strict=True):
        assert json.loads(line)["serverSeq"] == event.server_seq
        if isinstance(event.payload, str):
            assert json.loads(line)["payload"] == json.loads(event.payload)


SMALL = log_of(
    [
        NewEvent('{"text": "héllo"}', actor_id="ada", client_seq=3, type="edit", idempotency_key="k"),
        NewEvent(b"\x00\xff", hash="", signature=b"\x01"),
        NewEvent('{\n"n":1.0}', actor_id="ada"),
    ]
)


def test_a_file_that_is_cut_anywhere_is_not_whole(tmp_path: Path) -> None:
    """With any number of bytes missing at its end it is refused, after the events that are whole."""
    lines = archive_of(SMALL)
    whole = b"".join(lines)
    ends = [len(b"".join(lines[:n])) for n in range(1, len(lines) + 1)]
    file = tmp_path / "session.jsonl"
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(CommandError) as refusal, open_archive(file) as archive:
            for event in archive.whole():
                assert event in SMALL
        assert refusal.value.status == (6 if size >= ends[0] else 1)
        assert ("is not whole" in str(refusal.value)) == (size >= ends[0])
    file.write_bytes(whole)
    assert read(file) == SMALL


def test_a_byte_that_is_changed_is_noticed(tmp_path: Path) -> None:
    """Wherever the events or the end are changed, the file is refused, unless it still says the same.

    Not noticed is only what the chain does not cover: the header's session, and the events' ids.
    """
    lines = archive_of(SMALL)
    whole = b"".join(lines)
    file = tmp_path / "session.jsonl"
    refused = 0
    for place in range(len(lines[0]), len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            found = read(file)
        except CommandError as error:
            assert error.status == 6
            refused += 1
        else:
            assert [(event.content(), event.created_at, event.chain_hash) for event in found] == [
                (event.content(), event.created_at, event.chain_hash) for event in SMALL
            ]
    assert refused > 0.9 * (len(whole) - len(lines[0]))


def replaced(line: int, old: bytes, new: bytes) -> Callable[[list[bytes]], list[bytes]]:
    """Return what changes a line of an archive."""

    def change(lines: list[bytes]) -> list[bytes]:
        assert old in lines[line]
        return [*lines[:line], lines[line].replace(old, new), *(lines[line + 1 :] if line != -1 else [])]

    return change


_DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], int, str]] = {
    "empty": (lambda lines: [], 1, "its first line is no header"),
    "the header alone": (lambda lines: lines[:1], 6, "it ends after event 0 without its last line"),
    "no header": (lambda lines: lines[1:], 1, "its first line is no header"),
    "no end": (lambda lines: lines[:-1], 6, "it ends after event 3 without its last line"),
    "no line break at the end": (replaced(-1, b"\n", b""), 6, "it ends after event 3 without its last line"),
    "the first event is missing": (lambda lines: lines[:1] + lines[2:], 6, "damaged in line 2: .* comes event 2"),
    "an event is missing": (lambda lines: lines[:2] + lines[3:], 6, "in line 3: .* after event 1 comes event 3"),
    "the last event is missing": (lambda lines: lines[:3] + lines[4:], 6, "damaged in line 4: it ends with event 2"),
    "swapped": (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]], 6, "damaged in line 3"),
    "twice": (lambda lines: [*lines[:2], *lines[1:]], 6, "damaged in line 3: .* after event 1 comes event 1"),
    "more after the end": (lambda lines: [*lines, lines[1]], 6, "there is more after the last line"),
    "a blank line": (lambda lines: [*lines[:2], b"\n", *lines[2:]], 6, "damaged in line 3"),
    "no JSON": (lambda lines: [*lines[:2], b"hello\n", *lines[2:]], 6, "damaged in line 3"),
    "no UTF-8": (replaced(1, b"ada", b"\xff\xfe"), 6, "damaged in line 2"),
    "deep": (replaced(1, b'{"text"', b"[" * 200_000 + b'{"text"'), 6, "damaged in line 2"),
    "a payload": (replaced(1, b"llo", b"lla"), 6, "damaged in line 2: .* the chain breaks at event 1"),
    "white space in a payload": (replaced(1, b'": "', b'":"'), 6, "damaged in line 2: .* the chain breaks at event 1"),
    "a binary payload": (replaced(2, b'"AP8="', b'"AP4="'), 6, "damaged in line 3: .* the chain breaks at event 2"),
    "no base64": (replaced(2, b'"AP8="', b'"AP8"'), 6, "damaged in line 3: not base64"),
    "two payloads": (replaced(2, b'"payload":null', b'"payload":{}'), 6, "damaged in line 3: .* either JSON or binary"),
    "a payload that differs": (replaced(3, b':1.0}"', b':1.1}"'), 6, "damaged in line 4"),
    "an actor": (replaced(1, b'"ada"', b'"bob"'), 6, "damaged in line 2: .* the chain breaks at event 1"),
    "no actor": (replaced(1, b'"ada"', b"null"), 6, "damaged in line 2: .* the chain breaks at event 1"),
    "a number": (replaced(1, b'"serverSeq":1', b'"serverSeq":2'), 6, "damaged in line 2"),
    "a huge number": (replaced(1, b'"serverSeq":1', b'"serverSeq":1' + 30 * b"0"), 6, "damaged in line 2"),
    "a session": (replaced(1, b'"sessionId":7', b'"sessionId":8'), 6, "damaged in line 2: .* is of session 8"),
    "a time": (replaced(2, b"678902Z", b"678903Z"), 6, "damaged in line 3: .* the chain breaks at event 2"),
    "an earlier time": (replaced(2, b"2024", b"2023"), 6, "damaged in line 3: .* before the event before it"),
    "no time": (replaced(2, b"2024-01-02T", b""), 6, "damaged in line 3"),
    "a hash": (replaced(1, SMALL[0].chain_hash.hex().encode(), 64 * b"0"), 6, "damaged in line 2: .* the chain breaks"),
    "no hash": (replaced(1, SMALL[0].chain_hash.hex().encode(), b"xyz"), 6, "damaged in line 2"),
    "a field too many": (replaced(1, b'"id":', b'"more":1,"id":'), 6, "damaged in line 2: .* unknown field"),
    "a field too few": (replaced(1, b'"clientSeq":3,', b""), 6, "damaged in line 2: .*clientSeq"),
    "another end": (replaced(-1, b'"events":3', b'"events":2'), 6, "damaged in line 5: it ends with event 3"),
    "another chain at the end": (replaced(-1, b'"chainHash":"', b'"chainHash":"0'), 6, "damaged in line 5"),
    "more events in the header": (replaced(0, b'"lastServerSeq":3', b'"lastServerSeq":4'), 6, "speaks of 4 events"),
    "a version to come": (replaced(0, b'"version":1', b'"version":2'), 1, "has version 2 of the format"),
    "another format": (replaced(0, b"collab-session", b"something"), 1, "its first line is no header"),
    "no session": (replaced(0, b'"id":7', b'"id":0'), 1, "its first line is no header"),
    "a session out of range": (replaced(0, b'"id":7', b'"id":7' + 30 * b"0"), 1, "its first line is no header"),
    "compressed": (lambda lines: [b"\x1f\x8b\x08\x00"], 1, "it is compressed, so gunzip it first"),
    "another file": (lambda lines: [b"root:x:0:0:root:/root:/bin/bash\n"], 1, "its first line is no header"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(_DAMAGE))
def test_a_damaged_file_is_refused(here: Here, stub: CollabServiceStub, tmp_path: Path, name: str) -> None:
    """`collab verify` and `import` say what is wrong and where, and nothing of it is imported, not even the session."""
    room = unique()
    damage, status, words = _DAMAGE[name]
    file = tmp_path / "damaged.jsonl"
    file.write_bytes(b"".join(damage(archive_of(SMALL, session_of(SMALL, room=room)))))
    for command in (("verify", file), ("import", file), ("import", file, "--room", room)):
        said = here.refused(*command, status=status)
        assert str(file) in said
        assert re.search(words, said)
    assert not is_there(stub, room=room)


def test_files_that_cannot_be_read(here: Here, tmp_path: Path) -> None:
    """A file that is not there, and a directory, are told by their name; a pipe can be verified, and not imported."""
    missing = tmp_path / "missing.jsonl"
    assert here.refused("verify", missing, status=1) == f"cannot read {missing}: No such file or directory"
    assert here.refused("import", missing, status=1) == f"cannot read {missing}: No such file or directory"
    assert here.refused("import", tmp_path, status=1) == f"cannot read {tmp_path}: Is a directory"
    assert here.refused("verify", tmp_path / "missing", status=4).startswith("there is neither a file ")
    assert "so it must be a file and no pipe" in here.refused("import", "/dev/null", status=1)
    assert "its first line is no header" in here.refused("verify", "/dev/zero", status=1)
    assert "--room, --no-room and --into" in here.refused("import", missing, "--no-room", "--room", "x", status=2)


def test_ctrl_c_while_a_file_is_read(tmp_path: Path) -> None:
    """It ends at once, with status 130 and without a word."""
    pipe = tmp_path / "slow.jsonl"
    os.mkfifo(pipe)
    with subprocess.Popen(
        [*COLLAB, "verify", str(pipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=clean_environment(PYTHONWARNINGS=""),
    ) as process:
        with pipe.open("wb") as file:  # once the other end is open, too
            file.write(b"".join(archive_of(SMALL)[:2]))
            file.flush()
            process.send_signal(signal.SIGINT)
            assert process.wait(TIMEOUT) == 130
        assert process.communicate() == (b"", b"")


@pytest.fixture
def nasty(stub: CollabServiceStub) -> pb.Session:
    """A session in a room with everything that events can have."""
    session_id = new_session(stub, room=unique("room\u202e\x1b"), owner_id=unique("ada"), language_id=5)
    for text in NASTY:
        append(stub, session_id, json=text)
    append(stub, session_id, binary=b"")
    append(stub, session_id, binary=bytes(range(256)), signature=b"\x00", hash="")
    fields: dict[str, Any] = {"actor_id": "é\n", "client_seq": 0, "type": "\u2028", "hash": "sha256:abc"}
    append(stub, session_id, json='{"all": 1.0}', signature=b"\xff" * 1024, idempotency_key="\x7f", **fields)
    append(stub, session_id, client_seq=2**63 - 1)
    return stored(stub, session_id)


def test_a_round_trip(here: Here, stub: CollabServiceStub, nasty: pb.Session, tmp_path: Path) -> None:
    """Exported, deleted and imported, a session has the same room, owner, language and events, to the byte."""
    file = tmp_path / "session.jsonl"
    before = events(stub, nasty.id)
    ended = here.run("export", nasty.id, file)
    assert (ended.status, ended.out) == (0, "")
    assert ended.err == f"Exported session {nasty.id}: 12 events, chain {nasty.chain_hash.hex()}\n"
    assert here.run("export", nasty.id).out == file.read_bytes().decode()
    for what in (file, nasty.id):
        (told,) = here.json("verify", what)
        assert told == {"sessionId": nasty.id, "events": 12, "chainHash": nasty.chain_hash.hex()}
    assert re.search(r" is whole: 12 events in .*\nchain \w{64}, computed anew\n", here.say("verify", file))

    here.say("session", "delete", nasty.id)
    (imported,) = here.json("import", file)
    after = events(stub, imported["id"])
    assert list(map(content_of, after)) == list(map(content_of, before))
    assert imported["id"] != nasty.id
    assert (imported["room"], imported["ownerId"], imported["languageId"]) == (nasty.room, nasty.owner_id, 5)
    assert here.json("verify", imported["id"])[0]["events"] == 12
    assert here.say("import", file) == f"Session {imported['id']} has everything already: 12 events\n"
    again = tmp_path / "again.jsonl"
    here.run("export", imported["id"], again)
    assert [event.content() for event in read(again)] == [event.content() for event in read(file)]


def test_an_empty_session(here: Here, stub: CollabServiceStub, tmp_path: Path) -> None:
    """It can be exported, verified and imported like any other."""
    file = tmp_path / "empty.jsonl"
    session_id = new_session(stub)
    assert here.run("export", session_id, file).err.startswith(f"Exported session {session_id}: 0 events, chain ")
    assert " is whole: 0 events " in here.say("verify", file)
    assert re.fullmatch(r"Imported 0 events into session \d+\n", here.say("import", file))


def test_where_it_is_imported(here: Here, stub: CollabServiceStub, nasty: pb.Session, tmp_path: Path) -> None:
    """The room is that of the file, or another one, or none; with `--into` a session that is there is filled."""
    file = tmp_path / "session.jsonl"
    here.run("export", nasty.id, file)
    room = unique()
    (other,) = here.json("import", file, "--room", room)
    assert (other["room"], other["lastServerSeq"]) == (room, 12)
    (none,) = here.json("import", file, "--no-room")
    assert (none["room"], none["lastServerSeq"]) == (None, 12)
    empty = new_session(stub)
    assert here.say("import", file, "--into", empty) == f"Imported 12 events into session {empty}\n"
    assert here.say("import", file, "--into", room) == f"Session {other['id']} has everything already: 12 events\n"
    assert len({nasty.id, other["id"], none["id"], empty}) == 4
    here.refused("import", file, "--into", unique(), status=4)


@pytest.mark.parametrize("kind", ["other events", "one event too many", "an event in another form"])
def test_a_session_with_other_events_is_not_written_to(
    here: Here, stub: CollabServiceStub, tmp_path: Path, kind: str
) -> None:
    """What does not begin as the file does, or goes beyond it, is left alone; a sentence says from where it differs."""
    session_id = new_session(stub)
    for n in (1, 2):
        append(stub, session_id, json=f'{{"n":{n}}}')
    file = tmp_path / "session.jsonl"
    here.run("export", session_id, file)
    room = unique("\x1b[2J")
    other = new_session(stub, room=room)
    contents = {
        "other events": (['{"n":0}'], "event 1 is another than the file's"),
        "one event too many": (['{"n":1}', '{"n":2}', '{"n":3}'], "event 3 is not in the file"),
        "an event in another form": (['{"n":1}', '{"n": 2}'], "event 2 is another than the file's"),
    }
    texts, differs = contents[kind]
    for text in texts:
        append(stub, other, json=text)
    for where in (("--into", other), ("--room", room)):
        said = here.refused("import", file, *where, status=5)
        assert differs in said
    assert [event.json for event in events(stub, other)] == texts


def test_a_broken_log_is_told(here: Here, stub: CollabServiceStub, server_database_url: str, tmp_path: Path) -> None:
    """What was changed behind the service's back is noticed by `verify` and not exported, with status 6."""
    session_id = new_session(stub)
    for n in range(3):
        append(stub, session_id, json=f'{{"n":{n}}}')
    with psycopg.connect(server_database_url) as connection:
        change = "UPDATE collab_events SET payload_json = '{\"n\":7}' WHERE session_id = %s AND server_seq = 2"
        connection.execute(change, (session_id,))
    assert "the chain breaks at event 2" in here.refused("verify", session_id, status=6)
    assert "the chain breaks at event 2" in here.refused("export", session_id, tmp_path / "x.jsonl", status=6)
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("actor_id = 'eve'", "the chain breaks at event 2"),
        ("hash = NULL", "the chain breaks at event 2"),
        ("payload_json = '{\"longer\": true}'", "the chain breaks at event 2"),
        (
            "envelope = overlay(envelope PLACING 'bob'::bytea FROM position('ada'::bytea IN envelope))",
            "different things of event 2",
        ),
        (
            "envelope = (SELECT envelope FROM collab_events e WHERE e.session_id = %(session)s AND e.server_seq = 1)",
            "different things of event 2",
        ),
    ],
)
def test_two_truths_are_told(
    here: Here, stub: CollabServiceStub, server_database_url: str, change: str, words: str
) -> None:
    """Where a column was changed, or what lists are made of, `verify` says so, with status 6."""
    session_id = new_session(stub)
    for n in range(3):
        append(stub, session_id, json=f'{{"n":{n}}}', actor_id="ada", hash="h")
    assert here.json("verify", session_id)
    with psycopg.connect(server_database_url) as connection:
        statement = f"UPDATE collab_events SET {change} WHERE session_id = %(session)s AND server_seq = 2"
        assert connection.execute(statement.encode(), {"session": session_id}).rowcount == 1
    assert words in here.refused("verify", session_id, status=6)


def test_an_event_that_was_changed_by_hand(here: Here, stub: CollabServiceStub, server_database_url: str) -> None:
    """Lists show what the columns say, also after somebody has changed them: there is one truth."""
    session_id = new_session(stub)
    for n in range(3):
        append(stub, session_id, json=f'{{"n":{n}}}', actor_id="ada")
    with psycopg.connect(server_database_url) as connection:
        change = (
            "UPDATE collab_events SET payload_json = '{\"erased\": true}', id = id + 1000000000 WHERE session_id = %s"
        )
        assert connection.execute(change, (session_id,)).rowcount == 3
    assert [(event.json, event.id > 1_000_000_000) for event in events(stub, session_id)] == [
        ('{"erased": true}', True)
    ] * 3


def whole_export(here: Here, session_id: int, file: Path) -> list[bytes]:
    """Export a session and return the lines of the file."""
    assert here.run("export", session_id, file).status == 0
    assert not file.with_name(file.name + ".partial").exists()
    return file.read_bytes().splitlines(keepends=True)


def test_an_export_goes_on_where_it_was_cut(
    here: Here, stub: CollabServiceStub, nasty: pb.Session, tmp_path: Path
) -> None:
    """Wherever an earlier one has ended, in the middle of a line too, the file is the same, also when events came."""
    lines = whole_export(here, nasty.id, tmp_path / "whole.jsonl")
    whole = b"".join(lines)
    file, partial = tmp_path / "session.jsonl", tmp_path / "session.jsonl.partial"
    header = len(lines[0])
    for size in (0, 1, 20, 40, header - 1, header, header + 1, len(whole) // 2, len(whole) - 100, len(whole) - 1):
        partial.write_bytes(whole[:size])
        whole_export(here, nasty.id, file)
        assert file.read_bytes() == whole
        assert here.refused("export", nasty.id, file, status=1).startswith(f"{file} is there already")
        file.unlink()
    for cut in (len(lines) - 1, len(lines)):  # without its last line, and with it
        partial.write_bytes(b"".join(lines[:cut]))
        append(stub, nasty.id, json='{"came": "later"}')
        grown = whole_export(here, nasty.id, file)
        assert grown[:-2] == lines[:-1]
        assert read(file)[-1].payload == '{"came": "later"}'
        lines = [*lines[:-1], *grown[-2:]]
        file.unlink()


def test_a_partial_file_of_something_else_is_left_alone(here: Here, stub: CollabServiceStub, tmp_path: Path) -> None:
    """One of another session, one of this session before it was restored, and a damaged one are told and kept."""
    session_id, other = new_session(stub), new_session(stub)
    for n in range(3):
        append(stub, session_id, json=f'{{"n":{n}}}')
        append(stub, other, json=f'{{"n":{n}}}')
    lines = whole_export(here, session_id, tmp_path / "whole.jsonl")
    file, partial = tmp_path / "session.jsonl", tmp_path / "session.jsonl.partial"
    restored = log_of([NewEvent('{"other":1}')] * 3, session_id)
    before_restore = [lines[0], *map(event_line, restored)]
    for content, status, words in (
        (whole_export(here, other, tmp_path / "other.jsonl"), 1, f"is of another session, {other}; remove it"),
        ([lines[0].replace(b'"createdAt":"2', b'"createdAt":"1'), *lines[1:]], 1, "is of another session"),
        (before_restore, 6, "remove FILE.partial and export again"),
        (before_restore[:-1], 6, "the chain breaks at event 3"),
        ([*lines[:2], lines[2].replace(b'"n":1', b'"n":7')], 6, "damaged in line 3: .* remove it and export again"),
        ([b"something else\n"], 1, "its first line is no header"),
    ):
        partial.write_bytes(b"".join(content))
        assert re.search(words, here.refused("export", session_id, file, status=status))
        assert partial.read_bytes() == b"".join(content)
        assert not file.exists()


def run_shell(command: str, *arguments: object, address: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the shell in which `"$@"` is `collab` with these arguments."""
    return subprocess.run(
        ["sh", "-c", command, "sh", *COLLAB, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=clean_environment(COLLAB_TARGET=address),
        check=False,
    )


def test_a_disk_that_is_full(here: Here, server: ServeProcess, stub: CollabServiceStub, tmp_path: Path) -> None:
    """The sentence says so and how to go on; there is no file of that name until it is whole."""
    session_id = new_session(stub)
    for _ in range(20):
        append(stub, session_id, json=f'{{"text": "{"x" * 1_000}"}}')
    whole = b"".join(whole_export(here, session_id, tmp_path / "whole.jsonl"))
    file, partial = tmp_path / "session.jsonl", tmp_path / "session.jsonl.partial"
    result = run_shell('ulimit -f 8; exec "$@"', "export", session_id, file, address=server.grpc_address)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"collab: cannot write {partial}: File too large; what {partial} holds is kept, "
        "and the same command again goes on from there\n"
    )
    assert not file.exists()
    assert 0 < partial.stat().st_size < len(whole)
    assert whole.startswith(partial.read_bytes())
    whole_export(here, session_id, file)
    assert file.read_bytes() == whole

    result = run_shell('exec "$@" >/dev/full', "export", session_id, address=server.grpc_address)
    assert result.returncode == 1
    assert result.stderr == "collab: cannot write to standard output: No space left on device\n"
    missing = tmp_path / "missing" / "x.jsonl"
    said = here.refused("export", session_id, missing, status=1)
    assert said == f"cannot write {missing}.partial: No such file or directory; nothing was exported"


def test_an_export_that_is_interrupted(
    here: Here, server: ServeProcess, stub: CollabServiceStub, tmp_path: Path
) -> None:
    """Ctrl-C keeps what there is and says how to go on; nobody else can write the file at the same time."""
    session_id = many_events(stub, 2_000)
    lines = whole_export(here, session_id, tmp_path / "whole.jsonl")
    file, partial = tmp_path / "session.jsonl", tmp_path / "session.jsonl.partial"
    partial.write_bytes(b"".join(lines[:501]))

    async def start(address: str) -> asyncio.subprocess.Process:
        command = [*COLLAB, "export", str(session_id), str(file), "--target", address]
        return await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, env=clean_environment())

    async def work() -> None:
        async with TcpProxy(server.grpc_address) as proxy:
            proxy.hold()
            process = await start(proxy.address)
            await until(is_true(lambda: proxy.is_connected()), "a connection")
            proxy.refuse()  # any other
            proxy.cut_after(10_000)  # in the midst of events
            proxy.release()
            await until(is_true(lambda: proxy.refused > 0), "another attempt to connect")
            other = await start(server.grpc_address)
            _, err = await other.communicate()
            told = f"collab: another export is writing {partial}; wait for it, or choose another name\n"
            assert (other.returncode, err.decode()) == (1, told)
            process.send_signal(signal.SIGINT)
            _, err = await process.communicate()
            held = partial.read_bytes().count(b"\n") - 1
            told = f"{partial} holds {held:,} events, and the same command again goes on from there"
            assert (process.returncode, err.decode()) == (130, f"collab: interrupted; {told}\n")

    asyncio.run(work())
    begun = partial.read_bytes()
    assert b"".join(lines).startswith(begun)
    assert 501 <= begun.count(b"\n") < 2_001
    assert whole_export(here, session_id, file) == lines


def is_true(holds: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    """Return a condition that can be waited for."""

    async def condition() -> bool:
        return holds()

    return condition


def many_events(stub: CollabServiceStub, count: int, **session: Any) -> int:
    """Create a session with so many events."""
    session_id = new_session(stub, **session)
    batch = [pb.NewEvent(json=f'{{"n": {n}}}') for n in range(count)]
    for start in range(0, count, 1_000):
        request = pb.AppendEventsRequest(session_id=session_id, events=batch[start : start + 1_000])
        stub.AppendEvents(request, timeout=TIMEOUT)
    return session_id


def start_import(file: Path, address: str, *arguments: str) -> subprocess.Popen[str]:
    """Start `collab import`."""
    return subprocess.Popen(
        [*COLLAB, "import", str(file), "--target", address, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    )


def payloads(stub: CollabServiceStub, session_id: int) -> list[str]:
    """Return the payloads of a session."""
    return [event.json for event in events(stub, session_id)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_import_that_is_cut_short_goes_on(
    here: Here,
    server: ServeProcess,
    stub: CollabServiceStub,
    server_database_url: str,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    """By Ctrl-C, which tells how, or by `kill -9`: called again it writes what is missing and nothing twice."""
    source = many_events(stub, 2_000)
    file = tmp_path / "session.jsonl"
    whole_export(here, source, file)
    room = unique()
    session_id = new_session(stub, room=room)
    with Gate(server_database_url, session_id, after=1_000) as gate, start_import(
        file, server.grpc_address, "--room", room
    ) as process:  # fmt: skip
        gate.wait_for_knock()
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT)
        assert out == ""
        gate.open()
    if number is signal.SIGINT:
        assert process.returncode == 130
        told = f"interrupted; session {session_id} has 1,000 of 2,000 events; to go on, call it again"
        assert err == f"collab: {told}\n"
    else:
        assert err == ""
    assert stored(stub, session_id).last_server_seq in (1_000, 1_500)
    assert here.say("import", file, "--room", room) == f"Imported 2,000 events into session {session_id}\n"
    assert payloads(stub, session_id) == payloads(stub, source)


def test_a_service_that_is_killed_during_an_import(
    here: Here, database_url: str, directory: Path, tmp_path: Path
) -> None:
    """Killed with a batch on its way and started again on its port, it is waited for, and all is written once."""
    file = tmp_path / "session.jsonl"
    address = "127.0.0.1:0"
    with ExitStack() as stack:
        with Stub(database_url, directory, address) as (server, stub):
            address = server.grpc_address
            texts = payloads(stub, source := many_events(stub, 2_000))
            here.run("export", source, file, "--target", address)
            session_id = new_session(stub)
            gate = stack.enter_context(Gate(database_url, session_id, after=1_000))
            process = stack.enter_context(start_import(file, address, "--into", str(session_id)))
            stack.callback(process.kill)
            gate.wait_for_knock()
            server.process.kill()
            server.wait()
        gate.open()  # PostgreSQL commits what the service has sent, which nobody is told
        with Stub(database_url, directory, address) as (_, stub):
            out, err = process.communicate(timeout=2 * TIMEOUT)
            assert (process.returncode, err) == (0, "")
            assert out == f"Imported 2,000 events into session {session_id}\n"
            assert payloads(stub, session_id) == texts


@pytest.fixture
def replayed(server: ServeProcess) -> Iterator[int]:
    """The session of a whole recording."""
    if not TRACES.exists():
        pytest.skip("the recordings lie beside the repository, not in it")
    result = collab("replay", str(TRACES / "rustcode.json.gz"), "--target", server.grpc_address, timeout=110)
    assert (result.returncode, result.stderr) == (0, "")
    told = re.match(r"Session (\d+): 36,981 transactions", result.stdout)
    assert told is not None
    yield int(told[1])


@pytest.mark.long
def test_a_whole_recording(
    here: Here, server: ServeProcess, stub: CollabServiceStub, replayed: int, tmp_path: Path
) -> None:
    """What was replayed is exported, deleted and imported; file and session are verified, and hold the same events."""
    file, again = tmp_path / "rustcode.jsonl", tmp_path / "again.jsonl"
    before = [content_of(event) for event in events(stub, replayed)]
    chain = stored(stub, replayed).chain_hash.hex()
    assert here.run("export", replayed, file).err == f"Exported session {replayed}: 36,981 events, chain {chain}\n"
    assert here.json("verify", replayed) == here.json("verify", file)
    here.say("session", "delete", replayed)
    here.refused("verify", replayed, status=4)
    (imported,) = here.json("import", file)
    assert [content_of(event) for event in events(stub, imported["id"])] == before
    (told,) = here.json("verify", imported["id"])
    assert (told["sessionId"], told["events"]) == (imported["id"], 36_981)
    assert told["chainHash"] == stored(stub, imported["id"]).chain_hash.hex() != chain
    here.run("export", imported["id"], again)
    assert here.json("verify", again) == [told]
    assert [event.content() for event in read(again)] == [event.content() for event in read(file)]
