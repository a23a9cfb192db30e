"""Page tokens: a place in the list of sessions, bound to the filters it was made with.

A token is base64url of two 64-bit integers and a digest of them and the filters. It is no secret and protects nothing;
the digest only tells a token of ours, for this list, from anything else.
"""

import base64
import binascii
from hashlib import sha256
from struct import Struct

from collab_service.model.errors import InvalidArgument, Reason, Violation
from collab_service.storage.repository.sessions import ListPosition

_PLACE = Struct(">qq")
_DIGEST_BYTES = 12


def make_page_token(place: ListPosition, filters: object) -> str:
    """Return the token for the page after `place`; `filters` is anything whose `repr` tells filters apart."""
    packed = _PLACE.pack(*place)
    return base64.urlsafe_b64encode(packed + _digest(packed, filters)).rstrip(b"=").decode()


def read_page_token(token: str, filters: object) -> ListPosition:
    """Return the place that a token stands for.

    Raises:
        InvalidArgument: With the reason `PAGE_TOKEN_INVALID`: not one of ours, or made with other filters.
    """
    try:
        raw = base64.b64decode(token.encode() + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        packed, digest = raw[: _PLACE.size], raw[_PLACE.size :]
        if digest == _digest(packed, filters) and make_page_token(place := _place(packed), filters) == token:
            return place
    except (binascii.Error, ValueError):
        pass
    raise InvalidArgument(
        [
            Violation(
                "page_token",
                "must be the next_page_token of a call with the same filters, or empty for the first page",
                Reason.PAGE_TOKEN_INVALID,
            )
        ]
    )


def _place(packed: bytes) -> ListPosition:
    return ListPosition(*_PLACE.unpack(packed))


def _digest(packed: bytes, filters: object) -> bytes:
    return sha256(packed + repr(filters).encode()).digest()[:_DIGEST_BYTES]
