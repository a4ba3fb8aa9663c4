"""Write the README's picture of the chat page: `screenshot.py FILE`."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]

import devtools  # noqa: E402
import live  # noqa: E402

SIZE = (880, 470)
SETTINGS = {
    "gateway.http.endpoints.webchat.enabled": True,
    "agents.list": [{"id": "main", "name": "Helper"}, {"id": "poet", "name": "Poet"}],
}
TALK = {
    "How are the disks?": "All four are well. The oldest has run for 31,207 hours, without an error.",
    "When is the train?": "It leaves at 7:42 from platform 3. You are awake at six, as every Tuesday.",
    "How do I keep ten backups?": """\
List them by time, leave out the first ten, and remove the rest:

```sh
ls -t backup-*.tar.zst | tail -n +11 | xargs -r rm --
```

Try it with `echo` instead of `rm` first.""",
}


async def helper(message: str) -> AsyncIterator[str]:
    for word in TALK.get(message, "Small, and everywhere.").split(" "):
        yield f"{word} "
        await asyncio.sleep(0)


async def picture(chromium: str) -> bytes:
    """Return the page after a short conversation, as PNG."""
    async with live.serving(SETTINGS, {"main": helper, "poet": helper}) as hub, devtools.opened(chromium) as browser:
        tab = await browser.tab()
        await tab.size(*SIZE)
        await tab.prefer(prefers_color_scheme="light")
        await tab.goto(f"{hub.url}/")
        for message in TALK:
            await tab.says("Connected")
            await tab.click("#new")
            await tab.says("Talk to Helper")
            await tab.click("#text")
            await tab.type(message)
            await tab.press("Enter")
            await tab.until(f"document.querySelector('nav a[aria-current] span')?.textContent === {message!r}")
        return await tab.picture()


def main() -> None:
    """Run it."""
    if devtools.program() is None:
        sys.exit("no Chromium is here: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, devtools.chromium(Path(folder)) as chromium:
        data = live.run(picture(chromium))
    Path(sys.argv[1]).write_bytes(data)
    print(f"{sys.argv[1]}: {len(data)} bytes")


if __name__ == "__main__":
    main()
