"""One turn at a model server, in OpenAI's dialect, which is the one that most of them speak."""

from __future__ import annotations

import asyncio
import email.utils
import json
import re
import socket
import ssl
import time

import pytest

import model_server
import openai_completions
from test_providers import run, take, turn


class Response:
    def __init__(self, status=200, fields=None, events=(), body=b"", hang=False):
        self.status, self.fields, self.body, self.hang = status, fields or {}, body, hang
        self.script = events
        self.over = asyncio.Event()
        self.closed = self.ended = self.finalized = False

    async def read(self, limit):
        if isinstance(self.body, OSError):
            raise self.body
        if len(self.body) > limit:
            raise OSError("too long")
        if self.hang:
            await asyncio.Event().wait()
        return self.body

    async def events(self):
        try:
            for event in self.script:
                if isinstance(event, OSError):
                    raise event
                yield event if isinstance(event, str) else json.dumps(event)
            if self.hang:
                await self.over.wait()
                raise OSError("closed")
            self.ended = True
        finally:
            self.finalized = True

    def close(self):  # as the real one, which ends the connection that is read from
        self.closed = True
        self.over.set()


def server(answer, **options):
    """The provider, and the list of the requests made."""
    requests = []

    async def request(method, url, fields, body):
        requests.append((method, url, dict(fields), json.loads(body)))
        if isinstance(answer, OSError):
            raise answer
        if answer is None:
            await asyncio.Event().wait()
        return answer

    options = {"baseUrl": "http://up/v1/", "apiKey": "sk-secret"} | options
    return model_server.provider(options, request, openai_completions), requests


def delta(text=None, reason=None, **more):
    content = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": content, "finish_reason": reason}]} | more


def part(**content):
    return {"choices": [{"index": 0, "delta": content}]}


def likely(text, number):
    tokens = None if number is None else {"content": [number]}
    return {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": tokens}]}


def asked(index, name, arguments, id=None):
    call = {"index": index, "id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return {key: value for key, value in call.items() if value is not None}


def calling(index, id=None, **function):
    first = {"id": id, "type": "function"} if id else {}
    return {"tool_calls": [{"index": index, **first, "function": function}]}


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
COUNTED, STOP, DONE = {"usage": USAGE}, {"finish_reason": "stop"}, "[DONE]"
NONSENSE = ("upstream", "the model server's answer makes no sense", True, None)
BROKE_OFF = ("upstream", "the model server's answer broke off", True, None)
FAILED = ("upstream", "the model server failed", True, None)
LOST = ("upstream", "the connection to the model server broke", True, None)
LIMITED = ("rate_limited", "the model server's rate limit is reached", False, None)
OVERLOADED = ("upstream", "the model server is overloaded", False, None)
DENIED = ("upstream_auth", "the model server refused the gateway's credentials", False, None)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([delta("a"), delta("b"), delta(None, "stop"), DONE], ["a", "b", STOP]),
        ([delta("a", "length"), DONE], ["a", {"finish_reason": "length"}]),
        ([delta("a"), delta(None, "stop"), {"choices": [], "usage": USAGE}, DONE], ["a", COUNTED, STOP]),
        ([delta("a"), {"choices": [], "usage": USAGE}, delta(None, "stop"), DONE], ["a", COUNTED, STOP]),
        ([delta("a", usage=None), delta("b", "stop", usage=USAGE), DONE], ["a", "b", COUNTED, STOP]),
        ([delta("a", "stop"), {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}], ["a", COUNTED, STOP]),
        ([delta("a", "stop", usage={"prompt_tokens": "x"}), DONE], ["a", STOP]),
        ([delta("a", "stop", usage="many"), DONE], ["a", STOP]),
        ([{"choices": []}, {}, delta(), delta(""), delta("a"), DONE], ["a"]),
        ([{"choices": [{"delta": None, "finish_reason": "eos"}]}, DONE], [STOP]),
        ([part(reasoning_content="hm"), part(reasoning="m", content=""), part(reasoning="!", content="a"),
          delta(None, "stop"), DONE], [{"reasoning": "hm"}, {"reasoning": "m"}, {"reasoning": "!"}, "a", STOP]),
        ([part(tool_calls=[asked(0, "look", "", "c1")], content=None), part(tool_calls=[asked(0, None, "{}")]),
          part(tool_calls=[asked(1, "go", "{}", "c2")], content="a"), delta(None, "tool_calls"), DONE],
         [calling(0, "c1", name="look", arguments=""), calling(0, arguments="{}"), "a",
          calling(1, "c2", name="go", arguments="{}"), {"finish_reason": "tool_calls"}]),
        ([part(tool_calls=[asked(None, "look", "{", "c1")]), part(tool_calls=[asked(None, None, "}")]),
          part(tool_calls=[asked(None, "go", "{}", "c2")]), DONE],
         [calling(0, "c1", name="look", arguments="{"), calling(0, arguments="}"),
          calling(1, "c2", name="go", arguments="{}")]),
        ([likely("a", -1), likely("b", -2), delta("c"), likely("d", None), DONE],
         ["a", {"logprobs": {"content": [-1]}}, "b", {"logprobs": {"content": [-2]}}, "c", "d"]),
        # numbers and ids as they should not be: every call is 0, each part has the id, or one of its own
        ([part(tool_calls=[asked(0, "a", "{}", "c1")]), part(tool_calls=[asked(0, "b", "{}", "c2")]), DONE],
         [calling(0, "c1", name="a", arguments="{}"), calling(1, "c2", name="b", arguments="{}")]),
        ([part(tool_calls=[asked(0, "a", "{", "c1")]), part(tool_calls=[asked(0, "a", "}", "c1")]), DONE],
         [calling(0, "c1", name="a", arguments="{"), calling(0, arguments="}")]),
        ([part(tool_calls=[asked(None, "a", "{", "c1")]), part(tool_calls=[asked(None, "a", "}", "c1")]), DONE],
         [calling(0, "c1", name="a", arguments="{"), calling(0, arguments="}")]),
        ([part(tool_calls=[asked(7, "a", "{", "c1")]), part(tool_calls=[asked(7, "", "}", "c2")]), DONE],
         [calling(0, "c1", name="a", arguments="{"), calling(0, arguments="}")]),
        ([part(tool_calls=[asked(0, None, "", "c1")]), part(tool_calls=[asked(0, "a", "{}", "")]), DONE],
         [calling(0, "c1", arguments=""), calling(0, name="a", arguments="{}")]),
        ([part(tool_calls=[asked(0, "a", {"b": "\u00e9"}, "c1")]), DONE],
         [calling(0, "c1", name="a", arguments='{"b":"\u00e9"}')]),
        ([part(tool_calls=[asked(0, "a", "", "c1")]), part(tool_calls=[asked(1, "b", None, "c2")]), DONE],
         [calling(0, "c1", name="a", arguments=""), calling(1, "c2", name="b"),
          {"tool_calls": [{"index": n, "function": {"arguments": "{}"}} for n in (0, 1)]}]),
        # content in parts
        ([part(content=[{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                        {"type": "text", "text": "a"}, {"type": "reference", "reference_ids": [1]}]),
          part(content=[{"type": "text", "text": "b"}]), DONE], [{"reasoning": "hm"}, "a", "b"]),
        ([part(content=[{"type": "text", "text": 1}])], [NONSENSE]),
        ([part(role="assistant", refusal=None), part(content=None, refusal="I will not."), DONE], ["I will not."]),
        ([{"choices": [{"delta": {"content": "a"}, "logprobs": [1]}]}, DONE], ["a"]),
        ([part(tool_calls=[{}])], [calling(0), BROKE_OFF]),
        ([part(tool_calls=[asked(0, ["a"], "{}")])], [NONSENSE]),
        ([part(tool_calls=[asked([0], "a", "{}")])], [NONSENSE]),
        ([part(tool_calls=[{"index": 0, "function": "a"}])], [NONSENSE]),
        ([part(tool_calls=["x"])], [NONSENSE]),
        ([part(tool_calls={"index": 0})], [NONSENSE]),
        ([part(reasoning=["x"])], [NONSENSE]),
        ([delta("a"), {"error": {"code": 429}}], ["a", (*LIMITED[:2], True, None)]),
        ([{"error": {"type": "overloaded_error"}}], [OVERLOADED]),
        ([delta("a"), {"error": {"type": "overloaded_error"}}], ["a", (*OVERLOADED[:2], True, None)]),
        ([delta("\ud83d"), delta("a\u2028\U0001f600", "stop"), DONE], ["\ufffd", "a\u2028\U0001f600", STOP]),
        ([delta("a", "stop"), DONE, delta("behind the end")], ["a", STOP]),
        ([delta("a", "stop"), "[DONE] "], ["a", STOP]),
        ([delta("a")], ["a", BROKE_OFF]),
        ([], [BROKE_OFF]),
        ([delta("a"), OSError("reset")], ["a", LOST]),
        ([delta("a"), ConnectionRefusedError()], ["a", LOST]),
        ([delta("a"), "{"], ["a", NONSENSE]),
        (["[" * 200_000], [NONSENSE]),
        (["[]"], [NONSENSE]),
        (["null"], [NONSENSE]),
        ([{"choices": {"0": 1}}], [NONSENSE]),
        ([{"choices": ["x"]}], [NONSENSE]),
        ([{"choices": [{"delta": {"content": ["x"]}}]}], [NONSENSE]),
        ([{"choices": [{"delta": "x"}]}], [NONSENSE]),
        ([{"choices": [{"finish_reason": {}, "delta": {}}]}, {"choices": [{"finish_reason": {"a": 1}}]}], [NONSENSE]),
        ([delta("a", "error")], [FAILED]),
        ([delta("a"), {"error": {"message": "went  wrong\nwith sk-secret", "code": 500}}],
         ["a", ("upstream", "went wrong with ***", True, None)]),
        ([{"error": {"message": "went", "code": None, "type": "server_error"}}], [("upstream", "went", True, None)]),
        ([{"error": {"message": "timed out", "code": 408}}], [("upstream", "timed out", True, None)]),
        ([{"error": "plain words"}], [("upstream", "plain words", True, None)]),
        ([{"error": {"code": "999"}}], [FAILED]),
        ([{"error": {"message": "bad", "code": "400"}}], [("rejected", "bad", False, None)]),
        ([{"error": {"message": "long", "code": "context_length_exceeded"}}], [("rejected", "long", False, None)]),
        ([{"error": {"message": "x", "type": "rate_limit_error"}}],
         [("rate_limited", "the model server's rate limit is reached", False, None)]),
        ([{"error": {"message": "x", "status": 401}}], [DENIED]),
        ([{"object": "error", "message": "too long", "code": 400}], [("rejected", "too long", False, None)]),
    ],
)  # fmt: skip
def test_a_streamed_answer(events, expected):
    response = Response(fields={"content-type": "text/event-stream"}, events=events)
    provider, _ = server(response)
    assert run(provider) == expected
    assert response.closed
    assert response.finalized
    if DONE in events and not isinstance(expected[-1], tuple):
        assert response.ended  # read to its end, so that its connection is used again


def test_what_stands_in_place_of_a_status_is_in_the_log(caplog):
    run(server(Response(events=[{"error": {"message": "no credit for sk-secret", "code": 402}}]))[0])
    assert "an error: no credit for ***" in caplog.text


def told(error):
    return LookupError(error)


def words(*chunks):
    """What is made of the chunks one after the other, and of each by itself."""
    together, alone = openai_completions.Answer(told), [openai_completions.Answer(told) for _ in chunks]
    taken = [together.take(chunk) for chunk in chunks]
    assert taken == [each.read(chunk) for each, chunk in zip(alone, chunks, strict=True)]
    assert together.finish_reason == next((each.finish_reason for each in alone if each.finish_reason), None)
    assert together.usage == next((each.usage for each in alone if each.usage), None)
    return taken, together.frame


FRAME = ('{"choices":[{"delta":{"content":"', '"}}]}')


@pytest.mark.parametrize(
    ("form", "learned"),
    [
        ('{"choices":[{"delta":{"content":"%s"}}]}', True),
        ('{"choices": [{"delta": {"role": "a", "content": "%s"}, "finish_reason": null}], "usage": null}', True),
        ('{"choices":[{"delta":{"content":"%s"}}],"usage":{}}', True),
        (' {"choices":[{"delta":{"content":"%s"}}]}\r', True),
        ('{"choices":[{"delta":{"content":"%s"},"finish_reason":"stop"}]}', False),
        ('{"choices":[{"delta":{"content":"%s"}}],"usage":{"prompt_tokens":1}}', False),
        ('{"id":"%s","choices":[{"delta":{"content":"%s"}}]}', False),
        ('{"choices":[{"delta":{"content":"%s","content":"%s"}}]}', False),
        ('{"choices":[{"delta":{"content":"%s"}}],"choices":[{"delta":{"content":"%s"}}]}', False),
        ('{"choices":[{"delta":{"content":"%s"}}],"x":NaN}', True),
    ],
)
def test_words_in_a_frame(form, learned):
    def chunk(word):
        return form.replace("%s", word)

    given = ["a", "b", "b", " c ", "d\\n", "", "e\\u00e9", "\u00e9\u2028\U0001f600", ",", ":", '\\"', "f", "}"]
    taken, frame = words(*map(chunk, given))
    assert taken == [json.loads(f'"{word}"') for word in given]
    assert (frame != ("", "")) is learned
    assert frame == ("", "") or "g".join(frame) == chunk("g")


@pytest.mark.parametrize(
    "chunks",
    [
        [FRAME[0] + word + f'"}}}}],"n":{n}}}' for n, word in enumerate("abcdefgh")],
        ['{"choices":[{"delta":{"content":"a\\u0062"}}]}', '{"choices":[{"delta":{"content":"c"}}]}'],
        ["a".join(FRAME), "c".join(FRAME), FRAME[0] + 'b"}}],"usage":{"prompt_tokens":1},"x":[{"y":{"z":"' + FRAME[1]],
        ["a".join(FRAME), "c".join(FRAME), '{"choices":[{"delta":{},"finish_reason":"stop"}]}', "b".join(FRAME)],
        ["a".join(FRAME), *('{"x":",","choices":[{"delta":{"content":"%"}}]}'.replace("%", word) for word in ",a,")],
        ["a".join(FRAME), *('{"x":"%","choices":[{"delta":{"content":"a"}}]}'.replace("%", word) for word in "abc")],
        ["a".join(FRAME), "any other word".join(FRAME), "b".join(FRAME)],
        ["a".join(FRAME), "".join(FRAME), "b".join(FRAME)],
    ],
)
def test_words_of_several_frames(chunks):
    words(*chunks)


@pytest.mark.parametrize("broken", ["a\tb", "a\x00", 'a"', "a\\", "a\\x"])
def test_what_is_no_json_is_refused_in_a_known_frame_too(broken):
    answer = openai_completions.Answer(told)
    assert [answer.take(word.join(FRAME)) for word in "ab"] == ["a", "b"]
    assert answer.frame == FRAME
    with pytest.raises(ValueError):  # noqa: PT011 (any is nonsense to the one that asks)
        answer.take(broken.join(FRAME))
    with pytest.raises(ValueError):  # noqa: PT011
        answer.take(FRAME[0][:-1] + FRAME[1])


def whole(text, reason="stop", calls=None, **more):
    message = {"role": "assistant", "content": text, "tool_calls": calls}
    return json.dumps({"choices": [{"message": message, "finish_reason": reason}]} | more).encode()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (whole("hi there", usage=USAGE), ["hi there", COUNTED, STOP]),
        (whole("hi", None), ["hi"]),
        (whole(None, "tool_calls", calls=[{"id": "c1", "function": {"name": "a", "arguments": "{}"}}, {"id": "c2"}]),
         [{"tool_calls": [*calling(0, "c1", name="a", arguments="{}")["tool_calls"], *calling(1, "c2")["tool_calls"]]},
          calling(1, arguments="{}"), {"finish_reason": "tool_calls"}]),
        (b"\xef\xbb\xbf" + whole("hi"), ["hi", STOP]),
        (b"{}", [BROKE_OFF]),
        (b"\xff\xfe", [NONSENSE]),
        (b'{"error": {"message": "no", "code": 404}}', [("rejected", "no", False, None)]),
        (b" " * (model_server.MAX_ANSWER + 1), [LOST]),
    ],
)  # fmt: skip
def test_a_whole_answer(body, expected):
    response = Response(fields={"content-type": "Application/JSON; charset=utf-8"}, body=body)
    provider, _ = server(response)
    assert run(provider) == expected
    assert response.closed


def test_calls_without_an_id_get_one_each():
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in "ab"]
    response = Response(fields={"content-type": "application/json"}, body=whole(None, calls=calls))
    (found, _) = run(server(response)[0])
    assert [(call["index"], call["function"]["name"]) for call in found["tool_calls"]] == [(0, "a"), (1, "b")]
    ids = {call["id"] for call in found["tool_calls"]}
    assert len(ids) == 2
    assert all(re.fullmatch("call_[0-9a-f]{24}", id) for id in ids)


def refused(message):
    return [("rejected", message, False, None)]


def limited(seconds):
    return [("rate_limited", "the model server's rate limit is reached", False, seconds)]


def down(status, taken, seconds=None):
    return [("upstream", f"the model server failed with status {status}", taken, seconds)]


def overloaded(seconds):
    return [("upstream", "the model server is overloaded", False, seconds)]


def test_what_configured_fields_carry_is_never_said():
    body = b'{"error": "Bearer of-some-length was refused, so was sk-secret, x-title: a"}'
    provider, _ = server(Response(400, body=body), headers={"X-Key": "Bearer of-some-length", "X-Title": "a"})
    assert run(provider) == refused("Bearer *** was refused, so was ***, x-title: a")


REDIRECT = [("upstream_auth", "the model server answered with a redirect, which is never followed", False, None)]


@pytest.mark.parametrize(
    ("status", "fields", "body", "expected"),
    [
        (400, {}, b'{"error": {"message": "bad field"}}', refused("bad field")),
        (404, {}, b'{"error": "no such model"}', refused("no such model")),
        (409, {}, b'{"message": "conflict"}', refused("conflict")),
        (413, {}, b'{"detail": "too large"}', refused("too large")),
        (422, {}, b'{"detail": [{"msg": "x"}]}', refused("the model server refused the request with status 422")),
        (400, {}, b"<html>no</html>", refused("the model server refused the request with status 400")),
        (400, {}, b'{"error": " <html>no</html>"}', refused("the model server refused the request with status 400")),
        (400, {}, b'[{"error": {"message": "no such model", "code": 400}}]', refused("no such model")),
        (400, {}, b"[]", refused("the model server refused the request with status 400")),
        (400, {}, b'["no"]', refused("the model server refused the request with status 400")),
        (400, {}, b" " * 70_000, refused("the model server refused the request with status 400")),
        (400, {}, OSError("broke"), refused("the model server refused the request with status 400")),
        (400, {}, json.dumps({"error": "x" * 600}).encode(), refused("x" * 500)),
        (400, {}, b'{"error": "key sk-secret is\\r\\n bad"}', refused("key *** is bad")),
        (400, {}, json.dumps({"error": "\x1b[31mred\x07\x9b \u202eback \ud83d\u00e9 \U0001f600\u2028!"}).encode(),
         refused("[31mred back \u00e9 \U0001f600 !")),
        (401, {}, b'{"error": "your key sk-secret"}', [DENIED]),
        (402, {}, b"", [DENIED]),
        (403, {}, b"", [DENIED]),
        (301, {"location": "http://elsewhere/"}, b"", REDIRECT),
        (307, {}, b"", REDIRECT),
        (429, {"retry-after": "7"}, b"", limited(7)),
        (429, {"retry-after": "0"}, b'{"error": {"code": "insufficient_quota"}}', limited(1)),
        (429, {"retry-after": "9" * 5000}, b"", limited(86_400)),
        (429, {"retry-after": "soon"}, b"", limited(None)),
        (429, {"retry-after": "Mon, 01 Jan 2001 00:00:00 GMT"}, b"", limited(1)),
        (429, {}, b"", limited(None)),
        (408, {}, b"", down(408, False)),
        (500, {}, b'{"error": "inside"}', down(500, True)),
        (502, {}, b"", down(502, True)),
        (503, {"retry-after": "7"}, b"", down(503, False, 7)),
        (529, {}, b"", overloaded(None)),
        (529, {"retry-after": "3"}, b"", overloaded(3)),
    ],
)
def test_a_status_that_is_no_success(status, fields, body, expected, caplog):
    response = Response(status, fields, body=body)
    provider, _ = server(response)
    assert run(provider) == expected
    assert response.closed
    assert "sk-secret" not in caplog.text


def test_retry_after_as_a_date():
    text = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 97 <= model_server.retry_seconds(text) <= 101


CUT_OFF = ("upstream", model_server.UNREACHED, False, None)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(111, "refused"), CUT_OFF),
        (socket.gaierror(-2, "unknown"), CUT_OFF),
        (OSError(101, "unreachable"), CUT_OFF),
        (OSError("Multiple exceptions: [Errno 111] ..."), CUT_OFF),
        (ssl.SSLCertVerificationError(1, "self-signed"),
         ("upstream", "the model server's certificate could not be verified", False, None)),
        (ConnectionResetError(), LOST),
        (TimeoutError(), LOST),
    ],
)  # fmt: skip
def test_a_connection_that_fails(error, expected):
    provider, _ = server(error)
    assert run(provider) == [expected]


def test_what_is_sent():
    provider, requests = server(
        Response(events=[DONE]), headers={"X-Extra": "1", "Authorization": "Basic x"}, timeoutSeconds=5
    )
    messages = [{"role": "user", "content": "caf\u00e9"}]
    run(provider, turn(system="be kind", messages=messages, params={"temperature": 0.5}))
    ((method, url, fields, body),) = requests
    assert (method, url) == ("POST", "http://up/v1/chat/completions")
    assert fields == {
        "content-type": "application/json",
        "accept": "text/event-stream, application/json",
        "user-agent": "copepod",
        "authorization": "Basic x",
        "x-extra": "1",
    }
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "be kind"}, *messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
    }
    provider, requests = server(Response(events=[DONE]), apiKey=None)
    run(provider)
    assert "authorization" not in requests[0][2]
    assert requests[0][3]["messages"] == [{"role": "user", "content": "hello"}]
    assert run(server(Response(400, body=b'{"error": "sk-secret"}'), apiKey="")[0]) == refused("sk-secret")


@pytest.mark.parametrize(
    ("answer", "items"),
    [
        (None, []),
        (Response(events=[delta("a"), delta("b")], hang=True), ["a", "b"]),
        (Response(fields={"content-type": "application/json"}, hang=True), []),
        (Response(500, hang=True), []),
    ],
)
def test_the_time_an_answer_may_take(answer, items):
    provider, _ = server(answer, timeoutSeconds=0.05)
    assert run(provider) == [*items, ("timeout", "the model server took too long", True, None)]
    assert answer is None or answer.closed


def test_a_refusal_whose_body_does_not_come(monkeypatch):
    monkeypatch.setattr(model_server, "REFUSAL_SECONDS", 0.05)
    response = Response(429, {"retry-after": "7"}, hang=True)
    assert run(server(response)[0]) == limited(7)
    assert response.closed


def test_time_that_is_enough_and_a_server_that_stays_after_done():
    provider, _ = server(Response(events=[delta("a", "stop")]), timeoutSeconds=10)
    assert run(provider) == ["a", STOP]
    response = Response(events=[delta("a", "stop"), DONE], hang=True)
    provider, _ = server(response)
    assert run(provider) == ["a", STOP]
    assert response.closed
    assert not response.ended


@pytest.mark.parametrize("cancel", [True, False])
def test_a_cancel_closes_the_connection(cancel):
    response = Response(events=[delta("a")], hang=True)
    provider, _ = server(response)

    async def main():
        items = provider(turn())
        assert await anext(items) == "a"
        if cancel:
            task = asyncio.ensure_future(anext(items))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await items.aclose()
        assert response.closed
        assert response.finalized

    asyncio.run(main())


# Retries


OK = [delta("a", "stop"), DONE]
RETRY = {"tries": 3, "seconds": 10}


def busy(status, seconds=None):
    return Response(status, {} if seconds is None else {"retry-after": str(seconds)})


def told_first(**error):
    return Response(events=[{"error": error}])


def retried(answers, monkeypatch, **options):
    """The items, how long it waited before each try, and how many requests were made."""
    waits = []
    sleep = asyncio.sleep

    async def waited(seconds):
        waits.append(seconds)
        await sleep(0)

    monkeypatch.setattr("random.uniform", lambda low, high: high)
    monkeypatch.setattr(asyncio, "sleep", waited)
    left = iter(answers)
    made = []

    async def request(method, url, fields, body):
        made.append(body)
        answer = next(left)
        if isinstance(answer, OSError):
            raise answer
        return answer

    options = {"baseUrl": "http://up/v1/", "apiKey": "sk-secret", "retry": RETRY} | options

    async def main():
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda clock=loop.time: clock() + sum(waits))
        return await take(model_server.provider(options, request, openai_completions), turn())

    items = asyncio.run(main())
    assert len(set(made)) == 1
    assert all(answer.closed for answer in answers[: len(made)] if isinstance(answer, Response))
    return items, waits, len(made)


REFUSED = ConnectionRefusedError(111, "refused")


@pytest.mark.parametrize(
    ("answers", "options", "items", "waits", "made"),
    [
        ([busy(503), Response(events=OK)], {}, ["a", STOP], [0.5], 2),
        ([busy(529), busy(429), Response(events=OK)], {}, ["a", STOP], [0.5, 1.0], 3),
        ([REFUSED, Response(events=OK)], {}, ["a", STOP], [0.5], 2),
        ([busy(408), Response(events=OK)], {}, ["a", STOP], [0.5], 2),
        ([busy(429, 3), busy(503, 4), Response(events=OK)], {}, ["a", STOP], [3, 4], 3),
        ([told_first(code=429), Response(events=OK)], {}, ["a", STOP], [0.5], 2),
        ([told_first(type="overloaded_error"), Response(events=OK)], {}, ["a", STOP], [0.5], 2),
        # no more tries, no more time
        ([busy(429), busy(503)], {"retry": {"tries": 2, "seconds": 10}}, down(503, False), [0.5], 2),
        ([busy(429)], {"retry": {"tries": 1, "seconds": 10}}, limited(None), [], 1),
        ([busy(429)], {"retry": None}, limited(None), [], 1),
        ([busy(429, 11)], {}, limited(11), [], 1),
        ([busy(503, 6), busy(503, 5)], {}, down(503, False, 5), [6], 2),
        ([busy(503, 6)], {"timeoutSeconds": 5}, down(503, False, 6), [], 1),
        ([busy(503)], {"retry": {"tries": 9, "seconds": 0}}, down(503, False), [], 1),
        # what may have acted, and what will not pass
        ([busy(500)], {}, down(500, True), [], 1),
        ([ConnectionResetError()], {}, [LOST], [], 1),
        ([busy(400)], {}, refused("the model server refused the request with status 400"), [], 1),
        ([busy(401)], {}, [DENIED], [], 1),
        ([Response(events=[delta("a"), {"error": {"code": 429}}])], {}, ["a", (*LIMITED[:2], True, None)], [], 1),
        ([Response(events=[part(reasoning="a"), {"error": {"code": 429}}])], {},
         [{"reasoning": "a"}, (*LIMITED[:2], True, None)], [], 1),
        ([Response(events=[delta("a")])], {}, ["a", BROKE_OFF], [], 1),
        ([ssl.SSLCertVerificationError(1, "self-signed")], {},
         [("upstream", "the model server's certificate could not be verified", False, None)], [], 1),
    ],
)  # fmt: skip
def test_what_was_not_taken_is_asked_again(answers, options, items, waits, made, monkeypatch, caplog):
    assert retried(answers, monkeypatch, **options) == (items, waits, made)
    assert caplog.text.count("it is asked again in") == len(waits)
    for seconds in waits:
        assert f"asked again in {seconds:.1f} s" in caplog.text


def test_a_cancel_ends_the_wait_at_once():
    async def main():
        provider, requests = server(busy(503, 9), retry=RETRY)
        task = asyncio.ensure_future(anext(provider(turn())))
        async with asyncio.timeout(5):
            while not requests:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert len(requests) == 1

    asyncio.run(main())
