"""Chromium without a screen, spoken to over its DevTools protocol with our own WebSocket client."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import rfc6455

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-port=0",
)  # fmt: skip
BOUND = 20.0  # seconds that Chromium's start or one answer of its may take
SHOWN = 8000  # ms until a page must look as it should
MAX_MESSAGE = 64 * 1024 * 1024  # bytes; a picture
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "\t")}
SHIFT = 8

Dict = dict[str, Any]


def program() -> str | None:
    """The path of a Chromium that is here."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """Where a Chromium that knows nothing but `folder` can be told what to do: a port and a path, joined.

    It is no child of ours, since it lives longer than the test that has started it.
    """
    argv = [program() or NAMES[0], *OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    start = ["/bin/sh", "-c", '"$@" &', "sh", *argv]
    with (folder / "stderr").open("wb") as stderr:
        shell = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True)
    assert shell.stdout is not None
    shell.wait(BOUND)
    try:
        until, file = time.monotonic() + BOUND, folder / "DevToolsActivePort"
        while not (file.exists() and file.read_text().count("\n") == 1):
            assert time.monotonic() < until, (folder / "stderr").read_text()
            time.sleep(0.02)
        yield file.read_text().replace("\n", "")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)
        shell.stdout.read()  # its end is theirs
        shell.stdout.close()


class Tab:
    """A page in a context of its own: what it asks for and complains of, and what a person at it does."""

    def __init__(self, devtools: DevTools, context: str, target: str, session: str) -> None:
        self._devtools, self.context, self.target, self.session = devtools, context, target, session
        self.problems: list[str] = []
        self.addresses: list[str] = []  # of all that it has asked for
        self._loaded = asyncio.Event()

    def take(self, method: str, params: Dict) -> None:
        """Note an event."""
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Network.requestWillBeSent":
            self.addresses.append(params["request"]["url"])
        elif method == "Network.webSocketCreated":
            self.addresses.append(params["url"])
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
            self.problems.append(params["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("warning", "error", "assert"):
            self.problems.append(json.dumps(params["args"]))

    async def call(self, method: str, **params: Any) -> Dict:
        return await self._devtools.call(method, self.session, **params)

    async def goto(self, url: str) -> None:
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), BOUND)

    async def reload(self) -> None:
        self._loaded.clear()
        await self.call("Page.reload")
        await asyncio.wait_for(self._loaded.wait(), BOUND)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, of a promise what it comes to."""
        answer = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, expression: str) -> Any:
        """Wait until it is true; its value."""
        look = f"""new Promise((resolve, reject) => {{
            const end = Date.now() + {SHOWN};
            (function look() {{
                const value = ({expression});
                if (value) resolve(value);
                else if (Date.now() < end) setTimeout(look, 5);
                else reject(new Error("it never was: " + document.body.innerText));
            }})();
        }})"""
        return await self.evaluate(look)

    async def says(self, text: str, selector: str = "body") -> None:
        """Wait until it can be read there."""
        await self.until(f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})")

    async def click(self, selector: str) -> None:
        """Click on the middle of it, once the page is in front and drawn."""
        at = await self.until(
            f"(() => {{ const r = document.querySelector({json.dumps(selector)})?.getBoundingClientRect();"
            "return r?.width ? [r.x + r.width / 2, r.y + r.height / 2] : null; })()"
        )
        await self.call("Page.bringToFront")
        await self.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        for type_ in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=type_, x=at[0], y=at[1], button="left", clickCount=1)

    async def type(self, text: str) -> None:
        """Write where the focus is."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, modifiers: int = 0) -> None:
        code, text = KEYS[key]
        about = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        await self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **about)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    async def size(self, width: int, height: int, *, phone: bool = False, scale: float = 1) -> None:
        values = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        await self.call("Emulation.setDeviceMetricsOverride", **values)
        await self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    async def prefer(self, **features: str) -> None:
        """Say what the person prefers, as CSS asks for it."""
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        await self.call("Emulation.setEmulatedMedia", features=told)

    async def picture(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"])

    async def named(self) -> list[tuple[str, str]]:
        """The role and the name of what a screen reader finds, in order."""
        nodes = (await self.call("Accessibility.getFullAXTree"))["nodes"]
        seen = (node for node in nodes if not node["ignored"])
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in seen]

    def well(self, port: int) -> None:
        """It has complained of nothing, and asked nobody but the gateway."""
        assert self.problems == [], self.problems
        assert {urlsplit(address).netloc for address in self.addresses} == {f"127.0.0.1:{port}"}


class DevTools:
    """A connection to Chromium, for `opened`."""

    def __init__(self, socket: rfc6455.WebSocket) -> None:
        self._socket = socket
        self._calls: dict[int, asyncio.Future[Dict]] = {}
        self._tabs: dict[str, Tab] = {}

    async def call(self, method: str, session: str = "", **params: Any) -> Dict:
        id = len(self._calls)
        answer = self._calls[id] = asyncio.get_running_loop().create_future()
        request = {"id": id, "method": method, "params": params, **({"sessionId": session} if session else {})}
        await self._socket.send(json.dumps(request))
        frame: Dict = await asyncio.wait_for(answer, BOUND)
        assert "error" not in frame, (method, frame["error"])
        result: Dict = frame["result"]
        return result

    async def read(self) -> None:
        while (message := await self._socket.receive()) is not None:
            frame = json.loads(message)
            if "id" in frame:
                if not self._calls[frame["id"]].done():
                    self._calls[frame["id"]].set_result(frame)
            elif tab := self._tabs.get(frame.get("sessionId", "")):
                tab.take(frame["method"], frame["params"])

    async def tab(self, beside: Tab | None = None) -> Tab:
        """A new page; `beside` another it shares what that one's browser keeps."""
        context = beside.context if beside else (await self.call("Target.createBrowserContext"))["browserContextId"]
        target = (await self.call("Target.createTarget", url="about:blank", browserContextId=context))["targetId"]
        session = (await self.call("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        tab = self._tabs[session] = Tab(self, context, target, session)
        for domain in ("Page", "Network", "Log", "Runtime", "Accessibility"):
            await tab.call(f"{domain}.enable")
        return tab

    async def leave(self) -> None:
        for context in {tab.context for tab in self._tabs.values()}:
            await self.call("Target.disposeBrowserContext", browserContextId=context)


@asynccontextmanager
async def opened(address: str) -> AsyncIterator[DevTools]:
    """A connection to the Chromium at what `chromium` gave; when it ends, its pages are closed."""
    port, _, path = address.partition("/")
    socket = await rfc6455.connect("127.0.0.1", int(port), f"/{path}", max_message=MAX_MESSAGE)
    devtools = DevTools(socket)
    reading = asyncio.create_task(devtools.read())
    try:
        yield devtools
        await devtools.leave()
    finally:
        socket.close()
        await asyncio.wait_for(reading, BOUND)
