"""`collab session`: sessions are created, shown, listed, touched and deleted, by their number or their room."""

import uuid
from typing import Any

import grpc
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.here import Here
from tests.cli.terminal import Terminal
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, append, new_session


def unique(word: str = "room") -> str:
    """Return a name that nobody has used yet."""
    return f"{word} {uuid.uuid4().hex[:12]}"


def stored(stub: CollabServiceStub, session_id: int) -> pb.Session:
    """Return a session as the service has it."""
    return stub.GetSession(pb.GetSessionRequest(session_id=session_id), timeout=TIMEOUT).session


def is_there(stub: CollabServiceStub, **which: Any) -> bool:
    """Tell whether there is such a session."""
    try:
        stub.GetSession(pb.GetSessionRequest(**which), timeout=TIMEOUT)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.NOT_FOUND
        return False
    return True


def iso(time: Any) -> str:
    """Return a protobuf time as the contract has it in JSON."""
    return f"{time.ToDatetime().isoformat(timespec='microseconds')}Z"


def form_of(session: pb.Session) -> dict[str, Any]:
    """Return a session in the contract's JSON, field by field and in its order."""
    return {
        "id": session.id,
        "languageId": session.language_id if session.HasField("language_id") else None,
        "ownerId": session.owner_id if session.HasField("owner_id") else None,
        "room": session.room if session.HasField("room") else None,
        "createdAt": iso(session.create_time),
        "lastActive": iso(session.last_active_time),
        "lastServerSeq": session.last_server_seq,
    }


def test_json_is_the_contracts(here: Here, stub: CollabServiceStub) -> None:
    """`--output json` prints the session object of the HTTP API, with every field, whether it has a value or not."""
    room = unique()
    (created,) = here.json("session", "create", "--room", room, "--owner", "ada", "--language", 7)
    append(stub, created["id"])
    (shown,) = here.json("session", "show", created["id"])
    assert list(shown.items()) == list(form_of(stored(stub, created["id"])).items())
    assert (shown["languageId"], shown["ownerId"], shown["room"], shown["lastServerSeq"]) == (7, "ada", room, 1)
    (bare,) = here.json("session", "create")
    assert list(bare.items()) == list(form_of(stored(stub, bare["id"])).items())
    assert (bare["languageId"], bare["ownerId"], bare["room"]) == (None, None, None)


def test_text_is_for_people(here: Here, stub: CollabServiceStub) -> None:
    """A session is shown with all that it has, a line for each, and `-` for what it has not."""
    room = unique()
    session_id = int(here.say("session", "create", "--room", room).removeprefix("Session ").removesuffix(" created\n"))
    append(stub, session_id)
    session = stored(stub, session_id)
    lines = [line.split(None, 1) for line in here.say("session", "show", room).splitlines()]
    assert lines == [
        ["session", str(session_id)],
        ["room", room],
        ["owner", "-"],
        ["language", "-"],
        ["created", iso(session.create_time)],
        ["last", f"active  {iso(session.last_active_time)}"],
        ["events", "1"],
        ["last", "number  1"],
        ["chain", session.chain_hash.hex()],
    ]


def test_a_room_has_one_session(here: Here, stub: CollabServiceStub) -> None:
    """Creating it again shows the session that is there, which is left as it is, and says so."""
    room = unique()
    (first,) = here.json("session", "create", "--room", room, "--owner", "ada")
    append(stub, first["id"])
    again = here.say("session", "create", "--room", room, "--owner", "bob")
    assert again == f"Session {first['id']} has this room already, with 1 event\n"
    (shown,) = here.json("session", "create", "--room", room, "--owner", "bob")
    assert (shown["id"], shown["ownerId"], shown["lastServerSeq"]) == (first["id"], "ada", 1)


@pytest.mark.parametrize("prefix", ["", "room:"])
def test_a_room_that_looks_like_something_else(here: Here, prefix: str) -> None:
    """A room of digits, and one that begins with `room:`, are named with `room:` before them."""
    room = prefix + str(uuid.uuid4().int >> 70)
    (created,) = here.json("session", "create", "--room", room)
    assert here.json("session", "show", f"room:{room}") == [created]
    here.refused("session", "show", room, status=4)
    assert here.say("session", "delete", f"room:{room}").startswith(f"Deleted session {created['id']} ")


def test_the_list_is_by_activity_and_filtered(here: Here, stub: CollabServiceStub) -> None:
    """The most recently active session comes first; an owner, a language, or both together choose among them."""
    owner, other = unique("ada"), unique("bob")
    a = new_session(stub, owner_id=owner, language_id=1)
    b = new_session(stub, owner_id=owner, language_id=2)
    c = new_session(stub, owner_id=owner)
    d = new_session(stub, owner_id=other, language_id=2)
    (touched,) = here.json("session", "touch", a)
    assert touched == form_of(stored(stub, a))
    append(stub, b)

    def listed(*options: object) -> list[int]:
        return [session["id"] for session in here.json("session", "list", *options)]

    assert listed("--owner", owner) == [b, a, c]
    assert listed("--owner", owner, "--language", 2) == [b]
    assert listed("--owner", other) == [d]
    assert listed("--language", 2)[:2] == [b, d]
    assert listed("--owner", unique("nobody")) == []
    assert here.json("session", "list", "--owner", owner)[1] == touched
    session = stored(stub, b)
    first = here.say("session", "list", "--owner", owner).splitlines()[0]
    assert first == f"{b}  1  {iso(session.last_active_time)}  2  {owner}  -"


def test_a_list_that_is_cut_says_so(here: Here, stub: CollabServiceStub) -> None:
    """`--limit` cuts it, and says so when there are more, apart from the list; 0 lists all."""
    owner = unique("ada")
    ids = [new_session(stub, owner_id=owner) for _ in range(3)][::-1]
    for limit, shown in ((1, 1), (2, 2), (3, 3), (4, 3), (0, 3)):
        ended = here.run("session", "list", "--owner", owner, "--limit", limit, "-o", "json")
        assert ended.status == 0
        assert [line.split(",")[0] for line in ended.out.splitlines()] == [f'{{"id":{id_}' for id_ in ids[:shown]]
        hint = f"Only the first {shown} are shown; --limit 0 shows all of them.\n"
        assert ended.err == (hint if shown < 3 else "")


def test_touch_moves_the_last_activity(here: Here, stub: CollabServiceStub) -> None:
    """It moves to now and nothing else changes, by number or by room, in JSON or text."""
    room = unique()
    session_id = new_session(stub, room=room)
    before = form_of(stored(stub, session_id))
    (after,) = here.json("session", "touch", room)
    assert after.pop("lastActive") > before.pop("lastActive")
    assert after == before
    assert f"room         {room}\n" in here.say("session", "touch", session_id)


@pytest.mark.parametrize("options", [(), ("--yes",), ("-y",)])
def test_a_script_is_not_asked(here: Here, stub: CollabServiceStub, options: tuple[str, ...]) -> None:
    """Without a terminal a session is deleted at once, with `--yes` and without; then it is not there any more."""
    room = unique()
    session_id = new_session(stub, room=room)
    append(stub, session_id)
    assert here.say("session", "delete", room, *options) == f"Deleted session {session_id} with 1 event\n"
    assert not is_there(stub, session_id=session_id)
    here.refused("session", "delete", session_id, status=4)
    assert here.refused("session", "delete", room, status=4).startswith(f"there is no session with the room '{room}'")


@pytest.mark.parametrize(
    ("answer", "deleted"),
    [("y\n", True), ("n\n", False), ("\n", False), ("\x04", False), (None, False)],
    ids=["yes", "no", "nothing", "Ctrl-D", "Ctrl-C"],
)
def test_a_person_is_asked(server: ServeProcess, stub: CollabServiceStub, answer: str | None, deleted: bool) -> None:
    """On a terminal it asks, tells how much would go, and deletes nothing unless the answer is yes."""
    session_id = new_session(stub)
    append(stub, session_id)
    with Terminal(server.grpc_address, "session", "delete", session_id) as terminal:
        terminal.wait_for(f"Delete session {session_id} with 1 event? [y/N]: ")
        if answer is None:
            terminal.interrupt_until("nothing was deleted")
        else:
            terminal.press(answer)
        status, shown = terminal.end()
    assert is_there(stub, session_id=session_id) != deleted
    assert status == (0 if deleted else 130)
    last = f"Deleted session {session_id} with 1 event" if deleted else "collab: nothing was deleted"
    assert shown.splitlines()[-1] == last


def test_nothing_an_owner_wrote_reaches_the_terminal(here: Here, stub: CollabServiceStub) -> None:
    """Rooms and owners are shown with escapes for what could move the cursor, also where a sentence names them."""
    room, owner = unique("\x1b[2J\r\n\u202e"), unique("\x9b31m\x07")
    session_id = new_session(stub, room=room, owner_id=owner)
    shown = here.say("session", "show", session_id) + here.say("session", "list", "--owner", owner)
    assert all(line.isprintable() for line in shown.splitlines())
    for text in ("\\x1b[2J  \\u202e", "\\x9b31m\\x07"):
        assert shown.count(text) == 2
    here.say("session", "delete", room)
    assert "'\\x1b[2J  \\u202e" in here.refused("session", "show", room, status=4)  # which is one line that only shows
