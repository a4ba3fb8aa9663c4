"""A part of the torture that is small enough for every day, each scenario in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent / "torture"
SECONDS = 120  # a bound, on a busy machine

sys.path.append(str(FOLDER))
torture: Any = importlib.import_module("run")
NAMES = [torture.name_of(scenario) for scenario, _, _ in torture.find_scenarios()]


@pytest.mark.parametrize("name", NAMES)
def test_torture(name: str) -> None:
    # Limits that are made short must not be eaten up by asyncio's debug mode.
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONASYNCIODEBUG"}
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", name]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
