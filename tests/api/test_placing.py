"""Requests of one prompt go to one server, different ones are divided by tokens, and no server gets much more than its
part of what is asked at a time."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_api import placing, wire
from teacher_api.endpoints import Endpoint, urls_of
from teacher_api.placing import MOVE_TOKENS, Placing, groups_of, num_tokens
from teacher_api.replica import PROBE_FIRST_S, PROBE_MAX_S, Replica
from teacher_api.types import Completion, ScoreRequest


def replicas(number: int = 3) -> list[Replica]:
    return [Replica(Endpoint(f"grpc://host{n}:1"), transport=None) for n in range(number)]  # type: ignore[arg-type]


@settings(deadline=None)
@given(
    costs=st.lists(st.tuples(st.integers(0, 50), st.integers(1, 3000)), max_size=80),
    seed=st.integers(0, 999),
    number=st.integers(1, 5),
)
def test_no_server_gets_much_more_than_its_part(costs: list[tuple[int, int]], seed: int, number: int):
    """Mirrokni, Thorup and Zadimoghaddam: at most BOUND times the mean, or one that has least."""
    servers, where, rng = replicas(number), Placing(), random.Random(seed)
    running: list[tuple[Replica, int]] = []
    for n, (_, tokens) in enumerate(costs):
        before = {server: server.tokens for server in servers}
        chosen = where.choose(servers, [f"new {n}".encode()], tokens)
        mean = (sum(before.values()) + tokens) / number
        assert before[chosen] == min(before.values()) or before[chosen] + tokens <= 1.25 * mean
        chosen.tokens += tokens
        running.append((chosen, tokens))
        if rng.random() < 0.5:
            done, size = running.pop(rng.randrange(len(running)))
            done.tokens -= size


def test_a_groups_requests_stay_on_one_server_however_busy_the_order():
    servers, where = replicas(), Placing()
    homes: dict[bytes, set[Replica]] = {}
    rng = random.Random(1)
    order = [f"prompt {n}".encode() for n in range(20)] * 60
    rng.shuffle(order)
    for group in order:
        chosen = where.choose(servers, [group], 500)
        homes.setdefault(group, set()).add(chosen)
        chosen.tokens += 500 if rng.random() < 0.5 else -min(500, chosen.tokens)
    assert all(len(home) == 1 for home in homes.values())
    assert len(set.union(*homes.values())) == 3


def test_a_prompt_that_everybody_has_is_divided():
    now = 0.0
    servers, where = replicas(), Placing(lambda: now)
    for n in range(64):
        where.choose(servers, [b"system prompt"], 100).tokens += 100 if n < 30 else 0
    assert sorted(server.tokens for server in servers) == [0, 0, 3000], "so far it could be a group"
    for _ in range(60):
        where.choose(servers, [b"system prompt"], 100).tokens += 100
    assert sum(server.tokens for server in servers) == 9000
    assert max(server.tokens for server in servers) <= 1.25 * 3000
    now = 61.0
    assert len({where.choose(servers, [b"system prompt"], 100) for _ in range(50)}) == 1, "a later group"


def test_a_prompt_leaves_a_server_that_has_far_more_to_do_or_is_away():
    servers, where = replicas(), Placing()
    home = where.choose(servers, [b"p"], 10)
    home.tokens = MOVE_TOKENS
    assert where.choose(servers, [b"p"], 10) is home
    home.tokens = MOVE_TOKENS + 1
    second = where.choose(servers, [b"p"], 10)
    assert second is not home
    home.tokens = 0
    assert where.choose(servers, [b"p"], 10) is second, "it has moved, and does not move to and fro"
    third = where.choose([server for server in servers if server is not second], [b"p"], 10)
    assert third is not second


def test_every_client_and_every_epoch_sends_a_prompt_to_the_same_server():
    """So that its scores are found in that server's cache."""
    groups = [f"prompt {n}".encode() for n in range(300)]
    first, second = ([Placing().choose(replicas(), [group], 10).endpoint for group in groups] for _ in range(2))
    assert first == second
    assert all(70 <= number <= 130 for number in Counter(first).values()), Counter(first)
    without = [Placing().choose(replicas(2), [group], 10).endpoint for group in groups]
    moved = sum(one != other for one, other in zip(first, without, strict=True) if one.url != "grpc://host2:1")
    assert moved == 0, "only what was on the server that is gone goes elsewhere"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placing, "REMEMBERED", 10)
    where, servers = Placing(), replicas()
    for n in range(100):
        where.choose(servers, [str(n).encode()], 1)
    assert len(where._homes) == 10
    for server in servers:
        where.forget(server)
    assert not where._homes


def test_tokens_count_a_shared_prompt_once():
    def ids(*values: int) -> Any:
        return np.array(values, np.int32)

    shared = ScoreRequest([Completion("a", ids(1, 2), 0), Completion("b", ids(3, 4, 5), 0)], [ids(7, 8, 9, 300)])
    message = wire.encode_request(shared)
    assert num_tokens(message) == 4 + 2 + 3
    (group,) = groups_of(message)
    later = wire.encode_request(ScoreRequest([Completion("c", ids(9), 0)], [ids(7, 8, 9, 300)]))
    assert groups_of(later) == [group]
    alone = wire.encode_request(ScoreRequest([Completion("c", ids(9, 9))]))
    assert len(groups_of(alone)) == 1
    assert groups_of(alone) != [group]


def test_pauses_double_and_are_random_within_their_bounds():
    server = replicas(1)[0]
    server.goes("away")
    assert server.pause_s(0) == 0, "a connection that broke is looked at once, at once"
    for tries in range(1, 30):
        base = min(PROBE_FIRST_S * 2 ** (tries - 1), PROBE_MAX_S)
        pauses = [server.pause_s(tries) for _ in range(50)]
        assert 0.5 * base <= min(pauses) < 0.8 * base
        assert 1.2 * base < max(pauses) <= 1.5 * base
    server.comes_back(was_away=True)
    server.goes("away again, having done nothing")
    assert server.pause_s(0) > 0


def test_a_server_that_came_back_is_asked_carefully():
    server = replicas(1)[0]
    server.goes("away")
    server.comes_back(was_away=True)
    allowed = []
    while server.window is not None:
        server.calls = 0
        while server.is_free:
            server.calls += 1
        allowed.append(server.calls)
        server.worked()
    assert allowed == [1, 2, 4, 8, 16, 32, 64]
    assert server.away == 0


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ("grpc://a:1", ("grpc://a:1",)),
        ("grpc://a:1, grpc://b:1,", ("grpc://a:1", "grpc://b:1")),
        (["grpc://a:1", "http://b:2,http://c:3"], ("grpc://a:1", "http://b:2", "http://c:3")),
        ("openai+http://a:1/v1", ("openai+http://a:1/v1",)),
    ],
)
def test_urls(given: Any, urls: tuple[str, ...]):
    assert urls_of(given) == urls


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("", "no teacher URL"),
        (" , ", "no teacher URL"),
        ("grpc://a:1,grpc://a:1", "'grpc://a:1' is there twice"),
        ("grpc://a:1,openai+http://b:1/v1", r"'openai\+http://b:1/v1' is one of 2; expected it alone"),
    ],
)
def test_urls_that_make_no_sense_are_refused(given: str, complaint: str):
    with pytest.raises(ValueError, match=complaint):
        urls_of(given)
