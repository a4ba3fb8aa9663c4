"""The chat page as a person sees it, in a real Chromium."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import devtools
import gateway
import live
from devtools import SHIFT, Tab

pytestmark = pytest.mark.skipif(devtools.program() is None, reason="no Chromium is here: apt-get install chromium")

TOKEN = "a-token"  # noqa: S105
PAGE = {"gateway.http.endpoints.webchat.enabled": True}
WITH_TOKEN = {"gateway.auth.mode": "token", "gateway.auth.token": TOKEN}
HOSTILE = '<img src=x onerror="document.title=1"> <script>alert(1)</script> </p><b>bold</b> &lt;'
ARABIC = "\u0645\u0631\u062d\u0628\u0627"
SPOKEN = """window.spoken = [], new MutationObserver((changes) => {
    for (const { addedNodes, target } of changes) for (const node of addedNodes) {
        if (!target.closest("[aria-hidden]") && !node.ariaHidden) spoken.push(node.innerText ?? node.data);
    }
}).observe(document.getElementById("log"), { childList: true, subtree: true, characterData: true }), 0"""
RUNNING = "!document.getElementById('stop').hidden"
OVER = "document.getElementById('stop').hidden"
ANSWERS = "[...document.querySelectorAll('article.assistant')].map((a) => [...a.children].map((e) => e.textContent))"


class Step:
    """An agent that says a word each time that it is let to."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.go, self.left = words, asyncio.Semaphore(0), asyncio.Event()

    async def __call__(self, message: str) -> AsyncIterator[str]:
        try:
            for word in self.words:
                await self.go.acquire()
                yield word
        finally:
            self.left.set()


async def says(message: str) -> str:
    return f"You said: {message}"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with devtools.chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


Play = Callable[[Callable[["Stage"], Coroutine[Any, Any, None]]], None]


class Stage:
    """A gateway and a browser; `tab` opens the page, which must be well when the play ends."""

    def __init__(self, browser: devtools.DevTools) -> None:
        self.browser, self.tabs = browser, list[Tab]()
        self.forgiven = ""  # what the pages may complain of
        self.hub: gateway.Gateway

    @asynccontextmanager
    async def serving(self, agents: Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> AsyncIterator[None]:
        async with live.serving({**PAGE, **(changes or {})}, agents) as self.hub:
            self.port = self.hub.port
            yield

    async def tab(self, beside: Tab | None = None, at: str = "", until: str = "Connected") -> Tab:
        tab = await self.browser.tab(beside)
        self.tabs.append(tab)
        await tab.size(1000, 700)
        await tab.goto(f"{self.hub.url}/{at}")
        await tab.says(until)
        return tab

    def judge(self) -> None:
        for tab in self.tabs:
            if self.forgiven:
                tab.problems = [problem for problem in tab.problems if self.forgiven not in problem]
            tab.well(self.port)


@pytest.fixture
def play(chromium: str) -> Play:
    """Runs a play to its end, in a browser that knows nothing of the others."""

    async def staged(main: Callable[[Stage], Coroutine[Any, Any, None]]) -> None:
        async with devtools.opened(chromium) as browser:
            stage = Stage(browser)
            await main(stage)
            stage.judge()

    return lambda main: live.run(staged(main))


async def send(tab: Tab, message: str) -> None:
    """Write it and send it as people do."""
    await tab.click("#text")
    await tab.type(message)
    await tab.press("Enter")


async def rings(tab: Tab) -> str:
    """What has the focus, seen by its ring; that of the message is around its box."""
    await tab.until("document.hasFocus()")
    look = """(() => {
        const has = document.activeElement, style = getComputedStyle(has.id === "text" ? has.parentNode : has);
        return style.outlineStyle === "none" ? "unseen" : has.id || has.innerText;
    })()"""
    return str(await tab.evaluate(look))


def test_a_message_is_answered_word_by_word(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["First ", "a line\n\nand ", "a second"])
        async with stage.serving({"main": agent}):
            tab = await stage.tab(until="Talk to main")
            await send(tab, "How?")
            await tab.says("How?", "article.mine")
            await tab.until(RUNNING)
            agent.go.release()
            await tab.until(f"{ANSWERS}[0][1] === 'First '")
            assert not agent.left.is_set()
            agent.go.release()
            await tab.says("a line", "article.assistant")
            assert not agent.left.is_set()
            agent.go.release()
            await tab.until(OVER)
            assert await tab.evaluate(ANSWERS) == [["main", "First a line", "and a second"]]
            assert await rings(tab) == "text"

    play(main)


def test_a_screen_reader_hears_each_word_once(play: Play) -> None:
    words = ["Two ", "lines\n", "here.\n\n", "Then:\n```py\n", "x = 1\n", "y = 2\n", "```\n", "The ", "end."]

    async def main(stage: Stage) -> None:
        agent = Step(words)
        async with stage.serving({"main": agent}):
            tab = await stage.tab()
            await tab.evaluate(SPOKEN)
            await send(tab, "?")
            for number, word in enumerate(words):
                agent.go.release()
                shown = json.dumps("".join(words[: number + 1]).split("\n")[-2 if word.endswith("\n") else -1].strip())
                if not shown.startswith('"`'):
                    await tab.until(f"document.getElementById('log').innerText.includes({shown})")
            await tab.until(OVER)
            spoken = await tab.evaluate("spoken.slice(2)")  # behind the question and whose answer it is
            assert spoken == ["Two lines\nhere.", "Then:", "x = 1\ny = 2", "The end."]
            assert await tab.evaluate("document.getElementById('log').ariaLive") == "polite"
            assert await tab.evaluate("document.querySelector('pre code').textContent") == "x = 1\ny = 2"
            await tab.reload()
            await tab.says("The end.")
            assert await tab.evaluate("document.getElementById('log').ariaLive") == "off"

    play(main)


@pytest.mark.parametrize("how", ["the button", "Escape"])
def test_stop(play: Play, how: str) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["Half ", "never"])
        async with stage.serving({"main": agent}):
            tab = await stage.tab()
            await send(tab, "Go on")
            agent.go.release()
            await tab.says("Half", "article.assistant")
            await (tab.click("#stop") if how == "the button" else tab.press("Escape"))
            await live.within(agent.left.wait())
            await tab.says("Stopped", "article.assistant")
            assert await tab.evaluate(ANSWERS) == [["main", "Half ", "Stopped; this turn is not kept."]]
            await tab.until(f"{OVER} && document.activeElement.id === 'text'")

    play(main)


def test_a_reload_shows_what_was_said(play: Play, tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}, {"session.store": str(tmp_path / "store")}):
            tab = await stage.tab()
            await send(tab, "one\n\n```\n  two\n```")
            await tab.says("two", "article.assistant pre")
            await tab.until(OVER)
            seen = await tab.evaluate("document.getElementById('log').innerText")
            await tab.reload()
            await tab.until(f"document.getElementById('log').innerText === {json.dumps(seen)}")
            assert await tab.evaluate("document.querySelector('article.mine pre').innerText") == "  two"

    play(main)


def test_a_reload_in_the_middle_of_an_answer(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["before ", "after"])
        async with stage.serving({"main": agent}):
            tab = await stage.tab()
            await send(tab, "Long")
            agent.go.release()
            await tab.says("before", "article.assistant")
            await tab.reload()
            await tab.says("Connected")
            agent.go.release()
            await tab.says("before after", "article.assistant")
            await tab.says("Long", "article.mine")

    play(main)


def test_another_conversation(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says, "beta": says}, {"agents.list": [{"id": "main"}, {"id": "beta"}]}):
            tab = await stage.tab()
            await send(tab, "the first")
            await tab.says("the first", "nav a[aria-current]")
            assert await tab.evaluate("document.getElementById('log').ariaLive") == "polite"
            await tab.click("#new")
            await tab.says("Talk to main")
            assert await rings(tab) == "text"
            await tab.evaluate("document.getElementById('agent').value = 'beta'")
            await tab.evaluate("document.getElementById('agent').dispatchEvent(new Event('change'))")
            await tab.says("Talk to beta")
            await send(tab, "the second")
            await tab.says("the second", "nav a[aria-current]")
            assert await tab.evaluate("document.querySelector('article.assistant .who').innerText") == "beta"
            await tab.click("nav li:last-child a")
            await tab.says("You said: the first", "article.assistant")
            await tab.says("the first", "nav a[aria-current]")
            assert await tab.evaluate("document.getElementById('agent').value") == "main"
            assert await tab.evaluate("document.getElementById('log').ariaLive") == "off"  # it is not read aloud
            await tab.evaluate("history.back()")
            await tab.says("You said: the second", "article.assistant")

    play(main)


def test_a_wrong_token_and_the_right_one(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}, WITH_TOKEN):
            tab = await stage.tab(until="Who is there?")
            assert await rings(tab) == "secret"
            await tab.type("wrong")
            await tab.press("Enter")
            await tab.says("That is not it", "#refused")
            assert await tab.evaluate("sessionStorage.length + localStorage.length + document.cookie.length") == 0
            assert await rings(tab) == "secret"
            await tab.type(TOKEN)
            await tab.press("Enter")
            await tab.says("Talk to main")
            assert await tab.evaluate("document.getElementById('secret').value") == ""
            await tab.reload()  # and it does not ask again
            await tab.says("Talk to main")
            assert await tab.evaluate("JSON.stringify(sessionStorage)") == json.dumps(
                {"copepod.secret": TOKEN}, separators=(",", ":")
            )
            assert await tab.evaluate("localStorage.length + document.cookie.length") == 0
            other = await stage.tab(tab, until="Who is there?")  # kept in one tab alone
            assert await other.evaluate("sessionStorage.length") == 0

    play(main)


def test_the_gateway_is_restarted(play: Play, tmp_path: Path) -> None:
    async def main(stage: Stage) -> None:
        store = {"session.store": str(tmp_path / "store")}
        agent = Step(["never"])
        async with stage.serving(
            {"main": says, "beta": agent}, {**store, "agents.list": [{"id": "main"}, {"id": "beta"}]}
        ):
            tab = await stage.tab()
            await send(tab, "before")
            await tab.says("You said: before")
            await tab.until(OVER)
            port = stage.port
        await tab.says("Not connected, trying again", "[role=status]")
        assert await tab.evaluate("document.getElementById('send').disabled")
        await tab.click("#text")
        await tab.type("kept while away")
        await tab.press("Enter")
        async with stage.serving({"main": says}, {**store, "gateway.port": port}):
            await tab.says("Connected", "[role=status]")
            assert await tab.evaluate("document.getElementById('text').value") == "kept while away"
            await tab.press("Enter")
            await tab.says("You said: kept while away")
            assert await tab.evaluate(f"{ANSWERS}.length") == 2
        stage.forgiven = "ERR_CONNECTION_REFUSED"

    play(main)


def test_a_token_that_is_right_no_more(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}, WITH_TOKEN):
            tab = await stage.tab(until="Who is there?")
            await tab.type(TOKEN)
            await tab.press("Enter")
            await tab.says("Talk to main")
            port = stage.port
        async with stage.serving({"main": says}, {**WITH_TOKEN, "gateway.auth.token": "new", "gateway.port": port}):
            await tab.says("That is not it", "#refused")
            assert await tab.evaluate("sessionStorage.length") == 0
            assert await tab.evaluate("document.getElementById('composer').hidden")
            await tab.type("new")
            await tab.press("Enter")
            await tab.says("Talk to main")
        stage.forgiven = "ERR_CONNECTION_REFUSED"

    play(main)


def test_who_is_locked_out_for_a_while_is_not_forgotten(play: Play) -> None:
    async def main(stage: Stage) -> None:
        limits = {"gateway.auth.rateLimit": {"maxAttempts": 1, "exemptLoopback": False}}
        async with stage.serving({"main": says}, {**WITH_TOKEN, **limits}):
            tab = await stage.tab(until="Who is there?")
            await tab.type(TOKEN)
            await tab.press("Enter")
            await tab.says("Talk to main")
            other = await stage.tab(until="Who is there?")
            await other.type("wrong")
            await other.press("Enter")
            await other.says("That is not it", "#refused")
            await tab.reload()
            await tab.says("too many failed attempts: try again in", "#refused")
            assert await tab.evaluate("sessionStorage['copepod.secret']") == TOKEN

    play(main)


def test_who_looks_again_does_not_wait(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.tab()
            await tab.evaluate("failures = 1000, 0")  # the next attempt is more than ten seconds away
            for connection in list(stage.hub.upgraded):
                connection.transport.abort()
            await tab.says("Not connected, trying again")
            await tab.evaluate("dispatchEvent(new Event('online'))")
            await tab.says("Connected")

    play(main)


def test_below_a_path_that_a_proxy_takes_away(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.tab()
            await tab.evaluate("history.replaceState(null, '', `/chat/${location.hash}`)")  # where the proxy has it
            for connection in list(stage.hub.upgraded):
                connection.transport.abort()
            await tab.says("Not connected")
            await tab.says("Connected")
            assert tab.addresses[-1] == f"ws://127.0.0.1:{stage.port}/chat/"

    play(main)


def test_an_answer_that_a_crash_has_ended(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["Half ", "never"])
        async with stage.serving({"main": agent}):
            tab = await stage.tab()
            await send(tab, "Go on")
            agent.go.release()
            await tab.says("Half", "article.assistant")
            port = stage.port
            for connection in list(stage.hub.upgraded):
                connection.transport.abort()
        async with stage.serving({"main": says}, {"gateway.port": port}):
            await tab.says("The gateway was restarted before the answer had ended.", "article.assistant")
            await tab.until(OVER)
        stage.forgiven = "ERR_CONNECTION_REFUSED"

    play(main)


def test_a_connection_that_is_lost_loses_no_words(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["one ", "two ", "three"])
        async with stage.serving({"main": agent}):
            tab = await stage.tab()
            await send(tab, "Count")
            agent.go.release()
            await tab.says("one", "article.assistant")
            for connection in list(stage.hub.upgraded):
                connection.transport.abort()
            agent.go.release()  # nobody hears it
            await tab.says("Not connected")
            await tab.says("Connected")
            agent.go.release()
            await tab.says("one two three", "article.assistant")
            await tab.until(OVER)
            assert await tab.evaluate(ANSWERS) == [["main", "one two three"]]
            assert await tab.evaluate("document.querySelectorAll('article').length") == 2

    play(main)


def test_an_answer_that_ended_while_nobody_heard(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["one ", "two"])
        async with stage.serving({"main": agent}):
            tab = await stage.tab()
            await send(tab, "Count")
            agent.go.release()
            await tab.says("one", "article.assistant")
            for connection in list(stage.hub.upgraded):
                connection.transport.abort()
            agent.go.release()
            await live.within(agent.left.wait())
            await tab.says("one two", "article.assistant")
            await tab.until(OVER)
            assert await tab.evaluate("document.querySelectorAll('article').length") == 2

    play(main)


def test_a_gateway_that_is_silent_is_called_again(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.tab()
            # when something was heard is looked at every five seconds
            await tab.until("heard = 0, document.body.innerText.includes('Not connected, trying again')")
            await tab.says("Connected")
            await send(tab, "there?")
            await tab.says("You said: there?", "article.assistant")

    play(main)


def test_a_message_that_did_not_arrive_is_sent_again(play: Play) -> None:
    heard: list[str] = []

    async def once(message: str) -> str:
        heard.append(message)
        return "heard"

    async def main(stage: Stage) -> None:
        async with stage.serving({"main": once}):
            tab = await stage.tab()
            await tab.evaluate("socket.send = () => {}, 0")
            await send(tab, "Hello?")
            await tab.says("Hello?", "article.mine")
            for connection in list(stage.hub.upgraded):
                connection.transport.abort()
            await tab.says("heard", "article.assistant")
            await tab.until(OVER)
            assert heard == ["Hello?"]

    play(main)


def test_messages_in_a_row(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["word"])
        async with stage.serving({"main": agent}):
            tab = await stage.tab()
            await send(tab, "first")
            await tab.until(RUNNING)
            await send(tab, "second")
            await tab.until("document.querySelectorAll('article.assistant').length === 2")
            agent.go.release()
            await tab.until(f"{ANSWERS}[0][1] === 'word'")
            assert await tab.evaluate(RUNNING)
            agent.go.release()
            await tab.until(OVER)
            assert await tab.evaluate(ANSWERS) == [["main", "word"], ["main", "word"]]
            await tab.evaluate("document.getElementById('text').value = 'x'.repeat(600000), 0")
            await tab.press("Enter")
            await tab.says("This message is too long", "[role=status]")

    play(main)


def test_a_friend_sees_its_own(play: Play) -> None:
    async def main(stage: Stage) -> None:
        friend = {"name": "alice", "token": "of-alice", "agents": ["beta"]}
        changes = {
            "agents.list": [{"id": "main"}, {"id": "beta"}],
            "gateway.auth.mode": "password",
            "gateway.auth.password": TOKEN,
            "gateway.auth.tokens": [friend],
        }
        async with stage.serving({"main": says, "beta": says}, changes):
            tab = await stage.tab(until="Who is there?")
            await tab.type("of-alice")
            await tab.press("Enter")
            await tab.says("Talk to beta")
            assert await tab.evaluate("[...document.querySelectorAll('option')].map((o) => o.value)") == ["beta"]
            await send(tab, "of mine")
            await tab.says("You said: of mine", "article.assistant")
            await tab.says("of mine", "nav a[aria-current]")
            operator = await stage.tab(until="Who is there?")
            await operator.type(TOKEN)
            await operator.press("Enter")
            await operator.says("Talk to main")
            await operator.click("nav a")  # of the friend, whom an operator may answer
            await operator.says("You said: of mine", "article.assistant")
            await send(operator, "from the operator")
            await operator.says("You said: from the operator", "article:last-child")

    play(main)


def test_hostile_text_is_text(play: Play) -> None:
    async def hostile(message: str) -> AsyncIterator[str]:
        for part in (HOSTILE, "\n\n```html\n", HOSTILE, "\n```\n", "[a](javascript:alert(1))"):
            yield part

    async def main(stage: Stage) -> None:
        agents = [{"id": "main", "name": HOSTILE}]
        async with stage.serving({"main": hostile}, {"agents.list": agents}):
            tab = await stage.tab(until="Talk to <img")
            await send(tab, HOSTILE)
            await tab.says("javascript:alert(1)", "article.assistant")
            await tab.says("<img src=x", "nav a")
            assert await tab.evaluate("document.querySelector('article.assistant pre code').textContent") == HOSTILE
            for selector in ("article.mine > p + p", "article.assistant > p + p", "option"):
                assert await tab.evaluate(f"document.querySelector('{selector}').textContent") == HOSTILE
            await tab.reload()
            await tab.says("javascript:alert(1)", "article.assistant")
            made = await tab.evaluate("document.querySelectorAll('img, b, script, article a, iframe').length")
            assert made == 1  # its own script
            assert await tab.evaluate("document.title") == f"{HOSTILE[:60]} - Copepod"

    play(main)


@pytest.mark.parametrize(
    "key", ["agent:main:quo\"te's", "agent:main:ü 50% %23", "agent:main:a#b?c=d", "<b>", "k" * 500], ids=range(5)
)
def test_any_key(play: Play, key: str) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.tab(at=f"#{quote(key, safe='')}")  # not as the page itself would write it
            await tab.says("Talk to main")
            await send(tab, "hi")
            await tab.says("You said: hi", "article.assistant")
            await tab.says(key.removeprefix("agent:main:"), "nav a[aria-current]")
            await tab.click("#new")
            await tab.says("Talk to main")
            await tab.click("nav a")
            await tab.says("You said: hi", "article.assistant")
            assert await tab.evaluate("session") == key

    play(main)


def test_a_key_that_names_no_agent(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agents = [{"id": "main"}, {"id": "beta"}]
        async with stage.serving({"main": says, "beta": says}, {"agents.list": agents}):
            for agent in ("main", "beta"):  # two conversations, of which the page can have the default agent's
                await live.ask(stage.hub, agent, {"x-copepod-session-key": "a:agent:beta:b"}, model=f"copepod:{agent}")
            tab = await stage.tab()
            await tab.says("· main", "nav li:last-child")
            assert await tab.evaluate("document.querySelectorAll('nav li').length") == 1
            await tab.click("nav a")
            await tab.says("You said: main", "article.assistant")
            assert await tab.evaluate("document.getElementById('agent').value") == "main"

    play(main)


def test_two_tabs(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["one ", "two"])
        async with stage.serving({"main": agent}):
            first = await stage.tab()
            second = await stage.tab(first, at=await first.evaluate("location.hash"))
            third = await stage.tab(first)
            await send(first, "Both")
            agent.go.release()
            for tab in (first, second):
                await tab.says("one", "article.assistant")
            agent.go.release()
            for tab in (first, second):
                await tab.says("Both", "article.mine")
                await tab.says("one two", "article.assistant")
                await tab.until(OVER)
            await third.click("main")
            await third.says("Both", "nav")  # in its list, and nowhere else
            assert await third.evaluate("document.querySelectorAll('article').length") == 0

    play(main)


def test_an_agent_that_fails_and_one_that_is_not_there(play: Play) -> None:
    async def fails(message: str) -> str:
        raise RuntimeError

    async def main(stage: Stage) -> None:
        async with stage.serving({"main": fails}):
            tab = await stage.tab()
            await send(tab, "?")
            await tab.says("the agent failed", "article.assistant .bad")
            await tab.until(OVER)
            stranger = await stage.tab(tab, at="#agent:nobody:main")
            await stranger.says('unknown agent id "nobody"', "article .bad")

    play(main)


def test_by_keyboard_alone(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.tab(until="Talk to main")
            assert await rings(tab) == "text"
            await tab.type("two")
            await tab.press("Enter", SHIFT)
            await tab.type("lines")
            await tab.press("Enter")
            await tab.says("two\nlines", "article.assistant")
            await tab.says("two lines", "nav a")
            seen = []
            for _ in range(4):  # from the message backwards to the start
                await tab.press("Tab", SHIFT)
                seen.append((await rings(tab)).partition("\n")[0])
            assert seen == ["log", "agent", "two lines", "new"]
            await tab.press("Enter")
            await tab.says("Talk to main")
            assert await rings(tab) == "text"

    play(main)


def test_the_icon_is_a_picture(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.tab()
            icon = "Object.assign(new Image(), { src: document.querySelector('link').href })"
            assert await tab.evaluate(f"((image) => image.decode().then(() => image.naturalWidth > 0))({icon})")
            tab.addresses = [address for address in tab.addresses if not address.startswith("data:")]

    play(main)


def test_what_a_screen_reader_finds(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agent = Step(["word", "never"])
        async with stage.serving({"main": agent}, WITH_TOKEN):
            tab = await stage.tab(until="Who is there?")
            named = await tab.named()
            assert ("textbox", "Token or password") in named
            assert ("button", "Enter") in named
            await tab.type(TOKEN)
            await tab.press("Enter")
            await tab.says("Talk to main")
            await send(tab, "?")
            agent.go.release()
            await tab.says("word")
            named = await tab.named()
            wanted = {
                ("navigation", "Conversations"), ("heading", "Copepod"), ("button", "New conversation"),
                ("combobox", "Agent"), ("log", "Conversation"), ("textbox", "Message"), ("button", "Stop"),
                ("button", "Send"),
            }  # fmt: skip
            assert wanted <= set(named)
            roles = {role for role, _ in named}
            assert {"banner", "main", "status", "article"} <= roles
            controls = [(role, name) for role, name in named if role in ("button", "textbox", "combobox", "link")]
            assert all(name for _, name in controls)
            await tab.press("Escape")
            await tab.says("Stopped")

    play(main)


def test_on_a_phone(play: Play) -> None:
    wide = "x" * 300

    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.browser.tab()
            stage.tabs.append(tab)
            await tab.size(360, 640, phone=True)
            await tab.goto(f"{stage.hub.url}/")
            await tab.says("Talk to main")
            await tab.evaluate("document.getElementById('text').focus()")
            await tab.type(f"{wide}\n```\n{wide}\n```")
            await tab.press("Enter")
            await tab.says(f"You said: {wide}", "article.assistant")
            widths = await tab.evaluate(
                "[document.documentElement, document.getElementById('log')].map((e) => e.scrollWidth - e.clientWidth)"
            )
            assert widths == [0, 0]
            assert await tab.evaluate("document.querySelector('pre').scrollWidth > innerWidth")
            assert await tab.evaluate("document.documentElement.scrollHeight <= innerHeight")
            for control in ("input", "textarea", "select"):  # below, iOS zooms in
                size = await tab.evaluate(f"getComputedStyle(document.querySelector('{control}')).fontSize")
                assert size == "16px"
            assert await tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
            await tab.click("#menu")
            await tab.click("#new")
            await tab.says("Talk to main")
            assert await tab.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"

    play(main)


def test_large_letters_on_a_small_screen(play: Play) -> None:
    async def main(stage: Stage) -> None:
        agents = [{"id": "main", "name": "A long name " * 9}]
        async with stage.serving({"main": says}, {"agents.list": agents, **WITH_TOKEN}):
            tab = await stage.tab(until="Who is there?")
            await tab.size(360, 400, phone=True)
            await tab.evaluate("document.documentElement.style.fontSize = '200%', 0")
            assert await tab.evaluate("((door) => door.scrollHeight > door.clientHeight)(document.forms[0])")
            await tab.type(TOKEN)
            await tab.until("document.forms[0].scrollTop > 0")  # it has come into view
            await tab.press("Enter")
            await tab.says("Talk to A long name")
            await tab.evaluate("document.getElementById('text').focus()")
            for message in ("one", "two"):
                await tab.type(message)
                await tab.press("Enter")
                await tab.says(f"You said: {message}", "article:last-child")
            assert await tab.evaluate("document.documentElement.scrollWidth") == 360
            assert await tab.evaluate("document.documentElement.scrollHeight") == 400

    play(main)


def test_words_from_right_to_left(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.tab()
            await send(tab, f"x\n\n{ARABIC}")
            await tab.says(ARABIC, "article.assistant p:last-child")
            await tab.until(OVER)
            ends = """[...document.querySelectorAll('article.assistant p')].slice(1).map((p) => {
                const range = document.createRange(), box = p.getBoundingClientRect();
                range.selectNodeContents(p);
                const words = range.getBoundingClientRect();
                return [words.left === box.left, words.right === box.right];
            })"""
            assert await tab.evaluate(ends) == [[True, False], [False, True]]

    play(main)


ATTEMPTS = {
    "an image": "document.body.append(Object.assign(new Image(), {src: '/healthz'}))",
    "a script": "document.head.append(Object.assign(document.createElement('script'), {text: 'document.title = 1'}))",
    "a style": "document.head.append(Object.assign(document.createElement('style'), {textContent: 'p {}'}))",
    "HTML": "try { document.body.innerHTML = '<p>' } catch {}",
    "code": "try { document.body.onclick = 0; new Function('1')() } catch {}",
    "another gateway": "try { new WebSocket('ws://localhost:1/') } catch {}",
    "a base": "document.head.append(Object.assign(document.createElement('base'), {href: '/elsewhere/'}))",
}


def test_what_the_policy_forbids(play: Play) -> None:
    async def main(stage: Stage) -> None:
        async with stage.serving({"main": says}):
            tab = await stage.tab()
            for what, attempt in ATTEMPTS.items():
                await tab.evaluate(
                    "window.broken = new Promise((r) => addEventListener('securitypolicyviolation', r)), 0"
                )
                await tab.evaluate(f"setTimeout(() => {{ {attempt} }})")
                assert await tab.evaluate("broken.then((event) => event.disposition)") == "enforce", what
            tab.problems.clear()

    play(main)
