"""When sessions were active: what is remembered of it is written, and forgotten."""

import asyncio

from collab_service.log.activity import ActivityWriter
from collab_service.log.service import LogService
from tests.log.logs import new_session
from tests.log.test_sequencer import holding

_LATER = 4_000_000_000_000_000
"""Microseconds, in the year 2096."""


async def test_what_is_gone_is_forgotten_and_what_is_held_is_kept(service: LogService, database_url: str) -> None:
    """Sessions that are deleted, however many, leave nothing behind; one that somebody holds waits for its turn."""
    ids = [await new_session(service) for _ in range(30)]
    for session_id in ids[2:]:
        await service.delete_session(session_id)
    # One of the test's own: the service's writes by itself whenever it likes.
    activity = ActivityWriter(service._database)
    activity.note(dict.fromkeys(ids, _LATER), written=())
    async with holding(database_url, ids[0]):
        await activity.flush()
        assert list(activity._newest) == ids[:1]
    await activity.flush()
    assert not activity._newest
    sessions = [await service.get_session(session_id) for session_id in ids[:2]]
    assert {session.last_active for session in sessions} == {_LATER}


async def test_calls_at_once_wait_for_what_is_held_together(service: LogService, database_url: str) -> None:
    """However many lists of sessions are asked for at once, what others hold is not waited for by each in turn."""
    waits: list[int] = []

    class Activity(ActivityWriter):
        async def _wait_and_write(self, session_id: int, left: dict[int, int]) -> None:
            waits.append(session_id)
            await super()._wait_and_write(session_id, left)

    session_id = await new_session(service)
    activity = Activity(service._database)
    activity.note({session_id: _LATER}, written=())
    async with holding(database_url, session_id):
        await asyncio.gather(*(activity.flush() for _ in range(20)))
        assert 1 <= len(waits) <= 2
        await activity.flush()  # asked for when those had ended
        assert 2 <= len(waits) <= 3
    await activity.flush()
    assert not activity._newest
