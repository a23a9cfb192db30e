"""Where the gateway listens: chosen, switched off, taken by somebody else, or open to other machines."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.here import Here
from tests.cli.test_serve import assert_one_sentence
from tests.gateway.calls import open_http
from tests.processes import GatewayProcess, ServeProcess, collab

_DEFAULT = "127.0.0.1:8080"
_SMALL = ("--grpc-address", "127.0.0.1:0")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """Runs `collab` in this process."""
    return Here(monkeypatch, capsys)


@pytest.fixture
def taken() -> Iterator[str]:
    """An address that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_no_gateway(server_database_url: str, directory: Path) -> None:
    """`off`, here as a variable, serves gRPC alone."""
    arguments = ("--database-url", server_database_url)
    with ServeProcess(*arguments, cwd=directory, COLLAB_HTTP_ADDRESS="off") as process:
        assert process.wait_for("serving")["http_address"] is None
        assert process.stop() == 0


def test_the_default_address_where_it_is_taken(server_database_url: str, directory: Path) -> None:
    """Nobody chose it, so the service starts without a gateway, and a warning says why and what to do."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # then somebody else has taken it
            stack.enter_context(socket.create_server(("127.0.0.1", 8080)))
        process = ServeProcess("--database-url", server_database_url, cwd=directory, COLLAB_HTTP_ADDRESS="")
        with process:
            assert process.wait_for("serving")["http_address"] is None
            warning = process.wait_for("the gateway is not started", level="warning")
            assert _DEFAULT in warning["cause"]
            assert "--http-address" in warning["cause"]
            process.process.kill()
            process.wait()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_address_that_is_taken(server_database_url: str, taken: str, workers: str) -> None:
    """An address that was asked for is an error when somebody listens there, with one worker and with several."""
    arguments = ("--database-url", server_database_url, *_SMALL, "--workers", workers)
    assert_one_sentence(collab("serve", *arguments, "--http-address", taken), taken, "in use", "--http-address")


def test_an_address_of_a_gateway_that_is_taken(taken: str) -> None:
    """So it is for a gateway alone, also at the address that is the default."""
    result = collab("gateway", "--http-address", taken)
    assert_one_sentence(result, taken, "in use", "--http-address")


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "gateway.internal:80", "192.0.2.1:80"])
def test_only_loopback_without_authentication(here: Here, address: str) -> None:
    """What other machines can reach is refused before anything starts, with what to do about it."""
    sentence = here.refused("gateway", "--http-address", address, status=2)
    for words in (f"--http-address {address}", "no authentication", "--allow-unauthenticated"):
        assert words in sentence


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1", "127.0.0.1:65536", ":80", "off"])
def test_a_bad_address_is_told(here: Here, address: str) -> None:
    """What is no address is a sentence that shows one."""
    sentence = here.refused("gateway", "--http-address", address, status=2)
    assert address in sentence
    assert "127.0.0.1:" in sentence


def test_an_open_gateway(gateway: GatewayProcess, directory: Path) -> None:
    """When it is allowed it listens everywhere, and settings come from variables as well."""
    target = gateway.wait_for("serving")["target"]
    settings = {"COLLAB_ALLOW_UNAUTHENTICATED": "1", "COLLAB_CORS_ORIGIN": "https://a.example https://b.example"}
    with GatewayProcess(target, cwd=directory, http_address="0.0.0.0:0", **settings) as process:
        port = process.http_address.rpartition(":")[2]
        with open_http(f"127.0.0.1:{port}") as http:
            assert http.get("/readyz").status_code == 200
            for origin in ("https://a.example", "https://b.example"):
                answer = http.get("/healthz", headers={"origin": origin})
                assert answer.headers["access-control-allow-origin"] == origin
        process.process.kill()
        process.wait()


def test_a_gateway_on_ipv6(gateway: GatewayProcess, directory: Path) -> None:
    """Addresses of IPv6 work as well."""
    if not socket.has_ipv6:
        pytest.skip("there is no IPv6")
    target = gateway.wait_for("serving")["target"]
    with GatewayProcess(target, cwd=directory, http_address="[::1]:0") as process:
        assert process.http_address.startswith("[::1]:")
        with open_http(process.http_address) as http:
            assert http.get("/readyz").json() == {"status": "ready"}
        process.process.kill()
        process.wait()
