"""One turn at a model server: asked, listened to, its failures told; how an API looks is a dialect's business."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypeVar

WORDS_AT_ONCE = 64  # of a model server, between two turns of the loop: about half a millisecond
MAX_ANSWER = 8 * 1024 * 1024  # bytes of an answer that is not streamed
MIN_SECRET = 8  # characters of a header's word that is masked in what a server says; shorter ones are in many texts
MAX_REFUSAL = 64 * 1024  # bytes of a refusal's body
REFUSAL_SECONDS = 5.0  # from its head to the end of its body
MAX_MESSAGE = 500  # characters of another server's message
MAX_RETRY_AFTER = 86_400  # seconds
DONE_GRACE = 0.1  # seconds for the end of the body after the last event, so that the connection can be used again
FIRST_DELAY = 0.5  # seconds before the second try, doubled before each other one; as OpenAI's own clients
PASSING = {"upstream", "rate_limited"}  # kinds of failures that may be over at the next try
OVERLOADED = 529  # Anthropic's own status: too busy to begin
UNREACHED = "the model server could not be reached: where the gateway runs, `copepod doctor` says more"
UNREACHABLE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN}
NONSENSE = (ValueError, RecursionError, AttributeError, LookupError, TypeError)  # of what reads an answer
CODES = {  # what servers write in `code` and `type` where no status can be
    **dict.fromkeys(("invalid_request_error", "context_length_exceeded"), 400),
    **dict.fromkeys(("authentication_error", "invalid_api_key", "permission_error"), 401),
    **dict.fromkeys(("not_found_error", "model_not_found"), 404),
    **dict.fromkeys(("rate_limit_error", "rate_limit_exceeded", "insufficient_quota"), 429),
    "billing_error": 402,
    "overloaded_error": OVERLOADED,
}

log = logging.getLogger("copepod")

Turn = dict[str, Any]
Item = str | dict[str, Any]
Result = TypeVar("Result")
Provider = Callable[[Turn], AsyncIterator[Any]]


class Response(Protocol):
    """What `request` gives back; every failure of its connection is an OSError."""

    status: int
    fields: dict[str, str]

    async def read(self, limit: int) -> bytes: ...

    def events(self) -> AsyncGenerator[str, None]: ...

    def close(self) -> None: ...  # ends what is being read, too


Request = Callable[[str, str, list[tuple[str, str]], bytes], Awaitable[Response]]


class Answer(Protocol):
    """What the events of one answer told so far; an answer that does not stream is one event."""

    done: bool  # it said that it is over
    finish_reason: str | None

    def take(self, data: str) -> str | list[Item]:
        """The text of an event, often "", or its items; one of NONSENSE where it is none."""

    def end(self) -> list[Item]:
        """The last items."""


class Dialect(Protocol):
    """How an API looks, a module of its own; `told` makes of an error in an answer the exception to raise."""

    def url_of(self, base: str) -> str: ...

    def fields_of(self, key: str) -> dict[str, str]: ...

    def body_of(self, turn: Turn) -> bytes: ...  # ValueError, RecursionError: there is no form for what the turn holds

    def Answer(self, told: Callable[[object], Exception]) -> Answer: ...


class ProviderError(Exception):
    """A turn that failed: `kind` says whose fault it was, `taken` whether the model may have acted."""

    def __init__(self, kind: str, message: str, *, taken: bool = False, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.taken = taken
        self.retry_after = retry_after
        self.passing = kind in PASSING


def provider(options: dict[str, Any], request: Request, dialect: Dialect) -> Provider:
    """The provider that asks the server at `baseUrl` in that dialect, always streamed.

    What the server did not take, and a word or an event has not come of, is asked for again as `retry` allows.
    """
    return _Server(options, request, dialect).answered


def nonsense() -> ProviderError:
    """The error for an answer that cannot be read."""
    return ProviderError("upstream", "the model server's answer makes no sense", taken=True)


def items_of(answer: Answer, whole: str) -> list[Item]:
    """The items of a whole answer; ProviderError where it cannot be read."""
    try:
        items = answer.take(whole)
    except NONSENSE:
        raise nonsense() from None
    return items if isinstance(items, list) else [items] if items else []


def fields_of(options: dict[str, Any], dialect: Dialect) -> list[tuple[str, str]]:
    """The request's fields; those of the configuration win."""
    fields = {"content-type": "application/json", "accept": "text/event-stream, application/json"}
    fields["user-agent"] = "copepod"  # some servers, and what stands before them, refuse who does not say it
    fields |= dialect.fields_of(options.get("apiKey") or "")
    return list((fields | {name.lower(): value for name, value in (options.get("headers") or {}).items()}).items())


def formed(dialect: Dialect, turn: Turn) -> bytes:
    """The request's body; ProviderError where the API has no form for what the turn holds."""
    try:
        return dialect.body_of(turn)
    except (ValueError, RecursionError) as error:
        raise ProviderError("rejected", str(error)) from None


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
    log.warning("the model server's answer is, or ends with, an error: %s", message)
    if isinstance(status, int) and (status < 500 or status == OVERLOADED) and status != 408:
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
    if status == OVERLOADED:
        return ProviderError("upstream", "the model server is overloaded", retry_after=retry_after)
    # RFC 9110: 408 did not get the request, 503 did not handle it; any other may have acted on it.
    message, taken = f"the model server failed with status {status}", status not in (408, 503)
    return ProviderError("upstream", message, taken=taken, retry_after=None if taken else retry_after)


def message_of(value: object, secrets: list[str]) -> str:
    """Another server's message, safe to hand on: plain text, short, without our secrets; "" when there is none."""
    found: object = None
    if isinstance(value, list) and value:  # Gemini's
        value = value[0]
    if isinstance(value, dict):
        error = value.get("error")
        found = error.get("message") if isinstance(error, dict) else error
        found = found or value.get("message") or value.get("detail")
    if not isinstance(found, str) or found.lstrip().startswith("<"):
        return ""
    for secret in secrets:
        found = found.replace(secret, "***")
    plain = "".join(each if each.isprintable() else " " for each in found)  # it is shown in terminals
    return " ".join(plain.split())[:MAX_MESSAGE]


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
        failure = ProviderError("upstream", "the model server's certificate could not be verified")
        failure.passing = False
        return failure
    refused = isinstance(error, ConnectionRefusedError | socket.gaierror) or error.errno in UNREACHABLE
    # asyncio joins the failures of several addresses in one text, without an errno
    if not answered and (refused or str(error).startswith("Multiple exceptions")):
        return ProviderError("upstream", UNREACHED)
    return ProviderError("upstream", "the connection to the model server broke", taken=True)


async def refusal(response: Response, run_id: str, secrets: list[str]) -> ProviderError:
    """The error for a response that is no success."""
    try:
        async with asyncio.timeout(REFUSAL_SECONDS):
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


class Asked:
    """A turn's request, and its response; `seconds` for both, None for any, and `retry`, which says how often."""

    __slots__ = ("begun", "deadline", "ends", "events", "loop", "response", "retry", "run_id", "timer", "tries")

    def __init__(self, turn: Turn, seconds: float | None, retry: dict[str, Any]) -> None:
        self.run_id, self.ends = turn["run_id"], turn["deadline"]
        self.retry, self.tries, self.loop = retry, 0, asyncio.get_running_loop()
        self.begun = self.loop.time()
        self.deadline = None if seconds is None else self.begun + seconds
        self.response: Response | None = None
        self.events: AsyncGenerator[str, None] | None = None  # of an answer that is streamed
        self.timer: asyncio.TimerHandle | None = None

    async def open(self, work: Awaitable[Response], secrets: list[str]) -> str:
        """Set `events`, else return the whole answer. OSError: it does not come; ProviderError: it is a refusal."""
        self.tries += 1
        self.response = self.events = None
        self.response = response = await until(self.deadline, work)
        if not 200 <= response.status < 300:
            raise await until(self.deadline, refusal(response, self.run_id, secrets))
        if response.fields.get("content-type", "").lower().startswith("application/json"):
            return (await until(self.deadline, response.read(MAX_ANSWER))).decode("utf-8-sig", "replace")
        if self.deadline is not None:  # one timer for all of them, and closing it ends its events
            self.timer = self.loop.call_at(self.deadline, response.close)
        self.events = response.events()
        return ""

    def is_late(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and self.loop.time() >= self.deadline

    async def wait(self, error: ProviderError) -> None:
        """Return when it may be asked for again; else `error` is raised."""
        if self.tries >= self.retry.get("tries", 1) or error.taken or not error.passing:
            raise error
        import random
        import time

        delay = FIRST_DELAY * 2 ** (self.tries - 1) * random.uniform(0.75, 1)  # noqa: S311 (so that not all come at once)
        delay = max(delay, error.retry_after or 0)
        until_ = self.begun + self.retry.get("seconds", 0)
        late = self.loop.time() + delay > min(until_, self.deadline or until_)
        if late or time.monotonic() + delay > self.ends:
            raise error
        log.warning("run %s: %s; it is asked again in %.1f s", self.run_id, error, delay)
        await asyncio.sleep(delay)

    def check(self, answer: Answer, spoken: bool) -> None:
        """TimeoutError, ProviderError: the response ended before the answer did."""
        if answer.done:
            return
        if self.is_late():
            raise TimeoutError
        if not answer.finish_reason and (self.events is not None or not spoken):
            raise ProviderError("upstream", "the model server's answer broke off", taken=True)

    def failure(self, error: OSError | ProviderError, spoken: bool) -> ProviderError:
        """What is to be raised for that; a model that has spoken may have acted."""
        if isinstance(error, OSError):
            log.warning("run %s: the model server: %s", self.run_id, error or type(error).__name__)
            if self.is_late():
                return ProviderError("timeout", "the model server took too long", taken=True)
            error = broken(error, self.response is not None)
        error.taken |= spoken
        return error

    async def drain(self) -> None:
        """Read what follows the last event, most often the end of the body: only then is the connection used again."""
        if self.response is None or self.events is None:
            return
        timer = self.loop.call_later(DONE_GRACE, self.response.close)
        try:
            with suppress(OSError):
                async for _ in self.events:
                    pass
        finally:
            timer.cancel()

    def close(self) -> None:
        """End it, and give its connection back."""
        if self.timer is not None:
            self.timer.cancel()
        if self.response is not None:
            self.response.close()


class _Server:
    """One model server, with what is the same in all its turns."""

    def __init__(self, options: dict[str, Any], request: Request, dialect: Dialect) -> None:
        self.request, self.dialect = request, dialect
        self.url, self.fields = dialect.url_of(options.get("baseUrl") or ""), fields_of(options, dialect)
        self.seconds, self.retry = options.get("timeoutSeconds"), options.get("retry") or {}
        words = [word for value in (options.get("headers") or {}).values() for word in value.split()]
        self.secrets = [word for word in (options.get("apiKey"), *words) if word and len(word) >= MIN_SECRET]
        self.told = partial(told, secrets=self.secrets)

    async def answered(self, turn: Turn) -> AsyncIterator[Item]:
        """The items of the answer to a turn; ProviderError."""
        body = formed(self.dialect, turn)
        asked = Asked(turn, self.seconds, self.retry)
        while True:
            answer, spoken, count = self.dialect.Answer(self.told), False, 0
            try:
                whole = await asked.open(self.request("POST", self.url, self.fields, body), self.secrets)
                if asked.events is None:
                    for item in items_of(answer, whole):
                        spoken = True
                        yield item
                else:
                    async for data in asked.events:
                        try:
                            items = answer.take(data)
                        except NONSENSE:
                            raise nonsense() from None
                        if isinstance(items, str):
                            if items:
                                spoken = True
                                yield items
                        else:
                            for item in items:
                                spoken = True
                                yield item
                        if answer.done:
                            break
                        count += 1
                        if count % WORDS_AT_ONCE == 0:
                            await asyncio.sleep(0)  # of what came at once, the others shall not pay
                asked.check(answer, spoken)
                for item in answer.end():
                    yield item
                if asked.events is not None:
                    await asked.drain()
                return
            except (OSError, ProviderError) as error:
                failure = asked.failure(error, spoken)
            finally:
                asked.close()
                if asked.events is not None:
                    await asked.events.aclose()
            await asked.wait(failure)
