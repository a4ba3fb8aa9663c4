"""The words of any chunks, one after the other, are those that a parser finds in each by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from strategies import tries

import openai_completions
from model_server import NONSENSE

FORMS = [
    '{"choices":[{"delta":{"content":"%"}}]}', '{"choices": [{"delta": {"role": "%", "content": "%"}}]}',
    '{"id":"%","choices":[{"delta":{"content":"%"}}]}', '{"choices":[{"delta":{"content":"%","content":"%"}}]}',
    '{"choices":[{"delta":{"content":"%"},"finish_reason":"%"}]}',
    '{"choices":[{"delta":{"content":"%"}}],"usage":"%"}',
    '{"choices":[{"delta":{"content":"%","reasoning":"%"}}]}',
    '{"choices":[{"delta":{"content":"%","tool_calls":"%"}}]}',
    '{"choices":[{"delta":{"content":"%"},"message":{"content":"%"}}]}', '{"choices":[{"message":{"content":"%"}}]}',
    '{"choices":[{"delta":{"%":"%"}}]}', '{"%":[{"delta":{"content":"%"}}]}', '{"error":"%"}', "%", '"%"', '["%"]',
]  # fmt: skip
TOKENS = [
    "a", "b", " ", ",", ":", "}", '"', "\\", '\\"', "\\u00", "e9", "\\ud83d", "\u2028", "é", "\t", "content", '","',
    "stop", '"}}]}', '"}}],"usage":{"prompt_tokens":1},"x":[{"y":{"z":"', "any other word",
]  # fmt: skip
words = st.lists(st.sampled_from(TOKENS), max_size=3).map("".join)
chunks = st.builds(lambda form, word: form.replace("%", word), st.sampled_from(FORMS), words)


class ToldError(Exception):
    """What the server told."""


def told(answer: openai_completions.Answer, chunk: str, frames: bool) -> object:
    try:
        items = answer.take(chunk) if frames else answer.read(chunk)
    except (ToldError, *NONSENSE) as error:
        return str(error) if isinstance(error, ToldError) else "nonsense"
    return items, answer.usage, answer.finish_reason


@tries(1000)
@given(st.lists(chunks, min_size=3, max_size=7))
def test_any_words(stream: list[str]) -> None:
    quick, slow = openai_completions.Answer(ToldError), openai_completions.Answer(ToldError)
    for chunk in [stream[0], *stream]:
        assert told(quick, chunk, True) == told(slow, chunk, False)


@given(st.sampled_from(FORMS), st.lists(words, min_size=2, max_size=6))
def test_any_words_of_one_form(form: str, given_words: list[str]) -> None:
    quick, slow = openai_completions.Answer(ToldError), openai_completions.Answer(ToldError)
    for word in ["first", "second", *given_words]:
        chunk = form.replace("%", word)
        assert told(quick, chunk, True) == told(slow, chunk, False)
