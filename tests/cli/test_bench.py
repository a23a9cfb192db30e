"""`collab bench`: its figures are those of the service, it sees what goes wrong, and it leaves nothing behind."""

import json
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from collab_service.cli import benching
from collab_service.cli.load import payload_of
from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.cli.gate import wait_until
from tests.cli.here import Here
from tests.cli.terminal import Terminal
from tests.cli.test_help import DOCUMENT
from tests.cli.test_workers import children_of, is_running
from tests.processes import COLLAB, ServeProcess, clean_environment
from tests.rpc.calls import TIMEOUT, events

SHORT = ("--warm-up", 0, "--writers", 4)
PERCENTILES = ["min", "mean", "p50", "p90", "p99", "p999", "max"]


def sessions(stub: CollabServiceStub) -> dict[int, int]:
    """Return the sessions of benches that are there, with the number of their events."""
    request = pb.ListSessionsRequest(owner_id="collab bench", page_size=1000)
    found = stub.ListSessions(request, timeout=TIMEOUT).sessions
    return {session.id: session.last_server_seq for session in found}


def measured(here: Here, *arguments: object) -> dict[str, Any]:
    """Run it, and return its figures; all has to be well."""
    (figures,) = here.json("bench", *SHORT, *arguments)
    assert isinstance(figures, dict)
    assert figures["errors"] == {}
    assert not figures["interrupted"]
    return figures


@contextmanager
def running(address: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """Run it as a process that has to be ended."""
    with subprocess.Popen(
        [*COLLAB, "bench", "--target", address, *map(str, (*SHORT, *arguments))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=clean_environment(),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_events(stub: CollabServiceStub, before: dict[int, int]) -> None:
    """Wait until a bench that was started after `before` was seen has written something."""
    wait_until(lambda: any(count for id_, count in sessions(stub).items() if id_ not in before), "the first event")


@pytest.mark.parametrize("stream", [(), ("--stream",)])
@pytest.mark.parametrize(("batch", "processes"), [(1, 1), (7, 2)])
def test_the_figures_are_those_of_the_service(
    here: Here, stub: CollabServiceStub, batch: int, processes: int, stream: tuple[str, ...]
) -> None:
    """Every acknowledged event is stored, as large as it was asked for, and each follower has seen each one."""
    figures = measured(
        here, "--events", 150, "--batch", batch, "--processes", processes, "--sessions", 2, "--followers", 3,
        "--payload", 100, "--keep", *stream,
    )  # fmt: skip
    assert figures["settings"]["stream"] == bool(stream)
    assert figures["events"] == figures["storedEvents"] == 150
    first, second = (events(stub, id_) for id_ in figures["sessionIds"])
    assert len(first) + len(second) == 150
    assert figures["delivered"] == 2 * len(first) + len(second)
    assert figures["misplaced"] == figures["missing"] == figures["warmUpEvents"] == figures["doubtfulEvents"] == 0
    for event in (*first, *second):
        assert len(event.json) == 100
        assert isinstance(json.loads(event.json), dict)
    appends = {(event.actor_id, event.client_seq) for event in (*first, *second)}
    assert figures["appends"] == len(appends)
    assert {actor for actor, _ in appends} == {f"writer-{number}" for number in range(4)}
    for times in (figures["latencyMs"], figures["deliveryLagMs"]):
        assert list(times) == PERCENTILES
        assert 0 < times["min"] <= times["p50"] <= times["p90"] <= times["p99"] <= times["p999"] <= times["max"]
        assert times["min"] <= times["mean"] <= times["max"]
    assert figures["eventsPerSecond"] == pytest.approx(150 / figures["seconds"], rel=0.01)
    assert figures["appendsPerSecond"] == pytest.approx(len(appends) / figures["seconds"], rel=0.01)
    assert figures["payloadBytesPerSecond"] == pytest.approx(150 * 100 / figures["seconds"], rel=0.01)


def test_for_a_time_after_a_warm_up(here: Here, stub: CollabServiceStub) -> None:
    """It ends when the time is over; what was written in the warm-up is not measured; the sessions are deleted."""
    before = sessions(stub)
    figures = measured(here, "--duration", 0.3, "--warm-up", 0.2, "--followers", 1)
    assert 0.2 < figures["seconds"] < 10
    assert figures["warmUpEvents"] > 0
    assert figures["events"] + figures["warmUpEvents"] == figures["storedEvents"]
    assert figures["appends"] == figures["events"] == figures["delivered"]
    assert figures["sessionIds"] == []
    assert sessions(stub) == before


def test_more_sessions_than_writers(here: Here, stub: CollabServiceStub) -> None:
    """Each writer takes its sessions in turn, so that all are written to."""
    figures = measured(here, "--sessions", 10, "--events", 50, "--keep")
    actors = [{event.actor_id for event in events(stub, id_)} for id_ in figures["sessionIds"]]
    assert actors == [{f"writer-{number % 4}"} for number in range(10)]


def test_every_name_is_documented(here: Here) -> None:
    """docs/command-line.md names what `--output json` prints, name by name."""
    figures = measured(here, "--events", 1)
    text = DOCUMENT.read_text()
    section = text[text.index("## Measuring") : text.index("## Environment")]
    table = "".join(line for line in section.splitlines(keepends=True) if line.startswith("|"))
    assert set(re.findall(r"`(\w+)`", table)) - {"null", "count", "message"} == {
        *figures,
        *figures["settings"],
        *figures["latencyMs"],
    }
    assert figures["deliveryLagMs"] is None


def test_people_are_told(here: Here, server: ServeProcess) -> None:
    """As text it says what was done, rates, times and deliveries."""
    said = here.say("bench", *SHORT, "--events", 50, "--followers", 2, "--keep", "--batch", 5)
    for words in (
        "4 writers in 1 process, 1 session, 2 followers, 5 events of 200 bytes to an append, each a call",
        r"events     50 in \d+\.\d s, [\d,]+/s, \d+\.\d\d MB/s of payload",
        r"appends    10, [\d,]+/s",
        r"ms +min +mean +p50 +p90 +p99 +p99.9 +max",
        r"append( +[\d,]+\.\d\d){7}",
        r"delivery( +[\d,]+\.\d\d){7}",
        r"delivered  100 events, [\d,]+/s, to each follower each one once and in order",
        r"kept       session \d+",
    ):
        assert re.search(f"^{words}$", said, re.MULTILINE), (words, said)


@pytest.mark.parametrize("size", [*range(2, 20), 200, 4096])
def test_a_payload_is_an_object_of_its_size(size: int) -> None:
    """It has exactly so many bytes, and is the same whoever makes it."""
    payload = payload_of(size)
    assert len(payload.encode()) == size
    assert isinstance(json.loads(payload), dict)
    assert payload_of(size) == payload


def test_no_payload(here: Here, stub: CollabServiceStub) -> None:
    """With `--payload 0` the events are empty objects, and there are no bytes to count."""
    figures = measured(here, "--events", 5, "--payload", 0, "--keep")
    assert [event.json for event in events(stub, figures["sessionIds"][0])] == 5 * ["{}"]
    assert figures["payloadBytesPerSecond"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("--payload", 1), "--payload 1 is no JSON object"), (("--processes", 5), "--processes needs one")],
)
def test_options_that_do_not_go_together(here: Here, arguments: tuple[object, ...], words: str) -> None:
    """They are told before anything is asked of the service."""
    assert words in here.refused("bench", *SHORT, *arguments, "--target", "127.0.0.1:1", status=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--writers", 0), ("--sessions", 0), ("--batch", 1001), ("--duration", 0), ("--warm-up", -1), ("--events", 0)],
)
def test_numbers_out_of_range(here: Here, option: str, value: int) -> None:
    """They are wrong command lines, which name the option."""
    ended = here.run("bench", option, value)
    assert (ended.status, ended.out) == (2, "")
    assert option in ended.err


def test_no_service(here: Here) -> None:
    """Where nothing listens the status is 3."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert "nothing that speaks gRPC answers" in here.refused("bench", "--target", address, status=3)


def test_what_the_service_refuses(here: Here, stub: CollabServiceStub) -> None:
    """Where waiting does not help each writer gives up at once: it is counted, told, and the status is 1."""
    before = sessions(stub)
    ended = here.run("bench", *SHORT, "--duration", 60, "--payload", 2_000_000, "--output", "json")
    assert ended.status == 1
    assert ended.err.startswith("collab: 4 calls failed with EVENT_TOO_LARGE (event.json: must be at most")
    figures = json.loads(ended.out)
    assert figures["errors"]["EVENT_TOO_LARGE"]["count"] == 4
    assert figures["events"] == figures["appends"] == figures["storedEvents"] == 0
    assert figures["latencyMs"] is None
    assert sessions(stub) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c(server: ServeProcess, stub: CollabServiceStub, number: signal.Signals) -> None:
    """It ends at once, prints what there is, deletes the sessions, and has status 130; after SIGTERM as well."""
    before = sessions(stub)
    with running(server.grpc_address, "--duration", 3600, "--followers", 2, "--output", "json") as process:
        wait_for_events(stub, before)
        process.send_signal(number)
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, err) == (130, "collab: interrupted\n")
    figures = json.loads(out)
    assert figures["interrupted"]
    assert figures["storedEvents"] == figures["events"] > 0
    assert figures["delivered"] == 2 * figures["events"]
    assert sessions(stub) == before


def test_a_terminal_shows_how_it_goes(server: ServeProcess, stub: CollabServiceStub) -> None:
    """One line tells rate and p99 so far; it goes away, and what Ctrl-C has cut short is told in the end."""
    with Terminal(server.grpc_address, "bench", *SHORT, "--duration", 3600) as terminal:
        terminal.wait_for("/s, p99 ")
        terminal.interrupt()
        status, text = terminal.end()
    assert status == 130
    assert re.search(r"\d of 3600 s, [\d,]+ events, [\d,]+/s, p99 [\d,]+\.\d ms", text)
    assert text.endswith("collab: interrupted\n")


def test_a_service_that_goes_away(
    here: Here, monkeypatch: pytest.MonkeyPatch, database_url: str, directory: Path
) -> None:
    """Calls that fail are counted by reason, what was acknowledged before is told, and the status is 3."""
    monkeypatch.setattr(benching, "_TIMEOUT", 0.3)
    with (
        ServeProcess("--database-url", database_url, cwd=directory) as server,
        psycopg.connect(database_url, autocommit=True) as connection,
    ):

        def has_events() -> bool:
            return connection.execute("SELECT FROM collab_events LIMIT 1").fetchone() is not None

        def kill() -> None:
            wait_until(has_events, "the first event")
            server.process.kill()

        killing = threading.Thread(target=kill)
        killing.start()
        ended = here.run(
            "bench", *SHORT, "--duration", 1.5, "--target", server.grpc_address, "--output", "json", "--followers", 1
        )
        killing.join()
        server.wait()
        stored = connection.execute("SELECT count(*) FROM collab_events").fetchone()
    assert ended.status == 3
    assert "failed with Unavailable (the service does not answer" in ended.err
    assert "1 session could not be deleted" in ended.err
    figures = json.loads(ended.out)
    assert figures["errors"]["Unavailable"]["count"] > 0
    assert figures["storedEvents"] is figures["missing"] is None
    assert len(figures["sessionIds"]) == 1
    assert stored is not None
    assert 0 <= stored[0] - figures["events"] <= figures["doubtfulEvents"]


def test_a_promise_that_is_broken(here: Here, server_database_url: str) -> None:
    """Where the database loses what was acknowledged, that is seen, and the status is 6."""
    with psycopg.connect(server_database_url, autocommit=True) as connection:
        connection.execute(
            """
            CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
            CREATE TRIGGER lose BEFORE INSERT ON collab_events FOR EACH ROW
            WHEN (NEW.type = 'bench' AND NEW.server_seq = 5) EXECUTE FUNCTION lose()
            """
        )
        try:
            ended = here.run("bench", "--warm-up", 0, "--writers", 1, "--events", 9, "--output", "json")
        finally:
            connection.execute("DROP FUNCTION lose CASCADE")
    assert ended.status == 6
    assert ended.err.startswith("collab: 9 events were acknowledged, and 4 are stored")
    figures = json.loads(ended.out)
    assert (figures["events"], figures["storedEvents"]) == (9, 4)


def test_the_processes_end_with_their_parent(server: ServeProcess, stub: CollabServiceStub) -> None:
    """`kill -9` of the command leaves no load on the service."""
    before = sessions(stub)
    with running(server.grpc_address, "--duration", 3600, "--processes", 2) as process:
        wait_for_events(stub, before)
        pids = children_of(process.pid)
        assert len(pids) == 2
        process.kill()
        wait_until(lambda: not any(map(is_running, pids)), "the end of the load")
