"""The gateway as an ASGI application: routes, and what surrounds every call."""

import asyncio
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Protocol

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from collab_service import __version__
from collab_service.client import CollabClient, ServiceError
from collab_service.client import request_id as client_request_id
from collab_service.gateway.errors import (
    RequestError,
    answer_to_error,
    answer_to_service_error,
    internal_answer,
    stopping_answer,
)
from collab_service.gateway.forms import MetricsQuery
from collab_service.gateway.handlers import JSON, Handlers
from collab_service.gateway.openapi import document
from collab_service.gateway.operations import OPERATIONS
from collab_service.gateway.pages import page_routes
from collab_service.gateway.requests import id_of, query_of
from collab_service.gateway.streams import CutOff, Followers
from collab_service.logs import LineBudget

_log = structlog.get_logger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
"""What a caller's own request id may look like; any other is replaced."""
_REFUSES_GZIP = re.compile(rb"gzip\s*;\s*q=0(?:\.0*)?\s*(?:,|$)")
_READY_TIMEOUT = 2.0
"""Seconds for the service to say that it is well."""
_failed_lines = LineBudget(100)
"""Lines of the log in a second, at most, that tell of requests that have failed."""


class Metrics(Protocol):
    """What is known of the process, and of the requests."""

    def answered(self, method: str, route: str | None, status: int) -> None:
        """Count a request whose answer has begun."""

    def exposition(self, accept: str, *, per_worker: bool) -> tuple[bytes, str]:
        """Return the metrics as text, and its content type."""


class Gateway:
    """The application, and its state."""

    def __init__(
        self,
        client: CollabClient,
        metrics: Metrics,
        *,
        cors_origins: Sequence[str],
        max_body_bytes: int,
        turns: asyncio.Semaphore,
    ) -> None:
        """Prepare.

        Args:
            client: The service; its context must be entered before requests come.
            metrics: Counts the requests, and answers what is at `/metrics`.
            cors_origins: Origins whose pages may call from a browser; `*` for all.
            max_body_bytes: What a request may bring.
            turns: How many pages of events may be on their way to clients at once.
        """
        self._client = client
        self._metrics = metrics
        self._draining = False
        self.followers = Followers(turns)
        handlers = Handlers(client, self.followers, turns, max_body_bytes)
        self._document = msgspec.json.encode(document(__version__))
        routes = [
            Route(operation.path, getattr(handlers, operation.handler), methods=[operation.method])
            for operation in OPERATIONS
        ]
        routes += [
            Route("/healthz", self._healthz, methods=["GET"]),
            Route("/readyz", self._readyz, methods=["GET"]),
            Route("/metrics", self._scraped, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
            Route("/inspector/followers/{id}", self._followers, methods=["GET"]),
            *page_routes(),
        ]
        middleware = []
        if cors_origins:
            middleware.append(
                Middleware(
                    CORSMiddleware,
                    allow_origins=list(cors_origins),
                    allow_methods=["GET", "POST", "DELETE"],
                    allow_headers=["Content-Type", "Idempotency-Key", "Last-Event-ID", "X-Request-Id"],
                    expose_headers=["Link", "Retry-After", "X-Request-Id"],
                ),
            )
        routes = _one_route_a_path(routes)
        inner = Starlette(
            routes=routes,
            middleware=middleware,
            exception_handlers={
                RequestError: _refused,
                ServiceError: _failed,
                HTTPException: _not_routed,
                ClientDisconnect: _gone,
                Exception: _faulty,
            },
        )
        inner.router.redirect_slashes = False
        self.app: ASGIApp = _Boundary(inner, metrics, {route.endpoint: route.path for route in routes})

    def drain(self) -> None:
        """Be not ready from now on, and end what follows."""
        self._draining = True
        self.followers.close()

    async def _healthz(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self, request: Request) -> Response:
        cause = "draining" if self._draining else ""
        if not cause:
            try:
                if not await self._client.is_serving(timeout=_READY_TIMEOUT):
                    cause = "the service cannot work: it is stopping, or its database is away"
            except ServiceError:
                cause = "the service does not answer"
        if cause:
            return JSONResponse({"status": "not ready", "cause": cause}, HTTPStatus.SERVICE_UNAVAILABLE)
        return JSONResponse({"status": "ready"})

    async def _scraped(self, request: Request) -> Response:
        per_worker = query_of(request, MetricsQuery).per is not None
        text, content_type = self._metrics.exposition(request.headers.get("accept", ""), per_worker=per_worker)
        return Response(text, headers={"content-type": content_type})

    async def _openapi(self, request: Request) -> Response:
        return Response(self._document, media_type=JSON)

    async def _followers(self, request: Request) -> Response:
        return JSONResponse({"followers": self.followers.count[id_of(request)]})


class _Boundary:
    """Gives every request its id, counts it, and answers and logs what goes wrong; nothing internal leaves."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: Mapping[Any, str]) -> None:
        """Surround `app`; `paths` are those of its routes, by their endpoints."""
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._compressing = GZipMiddleware(app, minimum_size=500, compresslevel=4)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        # Most clients of appends do not ask for it, and need not pay for the middleware.
        accepted = headers.get(b"accept-encoding", b"")
        app = self._compressing if b"gzip" in accepted and not _REFUSES_GZIP.search(accepted) else self._app
        scope["state"] = {"request_id": request_id}
        client_request_id.set(request_id)
        started = ended = False

        async def send_with_id(message: Message) -> None:
            nonlocal started, ended
            if message["type"] == "http.response.start":
                started = True
                self._metrics.answered(scope["method"], self._paths.get(scope.get("endpoint")), message["status"])
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if scope["path"].startswith("/api/"):
                    _set_default(message["headers"], b"cache-control", b"no-store")
            else:
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await app(scope, receive, send_with_id)
        except CutOff as cut:
            _log_of(scope).info("request was cut off", code=str(cut))
            raise  # which closes the connection, so that nobody takes the answer for whole
        except asyncio.CancelledError:
            _log_of(scope).warning("request was cut off", code="SHUTTING_DOWN")  # the grace period is over
            if not started:
                await stopping_answer(writes=scope["method"] != "GET")(scope, receive, send_with_id)
            raise
        except Exception as error:
            _log_of(scope).error("request failed", status=500, exc_info=error)
            if not started:
                await internal_answer(request_id)(scope, receive, send_with_id)
            elif not ended:
                raise


def _one_route_a_path(routes: list[Route]) -> list[Route]:
    """Return the routes, those of one path as one: then a wrong method is told with all that are right."""
    by_path: dict[str, dict[str, Callable[[Request], Awaitable[Response]]]] = {}
    for route in routes:
        methods = by_path.setdefault(route.path, {})
        for method in route.methods or ():
            methods[method] = route.endpoint
    merged = [Route(path, _by_method(methods), methods=list(methods)) for path, methods in by_path.items()]
    for route in merged:
        if route.methods is not None and route.path.startswith("/api/"):
            route.methods.discard("HEAD")  # which would read a whole session to show nothing of it
    return merged


def _by_method(
    methods: dict[str, Callable[[Request], Awaitable[Response]]],
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return await methods[request.method](request)

    return endpoint


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def _set_default(headers: list[tuple[bytes, bytes]], name: bytes, value: bytes) -> None:
    if all(known != name for known, _ in headers):
        headers.append((name, value))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _logged(request, error.code, answer_to_error(error))


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError)
    return _logged(request, error.reason or type(error).__name__, answer_to_service_error(error))


async def _not_routed(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        code, message = "METHOD_NOT_ALLOWED", f"{request.method} is not possible here; possible are: {allowed}"
    elif error.status_code == HTTPStatus.NOT_FOUND:
        code, message = (
            "ROUTE_NOT_FOUND",
            f"there is nothing at {_path(request.scope)[:200]}; /docs tells what there is",
        )
    else:
        code, message = "INVALID_REQUEST", str(error.detail)
    refused = RequestError(HTTPStatus(error.status_code), code, message, headers=error.headers)
    return _logged(request, code, answer_to_error(refused))


async def _gone(request: Request, error: Exception) -> Response:
    return _logged(request, "CLIENT_GONE", Response(status_code=HTTPStatus.BAD_REQUEST))  # which nobody will see


async def _faulty(request: Request, error: Exception) -> Response:
    return internal_answer(request.state.request_id)  # and the error goes on to the boundary, which logs it


def _path(scope: Scope) -> str:
    """Return the path as it was sent, in which every character shows."""
    raw_path: bytes = scope["raw_path"]
    return raw_path.decode("latin-1")


def _log_of(scope: Scope) -> structlog.typing.FilteringBoundLogger:
    """Return the log, in which every line says which request it is about."""
    log: structlog.typing.FilteringBoundLogger = _log.bind(
        method=scope["method"], path=_path(scope), request_id=scope["state"]["request_id"]
    )
    return log


def _logged(request: Request, code: str, response: Response) -> Response:
    if requests := _failed_lines.take():
        _log_of(request.scope).info("request failed", status=response.status_code, code=code, requests=requests)
    return response
