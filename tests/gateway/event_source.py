"""A client of server-sent events, as a browser has one.

See https://html.spec.whatwg.org/multipage/server-sent-events.html; it comes again sooner than a browser does.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Self

from tests.gateway.wire import Answer, WireError, connected, request_bytes

_PATIENCE = 60.0
_PAUSE = 0.02
"""Seconds before it comes again."""


@dataclass(frozen=True, slots=True)
class Message:
    """What a browser's script is told."""

    type: str
    data: str
    last_event_id: str


class Parser:
    """Takes a stream apart."""

    def __init__(self, last_event_id: str = "") -> None:
        self.last_event_id = last_event_id
        self.retry: int | None = None
        self.comments: list[str] = []
        self._rest = b""
        self._id = last_event_id
        self._type = ""
        self._data: list[str] = []

    def feed(self, part: bytes) -> list[Message]:
        """Take the next bytes, and return the messages that they complete."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        return [message for line in lines if (message := self._line(line.decode())) is not None]

    @property
    def is_between_messages(self) -> bool:
        """Whether nothing has begun that is not complete."""
        return not self._rest and not self._data and not self._type and self._id == self.last_event_id

    def _line(self, line: str) -> Message | None:
        assert "\r" not in line
        if not line:
            return self._dispatch()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not name:
            self.comments.append(value)
        elif name == "data":
            self._data.append(value)
        elif name == "event":
            self._type = value
        elif name == "id":
            self._id = value
        elif name == "retry":
            self.retry = int(value)
        else:
            raise AssertionError(f"a field that a browser does not know: {line!r}")
        return None

    def _dispatch(self) -> Message | None:
        self.last_event_id = self._id
        data, kind, self._data, self._type = "\n".join(self._data), self._type or "message", [], ""
        return Message(kind, data, self.last_event_id) if data else None


class EventSource:
    """Follows a session, and comes again whenever it is cut off, until it is told to stay away."""

    def __init__(self, address: str, session_id: int, query: str = "", *, once: bool = False) -> None:
        """Begin; use it as a context manager, so that it ends.

        Args:
            address: The gateway's.
            session_id: The session.
            query: More parameters.
            once: Do not come again.
        """
        self.messages: list[Message] = []
        self.comments: list[str] = []
        self.answers: list[Answer] = []
        self.clean_ends = 0
        """How often the stream was ended as it should be."""
        self.cuts = 0
        """How often it was cut."""
        self.refused = 0
        """How often there was nobody to connect to."""
        self.retry: int | None = None
        self.last_event_id = ""
        self.ended = False
        self._address = address
        self._path = f"/api/collab/events?sessionId={session_id}{query}"
        self._once = once
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._run(), name="event-source")

    @property
    def events(self) -> list[Any]:
        """Every event that came."""
        return [json.loads(message.data) for message in self.messages if message.type == "message"]

    @property
    def numbers(self) -> list[int]:
        """The number of every event that came."""
        return [event["serverSeq"] for event in self.events]

    @property
    def heads(self) -> list[int]:
        """The head, whenever it was told that it has been reached."""
        return [json.loads(message.data)["headServerSeq"] for message in self.messages if message.type == "caught-up"]

    async def until(self, holds: Callable[[Self], bool]) -> None:
        """Wait until a condition holds; fail when it ends before, or after a while."""
        async with asyncio.timeout(_PATIENCE), self._changed:
            await self._changed.wait_for(lambda: self.ended or holds(self))
        assert holds(self), self.messages[-3:]

    async def until_ended(self) -> Answer:
        """Wait until it comes no more, and return the last answer up to its body."""
        await self.until(lambda source: source.ended)
        return self.answers[-1]

    async def _run(self) -> None:
        try:
            while True:
                if await self._connect() is False or self._once:
                    return
                await asyncio.sleep(_PAUSE)
        finally:
            await self._tell(ended=True)

    async def _connect(self) -> bool:
        """Follow once; False when it is told to stay away."""
        headers = {"accept": "text/event-stream", "accept-encoding": "gzip, deflate, br"}
        if self.last_event_id:
            headers["last-event-id"] = self.last_event_id
        try:
            async with connected(self._address) as connection:
                answer = await connection.ask(request_bytes(self._path, headers=headers))
                self.answers.append(answer)
                if answer.status != 200 or not answer.headers["content-type"].startswith("text/event-stream"):
                    return False
                await self._read(answer.parts())
                self.clean_ends += 1
        except WireError:
            self.cuts += 1
        except (OSError, asyncio.IncompleteReadError):
            self.refused += 1
        await self._tell()
        return True

    async def _read(self, parts: AsyncIterator[bytes]) -> None:
        parser = Parser(self.last_event_id)
        async for part in parts:
            self.messages += parser.feed(part)
            self.comments, parser.comments = self.comments + parser.comments, []
            self.retry, self.last_event_id = parser.retry, parser.last_event_id
            await self._tell()
        assert parser.is_between_messages

    async def _tell(self, *, ended: bool = False) -> None:
        self.ended |= ended
        async with self._changed:
            self._changed.notify_all()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
