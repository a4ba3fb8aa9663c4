"""An agent that is a Python function, async or not; what may block has a thread of its own."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Any

THREADS = 256  # of one agent, those that a cancelled run left behind included: a thread cannot be ended
AHEAD = 16  # items a thread may be ahead of their reader
OURS = os.path.dirname(os.path.realpath(__file__))  # whose modules come first in a bare checkout

log = logging.getLogger("copepod")

Turn = dict[str, Any]
Provider = Callable[[Turn], AsyncIterator[Any]]  # of what providers.checked makes items of


class AgentError(Exception):
    """A turn that failed: `kind` says how, and the agent has not begun (not `taken`)."""

    kind, taken, retry_after = "overloaded", False, None


def python_entry(entry: str, folder: str) -> Provider:
    """The provider for `module:function`, looked for in `folder` first; ValueError says what is wrong with it."""
    import importlib

    name, _, attribute = entry.partition(":")
    if not name or not attribute:
        raise ValueError(f'"{entry}" must have the form module:function')
    sys.path.insert(0, folder)  # first for the import, then last, for what the agent itself imports later
    try:
        top = importlib.import_module(name.partition(".")[0])
        file = getattr(top, "__file__", None)  # None: a package that is a folder alone
        shadowed = file is not None and os.path.dirname(os.path.realpath(file)) == OURS != os.path.realpath(folder)
        module = top if shadowed else importlib.import_module(name)
    except (Exception, SystemExit) as error:  # the second: of a script that runs where it is imported
        if isinstance(error, ModuleNotFoundError) and error.name and (name + ".").startswith(error.name + "."):
            raise ValueError(f'there is no module "{error.name}"') from None
        raise ValueError(f'importing "{name}" failed: {type(error).__name__}: {error}') from error
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)
    if shadowed:
        raise ValueError(f'"{top.__name__}" is shadowed by a module of the gateway; give yours another name')
    function: Any = module
    try:
        for part in attribute.split("."):
            function = getattr(function, part)
    except AttributeError:
        raise ValueError(f'the module "{name}" has no "{attribute}"') from None
    return python_function(function)


def python_function(function: Callable[..., object]) -> Provider:
    """The provider that calls `function` with `(message)` or `(message, turn)`; ValueError when it takes neither.

    It gives text, or the dicts of providers.checked: all at once or one after the other, async or not. What is not
    async runs in a thread of its own, so that it may block.
    """
    import inspect

    if not callable(function):
        raise ValueError(f"a {type(function).__name__} is no function")
    with_turn = takes_turn(function)
    # A wrapper of an async function is no async function itself; an object may have an async __call__.
    targets = (inspect.unwrap(function), type(function).__call__)
    is_async = any(inspect.isasyncgenfunction(each) or inspect.iscoroutinefunction(each) for each in targets)
    slots = threading.BoundedSemaphore(THREADS)

    def provider(turn: Turn) -> AsyncIterator[Any]:
        arguments = (turn["message"], turn) if with_turn else (turn["message"],)
        if not is_async:
            return in_thread(lambda: function(*arguments), slots)
        result: Any = function(*arguments)
        return result if hasattr(result, "__anext__") else unfold(result, slots)

    return provider


def takes_turn(function: Callable[..., object]) -> bool:
    """Whether the function takes `(message, turn)`; ValueError when it does not take `(message)` either."""
    import inspect

    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some builtins tell none
        return False
    for count in (2, 1):
        with suppress(TypeError):
            signature.bind(*[""] * count)
            return count == 2
    raise ValueError("the function must take (message) or (message, turn)")


def listed(result: object) -> Iterable[object]:
    """What a function gave back as items: text, a dict and what is of no use are one, None is none."""
    if isinstance(result, Iterable) and not isinstance(result, str | bytes | dict):
        return result
    return () if result is None else (result,)


async def unfold(result: object, slots: threading.BoundedSemaphore) -> AsyncIterator[object]:
    """The items of what an async function gave back."""
    if isinstance(result, Awaitable):
        result = await result
    if isinstance(result, AsyncIterable):
        items = aiter(result)
    elif isinstance(result, Iterable) and not isinstance(result, str | bytes | dict | list | tuple):
        items = in_thread(lambda: result, slots)  # its next item may block
    else:
        for item in listed(result):
            yield item
        return
    try:
        async for item in items:
            yield item
    finally:
        await close(items)


async def in_thread(call: Callable[[], object], slots: threading.BoundedSemaphore) -> AsyncIterator[object]:
    """The items of what `call` gives back, all fetched in one thread, which ends at its next item when we do.

    Not the loop's own pool: that has a handful of threads, which agents that hang would use up, and an exit waits
    for them.
    """
    if not slots.acquire(blocking=False):
        raise AgentError("the agent is busy")
    loop = asyncio.get_running_loop()
    arrived: asyncio.Queue[tuple[object, BaseException | None] | None] = asyncio.Queue()
    room = threading.Semaphore(AHEAD)
    over = False

    def post(entry: tuple[object, BaseException | None] | None) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            loop.call_soon_threadsafe(arrived.put_nowait, entry)

    def work() -> None:
        try:
            items = iter(listed(call()))
            for item in items:
                post((item, None))
                room.acquire()
                if over:
                    break
            if hasattr(items, "close"):
                items.close()
            post(None)
        except BaseException as error:  # also SystemExit: it is the agent that fails, not the gateway
            post((None, error))
        finally:
            slots.release()

    threading.Thread(target=work, name="copepod-agent", daemon=True).start()
    try:
        while entry := await arrived.get():
            item, error = entry
            if isinstance(error, KeyboardInterrupt):  # its own: a user's, which ends the loop, reaches no such thread
                raise RuntimeError("the agent interrupted itself") from error
            if error is not None:
                raise error
            room.release()
            yield item
    finally:
        over = True
        room.release()


async def close(items: AsyncIterator[Any] | None) -> None:
    """Closes an async generator; what it raises then is only logged."""
    if (aclose := getattr(items, "aclose", None)) is not None:
        try:
            await aclose()
        except Exception:
            log.exception("an agent's generator failed while it was closed")
