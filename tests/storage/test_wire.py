"""Envelopes: the messages that rows carry are those that protobuf makes."""

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_service.model import Event, NewEvent
from collab_service.rpc.convert import event_message
from collab_service.storage.repository.wire import envelope, message, sql_with_id
from collab_service.v1 import collab_service_pb2 as pb

_EDGES = [0, 1, 127, 128, 2**14, 2**28 - 1, 2**28, 2**35, 2**56 - 1, 2**56, 2**63 - 1]
_NUMBERS = st.sampled_from(_EDGES) | st.integers(0, 2**63 - 1)
_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
_CONTENTS = st.builds(
    NewEvent,
    actor_id=st.none() | _TEXTS,
    client_seq=st.none() | _NUMBERS,
    type=st.none() | _TEXTS,
    payload=_TEXTS | st.binary(max_size=300) | st.sampled_from([2**14, 2**20]).map(bytes),
    hash=st.none() | _TEXTS,
    signature=st.binary(max_size=1_024),
    idempotency_key=st.none() | _TEXTS,
)


@given(
    st.builds(
        Event, _NUMBERS, _NUMBERS, _NUMBERS, st.integers(0, 2**53), st.binary(min_size=32, max_size=32), _CONTENTS
    )
)
def test_a_message_says_what_the_event_does(event: Event) -> None:
    """Whatever an event holds, its message is the one that protobuf reads as that event."""
    assert list(pb.ListEventsResponse.FromString(message(event)).events) == [event_message(event)]


@pytest.mark.parametrize("event_id", _EDGES)
def test_an_id_that_is_given_with_the_insert(database_url: str, event_id: int) -> None:
    """The id that a statement puts into an envelope is the same as one that was known before."""
    content = NewEvent("ada", 7, "edit", "{}", None, b"", None)
    without, with_id = (Event(id_, 12, 345, 6_789_000_001, bytes(32), content) for id_ in (0, event_id))
    with psycopg.connect(database_url) as connection:
        statement = f"SELECT {sql_with_id('%(envelope)s::bytea', '%(id)s::bigint')}".encode()
        row = connection.execute(statement, {"envelope": envelope(without), "id": event_id}).fetchone()
    assert row == (envelope(with_id),)
