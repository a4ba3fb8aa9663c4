"""Images in a request's messages: for an agent that sees them its parts as they are, for any other the text alone."""

from __future__ import annotations

import re
from typing import Any

ADDRESS = re.compile(r"(?i)data:|https?://")

Message = dict[str, Any]


def kept(messages: list[Message]) -> list[Message]:
    """The messages, with nothing but text and images in their parts. ValueError: what is wrong with an image."""
    return [each | {"content": _parts(each["content"])} if _has_parts(each) else each for each in messages]


def left_out(messages: list[Message]) -> tuple[list[Message], str]:
    """The messages without images, and the text of the last one that is not the assistant's.

    ValueError: there is none.
    """
    found: list[Message] = []
    last = ""
    for each in messages:
        if _has_parts(each):
            text = "\n".join(part["text"] for part in each["content"] if _is_text(part))
            if not text:
                continue
            each = each | {"content": text}
        found.append(each)
        if each["role"] != "assistant":
            last = each["content"] or last
    if not last:
        raise ValueError("Missing user message in `messages`: this agent takes no images.")
    return found, last


def _has_parts(message: Message) -> bool:
    return isinstance(message["content"], list)


def _is_text(part: dict[str, Any]) -> bool:
    return part.get("type") in ("text", "input_text")


def _parts(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    parts = []
    for part in content:
        if _is_text(part):
            parts.append({"type": "text", "text": part["text"]})
        elif part.get("type") == "image_url":
            parts.append({"type": "image_url", "image_url": _image(part.get("image_url"))})
    return parts


def _image(image: object) -> dict[str, str]:
    """What OpenAI calls an image_url: an address and maybe `detail`; some clients send the address alone."""
    given = image if isinstance(image, dict) else {"url": image}
    url, detail = given.get("url"), given.get("detail")
    if not isinstance(url, str) or not ADDRESS.match(url):
        raise ValueError("The `url` of an `image_url` in `messages` must be a data:, http:// or https:// address.")
    return {"url": url, "detail": detail} if isinstance(detail, str) else {"url": url}
