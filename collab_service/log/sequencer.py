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

Where nobody else writes into these sessions, this process knows their heads (`known`). Then it decides first, and sends
one statement that locks, inserts if the heads are still those, and commits. When they are not, or a key is known, it
has done nothing, and the five steps follow.

What fails:

* Before the commit was sent, nothing is stored. A conflict or a lost connection is tried again; an unexpected error
  makes each of the requests be tried alone, so that a poisoned one takes no other down with it.
* When the connection is lost during the commit, nobody knows its outcome, and each request keeps what it would have
  stored (`doubt`). The next transaction takes the session's lock: then the old one has ended, one way or the other, and
  the event at our first number tells which. If it is not there, the same transaction stores the request once more.
  The one statement may have been cut off before it took its locks, and come late: then either it is found, or it finds
  the numbers taken; and where the second attempt fails, the outcome stays unknown.
* A commit that comes with a warning was carried out here, but no longer waited for a synchronous standby. A fail-over
  could still lose it, so nobody is told that it is stored.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from time import perf_counter

import psycopg
import structlog
from msgspec.structs import force_setattr

from collab_service.log.activity import ActivityWriter
from collab_service.log.background import BackgroundTasks
from collab_service.log.connections import AppendConnections
from collab_service.log.decide import Appended, AppendRequest, Decision, SessionState, replay_start
from collab_service.log.doubt import InDoubt, doubt_refusals, in_doubt_when_lost, look_for_attempts, refuse_warnings
from collab_service.log.known import KnownHeads
from collab_service.log.plan import (
    Plan,
    Written,
    added,
    decide_all,
    events_of,
    keys_of,
    plan,
    stored_of,
    times_of,
)
from collab_service.log.queue import AppendQueue, Arrivals, Pending, Succession, add_if_wanted
from collab_service.metrics import AppendMetrics
from collab_service.model import Event, QueueLimits
from collab_service.model.chain import content_digest
from collab_service.model.errors import (
    CollabError,
    CommitOutcomeUnknown,
    DatabaseUnreachable,
    LockTimeout,
    Overloaded,
    Reason,
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
_RESOLVE = 30.0
"""Seconds to try to find out what became of a commit."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0
"""Seconds between attempts to find out."""
_LINGER = 0.05
"""Seconds without a request after which a session that was waited for is written together with the others again."""
_GATHER = 0.012
"""Seconds to wait at most for callers who were active a moment ago."""
_GATHER_PER_EVENT = 0.0003
"""Seconds of that for each event expected of them: for a few it is not worth more, since a transaction takes them less
than a millisecond."""
_GATHER_LONGEST = 0.05
"""Seconds of that where transactions take long: as long again as the last one, if many events are expected."""
_WORTH_GATHERING = 64
"""Events from which on a transaction costs next to nothing for each of them."""


class Sequencer:
    """Appends for one process. One task writes; further ones wait for sessions that others hold."""

    def __init__(
        self,
        database: Database,
        limits: QueueLimits,
        *,
        activity: ActivityWriter,
        metrics: AppendMetrics,
        tasks: BackgroundTasks,
        on_stored: Callable[[Sequence[Event]], None],
        clock: Callable[[], int] = now_micros,
    ) -> None:
        """Prepare; `start` makes it work.

        Args:
            database: Where to write.
            limits: How much may wait.
            activity: What remembers when sessions were active.
            metrics: Where it is seen how appending fares.
            tasks: The owner of the tasks that write.
            on_stored: Called with the new events of each transaction, after its commit and before the answers.
            clock: The time in microseconds.
        """
        self._limits = limits
        self._activity = activity
        self._metrics = metrics
        self._queue = AppendQueue(limits)
        self._tasks = tasks
        self._on_stored = on_stored
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._closing = False
        self._heads = KnownHeads()
        self._next: list[Pending] = []
        """What is written next, where it was taken while the last transaction was under way."""
        self._plan: Plan | None = None
        """What was planned for it."""
        self._writing: dict[int, list[Pending]] = {}
        """What is being written, by the identity of the batch. What is put off is taken out of it."""
        self._wrote = asyncio.Event()
        self._connections = AppendConnections(database)
        self._held_slots = asyncio.Semaphore(_HELD_SESSIONS)
        metrics.watch_queue(lambda: len(self._queue), lambda: self._queue.size, lambda: self._queue.held_sessions)

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
        pending = self._pending(request, None)
        self.check_room(request.session_id, pending.size)
        self._queue.put(pending)
        try:
            decision = await pending.answer
        except asyncio.CancelledError:
            self.withdraw(pending)
            raise
        if isinstance(decision, Appended):
            return decision
        raise decision

    def check_room(self, session_id: int, size: int) -> None:
        """Raise `Overloaded` if there is no room for an append of so many bytes, which need not be looked at then."""
        try:
            self._queue.check_room(session_id, size)
        except Overloaded as error:
            self._metrics.refused(error.reason)
            raise

    async def submit(self, request: AppendRequest, succession: Succession) -> Pending:
        """Let a request wait to be written, as soon as there is room for it; its `answer` tells what became of it.

        Args:
            request: What to append.
            succession: The requests that it comes behind of.

        Raises:
            ShuttingDown: `stop` was called.
        """
        pending = self._pending(request, succession)
        await self._queue.put_when_there_is_room(pending)
        try:
            self._refuse_when_closing()
        except ShuttingDown:
            self._queue.remove(pending)
            raise
        return pending

    def withdraw(self, pending: Pending) -> None:
        """Give up on a request: it is not written, unless that has begun."""
        pending.answer.cancel()
        self._queue.remove(pending)
        self._wrote.set()

    def _pending(self, request: AppendRequest, succession: Succession | None) -> Pending:
        self._refuse_when_closing()
        size = request.size + _EVENT_BYTES * len(request.events)
        answer: asyncio.Future[Decision] = self._loop.create_future()
        digests = list(map(content_digest, request.events))
        return Pending(request, digests, size, answer, since=perf_counter(), succession=succession)

    def _refuse_when_closing(self) -> None:
        if self._closing:
            self._metrics.refused(ShuttingDown.reason)
            raise ShuttingDown

    def start(self) -> None:
        """Begin to write."""
        self._tasks.spawn(self._run(), "append")

    async def stop(self, grace: float) -> None:
        """Accept nothing more and write what waits, for `grace` seconds at most; the rest is told."""
        self._closing = True
        try:
            async with asyncio.timeout(grace):
                while self._writing or self._next or len(self._queue):
                    self._wrote.clear()
                    await self._wrote.wait()
        except TimeoutError:
            writing = sum(map(len, self._writing.values()))
            _log.warning("appends were cut off", waiting=len(self._queue), writing=writing)
        in_doubt = [pending for batch in self._writing.values() for pending in batch]
        await self._tasks.cancel()
        self._put_back_next()
        self._fail(self._queue.take_all(), ShuttingDown())
        self._fail(in_doubt, CommitOutcomeUnknown())
        self._connections.close()

    async def _run(self) -> None:
        expected, took = 1, 0.0
        while True:
            if not self._next:
                await _gather(self._queue.arrivals, expected, took)
                self._next = self._take()
            batch, self._next = self._next, []
            active = events_of(batch)
            begun = perf_counter()
            await self._write(batch)
            expected, took = active + self._queue.arrivals.ready, perf_counter() - begun

    def _take(self) -> list[Pending]:
        return self._queue.take(
            events=_TRANSACTION_EVENTS, size=_TRANSACTION_BYTES, sessions=self._limits.transaction_sessions
        )

    async def _plan_next(self, before: Plan) -> None:
        """Take and plan what is written next while a transaction is under way, once it is as much as that one writes.

        For fewer events it is not worth it: they would rather be joined by those that come until then.
        """
        await self._queue.arrivals.wait_for(len(before.events))
        self._next = self._take()
        heads = self._heads.of({pending.request.session_id for pending in self._next}, after=before.left)
        self._plan = plan(self._next, heads, self._clock()) if heads else None

    def _put_back_next(self) -> None:
        self._queue.put_back(self._next)
        self._next = []

    async def _write_held(self, session_id: int, arrivals: Arrivals) -> None:
        """Write what waits for one session apart, for as long as somebody else writes into it, too."""
        expected, stuck_since = 1, perf_counter()
        try:
            while await _gathered_in_time(arrivals, expected):
                async with self._held_slots:
                    batch = self._queue.take_held(session_id, events=_TRANSACTION_EVENTS, size=_TRANSACTION_BYTES)
                    active = events_of(batch)
                    done = await self._write(batch, wait_seconds=_LOCK_TURN, stuck_since=stuck_since)
                expected = active + arrivals.ready
                if done:
                    stuck_since = perf_counter()
                if done and self._heads.is_ours(session_id):
                    return
        finally:
            self._queue.release(session_id)

    async def _write(
        self, taken: list[Pending], *, wait_seconds: float | None = None, stuck_since: float = 0.0
    ) -> bool:
        """Write requests in one transaction and answer them; those that it is not the end for are back in the queue.

        Args:
            taken: The requests.
            wait_seconds: How long to wait for sessions that others hold; None puts their requests off.
            stuck_since: When others were found to hold them, or last let go of them, by `time.perf_counter`.

        Returns:
            False when the locks were not to be had in that time.
        """
        batch: list[Pending] = []
        for pending in taken:
            add_if_wanted(pending, batch)
        self._writing[id(batch)] = batch
        try:
            written = await self._write_with_retries(batch, wait_seconds) if batch else None
        except LockTimeout as error:
            now = perf_counter()
            for pending in batch:
                if now - max(pending.since, stuck_since) >= (_RESOLVE if pending.attempts else _LOCK_WAIT):
                    self._fail([pending], error)
            self._queue.put_back([pending for pending in batch if not pending.answer.done()])
            return False
        except CollabError as error:
            self._fail(batch, error)
        except Exception as error:
            if len(batch) == 1:
                self._fail(batch, error)
            else:
                _log.warning("an append transaction failed, each of its requests is tried alone", cause=repr(error))
                for pending in batch:
                    pending.is_alone = True
                self._queue.put_back(batch)
        else:
            if written is not None:
                self._tell(written, batch)
        finally:
            del self._writing[id(batch)]
            self._queue.settle(taken)
            self._wrote.set()
        return True

    async def _write_with_retries(self, batch: list[Pending], wait_seconds: float | None) -> Written | None:
        """Write requests in one transaction; None when nobody waits for them any more."""
        begun = perf_counter()
        attempt, pause = 1, _FIRST_PAUSE
        resolve_until: float | None = None
        while True:
            try:
                return await self._transact(batch, wait_seconds, begun)
            except InDoubt:
                now = self._loop.time()
                if resolve_until is not None and now >= resolve_until:
                    raise CommitOutcomeUnknown from None
                resolve_until = resolve_until or now + _RESOLVE
                self._heads.doubt({pending.request.session_id for pending in batch})
            except (LockTimeout, CommitOutcomeUnknown):
                raise
            except Exception as error:
                cause = repr(error.__cause__ or error)
                if _is_to_be_found_out(batch, error):
                    resolve_until = resolve_until or self._loop.time() + _RESOLVE
                    if self._loop.time() >= resolve_until:
                        raise CommitOutcomeUnknown from error
                    _log.info("the outcome of a commit is still unknown", cause=cause)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
                elif isinstance(error, TransactionConflict | DatabaseUnreachable) and attempt < _ATTEMPTS:
                    _log.info("an append transaction is tried again", cause=cause)
                    attempt += 1
                else:
                    raise
            batch[:] = [pending for pending in batch if not pending.answer.done()]
            if not batch:
                return None
            self._metrics.retried()

    async def _transact(self, batch: list[Pending], wait_seconds: float | None, begun: float) -> Written:
        """Write `batch` in one transaction. What is put off or no longer wanted is taken out of the list.

        Args:
            batch: The requests.
            wait_seconds: How long to wait for sessions that others hold; None puts their requests off.
            begun: When the first attempt began, by `time.perf_counter`.
        """
        keys = keys_of(batch)
        if len(set(keys)) < len(keys):
            self._put_off_repeated_keys(batch)
            keys = keys_of(batch)
        async with self._connections.lend() as connection:
            if not any(pending.attempts for pending in batch):
                written = await self._transact_on_known_heads(connection, batch, begun, ahead=wait_seconds is None)
                if written is not None:
                    return written
            locked = await appending.lock_sessions(
                connection,
                {pending.request.session_id for pending in batch},
                keys,
                new_ids=events_of(batch),
                wait_seconds=wait_seconds,
            )
            self._put_off(batch, locked.held)
            batch[:] = [pending for pending in batch if not pending.answer.done()]
            states = {session_id: SessionState(session_id, head) for session_id, head in locked.heads.items()}
            for (session_id, key), server_seq in locked.known_keys.items():
                if session_id in states:
                    states[session_id].known_keys[key] = server_seq
            await _read_stored(connection, batch, states)
            took_place = look_for_attempts(batch, states)
            if took_place is not None:
                self._metrics.in_doubt(took_place)
                _log.info("the commit in doubt was looked for", took_place=took_place)
            decisions = decide_all(batch, states, self._clock(), iter(locked.ids))
            events = added(states.values())
            known = events
            if any(pending.attempts for pending in batch):
                decisions = doubt_refusals(decisions, states)
                known = stored_of(decisions)
            times = times_of(known)
            active = self._activity.due(times)
            if any(isinstance(decision, Appended) for _, decision in decisions):
                # Also when it holds nothing new: what it found is acknowledged, so it has to be everywhere where a
                # commit waits for it to be.
                sent: float | None = perf_counter()
                with in_doubt_when_lost(connection, locked.heads, decisions, may_come_late=False):
                    await appending.insert_and_commit(connection, events, active=active)
                refuse_warnings(connection)
            else:
                sent = None
                await connection.run(appending.ROLLBACK)
        heads = [(session_id, locked.heads[session_id], state.head) for session_id, state in states.items()]
        return Written(decisions, known, None, heads, active, begun, sent)

    async def _transact_on_known_heads(
        self, connection: PipelineConnection, batch: list[Pending], begun: float, *, ahead: bool
    ) -> Written | None:
        """Write a batch in one round trip, if nobody else has written into its sessions lately; None if it was not.

        Decides on the heads as this process has left them, and lets the insert find out whether that is still true.
        Nothing but a plain success is decided that way: whatever needs a look into the table is left to it.

        Args:
            connection: What to write on.
            batch: The requests.
            begun: When the first attempt began, by `time.perf_counter`.
            ahead: Whether to plan what is written next meanwhile.
        """
        heads = self._heads.of({pending.request.session_id for pending in batch})
        if not heads:
            return None
        planned, self._plan = self._plan, None
        if planned is None or not planned.is_for(batch, heads):
            planned = plan(batch, heads, self._clock())
        if planned is None:
            return None
        active = self._activity.due(times_of(planned.events))
        sent = perf_counter()
        ids = None
        planning = self._loop.create_task(self._plan_next(planned)) if ahead and planned.is_large else None
        try:
            with in_doubt_when_lost(connection, heads, planned.decisions, may_come_late=True):
                ids = await appending.insert_behind_heads(connection, planned.insert, active=active)
        except psycopg.errors.UniqueViolation:  # a number is taken, or a key is known
            pass
        finally:
            if planning is not None:
                planning.cancel()
                if ids is None:
                    self._put_back_next()  # it comes behind what was not written
        if ids is None:
            self._heads.doubt(heads)
            return None
        refuse_warnings(connection)
        left = [(session_id, heads[session_id], head) for session_id, head in planned.left.items()]
        return Written(planned.decisions, planned.events, ids, left, active, begun, sent)

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
            arrivals = self._queue.hold(session_id)
            self._tasks.spawn(self._write_held(session_id, arrivals), f"append-to-held-session-{session_id}")

    def _tell(self, written: Written, batch: Sequence[Pending]) -> None:
        """Tell everybody in a batch what became of their request.

        It is committed, so nothing of this may be tried again: an error here is the end of the process.
        """
        try:
            self._tell_all(written)
        except Exception:
            self._fail(batch, CommitOutcomeUnknown())
            raise

    def _tell_all(self, written: Written) -> None:
        events = written.events
        if written.ids is not None:
            for event, id_ in zip(events, written.ids, strict=True):
                force_setattr(event, "id", id_)  # nobody has seen it yet
        for session_id, found, left in written.heads:
            self._heads.wrote(session_id, found=found, head=left)
        if events:
            self._activity.note(times_of(events), written.active)
            self._on_stored(events)
        for pending, decision in written.decisions:
            if not isinstance(decision, Appended):
                self._metrics.refused(decision.reason)
            if isinstance(decision, CommitOutcomeUnknown):
                pending.fail(decision)
            elif not pending.answer.done():
                pending.answer.set_result(decision)
        if written.sent is not None:
            self._observe(written, written.sent)

    def _fail(self, batch: Sequence[Pending], error: Exception) -> None:
        """Tell everybody that their request was not carried out."""
        for pending in batch:
            told = pending.fail(error)
            if told is not None:
                if pending.attempts:
                    self._metrics.in_doubt(None)
                self._metrics.refused(told.reason if isinstance(told, CollabError) else Reason.INTERNAL)

    def _observe(self, written: Written, sent: float) -> None:
        """Let the metrics see a transaction whose commit was `sent`."""
        now = perf_counter()
        stored = replayed = size = 0
        for pending, decision in written.decisions:
            if isinstance(decision, Appended):
                replayed += decision.replayed
                stored += not decision.replayed
                size += 0 if decision.replayed else pending.request.size
        self._metrics.transaction(
            stored=stored,
            replayed=replayed,
            events=len(written.events),
            size=size,
            waited_seconds=written.begun - min(pending.since for pending, _ in written.decisions),
            seconds=now - written.begun,
            commit_seconds=now - sent,
        )


async def _gather(arrivals: Arrivals, expected: int, took: float = 0.0) -> None:
    """Wait for something to write, and a moment longer for what is likely to come.

    Callers tend to come back once they are answered. So as many events as the last transaction had, or kept waiting,
    are expected again, as far as waiting for them is worth it; a lone caller expects nobody and does not wait.

    Args:
        arrivals: What is waited for.
        expected: Events that the last transaction had, or kept waiting.
        took: Seconds that it took.
    """
    await arrivals.wait_for(1)
    expected = min(expected, _WORTH_GATHERING)
    if expected > arrivals.ready:
        longest = max(
            min(_GATHER, _GATHER_PER_EVENT * expected), min(_GATHER_LONGEST, took) * expected / _WORTH_GATHERING
        )
        with suppress(TimeoutError):
            async with asyncio.timeout(longest):
                await arrivals.wait_for(expected)


async def _gathered_in_time(arrivals: Arrivals, expected: int) -> bool:
    """Gather as `_gather` does; False when nothing has come for a while."""
    try:
        async with asyncio.timeout(_LINGER):
            await arrivals.wait_for(1)
    except TimeoutError:
        return False
    await _gather(arrivals, expected)
    return True


def _is_to_be_found_out(batch: Sequence[Pending], error: Exception) -> bool:
    """Tell whether to go on finding out what became of attempts, although something has gone wrong.

    Whatever it is, as long as they were not looked for; then, only a database that is away.
    """
    attempts = [attempt for pending in batch for attempt in pending.attempts]
    return not all(attempt.was_looked_for for attempt in attempts) or (
        bool(attempts) and isinstance(error, DatabaseUnreachable)
    )


async def _read_stored(
    connection: PipelineConnection, batch: Sequence[Pending], states: Mapping[int, SessionState]
) -> None:
    """Read the stored events that requests may be replays of, or that earlier attempts to store them have left."""
    ranges = []
    for pending in batch:
        state = states.get(pending.request.session_id)
        if state is not None:
            firsts = [attempt.events[0].server_seq for attempt in pending.attempts]
            if known := state.known_places(pending.request):
                firsts.append(replay_start(known))
            ranges += [(state.session_id, first, first + len(pending.request.events) - 1) for first in firsts]
    if ranges:
        for (session_id, server_seq), event in (await appending.read_stored(connection, ranges)).items():
            states[session_id].stored[server_seq] = event
