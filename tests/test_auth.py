"""The judgements of auth: tables of fields and addresses, and a clock that the tests turn."""

from __future__ import annotations

import asyncio
import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import auth

SECRET = "s3cret"  # noqa: S105


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def as_field(text: str, encoding: str = "utf-8") -> str:
    """What arrives: the bytes of a field, decoded as Latin-1."""
    return text.encode(encoding).decode("latin-1")


@pytest.mark.parametrize(
    ("given", "secret", "expected"),
    [
        ("s3cret", "s3cret", True),
        ("s3cret ", "s3cret", False),
        ("S3cret", "s3cret", False),
        ("", "s3cret", False),
        ("s3cre", "s3cret", False),
        ("密码", "密码", True),
        ("é", "é", True),
        ("Ã©", "é", False),  # from JSON, where it never was bytes of a field
        ("\xc2\x80", "\xc2\x80", True),
        ("\ud800", "s3cret", False),
        ("\ud800", "\ud800", True),
    ],
)
def test_same(given: str, secret: str, expected: bool) -> None:
    assert auth.same(auth.digest(given), auth.digest(secret)) is expected


def test_digest_is_sha256_of_utf8() -> None:
    assert auth.digest("é") == hashlib.sha256(b"\xc3\xa9").digest()


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        (None, None),
        ("", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("Bearer abc", "abc"),
        ("bearer abc", "abc"),
        ("BEARER   abc  ", "abc"),
        ("Bearer a b", "a b"),
        ("Bearer a\tb", "a\tb"),
        ("Bearer\tabc", None),
        ("Basic abc", None),
        ("Bearerabc", None),
        ("abc", None),
        ("Bearer " + as_field("pässwört"), "pässwört"),
        ("Bearer " + as_field("pässwört", "latin-1"), "pässwört"),
        ("Bearer " + as_field("密码"), "密码"),
        ("Bearer " + as_field("à\x85x"), "à\x85x"),  # holds U+00A0 and U+0085, white space to str.split
    ],
)
def test_bearer(field: str | None, expected: str | None) -> None:
    assert auth.bearer(field) == expected


PROXIES = ("127.0.0.1", "10.0.0.0/8", "fd00::/8", "::ffff:192.0.2.0/120")


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "expected"),
    [
        ("203.0.113.9", None, "203.0.113.9"),
        ("203.0.113.9", "1.2.3.4", "203.0.113.9"),  # a stranger's word
        ("127.0.0.1", None, "127.0.0.1"),
        ("127.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("127.0.0.1", "6.6.6.6, 1.2.3.4", "1.2.3.4"),
        ("127.0.0.1", "1.2.3.4, 10.1.1.1 ,\t10.2.2.2", "1.2.3.4"),
        ("127.0.0.1", "10.3.3.3, 10.1.1.1", "10.3.3.3"),  # all trusted: the farthest
        ("127.0.0.1", "1.2.3.4, unknown, 10.1.1.1", "10.1.1.1"),
        ("127.0.0.1", "1.2.3.4, , 10.1.1.1", "10.1.1.1"),
        ("127.0.0.1", "garbage", "127.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "1.2.3.4:5555", "1.2.3.4"),
        ("127.0.0.1", "1.2.3.4:port", "127.0.0.1"),
        ("127.0.0.1", "[2001:db8::1]:123", "2001:db8::1"),
        ("127.0.0.1", "[2001:DB8:0::1]", "2001:db8::1"),
        ("127.0.0.1", "[2001:db8::1", "127.0.0.1"),
        ("127.0.0.1", "2001:db8::1", "2001:db8::1"),
        ("127.0.0.1", "::ffff:1.2.3.4", "1.2.3.4"),
        ("127.0.0.1", "1.2.3", "127.0.0.1"),
        ("127.0.0.1", "1.2.3.4\0", "127.0.0.1"),
        ("127.0.0.1", "1.2.3.\xb2", "127.0.0.1"),
        ("::ffff:127.0.0.1", "1.2.3.4", "1.2.3.4"),
        ("::ffff:203.0.113.9", None, "203.0.113.9"),
        ("192.0.2.7", "1.2.3.4", "1.2.3.4"),  # an IPv4-mapped block is its IPv4 block
        ("fd00::1", "1.2.3.4", "1.2.3.4"),
        ("fe80::1%eth0", "1.2.3.4", "fe80::1"),
        ("", "1.2.3.4", ""),
        ("not an address", "1.2.3.4", "not an address"),
    ],
)
def test_client_address(peer: str, forwarded_for: str | None, expected: str) -> None:
    assert auth.client_address(peer, forwarded_for, auth.networks(PROXIES)) == expected


def test_without_proxies_the_peer_stands() -> None:
    assert auth.client_address("127.0.0.1", "1.2.3.4", ()) == "127.0.0.1"


@pytest.mark.parametrize("entry", ["10.0.0.0/33", "proxy.local", "", "1.2.3", "::1/129"])
def test_networks_names_what_it_cannot_read(entry: str) -> None:
    with pytest.raises(ValueError, match="neither an IP address nor a CIDR block") as caught:
        auth.networks(["10.0.0.0/8", entry])
    assert repr(entry) in str(caught.value)


def test_networks_takes_host_bits_and_outer_space() -> None:
    assert [str(network) for network in auth.networks([" 10.1.2.3/8", "::1"])] == ["10.0.0.0/8", "::1/128"]


@pytest.mark.parametrize(
    ("address", "key", "loopback"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.255.0.3", "127.255.0.3", True),
        ("::1", "::/64", True),
        ("::ffff:127.0.0.1", "127.0.0.1", True),
        ("::ffff:1.2.3.4", "1.2.3.4", False),
        ("1.2.3.4", "1.2.3.4", False),
        ("0.0.0.0", "0.0.0.0", False),  # noqa: S104
        ("::", "::/64", False),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", False),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64", False),
        ("127.0.0.1.example.org", "127.0.0.1.example.org", False),
        ("127.1", "127.1", False),
        ("", "", False),
    ],
)
def test_limiter_key_and_loopback(address: str, key: str, loopback: bool) -> None:
    assert auth.limiter_key(address) == key
    assert auth.is_loopback(address) is loopback


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"host": "localhost", "forwarded-by": "x"}, None),
        ({"host": "localhost", "forwarded": ""}, "forwarded"),
        ({"via": "1.1 proxy"}, "via"),
        ({"x-real-ip": "1.2.3.4"}, "x-real-ip"),
        ({"x-forwarded-for": ""}, "x-forwarded-for"),
        ({"x-forwarded-anything": "1"}, "x-forwarded-anything"),
        ({"accept": "*/*", "x-forwarded-host": "a", "via": "b"}, "x-forwarded-host"),
    ],
)
def test_has_forwarding(fields: dict[str, str], expected: str | None) -> None:
    assert auth.has_forwarding(fields) == expected


ORIGINS = ("https://app.example.org", "chrome-extension://abc", "null", "*")


@pytest.mark.parametrize(
    ("origin", "host", "secure", "expected"),
    [
        ("http://localhost:18789", "localhost:18789", False, True),
        ("http://LOCALHOST:18789", "localhost:18789", False, True),
        ("http://localhost:18789", "LocalHost:18789", False, True),
        ("http://localhost:18788", "localhost:18789", False, False),
        ("http://localhost", "localhost:80", False, True),
        ("http://localhost:80", "localhost", False, True),
        ("http://localhost", "localhost:", False, True),
        ("https://gw.example.org", "gw.example.org", True, True),
        ("https://gw.example.org:443", "gw.example.org", True, True),
        ("http://gw.example.org", "gw.example.org", True, False),
        ("https://gw.example.org", "gw.example.org", False, False),
        ("https://gw.example.org", "gw.example.org:443", False, True),
        ("http://[::1]:18789", "[::1]:18789", False, True),
        ("http://127.0.0.1:18789", "localhost:18789", False, False),
        ("http://evil.example.org", "localhost:18789", False, False),
        ("http://localhost:18789.evil.org", "localhost:18789", False, False),
        ("http://localhost:18789/", "localhost:18789", False, False),
        ("http://localhost:18789@evil.org", "localhost:18789", False, False),
        ("http://", "localhost", False, False),
        ("http://localhost", "", False, False),
        ("localhost", "localhost", False, False),
        ("ftp://localhost:80", "localhost:80", False, False),
        ("", "localhost", False, False),
        ("https://app.example.org", "localhost:18789", False, True),
        ("https://APP.example.org", "localhost:18789", False, False),  # allowed as an exact string
        ("https://app.example.org:443", "localhost:18789", False, False),
        ("chrome-extension://abc", "localhost:18789", False, True),
        ("null", "localhost:18789", False, False),
        ("*", "localhost:18789", False, False),
    ],
)
def test_check_origin(origin: str, host: str, secure: bool, expected: bool) -> None:
    assert auth.check_origin(origin, host, secure, ORIGINS) is expected


ALLOWED_HOSTS = ("gw.local", "Other.local:8080", "fd00::5", "[fd00::6]:9", "bad host")


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("LOCALHOST:18789", True),
        ("localhost.", True),
        ("localhost.:18789", True),
        ("localhost.evil.org", False),
        ("evil-localhost", False),
        ("127.0.0.1", True),
        ("127.9.9.9:80", True),
        ("127.0.0.1.nip.io", False),
        ("127.1", False),
        ("[::1]", True),
        ("[::1]:18789", True),
        ("::1", False),
        ("[::2]", False),
        ("0.0.0.0:18789", False),
        ("192.168.1.5:18789", False),
        ("evil.example.org:18789", False),
        ("gw.local", True),
        ("GW.local:1234", True),
        ("other.local:8080", True),
        ("other.local:8081", False),
        ("other.local", False),
        ("[fd00::5]:18789", True),
        ("[fd00::6]:9", True),
        ("[fd00::6]:10", False),
        ("bad host", False),
        ("user@localhost", False),
        ("localhost:x", False),
        ("", False),
    ],
)
def test_check_host(host: str, expected: bool) -> None:
    assert auth.check_host(host, ALLOWED_HOSTS) is expected


def test_the_last_allowed_failure_locks_and_the_lock_ends() -> None:
    clock = Clock()
    limiter = auth.Limiter(3, 60_000, 300_000, clock)
    for _ in range(3):
        assert limiter.retry_after("a") == 0
        limiter.failed("a")
    assert (limiter.retry_after("a"), limiter.retry_after("b")) == (300, 0)
    clock.now += 0.5
    assert limiter.retry_after("a") == 300  # whole seconds, rounded up: never too early
    clock.now += 100
    limiter.failed("a")  # does not make it longer
    clock.now += 199.4
    assert limiter.retry_after("a") == 1
    clock.now += 0.1
    assert limiter.retry_after("a") == 0
    limiter.failed("a")  # and counting begins anew
    limiter.failed("a")
    assert limiter.retry_after("a") == 0


def test_the_window_slides() -> None:
    clock = Clock()
    limiter = auth.Limiter(3, 60_000, 300_000, clock)
    for step in (0, 30, 30.1, 20):  # the first is out of the window when the third comes
        clock.now += step
        assert limiter.retry_after("a") == 0
        limiter.failed("a")
    assert limiter.retry_after("a") == 300


def test_success_clears_the_count() -> None:
    limiter = auth.Limiter(2, 60_000, 300_000, Clock())
    for _ in range(5):
        limiter.failed("a")
        limiter.cleared("a")
    limiter.cleared("never seen")
    assert limiter.retry_after("a") == 0


def test_memory_is_bounded_and_the_locked_are_forgotten_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_CLIENTS", 3)
    clock = Clock()
    limiter = auth.Limiter(2, 60_000, 300_000, clock)
    for key in ("locked", "locked", "a", "b", "a", "c"):  # a is locked by now, and b makes room for c
        limiter.failed(key)
    assert [limiter.retry_after(key) for key in ("locked", "a", "b", "c")] == [300, 300, 0, 0]
    limiter.failed("b")  # c goes, b is new
    assert limiter.retry_after("b") == 0
    clock.now += 1
    limiter.failed("b")
    assert [limiter.retry_after(key) for key in ("locked", "a", "b")] == [299, 299, 300]
    limiter.failed("d")  # all are locked: the one that failed longest ago goes
    assert [limiter.retry_after(key) for key in ("locked", "a", "b")] == [0, 299, 300]
    clock.now += 300
    limiter.failed("d")  # locks that are over are forgotten first
    assert [limiter.retry_after(key) for key in ("a", "b", "d")] == [0, 0, 0]


def gate(**options: object) -> auth.Gate:
    return auth.Gate("token", SECRET, **{"clock": Clock(), **options})  # type: ignore[arg-type]


WRONG = auth.Verdict(0, False)
SHARED = auth.Caller("", frozenset({"operator.admin"}), digest=auth.digest(SECRET))
RIGHT = auth.Verdict(0, False, SHARED)
LOCKED = auth.Verdict(300, False)
MISSING = auth.Verdict(0, True)


def test_gate_admits_and_refuses() -> None:
    door = gate()
    assert door.admit(SECRET, "1.2.3.4", {}) == RIGHT
    assert door.admit("wrong", "1.2.3.4", {}) == WRONG
    assert door.admit(None, "1.2.3.4", {}) == MISSING
    assert door.admit("", "1.2.3.4", {}) == MISSING


def test_when_locked_right_and_wrong_alike_are_refused() -> None:
    clock = Clock()
    door = gate(clock=clock)
    assert [door.admit("wrong", "1.2.3.4", {}) for _ in range(10)] == [WRONG] * 10
    assert door.admit("wrong", "1.2.3.4", {}) == LOCKED
    assert door.admit(SECRET, "1.2.3.4", {}) == LOCKED
    assert door.admit(None, "1.2.3.4", {}) == LOCKED._replace(missing=True)
    assert door.admit(SECRET, "1.2.3.5", {}) == RIGHT
    clock.now += 300
    assert door.admit(SECRET, "1.2.3.4", {}) == RIGHT


def test_missing_does_not_count_and_success_clears() -> None:
    door = gate(max_attempts=2)
    for _ in range(5):
        assert door.admit("wrong", "1.2.3.4", {}) == WRONG
        assert door.admit(None, "1.2.3.4", {}) == MISSING
        assert door.admit(SECRET, "1.2.3.4", {}) == RIGHT


@pytest.mark.parametrize(
    ("client", "fields", "exempt_loopback", "exempt"),
    [
        ("127.0.0.1", {}, True, True),
        ("::1", {"x-real": "1.2.3.4"}, True, True),
        ("127.0.0.1", {"x-real-ip": ""}, True, False),
        ("127.0.0.1", {}, False, False),
        ("1.2.3.4", {}, True, False),
    ],
)
def test_loopback_exemption(client: str, fields: dict[str, str], exempt_loopback: bool, exempt: bool) -> None:
    door = gate(max_attempts=1, exempt_loopback=exempt_loopback)
    assert door.admit("wrong", client, fields) == WRONG
    assert door.admit("wrong", client, fields) == (WRONG if exempt else LOCKED)
    assert (door.admit(SECRET, client, fields) == RIGHT) is exempt


def test_an_ipv6_network_is_one_client() -> None:
    door = gate(max_attempts=2)
    door.admit("wrong", "2001:db8::1", {})
    door.admit("wrong", "2001:db8::2", {})
    assert door.admit(SECRET, "2001:db8::3", {}).retry_after == 300
    assert door.admit(SECRET, "2001:db8:0:1::3", {}) == RIGHT


def test_parallel_guesses_are_all_counted() -> None:
    door = gate(max_attempts=4)

    async def guess() -> auth.Verdict:
        await asyncio.sleep(0)
        return door.admit("wrong", "1.2.3.4", {})

    async def main() -> list[auth.Verdict]:
        return await asyncio.gather(*(guess() for _ in range(50)))

    verdicts = asyncio.run(main())
    assert verdicts.count(WRONG) == 4
    assert sum(verdict.retry_after > 0 for verdict in verdicts) == 46


def test_gate_resolves_the_client_behind_its_proxies() -> None:
    assert gate(trusted=["127.0.0.1"]).client("127.0.0.1", "1.2.3.4") == "1.2.3.4"
    assert gate().client("127.0.0.1", "1.2.3.4") == "127.0.0.1"


def test_mode_none_admits_everyone() -> None:
    door = auth.Gate("none", "")
    anyone = RIGHT._replace(caller=auth.Caller("", frozenset({"operator.admin"})))
    assert [door.admit(given, "1.2.3.4", {"via": ""}) for given in (None, "", "x")] == [anyone] * 3


@pytest.mark.parametrize(("mode", "secret"), [("token", ""), ("password", ""), ("tokens", "x"), ("", "")])
def test_gate_without_a_secret_is_none(mode: str, secret: str) -> None:
    with pytest.raises(ValueError, match="auth mode"):
        auth.Gate(mode, secret)


# Named tokens

ALICE = auth.Caller("alice", frozenset({"chat"}), frozenset({"beta"}), digest=auth.digest("of alice"))
BOB = auth.Caller("bob", frozenset({"chat"}), expires=2000.0, per_minute=2, digest=auth.digest("of bob"))


def friends(secret: str = SECRET, **options: object) -> auth.Gate:
    return auth.Gate("token", secret, named=(ALICE, BOB), **{"clock": Clock(), **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(("mode", "secret"), [("token", SECRET), ("password", SECRET), ("token", "")])
def test_named_tokens_are_let_in_beside_the_shared_secret_and_without_one(mode: str, secret: str) -> None:
    door = auth.Gate(mode, secret, named=(ALICE, BOB), wall=lambda: 1999.0)
    assert door.admit("of alice", "1.2.3.4", {}).caller == ALICE
    assert door.admit("of bob", "1.2.3.4", {}) == auth.Verdict(0, False, BOB)
    assert door.admit("of ALICE", "1.2.3.4", {}) == WRONG
    assert door.admit("", "1.2.3.4", {}) == MISSING
    assert door.admit(SECRET, "1.2.3.4", {}) == (RIGHT if secret else WRONG)


def test_without_the_shared_secret_only_mode_token_can_be() -> None:
    with pytest.raises(ValueError, match="auth mode password without a password"):
        auth.Gate("password", "", named=(ALICE,))


def test_an_expired_token_is_told_so_and_is_no_guess() -> None:
    door = friends(max_attempts=1, wall=lambda: 2000.0)
    for _ in range(3):
        expected = auth.Verdict(0, False, expired="1970-01-01T00:33:20Z")
        assert door.admit("of bob", "1.2.3.4", {}) == expected
    assert door.admit("of alice", "1.2.3.4", {}).caller


def test_a_named_token_clears_no_failures_and_is_locked_out_with_its_client() -> None:
    door = friends(max_attempts=3)
    for verdict in (WRONG, WRONG, WRONG):
        assert door.admit("of alice", "1.2.3.4", {}).caller
        assert door.admit("wrong", "1.2.3.4", {}) == verdict
    assert door.admit("of alice", "1.2.3.4", {}) == LOCKED
    assert door.admit("of alice", "1.2.3.5", {}).caller


def test_who_a_caller_is_now() -> None:
    door = friends()
    assert door.now(ALICE) is ALICE
    assert door.now(SHARED) == SHARED
    assert friends("another").now(SHARED) is None
    assert friends("").now(SHARED) is None
    anyone = auth.Gate("none", "").admit(None, "", {}).caller
    assert anyone is not None
    assert [gate_.now(anyone) for gate_ in (door, friends(""), auth.Gate("none", ""))] == [None, None, anyone]
    assert auth.Gate("none", "").now(SHARED) is None
    assert gate().now(ALICE) is None


def test_same_rights() -> None:
    assert ALICE.same_as(ALICE._replace(expires=1.0, per_minute=5))
    for changes in ({"name": "x"}, {"scopes": frozenset()}, {"agents": None}, {"digest": b""}):
        assert not ALICE.same_as(ALICE._replace(**changes))  # type: ignore[arg-type]
    assert not ALICE.same_as(None)
    assert [caller.may_chat() for caller in (ALICE, SHARED)] == [True, True]
    assert not ALICE._replace(scopes=frozenset({"operator.read"})).may_chat()


def test_an_allowance_comes_back_bit_by_bit_and_outlives_a_reload() -> None:
    clock = Clock()
    door = friends(clock=clock)
    assert [door.spend(ALICE) for _ in range(100)] == [0] * 100
    assert [door.spend(BOB) for _ in range(3)] == [0, 0, 30]
    clock.now += 29.5
    assert door.spend(BOB) == 1
    clock.now += 0.5
    assert [door.spend(BOB), door.spend(BOB)] == [0, 30]
    later = friends(clock=clock)
    later.follow(door)
    assert later.spend(BOB) == 30
    stranger = gate(clock=clock)
    stranger.follow(door)
    later.follow(stranger)
    assert later.spend(BOB) == 0  # it was away in between
    clock.now += 600
    assert [later.spend(BOB) for _ in range(3)] == [0, 0, 30]  # never more than a minute's


@pytest.mark.parametrize("per_minute", [1, 3, 7, 60, 999, 1_000_000])
def test_a_burst_is_the_whole_allowance(per_minute: int) -> None:
    door, caller = friends(), BOB._replace(per_minute=per_minute)
    count = min(per_minute, 1000)
    assert [door.spend(caller) for _ in range(count)] == [0] * count
    assert (door.spend(caller) > 0) is (count == per_minute)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2027-01-01", 1798761600.0),
        ("2027-01-01T00:00", 1798761600.0),
        ("2027-01-01 00:00:00Z", 1798761600.0),
        ("2027-01-01T01:00:00+01:00", 1798761600.0),
        ("2027-01-01T00:00:00.5Z", 1798761600.5),
        ("", None),
        ("tomorrow", None),
        ("2027-02-30", None),
        ("1798761600", None),
    ],
)
def test_moment(text: str, expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"Invalid|out of range"):
            auth.moment(text)
    else:
        assert auth.moment(text) == expected


def test_tokens_are_fresh_and_long() -> None:
    tokens = {auth.new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(re.fullmatch("copepod_[A-Za-z0-9_-]{43}", token) for token in tokens)


def test_no_secret_is_kept_or_shown() -> None:
    door = gate()
    assert repr(door) == "Gate(mode='token')"
    assert SECRET not in repr(vars(door))


def test_a_plain_start_imports_neither_ipaddress_nor_hmac() -> None:
    code = (
        "import auth, sys; gate = auth.Gate('none', ''); gate.client('127.0.0.1', None);"
        "auth.is_loopback('127.0.0.1'); auth.check_host('localhost:18789', ());"
        "print({'ipaddress', 'hmac', 'hashlib'} & set(sys.modules))"
    )
    root = Path(auth.__file__).parent
    ran = subprocess.run([sys.executable, "-S", "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
