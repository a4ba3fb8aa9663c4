"""The services in deploy/: what the init systems' own tools say of them, and whether they fit the settings."""

from __future__ import annotations

import re
import shlex
import shutil
import stat
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

import cli
import gateway
import make_pyz

ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "deploy" / "copepod.service"
OPENRC = ROOT / "deploy" / "copepod.openrc"
PAGE = ROOT / "docs" / "hosting.md"
PROGRAM, CONFIG, STATE = "/usr/local/bin/copepod", "/etc/copepod/copepod.json5", "/var/lib/copepod"
EXPOSURE = 13  # tenths: systemd's own measure, of which 100 is a service without walls

# OpenRC's own words, which say how they were called.
OPENRC_WORDS = """
checkpath() { echo checkpath "$@"; }
ebegin() { :; }
eend() { return "$1"; }
use() { echo use "$@"; }
after() { echo after "$@"; }
RC_SVCNAME=copepod
"""


def unit() -> dict[str, list[str]]:
    """The unit's settings by their name."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE):
        found.setdefault(name, []).append(value)
    return found


def sh(text: str) -> str:
    done = subprocess.run(["/bin/sh", "-euc", text], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def openrc(command: str) -> str:
    """What the script prints when OpenRC's words are stubs."""
    return sh(f"{OPENRC_WORDS}\n. {shlex.quote(str(OPENRC))}\n{command}")


def analyze(tmp_path: Path, *argv: str) -> None:
    """Let systemd-analyze judge the unit, with the program where the test could put it."""
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("needs systemd-analyze (apt-get install systemd)")
    make_pyz.build(tmp_path / "copepod")
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text(encoding="utf-8").replace(PROGRAM, str(tmp_path / "copepod")), encoding="utf-8")
    words = [program, "--no-pager", *argv, str(copy)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert argv[0] != "verify" or UNIT.stem not in said  # it may have something to say of others


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    analyze(tmp_path, "verify")


def test_the_unit_is_hardened(tmp_path: Path) -> None:
    analyze(tmp_path, "security", "--offline=true", f"--threshold={EXPOSURE}")


def test_the_script_is_shell() -> None:
    sh(f"/bin/sh -n {shlex.quote(str(OPENRC))}")


def test_both_start_the_same() -> None:
    """What both name: a command line that the program understands, and where it keeps what it keeps."""
    (start,) = unit()["ExecStart"]
    assert openrc('echo "$command $command_args"') == f"{start}\n"
    program, *argv = shlex.split(start)
    assert program == PROGRAM
    seen: list[Namespace] = []
    assert cli.run(argv, {"gateway": lambda options: seen.append(options) or 0}, "") == 0
    assert seen[0].config == CONFIG
    assert unit()["Environment"] == [f"COPEPOD_STATE_DIR={STATE}"]
    assert openrc("env | grep COPEPOD") == f"COPEPOD_STATE_DIR={STATE}\n"
    assert unit()["StateDirectory"] == [Path(STATE).name]


def test_both_wait_for_the_drain() -> None:
    config = gateway.load_config(None, {}, [("session.store", ":memory:")])
    seconds = config.drain_seconds + gateway.STOP_SECONDS + gateway.GOODBYE_SECONDS
    assert int(unit()["TimeoutStopSec"][0]) > seconds
    assert int(re.fullmatch(r"TERM/([0-9]+)/KILL/[0-9]+\n", openrc('echo "$retry"'))[1]) > seconds  # type: ignore[index]


def test_both_let_it_open_its_files() -> None:
    config = gateway.load_config(None, {}, [("session.store", ":memory:")])
    limits = [int(unit()["LimitNOFILE"][0]), int(openrc('echo "${rc_ulimit#-n }"'))]
    assert all((limit - 64) // 2 >= config.max_connections for limit in limits)


def test_both_read_the_configuration_again(tmp_path: Path) -> None:
    assert unit()["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    (tmp_path / "supervise-daemon").write_text('#!/bin/sh\necho supervise-daemon "$@"\n', encoding="utf-8")
    (tmp_path / "supervise-daemon").chmod(0o755)  # its name is none that a function may have
    assert openrc(f"PATH={shlex.quote(str(tmp_path))}; reload") == "supervise-daemon copepod --signal HUP\n"


def test_the_script_makes_its_folders() -> None:
    assert openrc("start_pre; depend").splitlines() == [
        f"checkpath --directory --mode 0700 --owner copepod:copepod {STATE}",
        "checkpath --file --mode 0640 --owner copepod:copepod /var/log/copepod.log",
        "use net dns",
        "after firewall",
    ]


def test_the_page_puts_things_where_they_are_looked_for() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(f" {PROGRAM}\n") == 2  # as one file, and as a package
    assert f"`{CONFIG}`" in text
    assert f"`{STATE}`" in text
    assert unit()["EnvironmentFile"] == ["-/etc/copepod/env"]
    for path in ("/etc/copepod/env", "/etc/conf.d/copepod", "/etc/init.d/copepod", "/etc/systemd/system/"):
        assert path in text
    assert OPENRC.stat().st_mode & stat.S_IXUSR == 0  # `install -m 755` makes it a program
