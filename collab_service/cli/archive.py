"""A session in a file: JSON lines, from which it can be checked and written again without loss.

The first line is a header with the session; each further line is an event in the JSON form of the HTTP contract; the
last line says how many there are and where the chain ends, so that a file that was cut off never passes for whole.

A payload whose text would not survive as part of a line (it has line breaks between its tokens, or spaces around it)
stands a second time, as the string `payloadText`, from which it is restored byte for byte.
"""

import base64
import binascii
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import UNSET, Struct, UnsetType

from collab_service.cli.failure import CommandError, ExitStatus
from collab_service.client import BrokenLog, Event, LogCheck, Session
from collab_service.client.json_form import EventForm, SessionForm, line_form, one_line, session_form
from collab_service.model.limits import MAX_INT64

FORMAT = "collab-session"
VERSION = 1
HEADER_BYTES = 64 * 1024
"""The first line is shorter than this, whatever room and owner are called."""


class _Header(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    format: str
    version: int
    session: SessionForm


class _EventLine(EventForm, frozen=True, rename="camel", forbid_unknown_fields=True):
    payload_text: str | UnsetType = UNSET


class _End(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    events: int
    chain_hash: str


class _EndLine(Struct, frozen=True, rename="camel", forbid_unknown_fields=True):
    end: _End


_decode_header = msgspec.json.Decoder(_Header).decode
_decode_event = msgspec.json.Decoder(_EventLine).decode
_decode_end = msgspec.json.Decoder(_EndLine).decode
_HEADER_START = b'{"format":"collab-session",'
_END = b'{"end":'
_GZIP = b"\x1f\x8b"


def header_line(session: Session) -> bytes:
    """Return the first line."""
    return msgspec.json.encode(_Header(FORMAT, VERSION, session_form(session))) + b"\n"


def is_begun_header(line: bytes) -> bool:
    """Tell whether a first line is the beginning of a header, or of nothing, and was cut off."""
    return not line.endswith(b"\n") and (line.startswith(_HEADER_START) or _HEADER_START.startswith(line))


def event_line(event: Event) -> bytes:
    """Return the line of an event."""
    form = line_form(event)
    line = msgspec.json.encode(form)
    text = event.payload
    if isinstance(text, str) and (bytes(form.payload) != text.encode() or text != text.strip()):
        line = line[:-1] + b',"payloadText":' + msgspec.json.encode(text) + b"}"
    return line + b"\n"


def end_line(check: LogCheck) -> bytes:
    """Return the last line."""
    return msgspec.json.encode(_EndLine(_End(check.last_server_seq, check.chain_hash.hex()))) + b"\n"


class Archive:
    """An archive that is read, and checked while it is."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the header.

        Raises:
            CommandError: It is no archive.
        """
        self._path = path
        self._file = file
        self._line = 1
        line = file.readline(HEADER_BYTES)
        try:
            header = _decode_header(line)
            if not line.endswith(b"\n") or header.format != FORMAT or not 1 <= header.session.id <= MAX_INT64:
                raise ValueError
        except (ValueError, RecursionError) as error:
            why = "it is compressed, so gunzip it first" if line.startswith(_GZIP) else "its first line is no header"
            raise CommandError(f"{path} is no session that `collab export` wrote: {why}") from error
        if header.version != VERSION:
            raise CommandError(
                f"{path} has version {header.version} of the format, and this collab reads version {VERSION}"
            )
        self.session = header.session
        self.check = LogCheck(self.session.id)
        self.size = len(line)
        """Bytes of the header and the events that were read so far: whole lines, all of them in order."""
        self.is_whole = False
        """Whether the end has been read."""

    def events(self) -> Iterator[Event]:
        """Yield the events. After the last one `is_whole` tells whether the file goes as far as it should.

        Raises:
            CommandError: The file is damaged: a line is none of an archive, or the log is broken.
        """
        for line in self._file:
            self._line += 1
            if not line.endswith(b"\n"):
                return  # half a line
            if line.startswith(_END):
                self._read_end(line)
                return
            with self._damage():
                event = _event_of(_decode_event(line))
                self.check.add(event)
            self.size += len(line)
            yield event

    def whole(self) -> Iterator[Event]:
        """Yield the events, and raise `CommandError` when the file ends too early."""
        yield from self.events()
        if not self.is_whole:
            raise CommandError(
                f"{self._path} is not whole: it ends after event {self.check.last_server_seq:,} without its last line; "
                "export the session again",
                ExitStatus.CHECK_FAILED,
            )

    def _read_end(self, line: bytes) -> None:
        with self._damage():
            end = _decode_end(line).end
            if (end.events, end.chain_hash) != (self.check.last_server_seq, self.check.chain_hash.hex()):
                raise BrokenLog(f"it ends with event {self.check.last_server_seq:,}, and not as its last line says")
            if self._file.read(1):
                raise BrokenLog("there is more after the last line")
            if end.events < self.session.last_server_seq:
                raise BrokenLog(f"its first line speaks of {self.session.last_server_seq:,} events")
        self.is_whole = True

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RecursionError, BrokenLog) as error:
            raise CommandError(
                f"{self._path} is damaged in line {self._line:,}: {error}", ExitStatus.CHECK_FAILED
            ) from error


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open an archive.

    Raises:
        CommandError: It cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            yield Archive(path, file)
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error


def _event_of(line: _EventLine) -> Event:
    if line.payload_base64 is not UNSET:
        payload: str | bytes = _bytes(line.payload_base64)
        if line.payload_text is not UNSET or bytes(line.payload) != b"null":
            raise ValueError("a payload is either JSON or binary")
    elif line.payload_text is not UNSET:
        payload = line.payload_text
        if one_line(line.payload_text).strip().encode() != bytes(line.payload):
            raise ValueError("payload and payloadText differ")
    else:
        payload = bytes(line.payload).decode()
    return Event(
        line.id,
        line.session_id,
        line.server_seq,
        datetime.strptime(line.created_at, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC),
        bytes.fromhex(line.chain_hash),
        payload,
        line.actor_id,
        line.client_seq,
        line.type,
        line.hash,
        b"" if line.signature is None else _bytes(line.signature),
        line.idempotency_key,
    )


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
