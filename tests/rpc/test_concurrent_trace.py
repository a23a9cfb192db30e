"""Three people who really wrote together, writing again at the same time over three connections.

Each author has seen what the recording says they had seen (`parents`) before they write. So in the log every
transaction comes after its parents.
"""

import gzip
import json
import threading
from typing import Any

import grpc
import pytest

from collab_service.v1 import collab_service_pb2 as pb
from collab_service.v1.collab_service_pb2_grpc import CollabServiceStub
from tests.conftest import TRACES
from tests.processes import ServeProcess
from tests.rpc.calls import TIMEOUT, events, new_session

_PATIENCE = 500.0
"""Seconds for the others to write: for long stretches only one of the three does."""

RECORDING = TRACES / "clownschool_concurrent.json.gz"


class Acknowledged:
    """Which transactions have been acknowledged, for authors who wait for them."""

    def __init__(self) -> None:
        self._done: set[int] = set()
        self._changed = threading.Condition()

    def add(self, index: int) -> None:
        """Note an acknowledgement."""
        with self._changed:
            self._done.add(index)
            self._changed.notify_all()

    def wait_for(self, indexes: list[int]) -> None:
        """Wait until all of these have been acknowledged."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._done.issuperset(indexes), _PATIENCE)


def write_together(server: ServeProcess, count: int) -> None:
    """Write the first `count` transactions and check that no effect comes before its cause."""
    with gzip.open(RECORDING) as file:
        transactions: list[dict[str, Any]] = json.load(file)["txns"][:count]
    acknowledged = Acknowledged()
    with grpc.insecure_channel(server.grpc_address) as channel:
        session = new_session(CollabServiceStub(channel))
    failures: list[BaseException] = []

    def write(agent: int) -> None:
        try:
            with grpc.insecure_channel(server.grpc_address, [("grpc.use_local_subchannel_pool", 1)]) as own:
                stub = CollabServiceStub(own)
                for index, transaction in enumerate(transactions):
                    if transaction["agent"] != agent:
                        continue
                    acknowledged.wait_for(transaction["parents"])
                    event = pb.NewEvent(
                        actor_id=f"agent-{agent}",
                        client_seq=index,
                        json=json.dumps({"patches": transaction["patches"]}),
                    )
                    stub.AppendEvent(pb.AppendEventRequest(session_id=session, event=event), timeout=TIMEOUT)
                    acknowledged.add(index)
        except BaseException as error:
            failures.append(error)

    authors = [threading.Thread(target=write, args=(agent,)) for agent in range(3)]
    for author in authors:
        author.start()
    for author in authors:
        author.join()
    assert not failures
    with grpc.insecure_channel(server.grpc_address) as channel:
        log = events(CollabServiceStub(channel), session)
    assert [event.server_seq for event in log] == list(range(1, len(transactions) + 1))
    number = {event.client_seq: event.server_seq for event in log}
    assert len(number) == len(transactions)
    for index, transaction in enumerate(transactions):
        assert all(number[parent] < number[index] for parent in transaction["parents"])
    for event in log:
        transaction = transactions[event.client_seq]
        assert event.actor_id == f"agent-{transaction['agent']}"
        assert json.loads(event.json) == {"patches": transaction["patches"]}


@pytest.mark.skipif(not RECORDING.exists(), reason="the recordings lie beside the repository, not in it")
def test_the_beginning(server: ServeProcess) -> None:
    """Every event's parents have lower numbers, in the first few thousand transactions."""
    write_together(server, 3_000)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not RECORDING.exists(), reason="the recordings lie beside the repository, not in it")
def test_the_whole(server: ServeProcess) -> None:
    """Every event's parents have lower numbers, in the whole recording."""
    write_together(server, 1_000_000)
