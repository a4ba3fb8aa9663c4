"""Any address, field or secret of a caller is judged; who fails too often is locked out, and only he."""

from __future__ import annotations

import ipaddress
import math
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from strategies import tries

import auth

TRUSTED = auth.networks(["127.0.0.1", "10.0.0.0/8", "::ffff:192.168.0.0/112", "fe80::/10", "::1"])
ips = (st.ip_addresses() | st.sampled_from(["10.1.2.3", "127.0.0.1", "::1", "fe80::1", "::ffff:10.0.0.1"])).map(str)
hops = st.one_of(
    ips, ips.map("[{}]".format), ips.map("[{}]:80".format), ips.map("{}:8080".format), ips.map("{}%eth0".format),
    st.text(max_size=8),
    st.sampled_from(["", "unknown", "_x", "[", "[]", "[]:", "1.2.3", "01.2.3.4", "\0", "::1\0", "²"]),
)  # fmt: skip
forwarded = st.none() | st.lists(hops, max_size=4).map(", ".join) | st.text(max_size=20)
hosts = hops | st.sampled_from(["localhost", "LOCALHOST.:1", "h:", "h:99999", "h:000001", "h:²", "a.b:443", "b.a"])
origins = st.builds("{}{}{}".format, st.sampled_from(["http", "https", "HTTPS", "ftp", ""]), st.just("://"), hosts)
allowed = st.lists(hosts | origins, max_size=3)


@given(st.sampled_from(["", "127.0.0.1", "10.0.0.9", "::1", "fe80::1%eth0"]) | hops, forwarded)
def test_any_forwarding_has_a_client(peer: str, fields: str | None) -> None:
    client = auth.client_address(peer, fields, TRUSTED)
    assert client == auth.shortest(client)
    auth.limiter_key(client)
    if client != peer and auth.shortest(peer) != client:
        ipaddress.ip_address(client)
        assert fields
    if auth._packed(peer) is None or not auth._within(auth._packed(peer) or b"", TRUSTED):
        assert client == auth.shortest(peer), "only a proxy of ours is believed"
    assert auth.client_address(peer, fields, ()) == auth.shortest(peer)


@given(ips, st.lists(ips, max_size=2), st.text(max_size=10))
def test_only_the_first_hop_that_is_not_trusted_counts(client: str, proxies: list[str], word: str) -> None:
    address = auth._packed(client)
    assert address is not None
    assume(not auth._within(address, TRUSTED))
    ours = [proxy for proxy in proxies if auth._within(auth._packed(proxy) or b"", TRUSTED)]
    assert auth.client_address("10.9.9.9", ", ".join([word, client, *ours]), TRUSTED) == auth.shortest(client)


@given(ips)
def test_an_address_has_one_shortest_form_and_one_key(address: str) -> None:
    short, key = auth.shortest(address), auth.limiter_key(address)
    assert auth.shortest(short) == short
    assert auth.limiter_key(short) == key
    packed = ipaddress.ip_address(short)
    assert packed in ipaddress.ip_network(key)
    assert auth.is_loopback(address) == packed.is_loopback


@given(origins | st.text(max_size=20), hosts | st.text(max_size=20), st.booleans(), allowed)
def test_any_origin_is_judged(origin: str, host: str, secure: bool, allowed: list[str]) -> None:
    assert isinstance(auth.check_origin(origin, host, secure, allowed), bool)
    assert not auth.check_origin("null", host, secure, [*allowed, "null"])
    assert auth.check_origin(origin, host, secure, [origin]) is (origin not in ("null", "*"))


@given(hosts | st.text(max_size=20), allowed)
def test_any_host_is_judged(host: str, allowed: list[str]) -> None:
    assert isinstance(auth.check_host(host, allowed), bool)
    assert isinstance(auth.stranger("127.0.0.1", {}, host, allowed), str)
    assert auth.stranger("127.0.0.1", {"x-forwarded-for": ""}, host, allowed)


secrets = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@given(secrets, st.none() | secrets)
def test_only_the_secret_is_let_in(secret: str, other: str | None) -> None:
    gate = auth.Gate("token", secret)
    for text in (other, secret):
        assert (gate.admit(text, "192.0.2.1", {}).caller is not None) is (text == secret)
        as_field = None if text is None else f"Bearer {text}".encode().decode("latin-1")
        sent = text is not None and text.strip(" \t")
        assert (gate.admit(auth.bearer(as_field), "192.0.2.2", {}).caller is not None) is (sent == secret)


@given(
    st.none()
    | st.text(max_size=12)
    | st.builds("{} {}".format, st.sampled_from(["Bearer", "bEARER", "Basic"]), secrets)
)
def test_any_authorization_is_read(value: str | None) -> None:
    credential = auth.bearer(value)
    if credential is not None:
        assert value is not None
        assert credential in value or not credential.isascii()  # UTF-8 that came as Latin-1
        assert credential == credential.strip(" \t")


WINDOW, LOCKOUT, ATTEMPTS = 10_000, 30_000, 3
clients = st.sampled_from(["a", "b", "c"])


class Limits(RuleBasedStateMachine):
    """The limiter and its clock, in whole seconds, beside the failures of each client as a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.limiter = auth.Limiter(ATTEMPTS, WINDOW, LOCKOUT, lambda: self.now)
        self.failures: dict[str, list[float]] = {}
        self.locked: dict[str, float] = {}

    @rule(seconds=st.integers(0, 12) | st.just(30))
    def passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(client=clients)
    def fails(self, client: str) -> None:
        self.limiter.failed(client)
        if self.locked.get(client, 0) > self.now:
            return
        recent = [at for at in self.failures.pop(client, []) if at > self.now - WINDOW / 1000] + [self.now]
        if len(recent) == ATTEMPTS:
            self.locked[client] = self.now + LOCKOUT / 1000
        else:
            self.failures[client] = recent

    @rule(client=clients)
    def is_cleared(self, client: str) -> None:
        self.limiter.cleared(client)
        self.failures.pop(client, None)

    @invariant()
    def only_those_are_locked_out(self) -> None:
        for client in "abc":
            assert self.limiter.retry_after(client) == max(0, math.ceil(self.locked.get(client, 0) - self.now))


TestLimits = Limits.TestCase
TestLimits.settings = tries(100, stateful_step_count=30)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 3), st.booleans()), max_size=60), st.integers(1, 4))
def test_what_is_remembered_has_a_bound(steps: list[tuple[int, int, bool]], attempts: int) -> None:
    now: list[Any] = [0]
    bound, auth.MAX_CLIENTS = auth.MAX_CLIENTS, 4
    try:
        limiter = auth.Limiter(attempts, WINDOW, LOCKOUT, lambda: now[0])
        for client, seconds, clear in steps:
            now[0] += seconds
            (limiter.cleared if clear else limiter.failed)(str(client))
            assert len(limiter) <= 4
            assert limiter.retry_after(str(client)) <= LOCKOUT / 1000
    finally:
        auth.MAX_CLIENTS = bound
