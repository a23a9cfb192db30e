"""Page tokens: a place in the list of sessions, bound to the filters it was made with.

A token is base64url of two 64-bit integers and a digest of them and the filters. It is no secret and protects nothing;
the digest only tells a token of ours, for this list, from anything else.
"""

import base64
import binascii
from hashlib import sha256
from struct import Struct
from struct import error as StructError

from collab_service.model import ListPosition
from collab_service.model.limits import MAX_INT64

_PLACE = Struct(">qq")
_DIGEST_BYTES = 12
_MAX_MICROS = 253_402_300_800_000_000  # the year 10000


def make_page_token(place: ListPosition, filters: object) -> str:
    """Return the token for the page after `place`; `filters` is anything whose `repr` tells filters apart."""
    packed = _PLACE.pack(*place)
    return base64.urlsafe_b64encode(packed + _digest(packed, filters)).rstrip(b"=").decode()


def read_page_token(token: str, filters: object) -> ListPosition | None:
    """Return the place that a token stands for; None when it is not one of ours, or was made with other filters."""
    try:
        raw = base64.b64decode(token.encode() + b"=" * (-len(token) % 4), altchars=b"-_", validate=True)
        place = ListPosition(*_PLACE.unpack(raw[: _PLACE.size]))
    except (binascii.Error, ValueError, StructError):
        return None
    in_range = 0 <= place.last_active < _MAX_MICROS and 0 < place.session_id <= MAX_INT64
    return place if in_range and make_page_token(place, filters) == token else None


def _digest(packed: bytes, filters: object) -> bytes:
    return sha256(packed + repr(filters).encode()).digest()[:_DIGEST_BYTES]
