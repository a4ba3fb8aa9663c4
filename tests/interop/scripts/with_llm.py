"""The command `llm`, as docs/client-settings.md sets it up: `with_llm.py URL TOKEN` prints what was seen, as JSON."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

url, token = sys.argv[1:]
command = Path(sys.executable).with_name("llm")
page = Path(__file__).resolve().parents[3] / "docs" / "client-settings.md"
(entry,) = re.findall(r"^    - model_id: copepod\n(?:    .+\n)+", page.read_text(), re.MULTILINE)
entry = textwrap.dedent(entry).replace("http://127.0.0.1:18789/v1", url)
Path(os.environ["LLM_USER_PATH"], "extra-openai-models.yaml").write_text(
    "".join(
        entry.replace("model_id: copepod", f"model_id: {agent}").replace("copepod:main", f"copepod:{agent}")
        for agent in ("main", "nobody", "endless", "ended")
    )
)


def run(*argv):
    return subprocess.run([command, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def llm(*argv, key=token):
    done = run(*argv, "--key", key, "one two three")
    return done.stdout if done.returncode == 0 else done.stderr


def leave():
    argv = [command, "-m", "endless", "--key", token, "go"]
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        child.stdout.read(len("more "))
        child.send_signal(signal.SIGINT)  # Ctrl-C
    return llm("-m", "ended")


def usage():
    (last,) = json.loads(run("logs", "--json", "-n", "1").stdout)
    return [last["input_tokens"], last["output_tokens"]]


print(
    json.dumps(
        {
            "answer": llm("-m", "main", "--no-stream"),
            "usage": usage(),
            "stream": llm("-m", "main"),
            "usage of the stream": usage(),
            "wrong key": llm("-m", "main", key="wrong"),
            "unknown agent": llm("-m", "nobody"),
            "left": leave(),
        }
    )
)
