"""The metrics of the service, declared in one place. What happens often is observed once a transaction, page or turn.

Buckets double, so that a quantile is known to within a factor of two wherever it is.
"""

from collections.abc import Callable

from prometheus_client import Counter, Gauge, Histogram

from collab_service.metrics.kept import Metrics, Tally
from collab_service.model.errors import Reason

_SECONDS = [0.00025 * 2**step for step in range(16)]
"""From 0.25 ms to 8 s."""
_COUNTS = [2**step for step in range(11)]
"""From 1 to 1,024."""


class AppendMetrics:
    """Appending: what was asked for, and the transactions that did it."""

    def __init__(self, metrics: Metrics) -> None:
        self._appends = metrics.counter(
            "collab_appends_total",
            "Appends that were answered, a batch being one; outcome: stored, replayed or, for a reason, refused.",
            ["outcome", "reason"],
        )
        self._stored = metrics.tally(self._appends, "stored", "")
        self._replayed = metrics.tally(self._appends, "replayed", "")
        self._events = metrics.tally(metrics.counter("collab_stored_events_total", "Events that were stored."))
        self._bytes = metrics.tally(
            metrics.counter("collab_stored_bytes_total", "Bytes of the appends that were stored, as protobuf messages.")
        )
        self._transaction_appends = metrics.histogram(
            "collab_append_transaction_appends", "Appends that a transaction has answered.", _COUNTS
        )
        self._transaction_events = metrics.histogram(
            "collab_append_transaction_events", "Events that a transaction has stored.", _COUNTS
        )
        self._wait = metrics.histogram(
            "collab_append_wait_seconds",
            "Time in the queue of the append that has waited longest, one for each transaction.",
            _SECONDS,
        )
        self._transaction = metrics.histogram(
            "collab_append_transaction_seconds",
            "Time of an append transaction from its beginning to its answers, with all attempts.",
            _SECONDS,
        )
        self._commit = metrics.histogram(
            "collab_append_commit_seconds",
            "Time to insert the events of a transaction and to commit.",
            _SECONDS,
        )
        self._retries = metrics.tally(
            metrics.counter("collab_append_retries_total", "Append transactions that have failed and were tried again.")
        )
        in_doubt = metrics.counter(
            "collab_append_commits_in_doubt_total",
            "Commits during which the connection was lost; outcome: stored, lost or unknown.",
            ["outcome"],
        )
        self._in_doubt = {
            True: metrics.tally(in_doubt, "stored"),
            False: metrics.tally(in_doubt, "lost"),
            None: metrics.tally(in_doubt, "unknown"),
        }
        self._metrics = metrics
        self._queued = metrics.gauge("collab_append_queue_appends", "Appends that wait to be written.")
        self._queued_bytes = metrics.gauge(
            "collab_append_queue_bytes",
            "Bytes of appends that wait or are being written, and a little for each event, as their limit counts.",
        )
        self._held = metrics.gauge(
            "collab_append_held_sessions",
            "Sessions whose appends wait apart, until others let go of them.",
        )

    def transaction(
        self,
        *,
        stored: int,
        replayed: int,
        events: int,
        size: int,
        waited_seconds: float,
        seconds: float,
        commit_seconds: float,
    ) -> None:
        """Observe a transaction that is committed.

        Args:
            stored: Appends that were stored with it.
            replayed: Appends that were found stored already.
            events: Events that were stored.
            size: Bytes of the appends that were stored.
            waited_seconds: How long the append that has waited longest was in the queue.
            seconds: From its beginning to the answers, with all attempts.
            commit_seconds: Of that, for the insert and the commit.
        """
        self._stored.add(stored)
        self._replayed.add(replayed)
        self._events.add(events)
        self._bytes.add(size)
        self._transaction_appends.observe(stored + replayed)
        self._transaction_events.observe(events)
        self._wait.observe(waited_seconds)
        self._transaction.observe(seconds)
        self._commit.observe(commit_seconds)

    def refused(self, reason: Reason) -> None:
        """Count an append that was answered with an error."""
        self._appends.labels("refused", reason).inc()

    def retried(self) -> None:
        """Count a transaction that is tried again."""
        self._retries.add()

    def in_doubt(self, took_place: bool | None) -> None:
        """Count a commit that was in doubt; None when it still is."""
        self._in_doubt[took_place].add()

    def watch_queue(
        self, appends: Callable[[], float], size: Callable[[], float], held_sessions: Callable[[], float]
    ) -> None:
        """Look at the queue through these functions: appends, bytes, and sessions on hold."""
        self._metrics.look(self._queued, appends)
        self._metrics.look(self._queued_bytes, size)
        self._metrics.look(self._held, held_sessions)


class FollowMetrics:
    """Following: who does, and how soon they are served."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._followers = metrics.gauge("collab_followers", "Calls that follow a session.")
        self._sessions = metrics.gauge("collab_followed_sessions", "Sessions that are followed, in each process.")
        self._lag = metrics.histogram(
            "collab_delivery_lag_seconds",
            "From an event's create_time until the follower that had waited longest was sent it; once each turn.",
            _SECONDS,
        )
        self._sent = metrics.tally(
            metrics.counter(
                "collab_notifications_sent_total",
                "Notifications that were sent to other processes.",
            )
        )
        self._heard = metrics.tally(
            metrics.counter("collab_notifications_heard_total", "Notifications that came from other processes.")
        )

    def watch(self, followers: Callable[[], float], sessions: Callable[[], float]) -> None:
        """Look at those who follow through these functions."""
        self._metrics.look(self._followers, followers)
        self._metrics.look(self._sessions, sessions)

    def delivered(self, lag_seconds: float) -> None:
        """Observe a turn of followers."""
        self._lag.observe(lag_seconds)

    def notified(self) -> None:
        """Count a notification to others."""
        self._sent.add()

    def heard(self) -> None:
        """Count a notification from others."""
        self._heard.add()


class ReadMetrics:
    """Reading the table, page by page: for callers, or for the tails."""

    def __init__(self, metrics: Metrics) -> None:
        self._seconds = metrics.histogram(
            "collab_read_page_seconds",
            "Time to read a page of events, with the wait for a turn and a connection; reader: calls or tails.",
            _SECONDS,
            ["reader"],
        )
        self._events = metrics.counter(
            "collab_read_events_total", "Events that were read from the table; reader: calls or tails.", ["reader"]
        )
        self._metrics = metrics

    def of(self, reader: str) -> "ReaderMetrics":
        """Return those of one reader."""
        return ReaderMetrics(self._seconds.labels(reader), self._metrics.tally(self._events, reader))


class ReaderMetrics:
    """The pages of one reader."""

    def __init__(self, seconds: Histogram, events: Tally) -> None:
        self._seconds = seconds
        self._events = events

    def page(self, seconds: float, events: int) -> None:
        """Observe a page that was read, and the events on it."""
        self._seconds.observe(seconds)
        self._events.add(events)


class RpcMetrics:
    """Calls by gRPC: how many, how they ended, and what was sent to readers."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._calls = metrics.counter(
            "collab_rpcs_total",
            "gRPC calls that have ended, by status code and, where the service has refused, the error's reason.",
            ["method", "code", "reason"],
        )
        self._in_progress = metrics.gauge("collab_rpcs_in_progress", "gRPC calls in progress, follows included.")
        messages = metrics.counter(
            "collab_sent_messages_total", "Messages of ListEvents that were sent; kind: read or follow.", ["kind"]
        )
        size = metrics.counter(
            "collab_sent_bytes_total",
            "Bytes of the messages of ListEvents that were sent; kind: read or follow.",
            ["kind"],
        )
        self._read = metrics.tally(messages, "read"), metrics.tally(size, "read")
        self._followed = metrics.tally(messages, "follow"), metrics.tally(size, "follow")

    def of(self, method: str) -> "MethodMetrics":
        """Return those of one method."""
        return MethodMetrics(self._metrics.tally(self._calls, method, "OK", ""), self._calls, method)

    def watch(self, in_progress: Callable[[], float]) -> None:
        """Look at the calls in progress through this function."""
        self._metrics.look(self._in_progress, in_progress)

    def sent(self, size: int, *, follow: bool) -> None:
        """Count a message of so many bytes to a reader."""
        messages, bytes_ = self._followed if follow else self._read
        messages.add()
        bytes_.add(size)


class MethodMetrics:
    """The calls of one method."""

    def __init__(self, answered: Tally, calls: Counter, method: str) -> None:
        self.answered = answered.add
        """Count a call that was answered."""
        self._calls = calls
        self._method = method

    def failed(self, code: str, reason: str = "") -> None:
        """Count a call that has ended with an error."""
        self._calls.labels(self._method, code, reason).inc()


class DatabaseMetrics:
    """The database as this process sees it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._up = metrics.gauge(
            "collab_database_up",
            "1 while the database answers and is not read-only (a full disk is not seen), else 0.",
            of_all="livemin",
        )
        self._size = metrics.gauge(
            "collab_database_pool_max_connections", "Connections that a pool may have; pool: calls or tails.", ["pool"]
        )
        self._lent = metrics.gauge(
            "collab_database_pool_lent_connections",
            "Connections of a pool in use; pool: calls or tails.",
            ["pool"],
        )
        self._wait = metrics.histogram(
            "collab_database_pool_wait_seconds",
            "Time until a pool has lent a connection, with that to open a new one; pool: calls or tails.",
            _SECONDS,
            ["pool"],
        )

    def health(self, up: bool) -> None:
        """Take note of whether it is there."""
        self._up.set(up)

    def pool(self, name: str) -> "PoolMetrics":
        """Return those of one pool."""
        return PoolMetrics(self._metrics, self._size.labels(name), self._lent.labels(name), self._wait.labels(name))


class PoolMetrics:
    """One pool of connections."""

    def __init__(self, metrics: Metrics, size: Gauge, lent: Gauge, wait: Histogram) -> None:
        self._metrics = metrics
        self._size = size
        self._lent = lent
        self.waited = wait.observe
        """Observe the seconds until a connection was lent."""

    def watch(self, size: int, lent: Callable[[], float]) -> None:
        """Take note of how many there may be, and look at how many are lent through this function."""
        self._size.set(size)
        self._metrics.look(self._lent, lent)


class ServiceMetrics:
    """All of them."""

    def __init__(self, metrics: Metrics) -> None:
        """Declare them among those of the process."""
        self.of_process = metrics
        self.appends = AppendMetrics(metrics)
        self.follows = FollowMetrics(metrics)
        self.reads = ReadMetrics(metrics)
        self.rpcs = RpcMetrics(metrics)
        self.database = DatabaseMetrics(metrics)
