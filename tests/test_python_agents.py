from __future__ import annotations

import asyncio
import os
import pathlib
import sys
import threading
import time

import pytest

import python_agents
from test_providers import run, take, turn

HERE = str(pathlib.Path(__file__).parent)


def agent(name):
    return python_agents.python_entry(f"agents_for_tests:{name}", HERE)


@pytest.fixture
def agents():
    agent("words")
    module = sys.modules["agents_for_tests"]
    module.closed.clear()
    module.go_on.clear()
    module.threads.clear()
    yield module
    module.go_on.set()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("words", ["you ", "said ", "hello"]),
        ("wrapped", ["you ", "said ", "hello"]),
        ("generator", ["you ", "said ", "hello"]),
        ("events", [
            "sid", {"tool": {"name": "look"}},
            {"usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}}, {"finish_reason": "length"},
        ]),
        ("one", ["HELLO"]),
        ("nothing", []),
        ("some", ["a", "b", "hello"]),
        ("slow_generator", ["in ", "a ", "thread"]),
        ("sync_words", ["in ", "a ", "thread"]),
        ("plain", ["olleh"]),
        ("plain_nothing", []),
        ("plain_list", ["hello", "run_1"]),
        ("callable_object", ["object ", "hello"]),
        ("method", ["method hello"]),
        ("callable_object.method", ["method hello"]),
        ("partial", ["partial hello"]),
        ("builtin", ["HELLO"]),
        ("no_signature", ["unsigned"]),
        ("letters", ["x", "y", "z"]),
        ("surrogate", ["a\ufffdb"]),
    ],
)  # fmt: skip
def test_an_agent_of_every_shape(agents, name, expected):
    assert run(agent(name)) == expected
    assert threading.main_thread() not in agents.threads


@pytest.mark.parametrize(
    ("name", "items", "message"),
    [
        ("number_item", [], "the agent gave a int that is neither text nor an event"),
        ("bad_dict", [], "the agent gave a dict that is neither text nor an event"),
        ("bad_finish", [], "the agent gave a dict that is neither text nor an event"),
        ("bad_bytes", [], "the agent gave a bytes that is neither text nor an event"),
    ],
)
def test_what_is_neither_text_nor_an_event_is_an_internal_error(agents, name, items, message):
    assert run(agent(name)) == [*items, ("internal", message, True, None)]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("raises", RuntimeError), ("plain_raises", KeyError), ("leaves", SystemExit), ("plain_leaves", SystemExit),
        ("cancels_itself", asyncio.CancelledError), ("plain_interrupts", RuntimeError),
    ],
)  # fmt: skip
def test_an_agents_own_error_is_handed_on(agents, name, error):
    async def main():
        with pytest.raises(error):
            await take(agent(name), turn())

    asyncio.run(main())


def test_a_failure_while_an_agent_is_closed_is_logged(agents, caplog):
    async def later(message):
        return agents.breaks_in_close(message)

    async def main():
        items = python_agents.python_function(later)(turn())
        assert await anext(items) == "started"
        await items.aclose()

    asyncio.run(main())
    assert [record.exc_info[0] for record in caplog.records] == [RuntimeError]


@pytest.mark.parametrize("name", ["waits", "endless"])
def test_closing_closes_the_agent(agents, name):
    async def main():
        items = agent(name)(turn())
        await anext(items)
        await items.aclose()
        if name == "waits":
            assert agents.closed.is_set()

    asyncio.run(main())
    assert agents.closed.wait(5)


def test_a_cancel_closes_the_agent_at_once(agents):
    async def main():
        items = agent("waits")(turn())
        await anext(items)
        task = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert agents.closed.is_set()

    asyncio.run(main())


def test_a_blocked_thread_holds_nobody_up_and_their_number_is_bounded(agents, monkeypatch):
    monkeypatch.setattr(python_agents, "THREADS", 1)

    async def main():
        provider = agent("blocks")
        first = asyncio.ensure_future(take(provider, turn()))
        await asyncio.sleep(0)
        assert await take(provider, turn()) == [("overloaded", "the agent is busy", False, None)]
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(first, 5)
        assert not agents.go_on.is_set()

    start = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - start < 5
    agents.go_on.set()  # the thread ends in a closed loop, without a word
    for thread in threading.enumerate():
        if thread.name == "copepod-agent":
            thread.join(5)
            assert not thread.is_alive()


def test_a_thread_is_not_far_ahead_of_its_reader(agents):
    taken = 0

    def count(message):
        nonlocal taken
        while True:
            taken += 1
            yield str(taken)

    async def main():
        items = python_agents.python_function(count)(turn())
        assert await anext(items) == "1"
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert taken <= python_agents.AHEAD + 2
        assert await anext(items) == "2"
        await items.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("agents_for_tests", '"agents_for_tests" must have the form module:function'),
        ("agents_for_tests:", '"agents_for_tests:" must have the form module:function'),
        (":words", '":words" must have the form module:function'),
        ("no_such_module:words", 'there is no module "no_such_module"'),
        ("agents_for_tests.inner:words", 'there is no module "agents_for_tests.inner"'),
        ("agents_for_tests:no_such", 'the module "agents_for_tests" has no "no_such"'),
        ("agents_for_tests:callable_object.no", 'the module "agents_for_tests" has no "callable_object.no"'),
        ("agents_for_tests:number", "a int is no function"),
        ("agents_for_tests:no_arguments", "the function must take (message) or (message, turn)"),
    ],
)
def test_a_bad_entry(entry, message):
    path = list(sys.path)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        python_agents.python_entry(entry, HERE)
    assert str(caught.value) == message
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("copepod_agent_a", "import no_such_thing", "there is no module"),
        ("copepod_agent_b", "def reply(:", "SyntaxError"),
        ("copepod_agent_c", "raise ValueError('at import')", "ValueError: at import"),
        ("copepod_agent_d", "raise SystemExit('usage: d FILE')", "SystemExit: usage: d FILE"),
    ],
)
def test_an_entry_that_cannot_be_imported(tmp_path, name, text, message):
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        python_agents.python_entry(f"{name}:reply", str(tmp_path))
    if name == "copepod_agent_a":
        assert str(caught.value) == 'importing "copepod_agent_a" failed: ' \
            "ModuleNotFoundError: No module named 'no_such_thing'"
    else:
        assert message in str(caught.value)


def test_an_entry_in_a_package_and_one_that_is_shadowed(tmp_path, agents, monkeypatch):
    package = tmp_path / "copepod_package"
    package.mkdir()
    (package / "agents.py").write_text("def reply(message): return 'packed ' + message")
    monkeypatch.setattr(python_agents, "OURS", os.path.dirname(os.path.realpath(agents.__file__)))
    provider = python_agents.python_entry("copepod_package.agents:reply", str(tmp_path))
    assert run(provider) == ["packed hello"]
    (tmp_path / "agents_for_tests.py").write_text("def words(message): return 'mine'")
    for entry in ("agents_for_tests:words", "agents_for_tests.inner:words"):
        with pytest.raises(ValueError, match='"agents_for_tests" is shadowed by a module of the gateway'):
            python_agents.python_entry(entry, str(tmp_path))
    assert python_agents.python_entry("agents_for_tests:words", HERE)
