"""What a JSON payload must be: the text of one RFC 8259 object, kept as the text that it is."""

import re
from itertools import accumulate

import msgspec

from collab_service.model.limits import MAX_JSON_DEPTH

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"')
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_HALF_PAIR = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)
_decoder = msgspec.json.Decoder(msgspec.Raw)


def json_object_problem(text: str) -> str | None:
    """Return what keeps `text` from being the text of one JSON object, or None when it is one.

    Checks the grammar (RFC 8259), a depth of at most 128, and that surrogates come in pairs. Numbers of any size,
    duplicate keys and the escape `\\u0000` are fine. Never builds the value.
    """
    if not text.startswith("{"):
        stripped = text.lstrip(" \t\n\r")
        if not stripped.startswith("{"):
            return "must be the text of one JSON object, such as {}" + ("" if stripped else "; it is empty")
    # Depth first: it bounds the recursion of the grammar check. What is opened has to be closed, too.
    long = len(text) > 2 * MAX_JSON_DEPTH
    if long and text.count("{") + text.count("[") > MAX_JSON_DEPTH and _depth(text) > MAX_JSON_DEPTH:
        return f"must be nested at most {MAX_JSON_DEPTH} deep"
    try:
        _decoder.decode(text)
    except msgspec.DecodeError as error:
        return f"must be the text of one JSON object (RFC 8259): {why_no_json(text.encode(), error)}"
    return None


def why_no_json(text: bytes, error: msgspec.DecodeError) -> str:
    """Return what the decoder says, or what is meant by it."""
    # Which JavaScript writes when a text is cut in the middle of an emoji; msgspec speaks of truncated input.
    return "it holds half of a surrogate pair" if _HALF_PAIR.search(text) else str(error)


def _depth(text: str) -> int:
    brackets = _STRING.sub(b"", text.encode()).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
