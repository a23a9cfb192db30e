"""What a JSON payload must be: the text of one RFC 8259 object, kept as the text that it is."""

import re
from itertools import accumulate

import msgspec

from collab_service.model.limits import MAX_JSON_DEPTH

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"')
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
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
        return f"must be the text of one JSON object (RFC 8259): {error}"
    return None


def _depth(text: str) -> int:
    brackets = _STRING.sub(b"", text.encode()).translate(None, _NOT_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)
