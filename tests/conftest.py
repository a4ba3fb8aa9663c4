"""What holds for every test: the user's own configuration is out of sight, and nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

OURS = re.compile(r"\w+_(CONFIG_PATH|STATE_DIR|GATEWAY_(PORT|TOKEN|PASSWORD))")  # of any brand


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--uvloop", action="store_true", help="run the loops of the tests themselves on uvloop, too")


def pytest_configure(config: pytest.Config) -> None:
    logging.getLogger("asyncio").addFilter(_is_no_measurement)
    if config.getoption("--uvloop"):
        import uvloop

        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())


def _is_no_measurement(record: logging.LogRecord) -> bool:
    """Whether it is not "Executing ... took ...", which debug mode says in any test on a busy machine."""
    return not record.msg.startswith("Executing ")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # what a test leaves is then found in a millisecond


@pytest.fixture(scope="session", autouse=True)
def _neutral_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in filter(OURS.fullmatch, list(os.environ)):
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _nothing_hidden() -> Iterator[None]:
    """What outlives its test and is let go by a later one is found here."""
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No task outlives its `asyncio.run`, no child its test, and no socket or file is closed by the collector."""
    left: list[str] = []
    close = asyncio.Runner.close

    def watched(runner: asyncio.Runner) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed already
            left.extend(map(repr, asyncio.all_tasks(runner.get_loop())))
        close(runner)

    monkeypatch.setattr(asyncio.Runner, "close", watched)
    yield
    gc.collect()  # a ResourceWarning is raised here; pytest makes an error of it
    gc.freeze()  # a report is kept of each test: looked at each time, all of them would cost more than the tests
    assert not left, "tasks are left"
    with pytest.raises(ChildProcessError):  # a child is left
        os.waitpid(-1, os.WNOHANG)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The files of one for localhost, and of its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("needs the openssl program")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2"]
    command += ["-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return cert, key
