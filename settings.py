"""What the file, the environment and the flags say: a tree of plain values, held against a table of rules."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MAX_FILE_BYTES = 1 << 20  # the family's largest real files are some 50 KB
LOCAL_FILE = "copepod.json5"
HOME_FILE = "~/.copepod/copepod.json5"
NEAR = 0.75  # difflib's ratio from which an unknown key is a slip of the pen: "prot" for "port" is 0.75
MEMORY = ":memory:"  # a session store without a file
SECRETS = ("token", "password", "apiKey")
SECRET_MAPS = ("env", "headers")

WHAT_TO_DO = {
    FileNotFoundError: ": name another with --config, or type `copepod init`, which makes one",
    PermissionError: ": let this user read it (chown, chmod), or name another with --config",
    IsADirectoryError: ": name the file in it",
}

VARIABLE = re.compile(r"\$(\$?)\{([A-Z_][A-Z0-9_]*)\}")
COMMENT = r"//[^\n\r\u2028\u2029]*|/\*.*?\*/"
# A string, a comment, a trailing comma, a bare key: what people use of JSON5.
JSON5 = rf'(?s)("(?:[^"\\]|\\.)*")|{COMMENT}|,(?=(?>\s|{COMMENT})*+[}}\]])|([A-Za-z_$][A-Za-z0-9_$]*)(?=\s*:)'


class Filled(str):
    """Text that a ${VAR} went into: never shown again."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "***"


class Unset(Filled):
    """Text whose ${VAR} is not set, which has been said."""

    __slots__ = ()


def parse(text: str) -> Any:
    """Return the value of a JSON or JSON5 text. ValueError: says where it is wrong, or that json5 is not installed."""
    try:
        # The package json5 takes 15 us for a byte, so it gets only what is not nearly JSON.
        for rewrite in (False, True):
            try:
                return json.loads(re.sub(JSON5, _plain, text) if rewrite else text)
            except ValueError:
                continue
        import json5

        return json5.loads(text)
    except ImportError:
        said = "is not plain JSON: pip install json5, or write plain JSON"
    except RecursionError:
        said = "is nested too deep"
    except ValueError as error:
        said = re.sub(r"^<string>:(\d+) (.*) at column (\d+)$", r"line \1, column \3: \2", str(error), flags=re.DOTALL)
    raise ValueError(said)


def _plain(match: re.Match[str]) -> str:
    return match[1] or (f'"{match[2]}"' if match[2] else " ")


def embedded(raw: Mapping[str, Any], agents: Iterable[str]) -> dict[str, Any]:
    """Return another program's dict with these agents listed, and with sessions in memory where it does not say."""
    tree = {"session": {}, "agents": {}, **raw}  # a section that is wrong stays as it is, for `build` to say
    if isinstance(tree["session"], Mapping):
        tree["session"] = {"store": MEMORY, **tree["session"]}
    if isinstance(tree["agents"], Mapping) and isinstance(listed := tree["agents"].get("list", []), (list, tuple)):
        known = {str(entry.get("id")).lower() for entry in listed if isinstance(entry, Mapping)}
        missing = ({"id": agent} for agent in agents if agent.lower() not in known)
        tree["agents"] = {**tree["agents"], "list": [*listed, *missing]}
    return tree


def mask(value: Any, key: str = "") -> Any:
    """Return the tree for showing: what is not set left out, every secret and all that a ${VAR} filled as "***"."""
    if value and (key in SECRETS or isinstance(value, Filled)):
        return "***"
    if isinstance(value, dict):
        shown = {name: "***" if key in SECRET_MAPS else mask(item, name) for name, item in value.items()}
        return {name: item for name, item in shown.items() if item is not None}
    return [mask(item) for item in value] if isinstance(value, (list, tuple)) else value


def written(value: Any, key: str = "", path: str = "") -> str:
    """Return the path of the first secret that the tree holds itself, and no ${VAR} filled; "" for none."""
    if isinstance(value, str):
        return path if value and key in SECRETS and not isinstance(value, Filled) else ""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    kind = SECRETS[0] if key in SECRET_MAPS else None  # any of its values may be one
    for name, item in pairs:
        at = f"{path}[{name}]" if isinstance(name, int) else _join(path, name)
        if found := written(item, kind or str(name), at):
            return found
    return ""


class Settings:
    """One reading: what it has to go by, and what it has found. It raises nothing; what is wrong is in `problems`."""

    def __init__(self, environ: Mapping[str, str], prefixes: list[str]) -> None:
        self.environ, self.prefixes = environ, prefixes  # of its variables, a brand each
        self.folder = "/"  # relative paths start here
        self.file: str | None = None  # that was read; absolute
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.ignored: list[str] = []  # paths of keys that are not in the table
        self.variables: set[str] = set()  # the names in every ${VAR}
        try:
            self.folder = os.getcwd()
        except OSError:
            self.problems.append("the current folder is gone: change to one that is there (cd)")

    def read(self, path: str | None, overrides: Sequence[tuple[str, str]] = ()) -> Any:
        """Return the tree of this file (None: the one that `find` finds, else {}) as `take` does; None: a problem."""
        if path is None:
            path = self.find()
        if self.problems:
            return None
        if path is None:
            return self.take({}, overrides)
        self.file = os.path.abspath(path)
        self.folder = os.path.dirname(self.file)
        try:
            raw = parse(_read(path))
        except ValueError as error:
            self.problems.append(f"{path}: {error}")
            return None
        return self.take(raw, overrides)

    def find(self) -> str | None:
        """Return the path of <PREFIX>_CONFIG_PATH, ./copepod.json5 or ~/.copepod/copepod.json5, else None."""
        if named := self.variable("CONFIG_PATH")[1]:
            return self.path(named)
        if _trusted(LOCAL_FILE):
            return self.path(LOCAL_FILE)
        if os.path.lexists(LOCAL_FILE):
            self.warnings.append(f"./{LOCAL_FILE} is not read, as others may write it: name it with --config")
        home = self.path(HOME_FILE)
        return home if os.path.lexists(home) else None

    def vacant(self, path: str | None) -> str:
        """Return where a first file goes, by default where `find` looks for it; one that is there is a problem."""
        place = self.path(path or self.find() or HOME_FILE)
        if os.path.lexists(place):
            self.problems.append(f"{place} is there, and left as it is: change it, or name another with --config")
        return place

    def take(self, raw: Any, overrides: Sequence[tuple[str, str]] = ()) -> Any:
        """Return a copy of the tree with the overrides (path, text) in it and each ${VAR} filled; None: a problem."""
        try:
            for where, text in overrides:
                raw = self._override(raw, where, text)
            return self._fill(raw, "")
        except RecursionError:
            self.problems.append("the configuration: is nested too deep")
            return None

    def path(self, text: str, folder: str = "") -> str:
        """Return an absolute path: "~" is HOME, a relative one starts at `folder`, by default the file's."""
        if text == "~" or text.startswith("~/"):
            text = (self.environ.get("HOME") or os.path.expanduser("~")) + text[1:]
        return os.path.normpath(os.path.join(folder or self.folder, text))

    def argument(self, text: str) -> str:
        """Return the path of a file that is there as an absolute one, any other text as it is.

        A plain word ("run") is no path, even where a file is called so.
        """
        if ("/" in text or "." in text) and not text.startswith("-") and os.path.isfile(self.path(text)):
            return self.path(text)
        return text

    def variable(self, suffix: str) -> tuple[str, str]:
        """Return name and value of the <PREFIX>_<suffix> that is set, or "" and ""; it is a problem if two differ."""
        names = dict.fromkeys(f"{prefix}_{suffix}" for prefix in self.prefixes)
        given = {name: value for name in names if (value := self.environ.get(name, "").strip())}
        if len(set(given.values())) > 1:
            self.problems.append(f"{' and '.join(given)}: set to different values: unset all but one")
        return next(iter(given.items()), ("", ""))

    def check(self, value: Any, table: Any, path: str = "") -> Any:
        """Return the value with the table's defaults filled in, and those in the place of what is wrong.

        The table mirrors the tree: a dict is an object, [x] a list of x, {"*": x} any names of x, and what is neither
        is a rule: `wants` completes "must be ...", `fits(value)` decides, `choices` are words to suggest, `secret`
        values are not quoted, and `default` is ... where the key has to be there. None in a dict is a key that is
        ignored, though it looks like one of the others.
        """
        if isinstance(table, dict):
            return self._check_object(value, table, path)
        if not isinstance(table, list):
            return self._check_rule(value, table, path)
        if not isinstance(value, list):
            text = isinstance(value, str) and isinstance(table[0], dict)  # it may be a secret, as below
            self.problems.append(f"{path}: must be a list, not {_kind(value) if text else _said(value)}")
            return []
        items = [self.check(item, table[0], f"{path}[{index}]") for index, item in enumerate(value)]
        return [item for item in items if item is not None]

    @staticmethod
    def near(word: str, words: Iterable[str]) -> str:
        """Return a question whether another of the words was meant, "" when none is near."""
        import difflib

        lower = {known.lower(): known for known in words}
        close = difflib.get_close_matches(word.lower(), lower, 1, NEAR)
        return f'. Did you mean "{lower[close[0]]}"?' if close else ""

    def _override(self, raw: Any, where: str, text: str) -> Any:
        try:
            return _put(raw, re.sub(r"\[(\d+)\]", r".\1", where).split("."), _value(text))
        except LookupError as error:
            self.problems.append(f"--set {where}: there is no {error} to set there")
        except ValueError as error:
            self.problems.append(f"--set {where}: {error}")
        return raw

    def _fill(self, value: Any, path: str) -> Any:
        if isinstance(value, str) and (found := VARIABLE.findall(value)):
            names = {name for escaped, name in found if not escaped}
            # One that is empty counts as unset, since an empty secret is none.
            unset = sorted(name for name in names if not self.environ.get(name))
            said = "set it in the environment, or write $${} for the text itself"
            self.problems += [f"{path}: ${{{name}}} is not set: {said}" for name in unset]
            self.variables |= names
            text = VARIABLE.sub(lambda match: match[0][1:] if match[1] else self.environ.get(match[2], ""), value)
            return Unset(text) if unset else Filled(text)
        if isinstance(value, Mapping):
            return {str(key): self._fill(item, _join(path, key)) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._fill(item, f"{path}[{index}]") for index, item in enumerate(value)]
        return value

    def _check_rule(self, value: Any, rule: Any, path: str) -> Any:
        if rule.fits(value):
            return value
        if not isinstance(value, Unset):
            hint = self.near(value, rule.choices) if isinstance(value, str) else ""
            said = _kind(value) if rule.secret or isinstance(value, Filled) else _said(value)
            self.problems.append(f"{path}: must be {rule.wants}, not {said}{hint}")
        return "" if rule.default is ... else rule.default

    def _check_object(self, value: Any, table: dict[str, Any], path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            said = "this text" if isinstance(value, str) else _said(value)  # it may be a secret, one level too high
            self.problems.append(f"{path or 'the configuration'}: must be an object, not {said}")
            return Settings({}, [])._check_object({}, table, path)
        if "*" in table:
            return {name: self.check(item, table["*"], _join(path, name)) for name, item in value.items()}
        ours = [key for key in table if table[key] is not None]
        for key in value:
            if key not in ours:
                hint = "" if key in table else self.near(key, ours)
                (self.problems if hint else self.ignored).append(_join(path, key) + (hint and f": unknown key{hint}"))
        return {
            key: self.check(value[key], table[key], _join(path, key))
            if key in value
            else self._missing(table[key], _join(path, key))
            for key in ours
        }

    def _missing(self, table: Any, path: str) -> Any:
        if isinstance(table, (dict, list)):
            return self.check(type(table)(), table, path)
        if table.default is ...:
            self.problems.append(f"{path}: is missing: it must be {table.wants}")
            return ""
        return table.default


def _trusted(path: str) -> bool:
    """Whether the file here is this user's or root's, and only theirs to write: others must not choose what we run."""
    try:
        link, file = os.lstat(path), os.stat(path)
    except OSError:
        return False
    return {link.st_uid, file.st_uid} <= {0, os.getuid()} and not file.st_mode & 0o002


def _read(path: str) -> str:
    """Return the text of a file. ValueError: says why it cannot be had."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"is over {MAX_FILE_BYTES} bytes: is it a configuration?")
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (at byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}{WHAT_TO_DO.get(type(error), '')}") from None


def _value(text: str) -> Any:
    """Return what `--set PATH=` means by this text: JSON, JSON5 where it begins like a value of it, else the text."""
    if text.startswith(("{", "[", "'")):
        return parse(text)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _put(node: Any, keys: list[str], value: Any) -> Any:
    """Return a copy of the tree with this value there. LookupError: its text is the key that cannot be."""
    if not keys:
        return value
    key, rest = keys[0], keys[1:]
    if node is None:
        node = [] if key == "0" else {}
    if isinstance(node, Mapping) and key:
        return {**node, key: _put(node.get(key), rest, value)}
    if not isinstance(node, (list, tuple)) or not key.isdecimal() or int(key) > len(node):
        raise LookupError(key)
    index = int(key)
    return [*node[:index], _put(node[index] if index < len(node) else None, rest, value), *node[index + 1 :]]


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _kind(value: object) -> str:
    kinds = {"bool": "true or false", "int": "a number", "float": "a number", "dict": "an object", "list": "a list"}
    return "null" if value is None else kinds.get(type(value).__name__, "this text")


def _said(value: object) -> str:
    """How a message quotes the value: short, and as it stands in the file."""
    if isinstance(value, (dict, list, Filled)):  # what a variable filled may be a secret
        return _kind(value)
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + '..."'
