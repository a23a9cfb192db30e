"""Reads requests: the body within its limit, forms out of it and out of the query, all that is wrong told at once."""

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
from msgspec import Raw, Struct
from starlette.requests import Request

from collab_service.client import NewEvent
from collab_service.gateway.errors import RequestError, invalid
from collab_service.gateway.forms import ABSENT, WHAT_IS_RIGHT, Detail, EventBody, fields_of
from collab_service.model.payload import json_object_problem, why_no_json

F = TypeVar("F", bound=Struct)
E = TypeVar("E", bound=EventBody)

_MOST_TOGETHER = 32 * 1024 * 1024
"""Bytes of bodies that are held at once. Taken apart, a body takes several times its size."""
_SMALL = 64 * 1024
"""Bytes of a body that always finds room, so that nobody is kept out by a few large ones that are slow to come."""
_STOPPED = 2.0
"""Seconds without a byte after which a body has to go if its room is needed."""
_MOST_EVENTS = 20_000
"""Events in a batch, whatever the service takes (1,000, unless configured): millions of empty ones fit into a body, and
would keep this process busy for half a minute only to be refused."""
_MUST_BE_UTF8 = "must be UTF-8, percent-encoded"
_BASE64 = ("payloadBase64", "signature")
_WHOLE_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")

_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


class Bodies:
    """Reads the bodies of requests, and bounds what those that are being carried out hold together."""

    def __init__(self, most: int) -> None:
        """Take bodies of at most so many bytes."""
        self._most = most
        self._held = 0
        self._reading: dict[asyncio.Timeout, float] = {}
        """What ends the reading of each body, and when something of it has come, on the loop's clock."""

    @asynccontextmanager
    async def of(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body of a request, and hold it for the length of the block.

        Raises:
            RequestError: It is no JSON by its content type, is too large or not UTF-8, there is no room for it now, or
                it has stopped coming and others need its room.
        """
        held = 0
        loop = asyncio.get_running_loop()

        def hold(size: int) -> None:
            nonlocal held
            self._reading[patience] = loop.time()
            if held + size > _SMALL and self._held + size > _MOST_TOGETHER and self._held > held:
                self._end_stopped(loop.time())
                what = "the bodies of other requests leave no room for this one"
                raise RequestError(HTTPStatus.TOO_MANY_REQUESTS, "OVERLOADED", what, headers={"retry-after": "1"})
            held += size
            self._held += size

        try:
            try:
                async with asyncio.timeout(None) as patience:
                    body = await _read_body(request, self._most, hold)
            except TimeoutError:
                what = "the body has stopped coming, and others need its room"
                raise RequestError(HTTPStatus.REQUEST_TIMEOUT, "REQUEST_TIMEOUT", what) from None
            finally:
                self._reading.pop(patience, None)
            yield body
        finally:
            self._held -= held

    def _end_stopped(self, now: float) -> None:
        for patience, since in self._reading.items():
            if now - since >= _STOPPED and not patience.expired():
                patience.reschedule(now)


async def _read_body(request: Request, most: int, hold: Callable[[int], None]) -> bytes:
    kind, _, parameters = request.headers.get("content-type", "").partition(";")
    charset = parameters.strip().lower()
    # Also when there is none: a page of somebody else's could then post here from a browser without being asked.
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8", 'charset="utf-8"'):
        raise RequestError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "UNSUPPORTED_MEDIA_TYPE",
            "the body must be JSON in UTF-8, sent with the header Content-Type: application/json",
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RequestError(
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            "UNSUPPORTED_MEDIA_TYPE",
            "the body must be sent as it is, without a Content-Encoding",
            headers={"accept-encoding": "identity"},
        )
    length = request.headers.get("content-length", "0")
    size, parts = int(length) if length.isdigit() else 0, []
    if size <= most:
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                break
            hold(len(part))
            parts.append(part)
    if size > most:
        raise RequestError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            "BODY_TOO_LARGE",
            f"the body must be at most {most} bytes",
            # The connection stays: the rest of the body is read and dropped, without which many clients never come to
            # read this answer.
        )
    body = b"".join(parts)
    try:
        body.decode()  # which msgspec does not check within payloads
    except UnicodeDecodeError as error:
        raise _malformed(f"it is not UTF-8 from byte {error.start} on") from error
    return body


def object_of(body: bytes, form: type[F]) -> F:
    """Return a JSON object as a form; raises `RequestError` with everything that is wrong."""
    try:
        found: F = _decode(body, form)
    except msgspec.ValidationError:
        raise invalid(_problems(body, form, "")) from None
    return found


def list_of(body: bytes, form: type[F]) -> list[F]:
    """Return a JSON array of objects as forms; raises `RequestError` with everything that is wrong."""
    if body.count(b",") >= _MOST_EVENTS and _is_longer(body, _MOST_EVENTS):
        what = f"must be at most {_MOST_EVENTS} events"
        raise RequestError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "BATCH_TOO_LARGE", f"body: {what}", [Detail("body", what)]
        )
    try:
        found: list[F] = _decode(body, list[form])  # type: ignore[valid-type]
        return found
    except msgspec.ValidationError:
        pass
    try:
        items: list[Raw] = _decode(body, list[Raw])
    except msgspec.ValidationError:
        raise invalid([Detail("body", "must be a JSON array of events")]) from None
    raise invalid(
        problem for index, item in enumerate(items) for problem in _problems(bytes(item), form, f"[{index}].")
    )


def query_of(request: Request, form: type[F]) -> F:
    """Return the parameters of a request as a form; raises `RequestError` with everything that is wrong."""
    fields = fields_of(form)
    values: dict[str, Any] = {}
    problems: list[Detail] = []
    for name, text in _parameters(request):
        if name not in fields:
            problems.append(_unknown(name, fields))
        elif name in values:
            problems.append(Detail(name, "must be given once"))
        else:
            try:
                values[name] = _from_text(text, fields[name].type)
            except msgspec.ValidationError:
                problems.append(_wrong(name))
                values[name] = None
    problems += [Detail(name, "must be given") for name in _missing(fields, values)]
    if problems:
        raise invalid(problems)
    return msgspec.convert(values, form)


def id_of(request: Request) -> int:
    """Return the session's number in the path; raises `RequestError` when it is none."""
    try:
        text = request.path_params["id"]
        number = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0
        if 1 <= number < 2**63:
            return number
    except ValueError:
        pass
    raise invalid([_wrong("id")])


def user_id_of(request: Request) -> str:
    """Return the user in the path; raises `RequestError` when it is no text."""
    try:
        unquote_to_bytes(request.scope["raw_path"]).decode()  # in the path itself, what is not UTF-8 is replaced
    except UnicodeDecodeError:
        raise invalid([Detail("userId", _MUST_BE_UTF8)]) from None
    user_id: str = request.path_params["user_id"]
    return user_id


def idempotency_key_of(request: Request) -> str | None:
    """Return the header `Idempotency-Key`; raises `RequestError` when it is no text."""
    values = [value for name, value in request.headers.raw if name == b"idempotency-key"]
    if not values:
        return None
    try:
        (value,) = values
        return value.decode()
    except ValueError as error:
        raise invalid([Detail("Idempotency-Key", "must be given once, in UTF-8")]) from error


def events_of(forms: list[E], key: str | None, *, in_batch: bool) -> list[NewEvent]:
    """Return the events of a request.

    Args:
        forms: What the body says.
        key: The header `Idempotency-Key`: the key of the first event, which is enough for all of them.
        in_batch: Whether they came in an array.

    Raises:
        RequestError: A payload or signature is not base64, there are two payloads, or two keys.
    """
    events: list[NewEvent] = []
    problems: list[Detail] = []
    for index, form in enumerate(forms):
        path = f"[{index}]." if in_batch else ""
        payload: str | bytes = bytes(form.payload).decode() if form.payload != ABSENT else "{}"
        if form.payload_base64 is not None:
            if form.payload != ABSENT:
                problems.append(Detail(path + "payloadBase64", "must not be given beside payload"))
            payload = _bytes(form.payload_base64, path + "payloadBase64", problems)
        own_key = form.idempotency_key
        if key is not None and index == 0:
            if own_key not in (None, key):
                problems.append(
                    Detail(path + "idempotencyKey", "must be that of the header Idempotency-Key, if both are given")
                )
            own_key = key
        signature = b"" if form.signature is None else _bytes(form.signature, path + "signature", problems)
        events.append(
            NewEvent(
                payload,
                actor_id=form.actor_id,
                client_seq=form.client_seq,
                type=form.type,
                hash=form.hash,
                signature=signature,
                idempotency_key=own_key,
            )
        )
    if problems:
        for index, form in enumerate(forms):
            for name, field in fields_of(type(form)).items():
                if name not in _BASE64 and (problem := _content_problem(name, getattr(form, field.name))):
                    problems.append(Detail((f"[{index}]." if in_batch else "") + name, problem))
        raise invalid(problems)
    return events


def _parameters(request: Request) -> list[tuple[str, str]]:
    try:
        return parse_qsl(request.scope["query_string"].decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise invalid([Detail("query", _MUST_BE_UTF8)]) from None


def _from_text(text: str, kind: Any) -> Any:
    """Return the value of a parameter; raises `ValidationError` when it is none of its type."""
    try:
        return msgspec.convert(text, kind)
    except msgspec.ValidationError:
        if not _WHOLE_NUMBER.fullmatch(text):
            raise
        return msgspec.convert(int(text), kind)


def _is_longer(body: bytes, most: int) -> bool:
    """Tell whether a JSON array has more than so many items."""
    try:
        return len(_decode(body, list[Raw])) > most
    except msgspec.ValidationError:  # it is no array
        return False


def _decode(body: bytes, kind: Any) -> Any:
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        return decoder.decode(body)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        raise _malformed(why_no_json(body, error)) from error
    except RecursionError as error:
        raise _malformed("it is nested too deep") from error


def _problems(body: bytes, form: type[Struct], path: str) -> list[Detail]:
    """Return everything that keeps an object from being a form; raises `RequestError` when it is not even JSON."""
    problems = list(_problems_of_fields(body, form, path))
    if not problems:
        try:
            _decode(body, form)
        except msgspec.ValidationError:  # the last one of that name is right
            problems.append(Detail(path.removesuffix(".") or "body", "must not have a field twice"))
    return problems


def _problems_of_fields(body: bytes, form: type[Struct], path: str) -> Iterator[Detail]:
    try:
        values: Mapping[str, Raw] = _decode(body, dict[str, Raw])
    except msgspec.ValidationError:
        yield Detail(path.removesuffix(".") or "body", "must be a JSON object")
        return
    fields = fields_of(form)
    for name, value in values.items():
        if name not in fields:
            yield _unknown(name, fields, path)
            continue
        try:
            decoded = _decode(value, fields[name].type)
        except (msgspec.ValidationError, RequestError):
            yield _wrong(name, path)
            continue
        if isinstance(decoded, str) and name in _BASE64:
            problems: list[Detail] = []
            _bytes(decoded, path + name, problems)
            yield from problems
        elif problem := _content_problem(name, decoded):
            yield Detail(path + name, problem)
    for name in _missing(fields, values):
        yield Detail(path + name, "must be given")


def _content_problem(name: str, value: Any) -> str | None:
    """Return what the service would tell of a value of its type, had it been asked."""
    if isinstance(value, str) and "\0" in value:
        return "must not hold a NUL character"
    return json_object_problem(bytes(value).decode()) if name == "payload" and value != ABSENT else None


def _missing(fields: Mapping[str, msgspec.structs.FieldInfo], values: Mapping[str, Any]) -> list[str]:
    return [name for name, field in fields.items() if field.required and name not in values]


def _wrong(name: str, path: str = "") -> Detail:
    return Detail(path + name, f"must be {WHAT_IS_RIGHT.get(name, 'a string that is not empty')}")


def _unknown(name: str, fields: Mapping[str, Any], path: str = "") -> Detail:
    known = ", ".join(fields)
    return Detail(path + name[:100], f"is not known; known are: {known}" if known else "is not known; there are none")


def _bytes(text: str, field: str, problems: list[Detail]) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        problems.append(Detail(field, f"must be {WHAT_IS_RIGHT['signature']}"))
        return b""


def _malformed(why: str) -> RequestError:
    return RequestError(
        HTTPStatus.BAD_REQUEST,
        "INVALID_REQUEST",
        f"the body is not JSON: {why}",
        [Detail("body", f"must be JSON (RFC 8259): {why}")],
    )
