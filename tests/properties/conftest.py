"""How much is tried: the same examples each time or, with HYPOTHESIS_PROFILE=long, many new ones."""

from __future__ import annotations

import os
from pathlib import Path

try:
    from hypothesis import HealthCheck, Phase, configuration, settings
except ImportError:  # a user's `make test` has pytest alone
    collect_ignore_glob = ["test_*.py"]
else:
    configuration.set_hypothesis_home_dir(Path(__file__).parents[2] / ".pytest_cache/hypothesis")  # else .hypothesis
    settings.register_profile(
        "short",
        derandomize=True,
        database=None,
        deadline=2000,  # ms for an example: far beyond all of them, so that only one that hangs fails
        phases=[Phase.explicit, Phase.generate, Phase.shrink],  # to explain takes long, and says little
        suppress_health_check=[HealthCheck.too_slow],  # a busy machine is no mistake
    )
    settings.register_profile("long", settings.get_profile("short"), derandomize=False, max_examples=3000)
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "short"))
