"""The auditor's page is the code's, and what it is made by sees what it has to see."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.metadata import distribution

import pytest

import audit
import gateway
import make_pyz

CODE = {
    "import os\nos.killpg(1, 9)": {"processes": ["os.killpg"]},
    "import os as system\nsystem.path.join(system.environ['A'])": {"else": ["os.environ"]},
    "from os import open as o\ndef f():\n    return [o]": {"files": ["os.open"]},
    "from pathlib import Path\nPath('a').read_text()": {"files": [".read_text", "pathlib.Path"]},
    "def f():\n    import _sqlite3 as s\n    s.connect('')": {"files": ["sqlite3.connect"]},
    "loop.create_server(f); asyncio = 1; asyncio.run": {"network": [".create_server"]},
    "import asyncio\nasync def f(x: asyncio.Server) -> asyncio.Server:\n    await asyncio.open_connection()": {
        "network": ["asyncio.open_connection"]
    },
    "print(open, eval('1'))": {"files": ["open"], "else": ["eval"]},
    "import os, antigravity\nos.getpid(); os.sendfile(); antigravity.fly": {"else": ["antigravity.fly", "os.sendfile"]},
    "import json, re\njson.loads; re.compile('')": {},
    "if TYPE_CHECKING:\n    import subprocess\n    subprocess.run": {},
}


@pytest.mark.parametrize("source", CODE)
def test_what_code_can_do(source: str) -> None:
    assert {column: names for column, names in audit.powers(source).items() if names} == CODE[source]


def test_the_page_is_the_codes() -> None:
    if audit.page() != audit.PAGE.read_text(encoding="utf-8"):
        pytest.fail(f"docs/{audit.PAGE.name} is not what the code says any more: run `make audit`")


def test_why_a_file_uses_the_network_is_said() -> None:
    can = {path.name: audit.powers(path.read_text(encoding="utf-8"))["network"] for path in audit.FILES}
    uses = {name for name, names in can.items() if names}
    assert uses == set(audit.REACH), "say in tests/audit.py, REACH, what for; then `make audit`"
    assert {name for name, names in can.items() if ".create_server" in names} == {"gateway.py"}
    default = gateway.load_config(None, {}, [("session.store", ":memory:")])
    assert f"without it {default.port}" in audit.REACH["gateway.py"]
    assert default.bind == "127.0.0.1"


def test_a_release_has_the_pinned_dependency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who builds one with another is told."""
    (pinned,) = re.findall(r"^\| `json5==([0-9.]+)`", audit.PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for here, said in ((pinned, ""), ("0.1", "json5==0.1 is not a release's: .*--require-hashes -r deploy/.*")):
        monkeypatch.setattr(make_pyz, "version", {"json5": here}.get)
        assert re.fullmatch(said, make_pyz.other_than_pinned())


def test_the_dependency_is_as_its_wheel_has_it() -> None:
    """The files that go into a release have the digests that the wheel's own list has."""
    json5 = distribution("json5")
    files = [path for path in json5.files or [] if path.suffix == ".py"]
    assert files
    for path in files:
        assert path.hash is not None
        assert path.hash.mode == "sha256"
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_binary()).digest()).decode().rstrip("=")
        assert digest == path.hash.value, path
