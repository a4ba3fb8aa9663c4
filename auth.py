"""May this caller in? Secret, failures per client, proxies, Origin, Host (RFC 6454 7, RFC 6750 2.1, RFC 9110 7.2)."""

from __future__ import annotations

import math
import re
import socket
import time
from _operator import _compare_digest  # what hmac.compare_digest is; hmac itself imports hashlib and OpenSSL with it
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import hashlib
    from ipaddress import IPv4Network, IPv6Network

MAX_CLIENTS = 10_000  # remembered clients, some 3 MiB when full; nginx's limit_req_zone holds 8,000 to 16,000 per MB
FORWARDING = frozenset({"forwarded", "via", "x-real-ip"})  # and every x-forwarded-*
PORTS = {"http": 80, "https": 443}
_MAPPED = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96, an IPv4 address in IPv6 (RFC 4291 2.5.5.2)

# uri-host [ ":" port ], RFC 9110 7.2; uri-host = IP-literal / IPv4address / reg-name, RFC 3986 3.2.2
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:/?#@\s,]+)(?::([0-9]{0,5}))?")


class Verdict(NamedTuple):
    """Whether the caller is let in; `retry_after` is whole seconds, 0 unless the client is locked out."""

    ok: bool
    retry_after: int
    missing: bool


ADMITTED = Verdict(True, 0, False)


@lru_cache(64)  # clients repeat themselves; found by a hash that no stranger can aim at
def digest(secret: str) -> bytes:
    """The SHA-256 of the secret's UTF-8 bytes."""
    # surrogatepass: a lone surrogate (from JSON or a strange environment) is a wrong secret and not a crash
    return _sha256()(secret.encode("utf-8", "surrogatepass")).digest()


@lru_cache(1)
def _sha256() -> Callable[[bytes], hashlib._Hash]:
    from hashlib import sha256  # here: a gateway of mode none never needs it

    return sha256


def same(given: str, expected_digest: bytes) -> bool:
    """Whether `given` is the secret. The time does not depend on where or by how much the two differ."""
    return _compare_digest(digest(given), expected_digest)


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
        self._failing: OrderedDict[str, list[float]] = OrderedDict()
        self._locked: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        """The number of clients that it remembers."""
        return len(self._failing) + len(self._locked)

    def retry_after(self, key: str) -> int:
        """Whole seconds until the client may try again, 0 when it is not locked out."""
        until = self._locked.get(key)
        if until is None:
            return 0
        left = until - self._clock()
        if left > 0:
            return math.ceil(left)
        del self._locked[key]
        return 0

    def failed(self, key: str) -> None:
        """Count one failure; the `max_attempts`-th within the window locks the client out."""
        if self.retry_after(key):
            return
        now = self._clock()
        recent = [moment for moment in self._failing.pop(key, ()) if moment > now - self._window]
        recent.append(now)
        self._make_room(now)
        if len(recent) < self._max_attempts:
            self._failing[key] = recent
        else:
            self._locked[key] = now + self._lockout

    def cleared(self, key: str) -> None:
        """Forget the client's failures."""
        self._failing.pop(key, None)

    def _make_room(self, now: float) -> None:
        while self._locked and next(iter(self._locked.values())) <= now:
            self._locked.popitem(last=False)
        if len(self._failing) + len(self._locked) >= MAX_CLIENTS:
            (self._failing or self._locked).popitem(last=False)


class Gate:
    """One judgement for HTTP and WebSocket alike; every check counts at once, so that parallel guesses are all seen."""

    def __init__(
        self,
        mode: str,
        secret: str,
        *,
        max_attempts: int = 10,
        window_ms: int = 60_000,
        lockout_ms: int = 300_000,
        exempt_loopback: bool = True,
        trusted: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if mode not in ("none", "token", "password"):
            raise ValueError(f"unknown auth mode {mode!r}")
        if mode != "none" and not secret:
            raise ValueError(f"auth mode {mode} without a {mode}")
        self.mode = mode
        self._expected = digest(secret) if mode != "none" else b""  # the secret itself is not kept
        self._limiter = Limiter(max_attempts, window_ms, lockout_ms, clock)
        self._exempt_loopback = exempt_loopback
        self._trusted = networks(trusted)

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
            return ADMITTED
        if given and not self._limiter and same(given, self._expected):
            return ADMITTED  # nobody has failed of late, so there is nothing to look up and nothing to clear
        exempt = self._exempt_loopback and is_loopback(client) and has_forwarding(fields) is None
        key = "" if exempt else limiter_key(client)
        left = 0 if exempt else self._limiter.retry_after(key)
        if left or not given:
            return Verdict(False, left, not given)
        if same(given, self._expected):
            self._limiter.cleared(key)
            return ADMITTED
        if not exempt:
            self._limiter.failed(key)
        return Verdict(False, 0, False)
