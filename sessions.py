"""Transcripts in SQLite, one writer, nothing acknowledged is lost."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import time
from collections.abc import Callable, Collection
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

# _sqlite3 is what sqlite3 hands on; sqlite3 itself imports datetime for types that are not stored here, 2 ms and half a
# MiB. Of both, a gateway without stored sessions imports none.
if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from sqlite3 import Connection

Dict: TypeAlias = dict[str, Any]  # a JSON object
Dicts: TypeAlias = list[Dict]  # Store has a method named list
Result = TypeVar("Result")

MEMORY = ":memory:"
BUSY_SECONDS = 5.0  # another process (a backup, the sqlite3 shell) may hold the file; sqlite3's own default
CHECKED_BYTES = 64 * 1024 * 1024  # a file up to this is checked whole at the start: some 50 ms
MAX_TOKENS = 2**53 - 1  # the largest integer that every reader of JSON holds exactly (RFC 8259 6)
SCHEMA_VERSION = 1

# messages is clustered by session, so that a load reads neighbouring pages whatever else the file holds.
SCHEMA = f"""
BEGIN;
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    agent TEXT NOT NULL,
    key TEXT NOT NULL,
    session_id TEXT NOT NULL,
    updated_at INTEGER NOT NULL, -- milliseconds
    input_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    model TEXT NOT NULL DEFAULT '',
    extra TEXT NOT NULL DEFAULT '{{}}', -- what sessions.patch set, a JSON object
    UNIQUE (agent, key)
);
CREATE INDEX sessions_newest ON sessions (updated_at, id);
CREATE INDEX sessions_of_agent ON sessions (agent, updated_at, id);
CREATE INDEX sessions_by_id ON sessions (session_id);
CREATE TABLE messages (
    session INTEGER NOT NULL REFERENCES sessions (id),
    seq INTEGER NOT NULL,
    role TEXT NOT NULL,
    timestamp INTEGER NOT NULL, -- milliseconds
    json TEXT NOT NULL,
    PRIMARY KEY (session, seq)
) WITHOUT ROWID;
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""


class StoreError(Exception):
    """The store cannot be opened, read or written; the text says why, for the operator (it may name the file)."""


def _now() -> int:
    return time.time_ns() // 1_000_000


def _new_id() -> str:
    from uuid import uuid4

    return str(uuid4())


def _tokens(usage: dict[str, int], name: str) -> int:
    return max(0, min(usage.get(name, 0), MAX_TOKENS))


def _connect(target: str, *, uri: bool = False) -> Connection:
    import _sqlite3 as sqlite3

    # isolation_level=None: the module begins no transaction of its own, each one here is written out
    return sqlite3.connect(target, timeout=BUSY_SECONDS, isolation_level=None, uri=uri)


def _take_lock(path: str) -> int:
    """Take the lock file beside the store, for as long as the descriptor that comes back is open."""
    # Not the database itself: closing any descriptor of it would drop SQLite's own locks (POSIX).
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StoreError(
            f"{path} is in use by another gateway: stop that one, or give this one its own session.store"
        ) from None
    except OSError:
        os.close(lock)
        raise
    return lock


def _create(path: str) -> None:
    """Make an empty store, whole or not at all: a process killed half-way leaves no file of that name."""
    fresh = path + ".new"
    # A log without its database would be replayed into the new one.
    for leftover in (fresh, fresh + "-journal", fresh + "-wal", fresh + "-shm", path + "-wal", path + "-shm"):
        with suppress(FileNotFoundError):
            os.unlink(leftover)
    os.close(os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))  # SQLite gives its log the same mode
    with closing(_connect(fresh)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA)
    os.replace(fresh, path)


def _check(path: str) -> None:
    """Refuse a file that is no store of ours, or a damaged one. Read-only: what is refused stays as it is."""
    import _sqlite3 as sqlite3

    logged = os.path.exists(path + "-wal") and os.path.getsize(path + "-wal") > 0
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    try:
        with closing(_connect(f"file:{name}?mode=ro", uri=True)) as db:
            version: int = db.execute("PRAGMA user_version").fetchone()[0]
            if version == SCHEMA_VERSION and not _is_ours(db):
                version = 0
            size, page = os.path.getsize(path), db.execute("PRAGMA page_size").fetchone()[0]
            small = size <= CHECKED_BYTES
            found: str = db.execute("PRAGMA quick_check(1)").fetchone()[0] if small else "ok"
            if size % page and not logged:  # nor has the log the page: SQLite takes zeros for what is missing
                found = "its last page is cut"
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            raise
        found = str(error)
    if found != "ok":
        found = " ".join(found.split())  # SQLite tells it in several lines
        raise StoreError(
            f"{path} is damaged or no SQLite database ({found}); it was left as it is. "
            f"Move it away to start afresh, or try: sqlite3 FILE .recover"
        )
    if version > SCHEMA_VERSION:
        raise StoreError(
            f"{path} was written by a newer version (schema {version}, this one knows {SCHEMA_VERSION}): "
            f"upgrade, or set another session.store"
        )
    if version < 1:
        raise StoreError(f"{path} is another program's database: set another session.store")


def _is_ours(db: Connection) -> bool:
    """Whether the tables are those of SCHEMA; any program may have set the same number."""
    import _sqlite3 as sqlite3

    try:
        db.execute("SELECT id, agent, key, session_id, updated_at, extra FROM sessions LIMIT 0")
        db.execute("SELECT session, seq, role, timestamp, json FROM messages LIMIT 0")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # no such table, no such column
            raise
        return False
    return True


def _write(db: Connection, job: Callable[[Connection], Result]) -> Result:
    """Run `job` in one transaction: committed when this returns, undone when it raises."""
    db.execute("BEGIN IMMEDIATE")  # IMMEDIATE: waits for the write lock here and not half-way, where it would fail
    try:
        result = job(db)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite has undone it itself after some errors, such as a full disk
            db.execute("ROLLBACK")
        raise
    return result


def _find(db: Connection, agent: str, key: str) -> tuple[int, str] | None:
    """The session's row and session id."""
    row: tuple[int, str] | None = db.execute(
        "SELECT id, session_id FROM sessions WHERE agent = ? AND key = ?", (agent, key)
    ).fetchone()
    return row


def _newest(db: Connection, row: int, limit: int | None) -> list[tuple[int, Dict]]:
    """The newest `limit` messages with their timestamps, in the order of the conversation."""
    found = db.execute(
        "SELECT timestamp, json FROM messages WHERE session = ? ORDER BY seq DESC LIMIT ?",
        (row, -1 if limit is None else limit),
    ).fetchall()
    return [(timestamp, json.loads(text)) for timestamp, text in reversed(found)]


def _load(db: Connection, agent: str, key: str, limit: int) -> tuple[str, Dicts]:
    session = _find(db, agent, key)
    if session is None:
        return _new_id(), []
    messages = [message for _, message in _newest(db, session[0], limit)]
    start = 0
    while start < len(messages) and messages[start].get("role") in ("tool", "function"):
        start += 1  # results whose call was trimmed: every provider refuses such a conversation
    return session[1], messages[start:]


def _ensure(db: Connection, agent: str, key: str, session_id: str) -> tuple[int, str]:
    """The session's row and session id; made with the given one if there is none."""
    db.execute(
        "INSERT INTO sessions (agent, key, session_id, updated_at) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (agent, key, session_id, _now()),
    )
    row: tuple[int, str] = db.execute(
        "SELECT id, session_id FROM sessions WHERE agent = ? AND key = ?", (agent, key)
    ).fetchone()
    return row


def _append(db: Connection, row: int, model: str, tokens: tuple[int, int], texts: list[tuple[str, str]]) -> None:
    """Add (role, JSON) pairs to the session."""
    now = _now()
    db.execute(
        "UPDATE sessions SET updated_at = ?, input_tokens = input_tokens + ?, output_tokens = output_tokens + ?,"
        " model = coalesce(nullif(?, ''), model) WHERE id = ?",
        (now, *tokens, model, row),
    )
    last: int = db.execute("SELECT coalesce(max(seq), 0) FROM messages WHERE session = ?", (row,)).fetchone()[0]
    db.executemany(
        "INSERT INTO messages (session, seq, role, timestamp, json) VALUES (?, ?, ?, ?, ?)",
        ((row, seq, role, now, text) for seq, (role, text) in enumerate(texts, last + 1)),
    )


def _trim(db: Connection, row: int, limit: int) -> None:
    """Drop the oldest messages beyond `limit`, and with them what is left of a turn they cut."""
    # Two queries: SQLite looks for the least and the greatest at once by reading all of them.
    ends = [f"SELECT {end}(seq) FROM messages WHERE session = ?" for end in ("min", "max")]  # noqa: S608
    first, last = (db.execute(query, (row,)).fetchone()[0] for query in ends)
    if first is None or last - first < limit:  # the numbers have no gaps: only the oldest are ever deleted
        return
    kept = last - limit + 1
    turn = db.execute(
        "SELECT min(seq) FROM messages WHERE session = ? AND seq >= ? AND role = 'user'", (row, kept)
    ).fetchone()[0]
    # no user message among them: one turn is longer than the limit, and can only be cut
    db.execute("DELETE FROM messages WHERE session = ? AND seq < ?", (row, kept if turn is None else turn))


def _where(agents: Collection[str] | None, prefix: str) -> tuple[str, tuple[str, ...]]:
    """The condition, with its values, of being a session of these agents whose key begins so; each may be absent."""
    of = "1" if agents is None else f"agent IN ({', '.join('?' * len(agents))})"
    if not prefix:
        return of, tuple(agents or ())
    behind = prefix[:-1] + chr(ord(prefix[-1]) + 1)  # the first text behind all that begin so: an index can be used
    return f"{of} AND key >= ? AND key < ?", (*(agents or ()), prefix, behind)


def _list(
    db: Connection,
    limit: int | None,
    agents: Collection[str] | None,
    since: int,
    keep: Callable[[Dict], bool] | None,
    prefix: str,
) -> Dicts:
    listed: Dicts = []
    columns = "key, agent, updated_at, session_id, input_tokens, output_tokens, model, extra"
    of, values = _where(agents, prefix)
    at = "+updated_at" if prefix else "updated_at"  # +: not by its index, which is of everybody's; a friend has few
    query = f"SELECT {columns} FROM sessions WHERE {at} >= ? AND {of} ORDER BY {at} DESC, id DESC LIMIT ?"  # noqa: S608
    rows = db.execute(query, (since, *values, -1 if limit is None or keep is not None else limit))
    with closing(rows):  # a query left half-way would keep the log from being moved into the database
        for key, agent, updated_at, session_id, input_tokens, output_tokens, model, extra in rows:
            if len(listed) == limit:
                break
            entry: Dict = json.loads(extra)
            key = key[len(prefix) :]
            entry |= {"key": key, "agentId": agent, "kind": "direct", "updatedAt": updated_at, "sessionId": session_id}
            entry |= {"inputTokens": input_tokens, "outputTokens": output_tokens}
            entry |= {"totalTokens": input_tokens + output_tokens, "model": model}
            if keep is None or keep(entry):
                listed.append(entry)
    return listed


def _history(db: Connection, agent: str, key: str, limit: int | None) -> tuple[str | None, Dicts]:
    session = _find(db, agent, key)
    if session is None:
        return None, []
    return session[1], [
        {"role": message.get("role"), "content": message.get("content"), "timestamp": timestamp}
        for timestamp, message in _newest(db, session[0], limit)
    ]


def _delete(db: Connection, agent: str, key: str) -> bool:
    session = _find(db, agent, key)
    if session is None:
        return False
    db.execute("DELETE FROM messages WHERE session = ?", (session[0],))
    db.execute("DELETE FROM sessions WHERE id = ?", (session[0],))
    return True


def _reset(db: Connection, agent: str, key: str) -> str:
    fresh = _new_id()
    row, _ = _ensure(db, agent, key, fresh)
    db.execute("DELETE FROM messages WHERE session = ?", (row,))
    db.execute(
        "UPDATE sessions SET session_id = ?, updated_at = ?, input_tokens = 0, output_tokens = 0 WHERE id = ?",
        (fresh, _now(), row),
    )
    return fresh


def _patch(db: Connection, agent: str, key: str, fields: Dict) -> Dict:
    row, session_id = _ensure(db, agent, key, _new_id())
    extra: Dict = json.loads(db.execute("SELECT extra FROM sessions WHERE id = ?", (row,)).fetchone()[0])
    extra = {name: value for name, value in (extra | fields).items() if value is not None}
    now = _now()
    db.execute("UPDATE sessions SET extra = ?, updated_at = ? WHERE id = ?", (json.dumps(extra), now, row))
    return {**extra, "sessionId": session_id, "updatedAt": now}


class Store:
    """The transcripts of one gateway. Every method raises StoreError; after a failed one the store goes on working.

    The file is opened by the first method that needs it. One thread owns the connection and takes the calls in order,
    so the loop never waits for a disk and the writers never for each other.
    """

    def __init__(self, path: str, max_messages: int) -> None:
        self._path = path if path == MEMORY else os.path.realpath(os.path.expanduser(path))
        self._max_messages = max_messages
        self._pool: ThreadPoolExecutor | None = None
        self._db: Connection | None = None
        self._lock: int | None = None
        self._patience = BUSY_SECONDS  # how long the connection waits for another process's lock
        self._closed = False

    async def _run(self, job: Callable[[Connection], Result]) -> Result:
        if self._closed:
            raise StoreError("the session store is closed")
        if self._pool is None:
            from concurrent.futures import ThreadPoolExecutor

            self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sessions")
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._call, job)

    async def _change(self, job: Callable[[Connection], Result]) -> Result:
        return await self._run(lambda db: _write(db, job))

    def _call(self, job: Callable[[Connection], Result]) -> Result:
        import _sqlite3 as sqlite3

        try:
            result = job(self._db or self._opened())
            self._wait_for_locks(BUSY_SECONDS)
            return result
        except (OSError, sqlite3.Error, UnicodeError) as error:  # UnicodeError: a lone surrogate in an agent or a key
            doing, do = "used", ""
            if self._db is None:
                doing, do = f"opened at {self._path}", ": set session.store to a place that this user may write"
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            if code == sqlite3.SQLITE_BUSY:
                self._wait_for_locks(0.0)  # else all the others would wait as long, one after the other
            elif code == sqlite3.SQLITE_READONLY:
                self._shut()  # opened anew it may be written, once the file may
            raise StoreError(f"the session store cannot be {doing}: {error}{do}") from error

    def _wait_for_locks(self, seconds: float) -> None:
        if self._db is not None and self._patience != seconds:
            self._db.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
            self._patience = seconds

    def _opened(self) -> Connection:
        try:
            if self._path != MEMORY:
                if os.path.exists(self._path) and not os.path.isfile(self._path):  # /dev/null would become a file
                    raise StoreError(f'{self._path} is no file: name one as session.store, or "{MEMORY}" for none')
                os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
                self._lock = _take_lock(self._path)
                if not os.path.exists(self._path) or os.path.getsize(self._path) == 0:
                    _create(self._path)
                _check(self._path)
                for side in (self._path + "-wal", self._path + "-shm"):  # left by a time when the file was read-only
                    with suppress(OSError):
                        os.chmod(side, os.stat(self._path).st_mode & 0o777)
            self._db, self._patience = _connect(self._path), BUSY_SECONDS
            if self._path == MEMORY:
                self._db.executescript(SCHEMA)
            # NORMAL would survive kill -9 too, for the system holds what was written; FULL also survives a power cut,
            # for 0.4 ms a turn on an SSD. A turn takes a model seconds, and small hosts lose their power.
            self._db.execute("PRAGMA synchronous = FULL")
        except BaseException:
            self._shut()
            raise
        return self._db

    def _shut(self) -> None:
        """Close what is open. SQLite moves the log into the database, and removes it, as the last connection closes."""
        if self._db is not None:
            self._db.close()
            self._db = None
        if self._lock is not None:  # the lock file stays: who removed it could remove another's
            os.close(self._lock)
            self._lock = None

    async def open(self) -> None:
        """Open the file now, made (mode 0600, its folder 0700) if there is none, so that a start can fail early."""
        await self._run(lambda db: None)

    async def load(self, agent: str, key: str) -> tuple[str, Dicts]:
        """The session id (a fresh one if nothing is stored) and the newest messages, at most `max_messages`, in order.

        They never begin with a tool's result whose call is no longer there.
        """
        return await self._run(lambda db: _load(db, agent, key, self._max_messages))

    async def append(
        self, agent: str, key: str, session_id: str, messages: Dicts, *, model: str, usage: dict[str, int]
    ) -> None:
        """Store the messages of one turn, whole or not at all; they are on the disk when this returns.

        `session_id` is taken if the session is new, else it keeps its own. `usage` has OpenAI's names and is added up.
        """
        tokens = (_tokens(usage, "prompt_tokens"), _tokens(usage, "completion_tokens"))
        newest = messages[-self._max_messages - 1 :]  # one more than stay, so that `_trim` looks for a turn's beginning

        def job(db: Connection) -> None:
            row, _ = _ensure(db, agent, key, session_id)
            _append(db, row, model, tokens, [(str(message.get("role", "")), json.dumps(message)) for message in newest])
            _trim(db, row, self._max_messages)

        await self._change(job)

    async def list(
        self,
        limit: int | None = None,
        agents: Collection[str] | None = None,
        since: int = 0,
        keep: Callable[[Dict], bool] | None = None,
        prefix: str = "",
    ) -> Dicts:
        """The sessions (of these agents only), newest first: the fields of sessions.list and those of `patch`.

        Only those that have changed since `since` (ms), that `keep`, called in the store's thread, wants, and whose
        keys begin with `prefix`, which is taken off.
        """
        return await self._run(lambda db: _list(db, limit, agents, since, keep, prefix))

    async def counts(self, agents: Collection[str] | None = None, prefix: str = "") -> dict[str, int]:
        """The number of sessions (of these agents, with keys that begin so) of each agent that has one."""
        of, values = _where(agents, prefix)
        query = f"SELECT agent, count(*) FROM sessions WHERE {of} GROUP BY agent"  # noqa: S608
        return await self._run(lambda db: dict(db.execute(query, values)))

    async def find(self, session_id: str) -> tuple[str, str] | None:
        """The agent and the key of the session with this id, None if there is none."""
        query = "SELECT agent, key FROM sessions WHERE session_id = ?"
        return await self._run(lambda db: db.execute(query, (session_id,)).fetchone())

    async def history(self, agent: str, key: str, limit: int | None = None) -> tuple[str | None, Dicts]:
        """The session id (None if nothing is stored) and the newest `limit` messages, in order.

        Each has role, content and timestamp (milliseconds).
        """
        return await self._run(lambda db: _history(db, agent, key, limit))

    async def delete(self, agent: str, key: str) -> bool:
        """Remove the session; False if there was none."""
        return await self._change(lambda db: _delete(db, agent, key))

    async def reset(self, agent: str, key: str) -> str:
        """Empty the session, or make it; its new session id. What `patch` set stays."""
        return await self._change(lambda db: _reset(db, agent, key))

    async def patch(self, agent: str, key: str, fields: Dict) -> Dict:
        """Set fields of the session, made if there is none; None removes one. The fields now set, sessionId, updatedAt.

        Which names and values are welcome is the caller's to judge.
        """
        return await self._change(lambda db: _patch(db, agent, key, fields))

    async def close(self) -> None:
        """Finish what was asked for, then close the file; the store cannot be used again. Twice does no harm."""
        self._closed = True
        if self._pool is not None:
            pool, self._pool = self._pool, None
            await asyncio.get_running_loop().run_in_executor(pool, self._shut)
            pool.shutdown()


class Shelf:
    """The sessions of a store whose keys begin with `prefix`, under their keys without it, and of these agents alone.

    Its methods are those of Store that people look at their sessions with.
    """

    def __init__(self, store: Store, prefix: str, agents: Collection[str] | None) -> None:
        self._store, self._prefix, self._agents = store, prefix, agents

    def _among(self, agents: Collection[str] | None) -> Collection[str] | None:
        if self._agents is None:
            return agents
        return self._agents if agents is None else [agent for agent in agents if agent in self._agents]

    async def list(
        self,
        limit: int | None = None,
        agents: Collection[str] | None = None,
        since: int = 0,
        keep: Callable[[Dict], bool] | None = None,
    ) -> Dicts:
        return await self._store.list(limit, self._among(agents), since, keep, self._prefix)

    async def counts(self) -> dict[str, int]:
        return await self._store.counts(self._agents, self._prefix)

    async def find(self, session_id: str) -> tuple[str, str] | None:
        agent, key = await self._store.find(session_id) or ("", "")
        if not key.startswith(self._prefix) or (self._agents is not None and agent not in self._agents):
            return None
        return agent, key[len(self._prefix) :]

    async def history(self, agent: str, key: str, limit: int | None = None) -> tuple[str | None, Dicts]:
        return await self._store.history(agent, self._prefix + key, limit)

    async def delete(self, agent: str, key: str) -> bool:
        return await self._store.delete(agent, self._prefix + key)

    async def reset(self, agent: str, key: str) -> str:
        return await self._store.reset(agent, self._prefix + key)

    async def patch(self, agent: str, key: str, fields: Dict) -> Dict:
        return await self._store.patch(agent, self._prefix + key, fields)
