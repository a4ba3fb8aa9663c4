"""Write docs/audit.md, the auditor's page, from the code: `audit.py`.

What a file can do is told by the names that it uses. A name that is in none of the tables below is told as well, under
"else", so that nothing is left out in silence.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "audit.md"
FILES = sorted(ROOT.glob("*.py"), key=lambda path: (path.stem != "gateway", path.name))  # the hub first
NEAR = 50  # lines that a file may have gained or lost before the page says another number

# What a name can do. One that begins with a dot is a method, of whatever object.
POWERS = {
    "network": r"asyncio\.(open_\w*connection|start_\w+)|\.create_((unix_)?(server|connection)|datagram_endpoint)"
    r"|\.(getaddrinfo|sock_\w+)|socket\.(socket|create_\w+|get\w+|from\w+)|ssl\.create_default_context"
    r"|(ftplib|http|smtplib|socketserver|urllib\.request|xmlrpc)\b.*",
    "files": r"open|(io|os)\.open|os\.(dup2|close|fd\w+|fsync|ch\w+|listdir|scandir|walk|l?stat\w*|\w*dirs?)"
    r"|os\.(replace|rename|unlink|remove|link|symlink|readlink|truncate|utime|access)"
    r"|os\.path\.(l?exists|get\w+|is\w+|realpath)|sqlite3\.connect|fcntl\.flock|\.(load_cert_chain|load_verify_locations|(read|write)_(text|bytes))"
    r"|(glob|linecache|pathlib|shutil|tarfile|tempfile|zipfile|zipimport)\b.*",
    "processes": r"\.(subprocess_\w+|add_signal_handler|send_signal)|asyncio\.create_subprocess_\w+|signal\.signal"
    r"|os\.(kill\w*|fork\w*|exec\w+|spawn\w+|posix_spawn\w*|system|popen|wait\w*)|(multiprocessing|subprocess)\b.*",
}
# What for a file uses names of the first kind.
UNSAID = "?"
REACH = {
    "doctor.py": "tries for a moment whether `gateway.port` is free",
    "gateway.py": "listens at `gateway.port` (without it 18789) of `gateway.bind` (without it loopback) alone",
    "pool.py": "connects to the `baseUrl` of model servers",
    "rfc6455.py": "connects to a running gateway, for the commands that call one",
    "tls.py": "makes no connection; it says what those over TLS trust",
}
METHODS = re.compile("|".join(POWERS.values()) + r"|\.run_in_executor")
BUILTINS = {"open", "eval", "exec", "compile", "__import__"}
# What can do nothing of the kind: names of modules that otherwise can, and modules.
PLAIN_NAMES = re.compile(
    r"asyncio\.(?!to_thread).*|os\.(path\.(abs|base|dir|join|norm|exp)\w*|urandom|get(cwd|uid|gid|pid)|uname|devnull|O_\w+)"
    r"|socket\.([A-Z]\w+|inet_\w+|\w*error)|ssl\.[A-Z]\w+|signal\.[A-Z]\w+|fcntl\.[A-Z]\w+|sqlite3\.[A-Z]\w+"
    r"|resource\.([A-Z]\w+|getrlimit)|sys\.(argv|exit|std\w+|platform|version\w*|maxsize|byteorder|flags)(\.\w+)*"
    r"|threading\.\w*Semaphore|importlib\.(metadata|resources)\..*|urllib\.parse\..*"
)
PLAIN = re.compile(
    r"(__future__|_operator|argparse|base64|binascii|codecs|collections|contextlib|contextvars|"
    r"dataclasses|datetime|difflib|email|enum|errno|functools|gc|hashlib|heapq|hmac|html|inspect|io|"
    r"ipaddress|itertools|json|logging|math|operator|platform|random|re|secrets|shlex|stat|string|struct|"
    r"textwrap|time|traceback|types|typing|uuid|warnings|weakref|zlib)\b.*"
)


def known(tree: ast.Module) -> dict[str, str]:
    """What each imported name stands for, and each builtin that can do something."""
    found = {name: name for name in BUILTINS}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                found[alias.asname or name] = name.replace("_sqlite3", "sqlite3")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def used(node: ast.AST, meaning: dict[str, str]) -> Iterator[str]:
    """The full names that the code uses, types apart, and of other objects the methods that have a power."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Name | ast.Attribute):
        first, _, rest = ast.unparse(node).partition(".")
        if first in meaning and re.fullmatch(r"[\w.]*", rest):
            yield f"{meaning[first]}.{rest}" if rest else meaning[first]
            return
        if isinstance(node, ast.Attribute) and METHODS.fullmatch(f".{node.attr}"):
            yield f".{node.attr}"
    for field, value in ast.iter_fields(node):
        if field not in ("annotation", "returns"):
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, ast.AST):
                    yield from used(inner, meaning)


def column(name: str) -> str | None:
    """Which of a file's powers the name shows, None for none."""
    for told, pattern in POWERS.items():
        if re.fullmatch(pattern, name):
            return told
    ours = name.partition(".")[0] in {path.stem for path in FILES}
    return None if ours or PLAIN.fullmatch(name) or PLAIN_NAMES.fullmatch(name) else "else"


def powers(source: str) -> dict[str, list[str]]:
    """The names that show what a module's code can do, by column."""
    tree = ast.parse(source)
    found: dict[str, set[str]] = {told: set() for told in (*POWERS, "else")}
    for name in used(tree, known(tree)):
        if told := column(name):
            found[told].add(name)
    return {told: sorted(names) for told, names in found.items()}


def numbers(path: Path) -> Iterator[tuple[str, str, str]]:
    """Each number that the module gives a name: that, its value, and the comment behind it."""
    source, module = path.read_text(encoding="utf-8"), import_module(path.stem)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, comment = node.targets[0].id, comments.get(node.end_lineno or 0, "")
            value = getattr(module, name)
            if not name.startswith("_") and type(value) in (int, float):
                yield name, f"{value:,}" if type(value) is int else f"{value:g}", comment


def keys(table: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a table of config.py, by its path, with its rule."""
    if isinstance(table, list):
        yield from keys(table[0], f"{path}[]")
    elif isinstance(table, dict):
        for name, inner in table.items():
            yield from keys(inner, f"{path}.{name}" if path else name)
    elif table is not None:
        yield path, table


def bounds(config: Any) -> Iterator[tuple[str, str, str]]:
    """Each number of the configuration: its key, its default, what it may be."""
    tables = {"": config.ROOT} | {f"models.providers.*({api})": table for api, table in config.PROVIDERS.items()}
    for path, table in tables.items():
        for key, rule in keys(table, path):
            if match := re.fullmatch(r"a (whole )?number from (.*) to (.*)", rule.wants):
                default = "" if rule.default is None else f"{rule.default:,}"
                yield key, default, f"{match[2]} to {match[3]}"


def variables() -> list[str]:
    """The environment's variables that the code asks for by name; `*` is a part that it fills in."""
    found = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                asked, word = ast.unparse(node.func), node.args[0]
            elif isinstance(node, ast.Subscript):
                asked, word = ast.unparse(node.value), node.slice
            else:
                continue
            parts = word.values if isinstance(word, ast.JoinedStr) else [word]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts)
            if asked.endswith(".variable"):
                found.add(f"<BRAND>_{text}")
            elif re.search(r"\benviron(\.get)?$|\bgetenv$", asked) and text != "*":
                found.add(text)
    return sorted(found)


def rows(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"


def code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def about(path: Path, shown: dict[str, str]) -> str:
    """The file's lines, roughly: what the page says already where that is near."""
    lines = path.read_text(encoding="utf-8").count("\n")
    before = int(shown.get(path.name, "0"))
    return str(before if before and abs(lines - before) <= NEAR else max(10, round(lines, -1)))


def page() -> str:
    """The page's text."""
    config = import_module("config")
    old = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    shown = dict(re.findall(r"^\| `(\w+\.py)` \| ([0-9]+) ", old, re.MULTILINE))
    can = {path: powers(path.read_text(encoding="utf-8")) for path in FILES}
    toml = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, (beside,) = toml["project"], toml["tool"]["setuptools"]["package-data"].values()
    pinned = (ROOT / "deploy" / "requirements.txt").read_text(encoding="utf-8").splitlines()[1:]
    dependencies = [tuple(line.replace("--hash=", "").split()) for line in pinned]
    return TEXT.format(
        files="\n".join(
            rows(f"`{path.name}`", about(path, shown), *map(code, names.values())) for path, names in can.items()
        ),
        beside=code(beside),
        reach="\n".join(
            f"* `{path.name}`: {REACH.get(path.name, UNSAID)}" for path, names in can.items() if names["network"]
        ),
        variables="\n".join(f"* `{name}`" for name in variables()),
        brands=code(list(dict.fromkeys(brand.prefix for brand in config.BRANDS))),
        keys="\n".join(rows(f"`{key}`", default, range_) for key, default, range_ in bounds(config)),
        numbers="\n".join(
            rows(f"`{path.stem}.{name}`", value, comment) for path in FILES for name, value, comment in numbers(path)
        ),
        dependencies="\n".join(rows(f"`{name}`", f"`{digest}`") for name, digest in dependencies),
        asked=code(project["dependencies"]),
        extras="\n".join(rows(f"`{name}`", code(words)) for name, words in project["optional-dependencies"].items()),
    )


TEXT = """\
# For the auditor

`make audit` writes this page from the code, and a test fails when it is another than the code's. It says what there is
to look at; [security](security.md) says what is promised.

## Files

Every file but `gateway.py` imports the standard library alone, and none of the others. What a file can do is told by
what it uses; a file with empty cells computes. `.name` is a method of that name of any object.

| file | lines, about | network | files | processes | else |
|---|---:|---|---|---|---|
{files}

`python_agents.py` imports and calls the functions that `entry` names, and `commands.py` starts the programs that
`command` names: what those can do is not told here. Beside these files an installed package has {beside}.

## Ports and connections

{reach}

There are no updates and no telemetry.

## Environment

`<BRAND>` is one of {brands}, or of `gateway.brands`.

{variables}
* `${{NAME}}` in the configuration: the variable of that name

A program of an agent gets the environment without the variables that the configuration uses. OpenSSL reads
`SSL_CERT_FILE` and `SSL_CERT_DIR`, and Python its own.

## Limits of the configuration

| key | without it | may be |
|---|---:|---|
{keys}

## Limits and other numbers of the code

| name | value | |
|---|---:|---|
{numbers}

## Dependencies

Python itself, and what is asked for: {asked}. A release has this one in it, a wheel that has the digest of
[the pinned list](../deploy/requirements.txt):

| package | digest |
|---|---|
{dependencies}

Extras, none of which the gateway needs and none of which is in the one file:

| extra | |
|---|---|
{extras}

## A release

The one file is the same bytes for everyone who builds it from the same commit, with the package above, on Python 3.11
to 3.13 with the same zlib. Its member `modules`, the text of all modules without comments, does not depend on zlib.

    pip install --require-hashes -r deploy/requirements.txt
    make pyz
    sha256sum dist/copepod.pyz
    unzip -p dist/copepod.pyz modules | sha256sum

To read what it runs: `unzip -p dist/copepod.pyz modules | less`. An installed package is checked by
`pip download --no-deps`, and by its `RECORD`.
"""


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page(), encoding="utf-8")
