"""May this caller in? Secret, failures per client, proxies, Origin, Host (RFC 6454 7, RFC 6750 2.1, RFC 9110 7.2)."""

from __future__ import annotations

import math
import os
import re
import socket
import time
from _operator import _compare_digest  # what hmac.compare_digest is; hmac itself imports hashlib and OpenSSL with it
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import hashlib
    from ipaddress import IPv4Network, IPv6Network

    class Reading(Protocol):
        """Where it is noted what is wrong with a configuration."""

        problems: list[str]
        warnings: list[str]

        def near(self, word: str, words: Iterable[str]) -> str: ...


MAX_CLIENTS = 10_000  # remembered clients, some 3 MiB when full; nginx's limit_req_zone holds 8,000 to 16,000 per MB
FORWARDING = frozenset({"forwarded", "via", "x-real-ip"})  # and every x-forwarded-*
PORTS = {"http": 80, "https": 443}
CHAT, READ, WRITE, ADMIN = "chat", "operator.read", "operator.write", "operator.admin"
SCOPES = (CHAT, READ, WRITE)  # that a named token may have
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, an IPv4 address in IPv6 (RFC 4291 2.5.5.2)

# uri-host [ ":" port ], RFC 9110 7.2; uri-host = IP-literal / IPv4address / reg-name, RFC 3986 3.2.2
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#@\s,]+)(?::([0-9]{0,5}))?")


class Caller(NamedTuple):
    """Who was let in, and what it may. Without a name: who has the shared secret or, in mode none, anyone."""

    name: str
    scopes: frozenset[str]
    agents: frozenset[str] | None = None  # their ids; None: all
    expires: float | None = None  # seconds since the epoch
    per_minute: int | None = None  # runs that it may ask for; None: any number
    digest: bytes = b""  # of its credential

    def __repr__(self) -> str:
        return f"Caller({self.name!r})"

    def may_chat(self) -> bool:
        """Whether it may ask for runs at all."""
        return not self.scopes.isdisjoint((CHAT, WRITE, ADMIN))

    def may_read(self) -> bool:
        """Whether it may read what is told of the whole gateway."""
        return not self.scopes.isdisjoint((READ, WRITE, ADMIN))

    def same_as(self, other: Caller | None) -> bool:
        """Whether the other has the same credential and rights; how long and how often is left out."""
        if other is None:
            return False
        rights = (self.name, self.scopes, self.agents, self.digest)
        return rights == (other.name, other.scopes, other.agents, other.digest)


ANYONE = Caller("", frozenset({ADMIN}))  # where no credential is asked for


class Verdict(NamedTuple):
    """Who is let in; `retry_after` is whole seconds, 0 unless the client is locked out."""

    retry_after: int
    missing: bool
    caller: Caller | None = None  # None: nobody
    expired: str = ""  # when it could still have been, as RFC 3339 writes it


@lru_cache(64)  # clients repeat themselves; found by a hash that no stranger can aim at
def digest(secret: str) -> bytes:
    """The SHA-256 of the secret's UTF-8 bytes."""
    # surrogatepass: a lone surrogate (from JSON or a strange environment) is a wrong secret and not a crash
    return _sha256()(secret.encode("utf-8", "surrogatepass")).digest()


same = _compare_digest  # of two digests, in a time that does not tell where or by how much they differ


@lru_cache(1)
def _sha256() -> Callable[[bytes], hashlib._Hash]:
    from hashlib import sha256  # here: a gateway of mode none never needs it

    return sha256


def new_token() -> str:
    """Return a fresh token: 256 random bits (RFC 4648 5), behind a word that is no flag and that scanners can find."""
    from base64 import urlsafe_b64encode

    return "copepod_" + urlsafe_b64encode(os.urandom(32)).decode("ascii").rstrip("=")


def moment(text: str) -> float:
    """Return the seconds since the epoch of a date or a date and time of ISO 8601, UTC where it does not say.

    ValueError: it is neither.
    """
    from datetime import UTC, datetime

    parsed = datetime.fromisoformat(text)
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()


def callers(
    entries: Sequence[Mapping[str, Any]], secret: str, agents: Collection[str], reading: Reading
) -> tuple[Caller, ...]:
    """Return those whom the entries of `gateway.auth.tokens`, of the right types, let in beside the shared `secret`.

    What is wrong with an entry is noted with its path in `reading.problems`.
    """
    found: list[Caller] = []
    owners = {digest(secret): "the shared one"} if secret else {}
    for n, entry in enumerate(entries):
        at, name, token, sha256 = f"gateway.auth.tokens[{n}]", entry["name"], entry["token"], entry["tokenSha256"]
        wrong = _wrong_with(entry, agents, reading.near)
        if any(name == other.name for other in found):
            wrong.append(f'.name: "{name}" is there already: give each token its own')
        if bool(token) is bool(sha256) and not any(problem.startswith(at) for problem in reading.problems):
            wrong.append(": must have a token or a tokenSha256, and not both")
        number = bytes.fromhex(sha256) if sha256 else digest(token or "")
        if (token or sha256) and owners.setdefault(number, f"that of {name}") != f"that of {name}":
            wrong.append(f": its secret is also {owners[number]}: give each its own")
        reading.problems += [at + problem for problem in wrong]
        if wrong:
            continue
        scopes, allowed = frozenset(entry["scopes"] or (CHAT,)), entry["agents"]
        ids = None if allowed is None else frozenset(agent.lower() for agent in allowed)
        until = None if entry["expires"] is None else moment(entry["expires"])
        if until is not None and until <= time.time():
            reading.warnings.append(f'{at}: "{name}" has expired, and lets nobody in')
        found.append(Caller(name, scopes, ids, until, entry["rateLimit"]["requestsPerMinute"], number))
    return tuple(found)


def _wrong_with(
    entry: Mapping[str, Any], agents: Collection[str], near: Callable[[str, Iterable[str]], str]
) -> list[str]:
    """What is wrong with the agents, the scopes and the date of an entry."""
    wrong = []
    for n, agent in enumerate(entry["agents"] or ()):
        if agent.lower() not in agents:
            wrong.append(f'.agents[{n}]: there is no agent "{agent}"{near(agent, agents)}')
    for n, scope in enumerate(entry["scopes"] or ()):
        if scope == ADMIN:
            wrong.append(f'.scopes[{n}]: "{ADMIN}" is for the shared secret alone')
        elif scope not in SCOPES:
            said = 'must be "chat", "operator.read" or "operator.write"'
            wrong.append(f'.scopes[{n}]: {said}, not "{scope}"{near(scope, SCOPES)}')
    try:
        if entry["expires"] is not None:
            moment(entry["expires"])
    except ValueError:
        wrong.append(f'.expires: must be a date such as "2027-01-01", or a date and time, not "{entry["expires"]}"')
    return wrong


def bearer(authorization: str | None) -> str | None:
    """The credential of `Authorization: Bearer <credential>`, None if there is none; a password may have spaces.

    The field's bytes came decoded as Latin-1: they are UTF-8 if they can be.
    """
    if authorization is None:
        return None
    scheme, _, rest = authorization.partition(" ")
    credential = rest.strip(" \t")  # not split(): U+00A0 and U+0085 are white space to str and halves of UTF-8 here
    if scheme.lower() != "bearer" or not credential:
        return None
    if not credential.isascii():
        with suppress(UnicodeError):
            return credential.encode("latin-1").decode("utf-8")
    return credential


def _packed(address: str) -> bytes | None:
    """The 4 or 16 bytes of an address, 4 for an IPv4-mapped one; None if it cannot be read."""
    # inet_pton: a fifth of ipaddress's time, and nothing to import at start
    try:
        if ":" not in address:
            return socket.inet_pton(socket.AF_INET, address)
        packed = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])  # without the zone, RFC 4007 11
    except (OSError, ValueError):
        return None
    return packed[12:] if packed.startswith(_MAPPED) else packed


def _text(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)


def _split(authority: str) -> tuple[str, str] | None:
    """Host (lower case, an IPv6 literal in its brackets) and port ("" when none); None if it is neither."""
    match = _AUTHORITY.fullmatch(authority)
    return (match[1].lower(), match[2] or "") if match else None


def networks(entries: Iterable[str]) -> tuple[IPv4Network | IPv6Network, ...]:
    """The addresses and CIDR blocks, parsed once; ValueError names the entry that is neither."""
    parsed: list[IPv4Network | IPv6Network] = []
    for entry in entries:
        from ipaddress import ip_network  # here: most gateways have no proxy before them

        try:
            network = ip_network(entry.strip(), strict=False)
        except ValueError:
            raise ValueError(f"{entry!r} is neither an IP address nor a CIDR block") from None
        if network.version == 6 and network.prefixlen >= 96 and network.network_address.packed.startswith(_MAPPED):
            network = ip_network((network.network_address.packed[12:], network.prefixlen - 96))
        parsed.append(network)
    return tuple(parsed)


def _within(packed: bytes, trusted: Collection[IPv4Network | IPv6Network]) -> bool:
    if not trusted:
        return False
    from ipaddress import ip_address

    address = ip_address(packed)
    return any(address in network for network in trusted)


@lru_cache(256)  # a client has many connections
def shortest(address: str) -> str:
    """An address in its shortest form, an IPv4-mapped one as its IPv4; what is no address as it is."""
    packed = _packed(address)
    return address if packed is None else _text(packed)


def client_address(peer: str, forwarded_for: str | None, trusted: Collection[IPv4Network | IPv6Network]) -> str:
    """The client's address in its shortest form: the peer, or behind trusted proxies the nearest one that is not ours.

    X-Forwarded-For is read right to left, each proxy having added what it saw; what stands left of an entry that
    cannot be read, or of one that is not trusted, is a stranger's word.
    """
    if forwarded_for is None or not trusted:
        return shortest(peer)
    client = _packed(peer)
    if client is None or not _within(client, trusted):
        return shortest(peer)
    for entry in reversed(forwarded_for.split(",")):
        entry = entry.strip(" \t")
        split = _split(entry)  # None for a bare IPv6 address, whose colons are no port
        hop = _packed(split[0].strip("[]") if split else entry)
        if hop is None:
            break
        client = hop
        if not _within(client, trusted):
            break
    return _text(client)


def limiter_key(address: str) -> str:
    """What failures are counted under: an IPv4 address whole, an IPv6 one by its /64, which is what one host gets."""
    packed = _packed(address)
    if packed is None:
        return address
    return _text(packed) if len(packed) == 4 else _text(packed[:8] + bytes(8)) + "/64"


def is_loopback(address: str) -> bool:
    """Whether it is an address of this machine alone: 127.0.0.0/8, ::1, or such an IPv4 address mapped into IPv6."""
    packed = _packed(address)
    return packed is not None and (packed[0] == 127 if len(packed) == 4 else packed == bytes(15) + b"\x01")


def has_forwarding(fields: Mapping[str, str]) -> str | None:
    """The name of the first field that a proxy adds, be it empty; None if there is none. Names are lower-case."""
    for name in fields:
        if name in FORWARDING or name.startswith("x-forwarded"):
            return name
    return None


def check_origin(origin: str, host: str, secure: bool, allowed: Collection[str]) -> bool:
    """Whether a page of `origin` may call: it is this host (Host field, default ports filled in) or one of `allowed`.

    `null` and `*` never match: the first is every sandboxed page, the second everyone.
    """
    if origin in ("null", "*"):
        return False
    if origin in allowed:
        return True
    scheme, _, authority = origin.partition("://")
    theirs, ours = _split(authority), _split(host)
    if scheme.lower() not in PORTS or theirs is None or ours is None:
        return False
    their_port = int(theirs[1] or PORTS[scheme.lower()])
    our_port = int(ours[1] or PORTS["https" if secure else "http"])
    return (theirs[0], their_port) == (ours[0], our_port)


def check_host(host: str, allowed: Collection[str]) -> bool:
    """Whether a Host field names this machine: localhost, a loopback literal, or one of `allowed`.

    An allowed name with a port is that port's, one without is every port's.
    """
    split = _split(host)
    if split is None:
        return False
    name, port = split
    # "localhost." is the same name written absolutely, and reserved (RFC 6761 6.3): no stranger's DNS can answer for it
    if name in ("localhost", "localhost.") or is_loopback(name.strip("[]")):
        return True
    for entry in allowed:
        bare_ipv6 = entry.count(":") > 1 and not entry.startswith("[")
        theirs = _split(f"[{entry}]" if bare_ipv6 else entry)
        if theirs is not None and theirs[0] == name and theirs[1] in ("", port):
            return True
    return False


def stranger(peer: str, fields: Mapping[str, str], host: str, allowed: Collection[str]) -> str:
    """Why a request that needs no credentials is not this machine's own, "" when it is; DNS rebinding ends here."""
    if not is_loopback(peer):
        return "Without auth, only this machine may call."
    if name := has_forwarding(fields):
        return f"Without auth, a request with the field `{name}` is refused: it came through a proxy."
    if not check_host(host, allowed):
        return "The Host field does not name this machine (see gateway.http.allowedHosts)."
    return ""


class Limiter:
    """Failures per client in a sliding window, then a lockout; its memory is bounded by MAX_CLIENTS."""

    def __init__(
        self, max_attempts: int, window_ms: int, lockout_ms: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_attempts = max_attempts
        self._window = window_ms / 1000
        self._lockout = lockout_ms / 1000
        self._clock = clock
        # Both in order of the last failure, so that the first is the one to forget. A plain dict would do but for
        # its front: taking the first key again and again walks over all the holes before it.
        self.failing: OrderedDict[str, list[float]] = OrderedDict()
        self.locked: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """The number of clients that it remembers."""
        return len(self.failing) + len(self.locked)

    def retry_after(self, key: str) -> int:
        """Whole seconds until the client may try again, 0 when it is not locked out."""
        until = self.locked.get(key)
        if until is None:
            return 0
        left = until - self._clock()
        if left > 0:
            return math.ceil(left)
        del self.locked[key]
        return 0

    def failed(self, key: str) -> None:
        """Count one failure; the `max_attempts`-th within the window locks the client out."""
        if self.retry_after(key):
            return
        now = self._clock()
        recent = [moment for moment in self.failing.pop(key, ()) if moment > now - self._window]
        recent.append(now)
        self._make_room(now)
        if len(recent) < self._max_attempts:
            self.failing[key] = recent
        else:
            self.locked[key] = now + self._lockout

    def cleared(self, key: str) -> None:
        """Forget the client's failures."""
        self.failing.pop(key, None)

    def _make_room(self, now: float) -> None:
        while self.locked and next(iter(self.locked.values())) <= now:
            self.locked.popitem(last=False)
        if len(self.failing) + len(self.locked) >= MAX_CLIENTS:
            (self.failing or self.locked).popitem(last=False)


class Gate:
    """One judgement for HTTP and WebSocket alike; every check counts at once, so that parallel guesses are all seen."""

    def __init__(
        self,
        mode: str,
        secret: str,
        *,
        named: Sequence[Caller] = (),
        max_attempts: int = 10,
        window_ms: int = 60_000,
        lockout_ms: int = 300_000,
        exempt_loopback: bool = True,
        trusted: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        if mode not in ("none", "token", "password"):
            raise ValueError(f"unknown auth mode {mode!r}")
        if mode != "none" and not secret and not (named and mode == "token"):
            raise ValueError(f"auth mode {mode} without a {mode}")
        self.mode = mode
        self._expected = digest(secret) if secret and mode != "none" else b""
        shared = Caller("", frozenset({ADMIN}), digest=self._expected)
        self._admitted = Verdict(0, False, shared)  # of the shared secret
        self.named = {caller.digest: caller for caller in named}
        self._limiter = Limiter(max_attempts, window_ms, lockout_ms, clock)
        self._exempt_loopback = exempt_loopback
        self._trusted = networks(trusted)
        self._clock, self._wall = clock, wall
        self._full_at: dict[bytes, float] = {}  # when a named token's allowance is whole again, by its digest

    def __repr__(self) -> str:
        return f"Gate(mode={self.mode!r})"

    def client(self, peer: str, forwarded_for: str | None) -> str:
        """The client's address, as the trusted proxies tell it."""
        return client_address(peer, forwarded_for, self._trusted)

    def admit(self, given: str | None, client: str, fields: Mapping[str, str]) -> Verdict:
        """Judge a credential (None or empty: missing, which is no failure) of a client resolved by `client()`.

        A request whose `fields` have a forwarding one is not exempt as loopback. In mode none everyone is let in; that
        mode's own rules are those of `stranger`.
        """
        if self.mode == "none":
            return self._admitted
        known = digest(given) if given else b""
        limiter = self._limiter
        if same(known, self._expected) and known and not limiter.failing and not limiter.locked:
            return self._admitted  # nobody has failed of late, so there is nothing to look up and nothing to clear
        exempt = self._exempt_loopback and is_loopback(client) and has_forwarding(fields) is None
        key = "" if exempt else limiter_key(client)
        left = 0 if exempt else limiter.retry_after(key)
        if left or not given:
            return Verdict(left, not given)
        if same(known, self._expected):
            limiter.cleared(key)
            return self._admitted
        caller = self.named.get(known)
        if caller is not None and same(known, caller.digest):  # clears nothing: a friend may be a guesser too
            if not self._over(caller):
                return Verdict(0, False, caller)
            return Verdict(0, False, expired=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(caller.expires)))
        if not exempt:
            limiter.failed(key)
        return Verdict(0, False)

    def now(self, caller: Caller) -> Caller | None:
        """Return the one whom the caller's credential lets in, None if it lets nobody in (any more)."""
        shared = self._admitted.caller
        if not caller.name and shared is not None and (self.mode == "none" or self._expected):
            return shared if same(shared.digest, caller.digest) else None
        current = self.named.get(caller.digest)
        return None if current is None or self._over(current) else current

    def _over(self, caller: Caller) -> bool:
        return caller.expires is not None and caller.expires <= self._wall()

    def spend(self, caller: Caller) -> int:
        """Take one run off the caller's allowance. Returns 0, or whole seconds until it has one again.

        `per_minute` of them may come at once; one comes back every 60 / `per_minute` seconds.
        """
        if caller.per_minute is None:
            return 0
        now, each = self._clock(), 60 / caller.per_minute
        full_at = max(now, self._full_at.get(caller.digest, now)) + each
        if full_at - now > 60.000001:  # the sums of `each` are not exact
            return math.ceil(full_at - now - 60)
        self._full_at[caller.digest] = full_at
        return 0

    def follow(self, old: Gate) -> None:
        """Go on with the allowances of those who were let in before."""
        self._full_at = {number: at for number, at in old._full_at.items() if number in self.named}
