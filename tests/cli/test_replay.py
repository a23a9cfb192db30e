"""`collab replay`: a recording written, read back and checked; and what it says when it cannot."""

import gzip
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from collab_service.cli.failure import CommandError
from collab_service.cli.trace import apply_patches, read_trace
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.conftest import TRACES
from tests.processes import ServeProcess, collab

_TIME = "2024-01-01T00:00:00.000Z"

# Three people; characters of one to four bytes, so that counting anything but code points ends elsewhere.
RECORDING: dict[str, Any] = {
    "startContent": "",
    "endContent": "𝄞 héllo 😀👩\u200d🚀 wörld!",
    "numAgents": 3,
    "txns": [
        {"agent": 0, "time": _TIME, "patches": [[0, 0, "😀👩\u200d🚀"]]},
        {"agent": 2, "time": _TIME, "patches": [[0, 0, "héllo "], [10, 0, " world"]]},
        {"agent": 0, "time": _TIME, "patches": [[12, 1, "ö"]]},
        {"agent": 1, "time": _TIME, "patches": []},
        {"agent": 2, "time": _TIME, "patches": [[0, 0, "𝄞 "], [18, 0, "!"]]},
    ],
}


def write(path: Path, recording: object) -> Path:
    """Write a recording."""
    path.write_bytes(gzip.compress(json.dumps(recording, ensure_ascii=False).encode()))
    return path


def assert_one_sentence(stderr: str, *words: str) -> None:
    """Assert that a command's last words are one sentence with these words."""
    assert stderr.startswith("collab: ")
    assert stderr.count("\n") == 1
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr


@pytest.mark.parametrize("batch", [1, 100])
def test_a_recording_is_replayed(tmp_path: Path, server: ServeProcess, stub: CollabServiceStub, batch: int) -> None:
    """Each transaction is an event of its writer with the writer's own counter; text and chain are checked and told."""
    trace = write(tmp_path / "small.json.gz", RECORDING)
    result = collab("replay", str(trace), "--batch", str(batch), COLLAB_TARGET=server.grpc_address)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"text       {len(RECORDING['endContent'])} code points, as recorded" in result.stdout
    assert "chain " in result.stdout
    assert re.search(rf"appended   5 events in .*, {batch} to an append", result.stdout)
    told = re.match(r"Session (\d+): 5 transactions from small.json.gz", result.stdout)
    assert told is not None
    session_id = int(told[1])

    (message,) = stub.ListEvents(pb.ListEventsRequest(session_id=session_id), timeout=20)
    assert [(event.actor_id, event.client_seq) for event in message.events] == [
        ("agent-0", 0),
        ("agent-2", 0),
        ("agent-0", 1),
        ("agent-1", 0),
        ("agent-2", 1),
    ]
    assert len({event.idempotency_key for event in message.events}) == 5
    text = ""
    for event in message.events:
        text = apply_patches(text, json.loads(event.json)["patches"])
    assert text == RECORDING["endContent"]
    assert message.events[-1].chain_hash.hex() in result.stdout
    # One time of creation for each transaction of the database: so many appends there were.
    times = {event.create_time.ToMicroseconds() for event in message.events}
    assert (len(times) == 1) == (batch == 100)


def test_a_recording_that_ends_elsewhere_is_told(tmp_path: Path, server: ServeProcess) -> None:
    """When what was read back is not the recorded text, the command fails and says so."""
    trace = write(tmp_path / "wrong.json.gz", {**RECORDING, "endContent": "something else"})
    result = collab("replay", str(trace), "--target", server.grpc_address)
    assert result.returncode == 6
    assert_one_sentence(result.stderr, "not the recorded one")


def test_no_file(tmp_path: Path) -> None:
    """A file that is not there is one sentence."""
    result = collab("replay", str(tmp_path / "missing.json.gz"))
    assert (result.returncode, result.stdout) == (1, "")
    assert_one_sentence(result.stderr, str(tmp_path / "missing.json.gz"), "No such file")


def test_no_server(tmp_path: Path) -> None:
    """A service that does not answer is one sentence with what to do."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = collab("replay", str(write(tmp_path / "small.json.gz", RECORDING)), "--target", address)
    assert (result.returncode, result.stdout) == (3, "")
    assert_one_sentence(result.stderr, "answers at", address, "collab serve")


_TXN = {"time": _TIME, "patches": [[0, 0, "a"]]}
_WHOLE = gzip.compress(json.dumps(RECORDING).encode(), mtime=0)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no gzip", "is no recording"),
        (_WHOLE[:-20], "is no recording"),
        (_WHOLE[:20] + b"\xff" * 20 + _WHOLE[40:], "is no recording"),
        (gzip.compress(b"no json", mtime=0), "is no recording"),
        (gzip.compress(b"\xff\xfe\xfd", mtime=0), "is no recording"),
        (gzip.compress(b"[1, 2]", mtime=0), "is no recording"),
        (gzip.compress(b'"text"', mtime=0), "is no recording"),
        (gzip.compress(b"{}", mtime=0), "is no recording"),
        ({"startContent": "", "endContent": "", "txns": 1}, "is no recording"),
        ({"startContent": "", "endContent": "", "txns": [1]}, "is no recording"),
        ({"startContent": "", "endContent": "", "txns": [{"time": _TIME, "patches": [[0, 0]]}]}, "is no recording"),
        ({"startContent": "", "endContent": "", "txns": [{"time": _TIME, "patches": 1}]}, "is no recording"),
        ({"startContent": "", "endContent": "", "txns": [{"time": _TIME}]}, "is no recording"),
        ({"startContent": "", "txns": [_TXN]}, "is no recording"),
        ({"startContent": "", "endContent": "a", "txns": [{**_TXN, "parents": [], "agent": 0}]}, "has parents"),
    ],
)
def test_what_is_no_recording(tmp_path: Path, content: bytes | dict[str, Any], words: str) -> None:
    """Whatever the file holds, what is wrong with it is one sentence that names it."""
    path = tmp_path / "odd.json.gz"
    path.write_bytes(content) if isinstance(content, bytes) else write(path, content)
    with pytest.raises(CommandError, match=words) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


with_recordings = pytest.mark.skipif(not TRACES.exists(), reason="the recordings lie beside the repository, not in it")


@with_recordings
def test_the_concurrent_recording_is_refused(server: ServeProcess) -> None:
    """The recording without an order of its own is refused with the reason, before anything is written."""
    result = collab("replay", str(TRACES / "clownschool_concurrent.json.gz"), "--target", server.grpc_address)
    assert (result.returncode, result.stdout) == (1, "")
    assert_one_sentence(result.stderr, "parents", "linear or sequential")


@pytest.mark.long
@with_recordings
@pytest.mark.parametrize(
    ("name", "transactions", "code_points"),
    [
        ("clownschool_linear_agents", 23_136, 21_148),
        ("rustcode", 36_981, 65_218),
        ("json-crdt-patch", 18_639, 49_302),
    ],
)
def test_a_whole_recording(server: ServeProcess, name: str, transactions: int, code_points: int) -> None:
    """What people really wrote comes back to the letter, with a chain that anybody can compute."""
    trace = TRACES / f"{name}.json.gz"
    result = collab("replay", str(trace), "--target", server.grpc_address, timeout=110)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"appended   {transactions:,} events" in result.stdout
    assert f"read back  {transactions:,} events" in result.stdout
    assert f"text       {code_points:,} code points, as recorded" in result.stdout
    assert "computed anew" in result.stdout
