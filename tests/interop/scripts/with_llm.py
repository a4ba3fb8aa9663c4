"""The command `llm`: `with_llm.py URL TOKEN` runs it as a person would and prints what was seen, as JSON."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

url, token = sys.argv[1:]
command = Path(sys.executable).with_name("llm")
home = Path(os.environ["LLM_USER_PATH"])
entries = [
    {"model_id": agent, "model_name": f"copepod:{agent}", "api_base": url, "api_key_name": "copepod"}
    for agent in ("main", "nobody", "endless", "ended")
]
(home / "extra-openai-models.yaml").write_text(json.dumps(entries))  # JSON is YAML


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
