"""Gives events their numbers: all appends of this process, written together.

A transaction for each append would wait for the commit before it, on a busy session. So whatever waits is written in
one transaction:

1. Take what is queued, fairly by session.
2. Lock the sessions' rows in the order of their ids. Two processes can then never deadlock, and within a session the
   order of the numbers is the order of the commits, so that a reader never sees a gap. A session that somebody else
   holds is left out and waits for its lock apart, so that it cannot stall the others.
3. In a later statement, whose snapshot is taken after the locks, read each session's head and the idempotency keys.
4. Decide on one request after the other (`decide`). One caller's mistake is that caller's answer and nobody else's.
5. Insert, commit, and only then answer.

What fails:

* Before the commit was sent, nothing is stored. A conflict or a lost connection is tried again; an unexpected error
  makes the requests be tried one by one, so that a poisoned one takes no other down with it.
* When the connection is lost during the commit, nobody knows its outcome. The session's lock is taken again: then the
  old transaction has ended, one way or the other, and the event at our first number tells which. Until that is known
  for certain, nothing is tried again.
* A commit that comes with a warning was carried out here, but no longer waited for a synchronous standby. A fail-over
  could still lose it, so nobody is told that it is stored.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import psycopg
import structlog

from collab_service.log.background import BackgroundTasks
from collab_service.log.connections import AppendConnections
from collab_service.log.decide import Appended, AppendRequest, Decision, SessionState, replay_start
from collab_service.log.doubt import Decisions, InDoubt, refuse_warnings, took_place
from collab_service.log.queue import AppendQueue, Pending
from collab_service.model import Event, QueueLimits
from collab_service.model.chain import content_digest
from collab_service.model.errors import (
    CollabError,
    CommitOutcomeUnknown,
    DatabaseUnreachable,
    LockTimeout,
    SessionNotFound,
    ShuttingDown,
    TransactionConflict,
)
from collab_service.storage.database import Database
from collab_service.storage.pipeline import PipelineConnection
from collab_service.storage.repository import appending
from collab_service.storage.times import now_micros

_log = structlog.get_logger(__name__)

_EVENT_BYTES = 256
"""What an event weighs in the queue besides its content, roughly."""
_TRANSACTION_EVENTS = 1_000
_TRANSACTION_BYTES = 8 * 1024 * 1024
_ATTEMPTS = 3
_LOCK_WAIT = 10.0
"""Seconds to wait for a session that somebody else holds."""
_LOCK_TURN = 0.2
"""Seconds of that at a time, so that a session that is stuck does not keep the others from waiting."""
_HELD_SESSIONS = 4
"""Sessions to wait for at once, each with a connection."""
_GATHER = 0.006
"""Seconds to wait at most for callers who were active a moment ago."""
_GATHER_PER_CALLER = 0.0002
"""Seconds of that for each of them: for a few it is not worth more, since a transaction takes them less than a
millisecond."""


class Sequencer:
    """Appends for one process. One task writes; further ones wait for sessions that others hold."""

    def __init__(
        self,
        database: Database,
        limits: QueueLimits,
        *,
        tasks: BackgroundTasks,
        on_stored: Callable[[Sequence[Event]], None],
        clock: Callable[[], int] = now_micros,
    ) -> None:
        """Prepare; `start` makes it work.

        Args:
            database: Where to write.
            limits: How much may wait.
            tasks: The owner of the tasks that write.
            on_stored: Called with the new events of each transaction, after its commit and before the answers.
            clock: The time in microseconds.
        """
        self._limits = limits
        self._queue = AppendQueue(limits)
        self._tasks = tasks
        self._on_stored = on_stored
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._expected = 1
        self._writing: set[Pending] = set()
        self._wrote = asyncio.Event()
        self._connections = AppendConnections(database)
        self._held_slots = asyncio.Semaphore(_HELD_SESSIONS)

    async def append(self, request: AppendRequest) -> Appended:
        """Append events to a session, all or nothing, and return them as they are stored.

        Raises:
            SessionNotFound: There is no such session.
            ServerSeqConflict: The expected last number is not the session's.
            IdempotencyKeyReused: A key is stored with other content.
            Overloaded: Too much is waiting already.
            StorageUnavailable: The database cannot do it now. Nothing was stored.
            CommitOutcomeUnknown: The events may or may not be stored.
            ShuttingDown: `stop` was called.
        """
        if self._closing:
            raise ShuttingDown
        size = request.size + _EVENT_BYTES * len(request.events)
        answer: asyncio.Future[Decision] = self._loop.create_future()
        pending = Pending(request, list(map(content_digest, request.events)), size, answer)
        self._queue.put(pending)
        try:
            decision = await answer
        except asyncio.CancelledError:
            self._queue.remove(pending)
            self._wrote.set()
            raise
        if isinstance(decision, Appended):
            return decision
        raise decision

    def start(self) -> None:
        """Begin to write."""
        self._tasks.spawn(self._run(), "append")

    async def stop(self, grace: float) -> None:
        """Accept nothing more and write what waits, for `grace` seconds at most; the rest is told."""
        self._closing = True
        try:
            async with asyncio.timeout(grace):
                while self._writing or len(self._queue):
                    self._wrote.clear()
                    await self._wrote.wait()
        except TimeoutError:
            _log.warning("appends were cut off", waiting=len(self._queue), writing=len(self._writing))
        in_doubt = list(self._writing)
        await self._tasks.cancel()
        _fail(self._queue.take_all(), ShuttingDown())
        _fail(in_doubt, CommitOutcomeUnknown())
        self._connections.close()

    async def _run(self) -> None:
        while True:
            await self._gather()
            batch = self._queue.take(
                events=_TRANSACTION_EVENTS, size=_TRANSACTION_BYTES, sessions=self._limits.transaction_sessions
            )
            active = len(batch)
            await self._write(batch)
            self._expected = active + self._queue.ready

    async def _gather(self) -> None:
        """Wait for something to write, and a moment longer for those who are likely to come.

        Callers tend to come back once they are answered. So as many as the last transaction answered, or kept waiting,
        are expected again; a lone caller expects nobody and does not wait.
        """
        await self._queue.wait_for(1)
        if self._expected > self._queue.ready:
            try:
                async with asyncio.timeout(min(_GATHER, _GATHER_PER_CALLER * self._expected)):
                    await self._queue.wait_for(self._expected)
            except TimeoutError:
                pass

    async def _write_held(self, session_id: int) -> None:
        """Write what waits for one session, once whoever holds it lets go."""
        try:
            done = False
            while not done:
                async with self._held_slots:
                    batch = self._queue.take_held(session_id, events=_TRANSACTION_EVENTS, size=_TRANSACTION_BYTES)
                    done = await self._write(batch, wait_seconds=_LOCK_TURN)
        finally:
            self._queue.release(session_id)

    async def _write(self, batch: list[Pending], *, wait_seconds: float | None = None) -> bool:
        """Write requests in one transaction and answer them; when that fails, tell them, or try them one by one.

        False when the lock was not to be had in `wait_seconds`: those who can wait longer are back in the queue.
        """
        mine = list(batch)
        self._writing.update(mine)
        try:
            if batch:
                await self._write_with_retries(batch, wait_seconds)
        except LockTimeout as error:
            now = self._loop.time()
            for pending in batch:
                pending.give_up_at = min(pending.give_up_at, now + _LOCK_WAIT)
            _fail([pending for pending in batch if pending.give_up_at <= now], error)
            self._queue.put_back([pending for pending in batch if not pending.answer.done()])
            return False
        except CollabError as error:
            _fail(batch, error)
        except Exception as error:
            if len(batch) == 1:
                _fail(batch, error)
            else:
                _log.warning("an append transaction failed, its requests are tried one by one", cause=repr(error))
                await self._write_one_by_one(batch, wait_seconds)
        finally:
            self._writing.difference_update(mine)
            self._wrote.set()
        return True

    async def _write_one_by_one(self, batch: list[Pending], wait_seconds: float | None) -> None:
        left = deque(batch)
        while left:
            pending = left.popleft()
            session_id = pending.request.session_id
            await self._write([pending], wait_seconds=wait_seconds)
            if not pending.answer.done() or (wait_seconds is None and self._queue.is_held(session_id)):
                # It was put off, so those behind it in its session are, too; they keep their order.
                behind = [other for other in left if other.request.session_id == session_id]
                left = deque(other for other in left if other.request.session_id != session_id)
                first = [pending] if self._queue.remove(pending) else []
                self._queue.put_back(first + behind)

    async def _write_with_retries(self, batch: list[Pending], wait_seconds: float | None) -> None:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                await self._transact(batch, wait_seconds)
                return
            except InDoubt as doubt:
                if await took_place(doubt, self._connections):
                    self._answer(doubt.decisions, doubt.events)
                    return
                _log.info("the commit in doubt did not take place")
            except (TransactionConflict, DatabaseUnreachable) as error:
                if attempt == _ATTEMPTS:
                    raise
                _log.info("an append transaction is tried again", cause=repr(error.__cause__ or error))
        raise DatabaseUnreachable

    async def _transact(self, batch: list[Pending], wait_seconds: float | None) -> None:
        """Write `batch` in one transaction. What is put off or no longer wanted is taken out of the list."""
        keys = _keys_of(batch)
        if len(set(keys)) < len(keys):
            self._put_off_repeated_keys(batch)
            keys = _keys_of(batch)
        async with self._connections.lend() as connection:
            locked = await appending.lock_sessions(
                connection,
                {pending.request.session_id for pending in batch},
                keys,
                new_ids=sum(len(pending.request.events) for pending in batch),
                wait_seconds=wait_seconds,
            )
            self._put_off(batch, locked.held)
            batch[:] = [pending for pending in batch if not pending.answer.done()]
            decisions, events = await self._decide(connection, batch, locked)
            if events or any(isinstance(decision, Appended) for _, decision in decisions):
                # Also when it holds nothing but replays: what they found is acknowledged, so it has to be everywhere
                # where a commit waits for it to be.
                await self._commit(connection, events, decisions)
            else:
                await connection.run(appending.ROLLBACK)
        self._answer(decisions, events)

    def _put_off_repeated_keys(self, batch: list[Pending]) -> None:
        """Leave a request with a key that another in the batch has to a later transaction, which can look it up.

        With it go those behind it in its session, which keep their order.
        """
        seen: set[tuple[int, str]] = set()
        put_off: dict[int, list[Pending]] = {}
        for pending in batch:
            session_id = pending.request.session_id
            keys = {(session_id, key) for _, key in pending.request.idempotency_keys()}
            if session_id in put_off or not seen.isdisjoint(keys):
                put_off.setdefault(session_id, []).append(pending)
            seen |= keys
        for later in put_off.values():
            self._queue.put_back(later)
            batch[:] = [pending for pending in batch if pending not in later]

    def _put_off(self, batch: list[Pending], held: set[int]) -> None:
        """Let requests for sessions that somebody else holds wait apart."""
        if not held:
            return
        self._queue.put_back([pending for pending in batch if pending.request.session_id in held])
        batch[:] = [pending for pending in batch if pending.request.session_id not in held]
        for session_id in held:
            self._queue.hold(session_id)
            self._tasks.spawn(self._write_held(session_id), f"append-to-held-session-{session_id}")

    async def _decide(
        self, connection: PipelineConnection, batch: Sequence[Pending], locked: appending.Locked
    ) -> tuple[Decisions, list[Event]]:
        """Decide on each request; return the decisions and the events to store."""
        states = {session_id: SessionState(session_id, head) for session_id, head in locked.heads.items()}
        if locked.known_keys:
            for (session_id, key), server_seq in locked.known_keys.items():
                if session_id in states:
                    states[session_id].known_keys[key] = server_seq
            await _read_replayed(connection, batch, states)
        now, ids = self._clock(), iter(locked.ids)
        decisions: list[tuple[Pending, Decision]] = []
        for pending in batch:
            request = pending.request
            state = states.get(request.session_id)
            if state is None:
                decisions.append((pending, SessionNotFound(session_id=request.session_id)))
            else:
                decisions.append((pending, state.decide(request, pending.digests, now, ids)))
        return decisions, [event for state in states.values() for event in state.added]

    async def _commit(self, connection: PipelineConnection, events: Sequence[Event], decisions: Decisions) -> None:
        try:
            await appending.insert_and_commit(connection, events)
        except psycopg.Error as error:
            if connection.usable or not events:
                raise  # the server said that it failed, or there was nothing to store
            if not connection.warnings:
                raise InDoubt(events, decisions) from error
        refuse_warnings(connection)

    def _answer(self, decisions: Decisions, stored: Sequence[Event]) -> None:
        """Tell everybody what became of their request; the transaction is committed."""
        if stored:
            self._on_stored(stored)
        for pending, decision in decisions:
            if not pending.answer.done():
                pending.answer.set_result(decision)


def _keys_of(batch: Sequence[Pending]) -> list[tuple[int, str]]:
    return [(pending.request.session_id, key) for pending in batch for _, key in pending.request.idempotency_keys()]


async def _read_replayed(
    connection: PipelineConnection, batch: Sequence[Pending], states: Mapping[int, SessionState]
) -> None:
    """Read the stored events that requests with a known key may be replays of."""
    ranges = []
    for pending in batch:
        state = states.get(pending.request.session_id)
        if state is not None and (known := state.known_places(pending.request)):
            first = replay_start(known)
            ranges.append((state.session_id, first, first + len(pending.request.events) - 1))
    if ranges:
        for (session_id, server_seq), event in (await appending.read_stored(connection, ranges)).items():
            states[session_id].stored[server_seq] = event


def _fail(batch: Sequence[Pending], error: Exception) -> None:
    for pending in batch:
        if not pending.answer.done():
            pending.answer.set_exception(error)
