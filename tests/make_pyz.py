"""Build the program as one file with all it needs but Python, the same bytes each time: `make_pyz.py FILE`.

So that it is small, the modules are one member of the zip, compressed as one with the chat page, without comments and
docstrings; each statement keeps its line, for tracebacks. `unzip -p copepod.pyz modules` shows them.
"""

from __future__ import annotations

import ast
import re
import sys
import tokenize
from importlib.metadata import distribution, version
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).resolve().parent.parent
PAGE = "webchat.html"
JSON5_PROGRAM = {"__main__.py", "tool.py"}  # its command line is not ours


def bare(source: bytes) -> bytes:
    """The module without comments and docstrings, indented by one column a level."""
    text = source.decode()
    lines, nodes = text.split("\n"), list(ast.walk(ast.parse(text)))
    strings = [node for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr)]
    inside = {row for node in strings for row in range(node.lineno, node.end_lineno or 0)}
    for node in [node.value for node in nodes if isinstance(node, ast.Expr)]:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            end = node.end_lineno or 0
            lines[node.lineno - 1 : end] = [" " * node.col_offset + '""', *[""] * (end - node.lineno)]
    for token in tokenize.generate_tokens(iter([f"{line}\n" for line in lines]).__next__):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    for row in set(range(len(lines))) - inside:
        lines[row] = re.sub("^(?: {4})+", lambda match: " " * (match.end() // 4), lines[row])
    return "\n".join(lines).encode()


def sources() -> dict[str, bytes]:
    """The modules as they are here, ours and those of json5, by their path."""
    files = {f"copepod/{path.name}": path.read_bytes() for path in ROOT.glob("*.py")}
    for path in distribution("json5").files or []:
        if path.suffix == ".py" and path.parts[0] == "json5" and path.name not in JSON5_PROGRAM:
            files[str(path)] = path.read_binary()
    return files


def contents() -> dict[str, bytes]:
    """What is in the file, by name. In `modules`, each begins with a form feed, its path and a line feed."""
    (json5_licence,) = (path for path in distribution("json5").files or [] if path.name == "LICENSE")
    files = {name: bare(source) for name, source in sources().items()} | {f"copepod/{PAGE}": (ROOT / PAGE).read_bytes()}
    packed = [b"\f%s\n%s" % (name.encode(), data) for name, data in sorted(files.items())]
    return {
        "__main__.py": (ROOT / "tests" / "pyz_main.py").read_bytes(),
        "copepod/LICENSE": (ROOT / "LICENSE").read_bytes(),
        "json5/LICENSE": json5_licence.read_binary(),
        "modules": b"".join(packed),
    }


def build(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as out:
        out.write(b"#!/usr/bin/env python3\n")
        with ZipFile(out, "w", ZIP_DEFLATED, compresslevel=9) as archive:
            for name, data in contents().items():
                entry = ZipInfo(name)  # its time is 1980
                entry.compress_type = ZIP_DEFLATED
                entry.external_attr = 0o100644 << 16
                archive.writestr(entry, data, compresslevel=9)
    target.chmod(0o755)


def other_than_pinned() -> str:
    """What to do for a release's bytes, where the json5 that is here is not a release's; else ""."""
    pins, here = ROOT / "deploy" / "requirements.txt", f"json5=={version('json5')}"
    if here in pins.read_text(encoding="utf-8").split():
        return ""
    return f"{here} is not a release's: for its bytes, pip install --require-hashes -r {pins.relative_to(ROOT)}"


if __name__ == "__main__":
    build(Path(sys.argv[1]))
    if said := other_than_pinned():
        print(said, file=sys.stderr)
