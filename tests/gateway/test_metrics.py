"""`/metrics`: what it tells is what was done, every name is documented, and it needs nothing but the process itself."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from collab_service.storage.embedded import Cluster
from tests.gateway.calls import answered, append, append_batch, events, new_session, open_http, refused
from tests.gateway.event_source import EventSource
from tests.gateway.test_health import becomes
from tests.processes import GatewayProcess, ServeProcess
from tests.scrapes import Kind, Scrape, scrape
from tests.waiting import until

_DOCUMENTED = Path(__file__).parents[2] / "docs" / "metrics.md"
_ROW = re.compile(
    r"^\| `(?P<name>\w+)` \| (?P<type>\w+) \| (?P<unit>\w*) ?\|(?P<labels>.*?)\| (?P<meaning>.*) \|$", re.MULTILINE
)
_TEXT = "text/plain; version=0.0.4; charset=utf-8"


@pytest.fixture
def alone(new_database: Callable[[], str], directory: Path) -> Iterator[ServeProcess]:
    """A server that nobody else calls."""
    with ServeProcess("--database-url", new_database(), cwd=directory) as process:
        yield process
        assert process.stop() == 0


def documented() -> dict[str, tuple[Kind, str]]:
    """Return what the documentation says of each metric, and its unit."""
    return {
        row["name"]: (Kind(row["type"], frozenset(re.findall(r"`(\w+)`", row["labels"])), row["meaning"]), row["unit"])
        for row in _ROW.finditer(_DOCUMENTED.read_text())
    }


def test_every_metric_is_documented(alone: ServeProcess) -> None:
    """The tables of docs/metrics.md have every metric with its type, labels and meaning, and no other."""
    with open_http(alone.http_address) as http:
        new_session(http)
    told = scrape(alone.http_address).kinds
    assert told == {name: kind for name, (kind, _) in documented().items()}
    for name, (kind, unit) in documented().items():
        assert name.endswith("_total") == (kind.type == "counter")
        if unit in ("seconds", "bytes", "connections"):
            assert name.removesuffix("_total").endswith(f"_{unit}"), name


async def test_counts_are_what_was_done(alone: ServeProcess) -> None:
    """Requests by route and status, what was read, those who follow and how they are served: not one too many."""
    address = alone.http_address
    with open_http(address) as http:
        session_id = new_session(http)
        for _ in range(3):
            append(http, session_id)
        append_batch(http, session_id, [{}] * 7)
        assert len(events(http, session_id)) == 10
        assert len(events(http, session_id, sinceServerSeq=6)) == 4
        refused(http.get(f"/api/collab/sessions/{session_id + 1}"), 404, "SESSION_NOT_FOUND")
        assert http.get("/nowhere").status_code == 404
        assert http.request("LINK", "/healthz").status_code == 405
        told = scrape(address)

        def requests(method: str, route: str, status: int) -> float:
            return told.value("collab_gateway_requests_total", method=method, route=route, status=str(status))

        assert requests("POST", "/api/collab/sessions", 201) == 1
        assert requests("POST", "/api/collab/events", 201) == 3
        assert requests("POST", "/api/collab/sessions/{id}/events", 201) == 1
        assert requests("GET", "/api/collab/events", 200) == 2
        assert requests("GET", "/api/collab/sessions/{id}", 404) == 1
        assert requests("GET", "other", 404) == 1
        assert requests("other", "/healthz", 405) == 1
        assert told.value("collab_gateway_requests_total") == 10
        assert told.value("collab_read_events_total", reader="calls") == 14
        assert told.value("collab_read_page_seconds_count", reader="calls") == 2
        assert 0 < told.value("collab_read_page_seconds_sum") < 10
        assert told.value("collab_followers") == told.value("collab_followed_sessions") == 0
        assert told.value("collab_delivery_lag_seconds_count") == 0

        async with EventSource(address, session_id) as one, EventSource(address, session_id) as other:
            for source in (one, other):
                await source.until(lambda source: len(source.numbers) == 10)
            told = scrape(address)
            assert told.value("collab_followers") == 2
            assert told.value("collab_followed_sessions") == 1
            assert told.value("collab_read_events_total", reader="calls") == 34
            append(http, session_id)
            for source in (one, other):
                await source.until(lambda source: len(source.numbers) == 11)
            told = scrape(address)
            assert told.value("collab_read_events_total") == 34, "it came from memory"
            assert told.value("collab_delivery_lag_seconds_count") == 1
            assert 0 < told.value("collab_delivery_lag_seconds_sum") < 1

        async def left() -> bool:
            return scrape(address).value("collab_followers") == 0

        await until(left, "the end of the follows")
        assert scrape(address).value("collab_followed_sessions") == 0


async def test_what_a_process_is_like(alone: ServeProcess) -> None:
    """Its version, its memory and time, and its pools; a second look finds what has changed."""
    told = scrape(alone.http_address)
    version = next(sample.labels["version"] for sample in told.samples if sample.name == "collab_build_info")
    assert version == alone.wait_for("serving")["version"]
    assert told.value("collab_processes") == told.value("collab_process_starts_total") == 1
    assert 20e6 < told.value("process_resident_memory_bytes") < 1e9
    assert told.value("collab_database_up") == 1
    assert told.value("collab_database_pool_max_connections", pool="calls") == 10
    with open_http(alone.http_address) as http:
        new_session(http)

    async def all_are_back() -> bool:
        return scrape(alone.http_address).value("collab_database_pool_lent_connections") == 0

    await until(all_are_back, "the return of the connections")
    again = scrape(alone.http_address)
    assert again.value("process_cpu_seconds_total") > told.value("process_cpu_seconds_total") > 0
    waits = "collab_database_pool_wait_seconds_count"
    assert again.value(waits, pool="calls") > told.value(waits, pool="calls")


def test_as_other_routes(http: httpx.Client) -> None:
    """HEAD has no body, another method is 405, a parameter that there is not is 400; it is no call of the API."""
    answer = http.get("/metrics")
    assert (answer.status_code, answer.headers["content-type"]) == (200, _TEXT)
    head = http.head("/metrics")
    assert (head.status_code, head.headers["content-type"], head.content) == (200, _TEXT, b"")
    wrong = http.post("/metrics")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "METHOD_NOT_ALLOWED")
    assert set(wrong.headers["allow"].split(", ")) == {"GET", "HEAD"}
    for query, field in (("per=process", "per"), ("worker=1", "worker")):
        wrong = http.get(f"/metrics?{query}")
        assert (wrong.status_code, wrong.json()["code"]) == (400, "INVALID_REQUEST")
        assert [detail["field"] for detail in wrong.json()["details"]] == [field]
    assert "/metrics" not in http.get("/openapi.json").json()["paths"]


def test_open_metrics(http: httpx.Client) -> None:
    """Whoever asks for OpenMetrics, as Prometheus does, gets it."""
    answer = http.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert answer.text.endswith("# EOF\n")


def test_per_worker(alone: ServeProcess) -> None:
    """A process that is alone is worker 1; every number has the label, and is that of the whole."""
    with open_http(alone.http_address) as http:
        new_session(http)
    whole, apart = scrape(alone.http_address), scrape(alone.http_address, per_worker=True)
    assert {sample.labels["worker"] for sample in apart.samples} == {"1"}
    assert not any("worker" in sample.labels for sample in whole.samples)
    assert apart.kinds.keys() == whole.kinds.keys()
    assert apart.value("collab_notifications_sent_total") == whole.value("collab_notifications_sent_total")


async def test_without_the_database(own_cluster: Cluster, directory: Path) -> None:
    """It asks the database nothing: it is there while that is away, and says that it is."""
    with ServeProcess("--database-url", own_cluster.url, cwd=directory) as server:
        assert scrape(server.http_address).value("collab_database_up") == 1
        own_cluster.stop()
        await becomes(server.http_address, 503)
        told = scrape(server.http_address)
        assert told.value("collab_database_up") == 0
        assert told.value("collab_gateway_requests_total", route="/readyz", status="503") == 1
        own_cluster.start()
        await becomes(server.http_address, 200)
        assert scrape(server.http_address).value("collab_database_up") == 1


def test_a_gateway_alone(server: ServeProcess, directory: Path) -> None:
    """It tells of its own requests and process, and nothing of the service behind it."""
    with GatewayProcess(server.grpc_address, cwd=directory) as gateway:
        with open_http(gateway.http_address) as http:
            answered(http.get("/api/collab/sessions?pageSize=1"))
        told: Scrape = scrape(gateway.http_address)
        assert told.value("collab_gateway_requests_total", route="/api/collab/sessions", status="200") == 1
        kinds = {name: kind for name, (kind, _) in documented().items()}
        assert told.kinds.items() <= kinds.items()
        assert {name.split("_")[1] for name in told.kinds if name.startswith("collab_")} == {
            "build",
            "gateway",
            "process",
            "processes",
        }
        assert gateway.stop() == 0
