"""The pages: each block in them is run, built or parsed, and each link leads somewhere.

A block that cannot be checked has a comment before it, which GitHub does not show: `<!-- not run: why -->`.
"""

from __future__ import annotations

import asyncio
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import cli
import gateway
import schema
import settings as reading
from live import ask, run, serving, within
from peer import TOKEN, opened

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "http://127.0.0.1:18789"  # of the pages; a test puts its own there
SECRET = "the token"  # noqa: S105
BOUND = 60  # seconds for a program
SAMPLES = {"JSON": "{}", "N": "1", "S": "1"}  # for words that stand for something else


class Block(NamedTuple):
    page: Path
    line: int
    why_not: str  # it is not checked
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks() -> Iterator[Block]:
    """Every code block, indented or fenced, without its indentation."""
    shape = r"(?:<!-- not run: (.+) -->\n\n?)?(?:^```.*\n((?:.*\n)*?)```$|(?<=\n\n)^((?:    .*\n|\n(?=\n*    ))+))"
    for page in PAGES:
        text = page.read_text(encoding="utf-8") + "\n"
        for match in re.finditer(shape, text, re.MULTILINE):
            code = match[2] or match[3]
            line = text.count("\n", 0, match.end() - len(code)) + 1
            yield Block(page, line, match[1] or "", textwrap.dedent(code))


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell's script as words, from their names on; comments, assignments and subshells apart."""
    for line in text.replace("\\\n", " ").replace(" 2>&1", "").splitlines():
        for part in re.split(r"[;|]|&&", line):
            with_comments = shlex.shlex(part.strip("( )"), posix=True, punctuation_chars=">")
            with_comments.whitespace_split = True
            words = list(with_comments)
            if words:
                yield words


def check_shell(block: Block, folder: Path) -> None:
    """It is shell, the program knows its own command lines, the Makefile has the targets, and curl gets an answer."""
    checked = subprocess.run(["/bin/sh", "-n"], input=block.text, text=True, capture_output=True, timeout=BOUND)
    assert checked.returncode == 0, checked.stderr
    for words in commands(block.text):
        check_command(words)
    if re.search(r"^curl ", block.text, re.MULTILINE):
        check_curl(block.text)


def check_command(words: list[str]) -> None:
    if words[:2] == ["python3", "gateway.py"] or words[0] == "copepod" or words[:2] == ["python", "copepod.pyz"]:
        check_line(words[1 + (words[0] != "copepod") :])
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words
    for word in words:
        if re.match(r"(deploy|tests|docs)/", word):
            assert (ROOT / word).exists(), word


def check_line(argv: list[str]) -> None:
    """The program's parser takes it, or it is a command's name."""
    names = [command.name for command in cli.COMMANDS]
    if " ".join(argv) in (*names, "--version", "--help"):
        return
    seen: list[Any] = []
    known = dict.fromkeys(names, lambda options: seen.append(options) or 0)
    status = cli.run([SAMPLES.get(word, word) for word in argv], known, "")
    assert (status, len(seen)) == (0, 1), argv
    if seen[0].command == "call" and seen[0].method != "METHOD":
        assert not schema.problem(seen[0].method, seen[0].params)


def check_curl(text: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("needs curl")

    async def main() -> None:
        auth = {"gateway.auth.mode": "token", "gateway.auth.token": SECRET}
        async with serving(auth) as hub:
            script = text.replace(ADDRESS, hub.url)
            environ = {"PATH": os.environ["PATH"], "NO_PROXY": "*", "COPEPOD_GATEWAY_TOKEN": SECRET}
            pipe = asyncio.subprocess.PIPE
            child = await asyncio.create_subprocess_exec("/bin/sh", "-euc", script, stdout=pipe, env=environ)
            out, _ = await within(child.communicate())
            assert child.returncode == 0
            assert b'"error"' not in out
            assert out

    run(main())


def check_python(block: Block, folder: Path) -> None:
    """It compiles; a client gets its answer, and an agent gives one."""
    text = block.text
    if text.startswith("yield "):
        text = "async def reply(message, turn):\n" + textwrap.indent(text, "    ")
    names: dict[str, Any] = {}
    code = compile(text.replace(ADDRESS, "{url}"), str(block), "exec")
    if "asyncio.run(" in text:  # a whole program, which test_embedding.py runs
        return
    if "import OpenAI" not in text:
        exec(code, names)  # noqa: S102 - it is ours
        check_agent(names["reply"])
    elif find_spec("openai") is not None:
        check_client(text)


def check_agent(reply: Callable[..., Any]) -> None:
    async def main() -> None:
        async with serving(agents={"main": reply}) as hub:
            assert (await ask(hub, "one two")).status == 200

    run(main())


def check_client(text: str) -> None:
    async def main() -> None:
        auth = {"gateway.auth.mode": "token", "gateway.auth.token": SECRET}
        async with serving(auth) as hub:
            names: dict[str, Any] = {}
            await within(asyncio.to_thread(exec, text.replace(ADDRESS, hub.url), names))
            assert "answer" not in names or names["answer"].choices[0].message.content == "hi"
            names["client"].close()

    run(main())


def check_json5(block: Block, folder: Path) -> None:
    """A configuration is built without a warning, a provider of one too; another program's is looked at as text."""
    tree = reading.parse(block.text)
    if "api" in tree:
        tree = {"models": {"providers": {"mine": tree}}}
    elif not tree.keys() <= {"gateway", "agents", "models", "session", "logging"}:
        return check_settings(block, folder)
    for entry in tree.get("gateway", {}).get("auth", {}).get("tokens", []):
        entry["tokenSha256"] = entry["tokenSha256"].replace("...", 64 * "0")
    environ = dict.fromkeys(re.findall(r"\$\{(\w+)\}", block.text), SECRET)
    read = reading.Settings(environ, ["COPEPOD"])
    read.folder = str(folder)
    for name in tree.get("gateway", {}).get("tls", {}).values():
        (folder / name).touch()
    config = gateway.configuration.build(read.take(tree), read, gateway.auth.callers)
    assert not config.warnings
    return None


def check_frames(block: Block, folder: Path) -> None:
    """What is sent is answered by a live gateway, with the kinds of frames that are shown."""
    joined = re.sub(r"\n +", "", block.text).splitlines()
    sent = [json.loads(line[3:]) for line in joined if line.startswith("-> ")]
    shown = [line[3:] for line in joined if line.startswith("<- ")]
    assert len(sent) + len(shown) == len(joined)
    answers = Counter(re.findall(r'"type":"res","id":"(\w+)","ok":true', "\n".join(shown)))

    async def main() -> None:
        async with serving({**TOKEN, "gateway.auth.token": "..."}) as hub, opened(hub) as peer:
            await peer.challenge()
            for frame in sent:
                await peer.send(frame)
                for _ in range(answers[frame["id"]]):
                    assert (await peer.answer(frame["id"]))["ok"]
                answers.pop(frame["id"])
            assert all(
                f'"event":"{frame["event"]}"' in block.text for frame in peer.frames if frame.get("event") == "agent"
            )
        assert not answers

    run(main())


def check_ini(block: Block, folder: Path) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(block.text)
    assert parser.sections()


def check_settings(block: Block, folder: Path) -> None:
    """What is pasted into another program has the gateway's address and models; the program is not here."""
    addresses = re.findall(r"https?://[^\s\"]+", block.text)
    assert all(re.fullmatch(r"http://[\w.]+:18789/v1", address) for address in addresses), addresses
    assert re.search(r"18789/v1|copepod:main", block.text)
    assert set(re.findall(r"copepod:(\w+)", block.text)) <= {"main"}


def check_elsewhere(block: Block, folder: Path) -> None:
    """A proxy's lines are run by the tests of proxies, which find them by their first line."""
    assert 'block("' + block.text.split("\n")[0][:10] in (ROOT / "tests/interop/test_proxies.py").read_text(
        encoding="utf-8"
    )


# How a block is known, and what is done with it; the first that fits.
KINDS: tuple[tuple[str, Callable[[Block, Path], None]], ...] = (
    (r"# /etc/(nginx|caddy)", check_elsewhere),
    (r"// |\{", check_json5),
    (r"(# \S+\.py|from \w|import \w|async def|def |yield )", check_python),
    (
        r"(copepod|make|python3?|pip|curl|git|cp|mkdir|install|addgroup|export|sh|kill|systemctl|tar|cd|sqlite3) ",
        check_shell,
    ),
    (r"-> \{", check_frames),
    (r"\[mypy", check_ini),
    (r"[\w -]+: \S|- \w+:|[A-Z_]+=", check_settings),
)
BLOCKS = list(blocks())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_block(block: Block, tmp_path: Path) -> None:
    found = [check for start, check in KINDS if re.match(start, block.text)]
    if block.why_not:
        pytest.skip(block.why_not)
    assert found, f"{block}: say here how it is checked, or before it: <!-- not run: why -->"
    found[0](block, tmp_path)


def anchors(page: Path) -> set[str]:
    """What a link may name in the page: its headings as GitHub writes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?://", target):
            name, _, anchor = target.partition("#")
            file = page.parent / name if name else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_is_there(page: Path) -> None:
    """Files of the project, targets and command lines, between two backticks."""
    for text in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        if re.match(r"(copepod|make|python3 gateway\.py) [a-z]|(deploy|tests|docs)/\S+$", text):
            check_command(shlex.split(text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_is_in_the_index(page: Path) -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert page.parent == ROOT or page.name == "README.md" or f"]({page.name})" in index
