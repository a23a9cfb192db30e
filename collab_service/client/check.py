"""Checks a log that somebody holds: numbers, times and the chain, computed anew."""

from datetime import UTC, datetime, timedelta

from collab_service.client.values import Event
from collab_service.model.chain import chain_next, chain_start, content_digest

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class BrokenLog(Exception):
    """The events are not the log that they claim to be; the message says from which event on."""


class LogCheck:
    """Takes a session's events one after the other, from the first, and computes the chain over them.

    Afterwards `chain_hash` must be the session's, or that of whoever else holds the log: then both hold the same.
    """

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.last_server_seq = 0
        """The number of the last event that was taken."""
        self.chain_hash = chain_start(session_id)
        """The chain's head after it, 32 bytes."""
        self._last_time = _EPOCH

    def add(self, event: Event) -> None:
        """Take the next event.

        Raises:
            BrokenLog: It is of another session, not the next one, earlier than the one before, or its content is not
                what its chain hash says.
        """
        number = event.server_seq
        if event.session_id != self.session_id:
            raise self._broken(f"event {number} is of session {event.session_id}")
        if number != self.last_server_seq + 1:
            raise self._broken(f"after event {self.last_server_seq} comes event {number}")
        if event.created_at < self._last_time:
            raise self._broken(f"event {number} is from before the event before it")
        micros = (event.created_at - _EPOCH) // _MICROSECOND
        chain_hash = chain_next(self.chain_hash, self.session_id, number, micros, content_digest(event))
        if chain_hash != event.chain_hash:
            raise self._broken(f"the chain breaks at event {number}: it, or one before it, is not what was stored")
        self.last_server_seq, self.chain_hash, self._last_time = number, chain_hash, event.created_at

    def _broken(self, how: str) -> BrokenLog:
        return BrokenLog(f"the log of session {self.session_id} is not right: {how}")
