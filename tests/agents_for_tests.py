"""Agents of every shape, for the tests of the providers."""

import asyncio
import functools
import sys
import threading
import time

closed = threading.Event()
go_on = threading.Event()
threads = []

number = 7


async def words(message):
    for word in ("you ", "", "said ", message):
        yield word


async def events(message, turn):
    yield turn["session_id"]
    yield {"tool": {"name": "look"}}
    yield {"usage": {"prompt_tokens": 2, "completion_tokens": 3}}
    yield {"finish_reason": "length"}


async def one(message):
    return message.upper()


async def nothing(message):
    return None


async def some(message):
    return ["a", "b", message]


async def generator(message):
    return words(message)


async def slow_generator(message):
    return sync_words(message)


def sync_words(message):
    threads.append(threading.current_thread())
    yield "in "
    yield "a "
    yield "thread"


def plain(message):
    threads.append(threading.current_thread())
    time.sleep(0)
    return message[::-1]


def plain_nothing(message):
    return None


def plain_list(message, turn):
    return [message, turn["run_id"]]


@functools.wraps(words)
def wrapped(*arguments):
    return words(*arguments)


class Object:
    async def __call__(self, message):
        yield "object "
        yield message

    def method(self, message):
        return "method " + message


callable_object = Object()
method = callable_object.method
partial = functools.partial(lambda prefix, message: prefix + message, "partial ")
builtin = str.upper


class NoSignature:
    __signature__ = "none"

    def __call__(self, message):
        return "unsigned"


no_signature = NoSignature()


class Letters:
    """An async iterator that cannot be closed."""

    def __init__(self):
        self.letters = iter("xyz")

    def __aiter__(self):
        return self

    async def __anext__(self):
        for letter in self.letters:
            return letter
        raise StopAsyncIteration


async def letters(message):
    return Letters()


async def surrogate(message):
    yield "a\ud800b"


async def raises(message):
    yield "first"
    raise RuntimeError("secret text of the agent")


def plain_raises(message):
    raise KeyError("secret text of the agent")


async def leaves(message):
    sys.exit(3)
    yield


def plain_interrupts(message):
    raise KeyboardInterrupt


def plain_leaves(message):
    sys.exit(3)


async def cancels_itself(message):
    raise asyncio.CancelledError
    yield


async def number_item(message):
    yield 5


async def bad_dict(message):
    yield {"usage": {}, "tool": {}}


async def bad_finish(message):
    yield {"finish_reason": "error"}


async def bad_bytes(message):
    return b"bytes"


async def waits(message):
    try:
        yield "started"
        await asyncio.Event().wait()
    finally:
        closed.set()


async def breaks_in_close(message):
    try:
        yield "started"
        yield "more"
    finally:
        raise RuntimeError("secret text of the close")


def endless(message):
    try:
        while True:
            yield "tick"
    finally:
        closed.set()


def blocks(message):
    go_on.wait(10)
    return "late"


def no_arguments():
    return "never"
