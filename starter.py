"""The first configuration: what can answer on this machine, and the file that has it answer."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

LOCAL = (  # servers on the ports that they choose themselves
    ("ollama", "http://127.0.0.1:11434/v1"),
    ("lmstudio", "http://127.0.0.1:1234/v1"),
    ("llamacpp", "http://127.0.0.1:8080/v1"),
)
PORTS = range(18789, 18809)  # the family's, and those beside it where that one is taken
LOCAL_SECONDS = 0.5
REMOTE_SECONDS = 3.0
OPENAI, ANTHROPIC = "https://api.openai.com/v1", "https://api.anthropic.com/v1"
USUAL = {OPENAI: "gpt-4o-mini", ANTHROPIC: "claude-haiku-4-5"}  # small and cheap ones; taken where no list comes
MAX_LIST = 1 << 20  # bytes; OpenAI's is some 20 KB
MAX_MODELS = 6  # offered of one server, so that all fits a screen
MODEL = r"[A-Za-z0-9_.:/@+-]{1,100}"  # neither ends a string of the file nor commands a terminal
BASE = r"https?://[A-Za-z0-9_.:/\[\]~%-]{1,200}"
NO_TALKERS = "embed|rerank|whisper|tts|dall-e|image|moderation|realtime|transcribe|audio|sora|babbage|davinci"


if TYPE_CHECKING:

    class Response(Protocol):
        """What `request` gives back; every failure of its connection is an OSError."""

        status: int

        async def read(self, limit: int) -> bytes: ...

        def close(self) -> None: ...

    class Dialect(Protocol):
        """How a model server's API looks."""

        def models_url_of(self, base: str) -> str: ...

        def fields_of(self, key: str) -> dict[str, str]: ...

    Request = Callable[[str, str, list[tuple[str, str]], bytes], Awaitable[Response]]


class Offer(NamedTuple):
    """Something that can answer: a model of a provider."""

    provider: str
    model: str
    api: str = "echo"
    base: str = ""
    variable: str = ""  # the environment's that holds its key

    def __str__(self) -> str:
        if self.api == "echo":
            return "echo, which repeats what it is told and needs nothing"
        return f"{self.provider}/{self.model} at {self.base}" + (f", with {self.variable}" if self.variable else "")


ECHO = Offer("echo", "echo")


def problems(environ: Mapping[str, str]) -> list[str]:
    """What is wrong with the environment, each with what to do; values, which may hold a password, are not quoted."""
    if re.fullmatch(BASE, environ.get("OPENAI_BASE_URL") or OPENAI):
        return []
    return ["OPENAI_BASE_URL: must be an address such as http://127.0.0.1:8000/v1: set it so, or unset it"]


async def offers(dialects: Mapping[str, Dialect], environ: Mapping[str, str], request: Request) -> list[Offer]:
    """What this machine and the environment have to offer, the best first and echo last; each `api` has its dialect."""

    def models(place: Offer, key: str, seconds: float) -> Awaitable[list[Offer]]:
        return _models(place, dialects[place.api], key, request, seconds)

    openai, anthropic = environ.get("OPENAI_API_KEY", ""), environ.get("ANTHROPIC_API_KEY", "")
    places = [models(Offer(name, "", "openai-completions", base), "", LOCAL_SECONDS) for name, base in LOCAL]
    base = environ.get("OPENAI_BASE_URL", "").rstrip("/") or OPENAI * bool(openai)
    if re.fullmatch(BASE, base) and base not in dict(LOCAL).values():
        place = Offer("openai", "", "openai-completions", base, "OPENAI_API_KEY" * bool(openai))
        places.append(models(place, openai, REMOTE_SECONDS))
    if anthropic:
        place = Offer("anthropic", "", "anthropic-messages", ANTHROPIC, "ANTHROPIC_API_KEY")
        places.append(models(place, anthropic, REMOTE_SECONDS))
    return [offer for found in await asyncio.gather(*places) for offer in found] + [ECHO]


async def _models(place: Offer, dialect: Dialect, key: str, request: Request, seconds: float) -> list[Offer]:
    """One offer for each of the first models that the server lists; [] where it refuses or nothing answers."""
    fields = [("accept", "application/json"), *dialect.fields_of(key).items()]
    usual = USUAL.get(place.base)
    try:
        async with asyncio.timeout(seconds):
            response = await request("GET", dialect.models_url_of(place.base), fields, b"")
            try:
                listed = json.loads(await response.read(MAX_LIST)) if response.status == 200 else {"data": []}
            finally:
                response.close()
        models = [str(entry["id"]) for entry in listed["data"]]
    except (OSError, ValueError, RecursionError, LookupError, TypeError):  # TimeoutError is an OSError
        models = [usual] if usual else []
    models = [model for model in models if re.fullmatch(MODEL, model) and not re.search(NO_TALKERS, model.lower())]
    models.sort(key=lambda model: model != usual)
    return [place._replace(model=model) for model in models[:MAX_MODELS]]


TEXT = """\
// Copepod reads this file as it starts, and again on SIGHUP. It is JSON5: JSON with comments.
// `copepod config check` says what is wrong with it, `copepod doctor` also what is wrong around it.
{
  gateway: {
    port: %(port)s,  // http://127.0.0.1:%(port)s/ is a chat page, and /v1 below it OpenAI's API
    bind: "loopback",  // this machine alone; "lan" is all that can reach it
    // Who has this token may do anything; `copepod token new` makes tokens for friends.
    auth: { mode: "token", token: %(token)s },
    http: { endpoints: { chatCompletions: { enabled: true }, webchat: { enabled: true } } },
  },
  models: { providers: {  // where answers come from, each by a name of your own
%(provider)s
  } },
  agents: { list: [  // who answers: clients choose one by its id, the first by default
    { id: "main", model: %(model)s, systemPrompt: "Be brief." },
  ] },
}
"""
NO_PROVIDER = '    // ollama: { api: "openai-completions", baseUrl: "http://127.0.0.1:11434/v1" },'
PROVIDER = "    %s: {\n      api: %s,\n      baseUrl: %s,%s\n    },"
KEY = '\n      apiKey: "${%s}",  // of the environment in which it starts'


def text(offer: Offer, token: str, port: int) -> str:
    """The file for it, with its comments."""
    key = KEY % offer.variable if offer.variable else ""
    provider = PROVIDER % (offer.provider, json.dumps(offer.api), json.dumps(offer.base), key)
    return TEXT % {
        "port": port,
        "token": json.dumps(token),
        "provider": NO_PROVIDER if offer == ECHO else provider,
        "model": json.dumps(f"{offer.provider}/{offer.model}"),
    }


def write(path: str, content: str) -> None:
    """Make the file, for this user alone (0600), and its folder (0700). OSError: it cannot be made, or is there."""
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(number, "w", encoding="utf-8") as file:
                file.write(content)
        except OSError:
            os.unlink(path)  # a part of it would be in the way of the next try
            raise
    except OSError as error:
        raise OSError(f"{path} cannot be made ({error.strerror}): name another place with --config") from None
