"""Recordings of people writing together, and the text that they amount to.

The format: gzip, JSON, one object with `startContent`, `endContent` and `txns`; each transaction has `patches`, a list
of [position, deleted, inserted], applied one after another. Positions count Unicode code points, as Python's do.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from collab_service.cli.failure import CommandError

Patch = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Transaction:
    """What one person wrote at once."""

    agent: int
    time: str
    patches: Sequence[Patch]


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording in one order, in which every transaction builds on all before it."""

    start: str
    end: str
    transactions: Sequence[Transaction]


def read_trace(path: Path) -> Trace:
    """Read a recording.

    Raises:
        CommandError: It cannot be read, is no recording, or is one that has no single order.
    """
    try:
        with gzip.open(path) as file:
            found = json.load(file)
        if any("parents" in txn for txn in found["txns"]):
            raise CommandError(
                f"{path} records what each writer had seen (it has parents) and has no order of its own to replay; "
                "take a linear or sequential recording"
            )
        transactions = [
            Transaction(
                int(txn.get("agent", 0)),
                str(txn["time"]),
                [(int(position), int(deleted), str(inserted)) for position, deleted, inserted in txn["patches"]],
            )
            for txn in found["txns"]
        ]
        return Trace(str(found["startContent"]), str(found["endContent"]), transactions)
    except (
        gzip.BadGzipFile,
        EOFError,
        zlib.error,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CommandError(
            f"{path} is no recording: it should be gzipped JSON with startContent, endContent and txns"
        ) from error
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error


def apply_patches(text: str, patches: Iterable[Patch]) -> str:
    """Return the text after some patches."""
    for position, deleted, inserted in patches:
        text = text[:position] + inserted + text[position + deleted :]
    return text
