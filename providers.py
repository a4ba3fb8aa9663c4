"""Where an agent's words come from: the echo, or an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

ECHO_SLICE = 256  # words between two turns of the loop: about a tenth of a millisecond
WORDS_AT_ONCE = 64  # of a model server, between two turns of the loop: about half a millisecond
MAX_ANSWER = 8 * 1024 * 1024  # bytes of an answer that is not streamed
MAX_TOOL = 256 * 1024  # characters of a tool event as JSON
MIN_SECRET = 8  # characters of a header's word that is masked in what a server says; shorter ones are in many texts
MAX_REFUSAL = 64 * 1024  # bytes of a refusal's body
MAX_MESSAGE = 500  # characters of another server's message
MAX_RETRY_AFTER = 86_400  # seconds
MAX_FRAMES = 5  # words of an answer around which one is looked for; some servers have another in each chunk
DONE_GRACE = 0.1  # seconds for the end of the body after [DONE], so that the connection can be used again
FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter"}
UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
CODES = {  # what OpenAI-compatible servers write in `code` and `type` where no status can be
    **dict.fromkeys(("invalid_request_error", "context_length_exceeded"), 400),
    **dict.fromkeys(("authentication_error", "invalid_api_key", "permission_error"), 401),
    **dict.fromkeys(("not_found_error", "model_not_found"), 404),
    **dict.fromkeys(("rate_limit_error", "rate_limit_exceeded", "insufficient_quota"), 429),
}
WORD = re.compile(r"\S+\s*|\s+")
ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
PLAIN = re.compile(r'[^"\\\x00-\x1f]+')  # RFC 8259, 7: unescaped; in a JSON string it stands for itself

log = logging.getLogger("copepod")

Turn = dict[str, Any]
Item = str | dict[str, Any]
Result = TypeVar("Result")
Provider = Callable[[Turn], AsyncIterator[Any]]  # of Items, or of what `checked` makes Items of


class Response(Protocol):
    """What `request` gives back; every failure of its connection is an OSError."""

    status: int
    fields: dict[str, str]

    async def read(self, limit: int) -> bytes: ...

    def events(self) -> AsyncIterator[str]: ...

    def close(self) -> None: ...  # ends what is being read, too


Request = Callable[[str, str, list[tuple[str, str]], bytes], Awaitable[Response]]


class ProviderError(Exception):
    """A turn that failed: `kind` says whose fault it was, `taken` whether the agent may have acted."""

    def __init__(self, kind: str, message: str, *, taken: bool = False, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.taken = taken
        self.retry_after = retry_after


def well_formed(text: str) -> str:
    """The text; a lone surrogate, which UTF-8 cannot carry, becomes U+FFFD."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def usage_of(usage: object) -> dict[str, int] | None:
    """Measured tokens in OpenAI's three names, None when these are no numbers."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


# The echo


def echo() -> Provider:
    """The provider that answers with the message unchanged, word by word."""

    async def provider(turn: Turn) -> AsyncIterator[Item]:
        for count, word in enumerate(WORD.finditer(turn["message"]), 1):
            yield word[0]
            if count % ECHO_SLICE == 0:
                await asyncio.sleep(0)  # nothing here waits, so a long message would keep the loop from all others

    return provider


# What a provider gives


def checked(item: object) -> Item | None:
    """What an agent gave, None for an empty text; ProviderError for what no run knows."""
    if isinstance(item, str):
        return well_formed(item) if item else None
    if isinstance(item, dict) and len(item) == 1:
        if usage := usage_of(item.get("usage")):
            return {"usage": usage}
        if item.get("finish_reason") in FINISH_REASONS or (isinstance(item.get("tool"), dict) and fits(item["tool"])):
            return item
    name = type(item).__name__
    raise ProviderError("internal", f"the agent gave a {name} that is neither text nor an event", taken=True)


def fits(tool: dict[str, Any]) -> bool:
    """Whether a tool's doing is JSON, and short enough to be told to all who watch."""
    try:
        return len(json.dumps(tool, allow_nan=False)) <= MAX_TOOL
    except (TypeError, ValueError, RecursionError, RuntimeError):  # the last: it is changed by a thread meanwhile
        return False


async def close(items: AsyncIterator[Any] | None) -> None:
    """Closes an async generator; what it raises then is only logged."""
    if (aclose := getattr(items, "aclose", None)) is not None:
        try:
            await aclose()
        except Exception:
            log.exception("an agent's generator failed while it was closed")


# An OpenAI-compatible server


def openai_completions(options: dict[str, Any], request: Request) -> Provider:
    """The provider that asks the server at `baseUrl`, always streamed."""
    url = options["baseUrl"].rstrip("/") + "/chat/completions"
    words = [word for value in (options.get("headers") or {}).values() for word in value.split()]
    secrets = [word for word in (options.get("apiKey"), *words) if word and len(word) >= MIN_SECRET]
    fields, seconds = fields_of(options), options.get("timeoutSeconds")

    async def provider(turn: Turn) -> AsyncIterator[Item]:
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else loop.time() + seconds
        response: Response | None = None
        events: AsyncIterator[str] | None = None
        timer: asyncio.TimerHandle | None = None
        answer = Answer(secrets)
        try:
            response = await until(deadline, request("POST", url, fields, body_of(turn)))
            if not 200 <= response.status < 300:
                raise await until(deadline, refusal(response, turn["run_id"], secrets))
            if response.fields.get("content-type", "").lower().startswith("application/json"):
                body = await until(deadline, response.read(MAX_ANSWER))
                if text := answer.take(body, "message"):
                    yield text
                answer.done = bool(text)
            else:
                if deadline is not None:  # one timer for all of them, and closing it ends its events
                    timer = loop.call_at(deadline, response.close)
                events, count = response.events(), 0
                async for data in events:
                    if data == "[DONE]":
                        answer.done = True
                        break
                    if text := answer.word(data):
                        yield text
                    count += 1
                    if count % WORDS_AT_ONCE == 0:
                        await asyncio.sleep(0)  # of what came at once, the others shall not pay
                if not answer.done and deadline is not None and loop.time() >= deadline:
                    raise TimeoutError
            for item in answer.end():
                yield item
            if events is not None:
                await drain(events, response)
        except OSError as error:
            log.warning("run %s: the model server: %s", turn["run_id"], error or type(error).__name__)
            if deadline is not None and loop.time() >= deadline:
                raise ProviderError("timeout", "the model server took too long", taken=True) from None
            raise broken(error, response is not None) from None
        finally:
            if timer is not None:
                timer.cancel()
            if response is not None:
                response.close()
            await close(events)

    return provider


def fields_of(options: dict[str, Any]) -> list[tuple[str, str]]:
    """The request's fields; those of the configuration win."""
    fields = {"content-type": "application/json", "accept": "text/event-stream, application/json"}
    if key := options.get("apiKey"):
        fields["authorization"] = f"Bearer {key}"
    return list((fields | {name.lower(): value for name, value in (options.get("headers") or {}).items()}).items())


def body_of(turn: Turn) -> bytes:
    """The request's body."""
    system = [{"role": "system", "content": turn["system"]}] if turn["system"] else []
    value = {
        "model": turn["model"],
        "messages": system + turn["messages"],
        "stream": True,
        "stream_options": {"include_usage": True},
        **turn["params"],
    }
    return ENCODER.encode(value).encode()


class Answer:
    """What the chunks of an answer, or the whole of it, told so far."""

    def __init__(self, secrets: list[str]) -> None:
        self.secrets = secrets
        self.usage: dict[str, int] | None = None
        self.finish_reason: str | None = None
        self.done = False
        self.frame, self.missed = ("", ""), 0

    def word(self, data: str) -> str:
        """The text of a chunk, as `take` has it: where only the word is new, all the rest is known to tell nothing."""
        before, after = self.frame
        if before and data.startswith(before) and data.endswith(after):
            plain = PLAIN.fullmatch(data, len(before), len(data) - len(after))
            if plain is not None:
                return plain[0]
        text = self.take(data, "delta")
        if text:
            self.missed += 1
            if 1 < self.missed <= MAX_FRAMES:  # an answer of one word has no use for it
                self.frame = frame_of(data, text) or self.frame
        return text

    def take(self, data: str | bytes, part: str) -> str:
        """The text of a chunk (part "delta") or of a whole answer ("message"), often ""; else ProviderError."""
        try:
            value = json.loads(data)
            if error := value if value.get("object") == "error" else value.get("error"):
                raise told(error, self.secrets)
            if value.get("usage"):
                self.usage = usage_of(value["usage"]) or self.usage
            if not value.get("choices"):  # a heartbeat, or usage alone
                return ""
            choice = value["choices"][0]
            if reason := choice.get("finish_reason"):
                if reason == "error":
                    raise ProviderError("upstream", "the model server failed", taken=True)
                self.finish_reason = reason if reason in FINISH_REASONS else "stop"
            return well_formed((choice.get(part) or {}).get("content") or "")
        except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
            raise ProviderError("upstream", "the model server's answer makes no sense", taken=True) from None

    def end(self) -> list[Item]:
        """The last items; ProviderError when the answer is not whole."""
        if not self.done and self.finish_reason is None:
            raise ProviderError("upstream", "the model server's answer broke off", taken=True)
        items: list[Item] = [{"usage": self.usage}] if self.usage else []
        return [*items, {"finish_reason": self.finish_reason}] if self.finish_reason else items


def frame_of(chunk: str, text: str) -> tuple[str, str] | None:
    """What stands before and behind the text in a chunk that tells nothing else, None when that is not sure."""
    before, _, after = chunk.partition(f'"{text}"')
    frame, other = (f'{before}"', f'"{after}'), "any other word"
    with suppress(ValueError, RecursionError):
        value = json.loads(chunk)
        choice = value["choices"][0]
        choice["delta"]["content"] = other
        # If this alone changes, the text is one whole string of the JSON: any that is plain may stand in its place.
        if not choice.get("finish_reason") and not value.get("usage") and json.loads(other.join(frame)) == value:
            return frame
    return None


def told(error: object, secrets: list[str]) -> ProviderError:
    """The error that a server wrote into its answer, in place of a status."""
    status: object = None
    for name in ("status", "status_code", "code", "type"):
        value = error.get(name) if isinstance(error, dict) else None
        if isinstance(value, str):
            value = int(value) if re.fullmatch("[0-9]{3}", value) else CODES.get(value)
        if isinstance(value, int) and 400 <= value < 600:
            status = value
            break
    message = message_of({"error": error}, secrets)
    if isinstance(status, int) and status < 500 and status != 408:
        return status_error(status, message)
    return ProviderError("upstream", message or "the model server failed", taken=True)


def status_error(status: int, message: str, retry_after: int | None = None) -> ProviderError:
    """The error for a status that is no success."""
    if status in (401, 402, 403):
        return ProviderError("upstream_auth", "the model server refused the gateway's credentials")
    if 300 <= status < 400:
        return ProviderError("upstream_auth", "the model server answered with a redirect, which is never followed")
    if status == 429:
        return ProviderError("rate_limited", "the model server's rate limit is reached", retry_after=retry_after)
    if status != 408 and 400 <= status < 500:
        return ProviderError("rejected", message or f"the model server refused the request with status {status}")
    # RFC 9110: 408 did not get the request, 503 did not handle it; any other may have acted on it.
    return ProviderError("upstream", f"the model server failed with status {status}", taken=status not in (408, 503))


def message_of(value: object, secrets: list[str]) -> str:
    """Another server's message, safe to hand on: plain text, short, without our secrets; "" when there is none."""
    found: object = None
    if isinstance(value, dict):
        error = value.get("error")
        found = error.get("message") if isinstance(error, dict) else error
        found = found or value.get("message") or value.get("detail")
    if not isinstance(found, str) or found.lstrip().startswith("<"):
        return ""
    for secret in secrets:
        found = found.replace(secret, "***")
    return well_formed(" ".join(found.split()))[:MAX_MESSAGE]


def retry_seconds(text: str) -> int | None:
    """The seconds of a Retry-After (RFC 9110, 10.2.3), at least 1 and at most a day, None when it cannot be read."""
    if text.isascii() and text.isdigit():
        return min(max(int(text[:9]), 1), MAX_RETRY_AFTER)
    import time
    from email.utils import parsedate_to_datetime

    try:
        seconds = parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return min(max(round(seconds), 1), MAX_RETRY_AFTER)


def broken(error: OSError, answered: bool) -> ProviderError:
    """The error for a connection that failed. Once a request may have been sent, the turn counts as taken."""
    import socket

    if isinstance(error, ValueError):  # ssl.SSLCertVerificationError is one, and ssl needs no import for that
        return ProviderError("upstream", "the model server's certificate could not be verified")
    refused = isinstance(error, ConnectionRefusedError | socket.gaierror) or error.errno in UNREACHABLE
    # asyncio joins the failures of several addresses in one text, without an errno
    if not answered and (refused or str(error).startswith("Multiple exceptions")):
        return ProviderError("upstream", "the model server could not be reached")
    return ProviderError("upstream", "the connection to the model server broke", taken=True)


async def refusal(response: Response, run_id: str, secrets: list[str]) -> ProviderError:
    """The error for a response that is no success."""
    try:
        message = message_of(json.loads(await response.read(MAX_REFUSAL)), secrets)
    except (OSError, ValueError, RecursionError):  # the status tells enough
        message = ""
    log.warning("run %s: the model server answered with status %d: %s", run_id, response.status, message)
    return status_error(response.status, message, retry_seconds(response.fields.get("retry-after", "")))


async def until(deadline: float | None, work: Awaitable[Result]) -> Result:
    """What the work gives back, TimeoutError at the deadline, a time of the loop's clock."""
    if deadline is None:
        return await work
    async with asyncio.timeout_at(deadline):
        return await work


async def drain(events: AsyncIterator[str], response: Response) -> None:
    """Reads what follows [DONE], most often the end of the body alone: only then is the connection used again."""
    timer = asyncio.get_running_loop().call_later(DONE_GRACE, response.close)
    try:
        with suppress(OSError):
            async for _ in events:
                pass
    finally:
        timer.cancel()
