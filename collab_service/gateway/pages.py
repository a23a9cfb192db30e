"""The pages that people look at: the inspector at `/`, the reference at `/docs`. Nothing comes from elsewhere."""

import hashlib
from collections.abc import Iterator
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_PAGES = {"inspector.html": "/", "docs.html": "/docs"}
"""Their paths; what belongs to them is below `/static/`."""
_MEDIA_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> Iterator[Route]:
    """Yield a route for each page and what belongs to it."""
    for file in files(__package__).joinpath("static").iterdir():
        media_type = _MEDIA_TYPES.get(file.name.rpartition(".")[2])
        if media_type is not None:
            yield _route(_PAGES.get(file.name, f"/static/{file.name}"), file.read_bytes(), media_type)


def _route(path: str, content: bytes, media_type: str) -> Route:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def page(request: Request) -> Response:
        headers = {**_HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return Route(path, page, methods=["GET"])
