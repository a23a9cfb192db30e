"""What the sequencer knows of sessions without asking the database, which then only has to confirm it."""

from collections import OrderedDict
from collections.abc import Collection, Mapping
from types import MappingProxyType

from msgspec import Struct

from collab_service.storage.repository.appending import Head

_SESSIONS = 20_000
"""Sessions whose heads are kept."""


class _Known(Struct):
    head: Head
    ours: bool
    """Whether the last transaction found the head as the one before it had left it, so that nobody else writes here."""


class KnownHeads:
    """The heads of the sessions that this process has written into lately, as it has left them.

    They are good for nothing where others write, too. So a head is used from the second transaction on that found
    nobody else's events before it, and no longer once it was found to be outdated.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, _Known] = OrderedDict()

    def of(
        self, session_ids: Collection[int], *, after: Mapping[int, Head] = MappingProxyType({})
    ) -> dict[int, Head] | None:
        """Return the heads of sessions that nobody else seems to write into, by id; None when one is not known.

        Args:
            session_ids: The sessions.
            after: The heads that a transaction will leave that is under way.
        """
        heads = {}
        for session_id in sorted(session_ids):
            known = self._known.get(session_id)
            if known is None or not known.ours:
                return None
            heads[session_id] = after.get(session_id, known.head)
        return heads

    def is_ours(self, session_id: int) -> bool:
        """Tell whether nobody else seems to write into a session."""
        known = self._known.get(session_id)
        return known is not None and known.ours

    def wrote(self, session_id: int, *, found: Head, head: Head) -> None:
        """Take note of what a transaction has found and left."""
        known = self._known.get(session_id)
        if known is not None:
            known.ours = known.head == found
            known.head = head
            self._known.move_to_end(session_id)
            return
        self._known[session_id] = _Known(head, ours=False)
        if len(self._known) > _SESSIONS:
            self._known.popitem(last=False)

    def doubt(self, session_ids: Collection[int]) -> None:
        """Have it confirmed by the next transaction that nobody else writes into these sessions."""
        for session_id in session_ids:
            if session_id in self._known:
                self._known[session_id].ours = False
