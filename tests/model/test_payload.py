"""A JSON payload is the text of one RFC 8259 object, and everything that is one is taken."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collab_service.model.payload import json_object_problem

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
)


def nested(depth: int) -> str:
    """Return an object with so many levels."""
    return '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"


@given(st.dictionaries(st.text(), JSON), st.booleans())
def test_every_json_object_is_accepted(value: dict[str, object], ascii_only: bool) -> None:
    """No object that a JSON library writes is refused."""
    assert json_object_problem(json.dumps(value, ensure_ascii=ascii_only)) is None


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        " \t\r\n{ } \n",
        '{"a":1e999}',
        '{"a":-0}',
        '{"a":1E+5}',
        '{"a":' + "9" * 5_000 + "}",
        '{"a":1,"a":2}',
        r'{"a":"\u0000"}',
        r'{"a":"\ud83d\ude00"}',
        '{"a":"\u2028\x7f"}',
        nested(128),
        '{"a":"' + "[" * 500 + '\\"' + "{" * 500 + '"}',
    ],
)
def test_accepted(text: str) -> None:
    """Numbers of any size, duplicate keys, escapes and depth up to the limit are part of the contract."""
    assert json_object_problem(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "[]", "1", '"a"', "null", "{", "}", "{}}", "{}{}", "{},", "x{}", "\ufeff{}", "{}\u00a0", "{}\0",
        "{a:1}", "{'a':1}", '{"a"}', '{"a":}', '{"a":1,}', '{,}', '{"a":1 "b":2}', '{"a":[1,]}', '{"a":[,1]}',
        '{"a":01}', '{"a":1.}', '{"a":.5}', '{"a":+1}', '{"a":-}', '{"a":1e}', '{"a":--1}', '{"a":0x1}',
        '{"a":NaN}', '{"a":Infinity}', '{"a":tru}', '{"a":True}', "{/**/}", '{"a":1//\n}',
        '{"a":"\t"}', '{"a":"\x00"}', '{"a":"\x1f"}', '{"a":"\\x"}', '{"a":"\\u12"}', '{"a":"', '{"a":"\\',
        r'{"a":"\ud800"}', r'{"a":"\ude00"}', r'{"a":"\ud83dabcdef"}', r'{"a":"\ud83d\u0041"}', r'{"\ud800":1}',
        r'{"a":"\ud83d\ud83d\ude00"}', nested(129), "[" * 100_000, '{"a":' * 100_000,
    ],
)  # fmt: skip
def test_refused(text: str) -> None:
    """What is no object, or not RFC 8259, or too deep, is refused with a reason."""
    problem = json_object_problem(text)
    assert problem is not None
    assert problem.startswith("must be")


@pytest.mark.parametrize("text", [r'{"a":"\ud800"}', r'{"a":"\udc00"}', r'{"a":"\uD83D\uD83D\uDE00"}'])
def test_half_a_pair_is_called_so(text: str) -> None:
    """JavaScript writes it when a text is cut in the middle of an emoji; nothing of the JSON is missing."""
    assert "half of a surrogate pair" in str(json_object_problem(text))


@given(st.text(alphabet='{}[]",:\\u0dDeE89-+. \n\x00aé😀', max_size=40))
def test_agrees_with_another_parser(text: str) -> None:
    """Whatever is accepted is an object to Python's parser too, and the other way round (surrogates apart)."""
    try:
        value = json.loads(text, parse_constant=lambda name: 1 / 0)
        json.dumps(value, ensure_ascii=False).encode()
        is_object = isinstance(value, dict)
    except (ValueError, ZeroDivisionError):
        is_object = False
    assert (json_object_problem(text) is None) == is_object
