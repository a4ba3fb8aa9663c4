"""Other people's clients, each in its own environment, against a gateway on a real port."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest

import environments
from served import AGENTS, TOKEN, served

SCRIPTS = Path(__file__).with_name("scripts")
SETTINGS = Path(__file__).resolve().parents[2] / "docs" / "client-settings.md"
BOUND = 120  # seconds for all that a script does; the first import after an install compiles

SEEN: dict[str, Any] = {
    "answer": "one two three ",
    "usage": [3, 4, 7],
    "finish": "stop",
    "stream": ["one ", "two ", "three "],
    "usage of the stream": [3, 4, 7],
    "left": "it ended",
}


class Client(NamedTuple):
    script: str
    sees: dict[str, Any]


CLIENTS = {
    "langchain-openai": Client(
        "with_langchain.py",
        {
            **SEEN,
            "wrong key": "OpenAIAuthenticationError invalid_api_key",
            "unknown agent": "OpenAIModelNotFoundError model_not_found",
        },
    ),
    "litellm": Client(
        "with_litellm.py",
        {**SEEN, "wrong key": "AuthenticationError 401", "unknown agent": "NotFoundError 404"},
    ),
    "pydantic-ai": Client(
        "with_pydantic_ai.py",
        {**SEEN, "wrong key": "ModelAuthenticationError 401", "unknown agent": "ModelNotFoundError 404"},
    ),
    "llm": Client(
        "with_llm.py",
        {
            "answer": "one two three \n",
            "usage": [3, 4],
            "stream": "one two three \n",
            "usage of the stream": [3, 4],
            "wrong key": "Error: Error code: 401 - Wrong credentials; send `Authorization: Bearer <token>`.\n",
            "unknown agent": "Error: Error code: 404 - There is no agent `nobody`; "
            "the agents are `main`, `endless`, `ended`.\n",
            "left": "it ended\n",
        },
    ),
}


@pytest.fixture
def url() -> Iterator[str]:
    with served() as hub:
        yield f"{hub.url}/v1"


def seen_by(argv: list[object], url: str, cwd: Path, source: IO[str] | None = None) -> Any:
    """What a script printed. It finds no variable, key, proxy or setting of the user's."""
    environ = {
        "HOME": str(cwd),
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # else it fetches a list of prices
        "LLM_USER_PATH": str(cwd),
    }
    words = [*map(str, argv), url, TOKEN]
    done = subprocess.run(
        words,
        stdin=source or subprocess.DEVNULL,
        cwd=cwd,
        env=environ,
        capture_output=True,
        text=True,
        timeout=BOUND,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.network
@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_for_python(name: str, url: str, tmp_path: Path) -> None:
    client = CLIENTS[name]
    interpreter = environments.python_of(environments.environment(name))
    assert seen_by([interpreter, "-I", SCRIPTS / client.script], url, tmp_path) == client.sees


@pytest.mark.network
def test_openai_for_node(url: str) -> None:
    folder = environments.environment(environments.NODE)
    # From stdin, a script finds the packages of the folder that it runs in.
    with (SCRIPTS / "with_openai.mjs").open() as script:
        seen = seen_by([environments.node(), "--input-type=module", "-"], url, folder, script)
    assert seen == {
        **SEEN,
        "wrong key": "AuthenticationError 401 invalid_api_key",
        "unknown agent": "NotFoundError 404 model_not_found",
        "aborted": "it ended",
        "models": [f"copepod:{agent}" for agent in AGENTS],
    }


def test_curl(url: str) -> None:
    """The lines of docs/client-settings.md, as they stand there."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not here")
    (lines,) = re.findall(r"^    (curl .+(?:\n      .+)+)", SETTINGS.read_text(encoding="utf-8"), re.MULTILINE)
    script, environ = lines.replace("http://127.0.0.1:18789/v1", url), {"PATH": os.environ["PATH"], "NO_PROXY": "*"}
    for token, seen in ((TOKEN, r'"content":"hi "(.|\n)*data: \[DONE\]'), ("wrong", '"code": "invalid_api_key"')):
        done = subprocess.run(
            ["/bin/sh", "-c", script],
            env={**environ, "COPEPOD_GATEWAY_TOKEN": token},
            capture_output=True,
            text=True,
            timeout=BOUND,
            check=True,
        )
        assert re.search(seen, done.stdout)
