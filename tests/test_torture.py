"""A part of the torture that is small enough for every day: see tests/torture/run.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent / "torture"))
torture: Any = importlib.import_module("run")
ENTRIES = [pytest.param(each, quick, id=torture.name_of(each)) for each, _, quick in torture.find_scenarios()]


@pytest.mark.parametrize(("scenario", "n"), ENTRIES)
def test_torture(scenario: Any, n: int) -> None:
    row = torture.try_one(scenario, n)
    assert row.lost == 0, row.seen[: torture.SHOWN]
