"""The metrics of a gateway."""

from collab_service.metrics.kept import Metrics, Tally

_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))


class GatewayMetrics:
    """What a gateway counts, and the answer to those who want to see it."""

    def __init__(self, metrics: Metrics) -> None:
        """Declare them among those of the process."""
        self._metrics = metrics
        self._requests = metrics.counter(
            "collab_gateway_requests_total",
            "HTTP requests whose answers have begun, by route; other: what there is no route or method for.",
            ["method", "route", "status"],
        )
        self._tallies: dict[tuple[str, str, str], Tally] = {}
        self.exposition = metrics.exposition

    def answered(self, method: str, route: str | None, status: int) -> None:
        """Count a request whose answer has begun."""
        # Callers make up methods, which must not become series without end.
        key = (method if method in _METHODS else "other", route or "other", str(status))
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = self._metrics.tally(self._requests, *key)
        tally.add()
