"""What was called and what was answered: everything that the checks go by, and that is kept when one fails."""

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct, field

from collab_service.client import Event, NewEvent

Outcome = Literal["stored", "refused", "unknown"]


class Sent(Struct, frozen=True):
    """An event as it was sent. No two have the same `mark`; what is sent again keeps it."""

    mark: str
    """What the event carries as its `hash`."""
    payload: str | bytes
    key: str | None = None
    """Its idempotency key, if its author gave it one."""

    def event(self) -> NewEvent:
        """Return what is sent."""
        return NewEvent(self.payload, hash=self.mark, idempotency_key=self.key)


class Append(Struct, tag=True):
    """One call that appends, or one request of a stream, with what was answered. A second attempt is another one."""

    number: int
    session: int
    writer: str
    events: Sequence[Sent]
    expected: int | None
    begun: float
    """Seconds of the run, as everywhere here."""
    stream: str = ""
    """The stream that it was a request of: those of one stream are in the order in which they were sent."""
    client: bool = False
    """Whether it was the client's, which sends again by itself, with keys of its own."""
    ended: float | None = None
    outcome: Outcome = "unknown"
    reason: str = ""
    first: int = 0
    """The number of the first event, where it was answered; so are the next four, where the call answers them."""
    created_at: str = ""
    replayed: bool = False
    id: int = 0
    chain_hash: str = ""


class Delete(Struct, tag=True):
    """A session that was deleted."""

    number: int
    session: int
    begun: float
    ended: float | None = None
    outcome: Outcome = "unknown"
    reason: str = ""


class Opened(Struct, tag=True):
    """A reader that has begun, or has begun again behind what it had."""

    reader: str
    session: int
    since: int
    follow: bool
    begun: float


class Page(Struct, tag=True):
    """What a reader was sent."""

    reader: str
    session: int
    at: float
    events: Sequence[tuple[int, int, str]]
    """Number, id and chain hash of each, the last of which stands for its content and all before it."""
    through: int
    head: int


class Closed(Struct, tag=True):
    """The end of what a reader was sent; without a reason it was told that this is all."""

    reader: str
    session: int
    at: float
    reason: str = ""


class Fault(Struct, tag=True):
    """What was done to the service."""

    kind: str
    begun: float
    ended: float | None = None
    note: str = ""
    hit: bool = False
    """Whether it found something to damage at its moment, and did."""


Entry = Append | Delete | Opened | Page | Closed | Fault


class History(Struct):
    """Everything in the order in which it began."""

    seed: int = 0
    entries: list[Entry] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        """Return the seconds since the start."""
        return round(time.monotonic() - self.started, 6)

    def append(
        self,
        session: int,
        writer: str,
        events: Sequence[Sent],
        *,
        expected: int | None = None,
        stream: str = "",
        client: bool = False,
    ) -> Append:
        """Note that a call begins; who calls fills in the rest."""
        call = Append(len(self.entries), session, writer, events, expected, self.now(), stream, client)
        self.entries.append(call)
        return call

    def appends(self) -> Iterable[Append]:
        """Return the appends."""
        return (entry for entry in self.entries if isinstance(entry, Append))

    def write(self, path: Path) -> None:
        """Write it as JSON lines."""
        path.write_bytes(msgspec.json.Encoder().encode_lines(self.entries))


def page_events(events: Iterable[Event]) -> list[tuple[int, int, str]]:
    """Return events as a `Page` has them."""
    return [(event.server_seq, event.id, event.chain_hash.hex()) for event in events]
