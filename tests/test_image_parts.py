"""Images in messages: which parts an agent that sees them gets, and what is left for one that does not."""

from __future__ import annotations

from typing import Any

import pytest

import image_parts

PNG = "data:image/png;base64,iVBO"
FAR = "HTTPS://a.example/b.png"


def user(*content: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(content)}


def text(words: str, kind: str = "text") -> dict[str, Any]:
    return {"type": kind, "text": words}


def image(given: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": given}


SAID: list[dict[str, Any]] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([image({"url": PNG})], [image({"url": PNG})]),
        ([text("a"), image({"url": FAR, "detail": "low", "x": 1})], [text("a"), image({"url": FAR, "detail": "low"})]),
        ([image({"url": FAR, "detail": 5})], [image({"url": FAR})]),
        ([image(FAR)], [image({"url": FAR})]),
        ([text("a", "input_text"), {"type": "input_audio"}, {}, image(PNG)], [text("a"), image({"url": PNG})]),
    ],
)
def test_kept(content: Any, expected: Any) -> None:
    before = repr(content)
    assert image_parts.kept([*SAID, user(*content)]) == [*SAID, user(*expected)]
    assert repr(content) == before


@pytest.mark.parametrize("given", [None, 5, {}, {"url": None}, {"url": ""}, {"url": "file:///etc/passwd"}, "a.png", []])
def test_what_is_no_address(given: Any) -> None:
    with pytest.raises(ValueError, match="must be a data:, http:// or https:// address"):
        image_parts.kept([user(image(given))])


@pytest.mark.parametrize(
    ("messages", "expected", "last"),
    [
        ([*SAID, user(text("c"), image(PNG), text("d"))], [*SAID, {"role": "user", "content": "c\nd"}], "c\nd"),
        ([*SAID, user(image(None))], SAID, "a"),
        ([user(image(PNG), text("c")), *SAID[1:]], [{"role": "user", "content": "c"}, *SAID[1:]], "c"),
        ([user(image(PNG)), {"role": "tool", "content": ""}, {"role": "tool", "content": "r"}],
         [{"role": "tool", "content": ""}, {"role": "tool", "content": "r"}], "r"),
    ],
)  # fmt: skip
def test_left_out(messages: Any, expected: Any, last: str) -> None:
    before = repr(messages)
    assert image_parts.left_out(messages) == (expected, last)
    assert repr(messages) == before


@pytest.mark.parametrize("messages", [[user(image(PNG))], [user(image(PNG), text(""))], [*SAID[1:], user(image(PNG))]])
def test_nothing_is_left(messages: Any) -> None:
    with pytest.raises(ValueError, match="Missing user message"):
        image_parts.left_out(messages)
