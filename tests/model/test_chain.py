"""The chain is the public contract's, to the bit."""

import pytest

from collab_service.model import Event, NewEvent
from collab_service.model.chain import chain_next, chain_start, content_digest, first_broken_link

FIRST = NewEvent(actor_id="ada", client_seq=0, type="insert", payload='{"text":"héllo"}', hash="sha256:abc123")
SECOND = NewEvent(payload=b"\x00\x01\xff", signature=b"sig", idempotency_key="k-1")


def log() -> list[Event]:
    """Return the contract's worked example."""
    first = chain_next(chain_start(7), 7, 1, 1700000000123456, content_digest(FIRST))
    second = chain_next(first, 7, 2, 1700000000123999, content_digest(SECOND))
    return [Event(1, 7, 1, 1700000000123456, first, FIRST), Event(2, 7, 2, 1700000000123999, second, SECOND)]


def test_the_worked_example_of_the_contract() -> None:
    """Anyone who implements the contract computes these hashes."""
    assert content_digest(FIRST).hex() == "f6d928551259ae2468e6f1f6b0b69d3e8898ba503dbf0add207a1efd6a4580ab"
    assert chain_start(7).hex() == "5160d34d6e5258869246887360ea6a26c1e44a3b2929169eadf3bb1853f5ea88"
    first, second = log()
    assert first.chain_hash.hex() == "28843bf3a82a3e821a6adaf35def0328a067f4086d5744baee7e2975651775cb"
    assert second.chain_hash.hex() == "6df198a043f4e5a60b633c048fddf5379a6f5d7584566a2a0e2660b7bddf266f"


def test_present_but_empty_is_not_absent() -> None:
    """Fields cannot be moved into each other without the digest telling."""
    variants = [
        NewEvent(),
        NewEvent(hash=""),
        NewEvent(payload=b""),
        NewEvent(payload=b"{}"),
        NewEvent(actor_id="{}"),
        NewEvent(type="{}"),
        NewEvent(client_seq=0),
        NewEvent(hash="0"),
        NewEvent(idempotency_key="0"),
        NewEvent(signature=b"0"),
    ]
    assert len({content_digest(event) for event in variants}) == len(variants)
    assert content_digest(NewEvent(signature=b"")) == content_digest(NewEvent())


@pytest.mark.parametrize("field", ["id", "server_seq", "created_at", "content"])
def test_a_changed_event_breaks_the_chain_where_it_is(field: str) -> None:
    """Whoever holds a log can tell what was changed; an event's id is not part of it."""
    first, second = log()
    assert first_broken_link(chain_start(7), [first, second]) is None
    changed = {"id": 9, "server_seq": 3, "created_at": 1700000000123998, "content": FIRST}[field]
    values = {name: getattr(second, name) for name in second.__struct_fields__} | {field: changed}
    found = first_broken_link(chain_start(7), [first, Event(**values)])
    assert (found is None) == (field == "id")
