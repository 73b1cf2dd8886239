"""The status page in Debian's Chromium, next to what the server says as JSON and to what was sent: looked at, clicked
and pictured, in light and dark, at a desk and on a phone."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import CHROMIUM, REASON, Page, browsing
from serving import PROTOBUF, Server, post, request_of, serving

from teacher_api import wire
from teacher_server import history

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=REASON)]
KEYS = {"admins": "the-key-of-the-admins", "alpha": "the-key-of-alpha", "beta": "the-key-of-beta"}
MODEL = "Teacher <b>8B</b> & co"
SHOWN = "!document.getElementById('page').hidden"
ASKED = "!document.getElementById('ask').hidden"


def hashed(key: str) -> str:
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Loaded: two tenants have sent for a while, one of them three times as much, and some of it was wrong."""
    tenants = {
        name: {"keys": [hashed(key)], "admin": name == "admins", "weight": 2.5 if name == "beta" else 1}
        for name, key in KEYS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(history, "STEP_S", 0.5)
        with serving(tenants=tenants, model_name=MODEL, fake_latency_s=0.01, max_sequence_tokens=256) as running:
            callers = [threading.Thread(target=load, args=(running, *one)) for one in (("alpha", 90), ("beta", 30))]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            yield running


def load(server: Server, name: str, tokens: int) -> None:
    headers = {**PROTOBUF, "authorization": f"Bearer {KEYS[name]}"}
    with httpx.Client(headers=headers, timeout=60) as http:
        for turn in range(20):
            sequence = [(turn + place) % 500 for place in range(tokens)]
            body = b"\xff" if turn % 5 == 4 else wire.encode_request(request_of(sequence)).SerializeToString()
            http.post(f"{server.http_url}/v1/score", content=body)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browsing() as one:
        one.look(1280, 900)
        yield one


def status(server: Server, name: str = "admins") -> dict[str, Any]:
    """Once the last step has passed."""
    time.sleep(0.5)
    found: dict[str, Any] = server.http.get(
        f"{server.http_url}/v1/status", headers={"authorization": f"Bearer {KEYS[name]}"}
    ).json()
    return found


def enter(page: Page, server: Server, name: str) -> None:
    page.open(f"{server.http_url}/")
    page.wait(f"{SHOWN} || {ASKED}")
    if page.value(SHOWN):
        page.wait("!document.getElementById('forget').hidden")
        page.click("#forget")
    page.wait(ASKED)
    page.click("#key")
    page.type(KEYS[name])
    page.press_enter()
    page.wait(SHOWN)


def names(page: Page) -> list[str]:
    return [text.split(" ")[0] for text in page.texts("#tenants tbody td:first-child")]


def test_it_asks_for_a_key_and_says_when_it_is_wrong(page: Page, server: Server) -> None:
    page.open(f"{server.http_url}/")
    page.wait(ASKED)
    assert "asks for a key" in page.text("#ask")
    assert page.value("document.getElementById('page').hidden")
    page.click("#key")
    page.type("not-the-key-of-anybody")
    page.click("#ask button")
    page.wait("!document.getElementById('wrong').hidden")
    assert server.fingerprint not in page.value("document.documentElement.innerHTML")
    enter(page, server, "admins")
    assert page.value("document.getElementById('ask').hidden")


def test_what_an_admin_reads_is_what_was_sent(page: Page, server: Server) -> None:
    enter(page, server, "admins")
    told = status(server)
    page.wait(f"document.getElementById('refused').textContent === '{8}'")  # one in five of forty
    assert page.text("#state") == "Ready"
    assert page.text("h1") == MODEL
    assert page.value("document.querySelector('h1').children.length") == 0  # markup in a name is text
    assert page.text("#fingerprint") == server.fingerprint == told["teacher"]["fingerprint"]
    assert page.text("#queue") == "0\u00a0%"
    assert page.text("#requests-more") == "32 in the last hour"
    assert page.text("#refused-more") == "most: invalid request"
    assert page.text("#tokens-more") == "1.92k in the last hour"  # 16 of 90 and 16 of 30
    assert page.texts("#outcomes td") == ["answered", "32", "invalid request", "8"]
    rows = page.texts("#tenants tbody tr")
    assert names(page) == ["alpha", "beta"]
    assert "75\u00a0%" in rows[0]
    assert "25\u00a0%" in rows[1]
    p95 = {one["name"]: one["latency_s"]["p95"] for one in told["tenants"]}
    for row, name in zip(rows, ("alpha", "beta"), strict=True):
        assert f"{round(1000 * p95[name])}\u00a0ms" in row


def test_clicks_sort_tenants_and_choose_the_time_shown(page: Page, server: Server) -> None:
    enter(page, server, "admins")
    assert page.value("document.querySelector('[data-minutes=\"60\"]').ariaPressed") == "true"
    assert "60 min ago" in page.text("#throughput")
    page.click('[data-minutes="5"]')
    assert page.texts('[aria-pressed="true"]') == ["5 min"]
    assert "5 min ago" in page.text("#throughput")
    assert names(page) == ["alpha", "beta"]  # by share, the largest first
    page.click('[data-sort="share"]')
    assert names(page) == ["beta", "alpha"]
    assert page.value("document.querySelector('[data-sort=share]').parentNode.ariaSort") == "ascending"
    page.click('[data-sort="name"]')
    assert names(page) == ["alpha", "beta"]
    page.click('[data-sort="name"]')
    assert names(page) == ["beta", "alpha"]


def test_the_charts_tell_their_values_where_one_points(page: Page, server: Server) -> None:
    enter(page, server, "admins")
    page.click('[data-minutes="5"]')
    now = page.text("#waiting-legend")
    page.move("#waiting", 0.5)
    assert "ago" in page.text("#waiting-legend")
    page.move("h1")
    assert "ago" not in page.text("#waiting-legend")
    assert now.startswith("tokens")
    drawn = page.value("document.querySelector('#throughput path.line').getAttribute('d').split('L').length")
    assert 2 <= drawn <= 600  # a point for each step


def test_a_tenant_sees_itself_alone(page: Page, server: Server) -> None:
    enter(page, server, "beta")
    page.wait("document.querySelectorAll('#tenants tbody tr').length === 1")
    assert names(page) == ["beta"]
    assert page.text("#tenants-title") == "Your tenant, last hour"
    assert page.text("#tokens-more") == "480 in the last hour"
    assert page.text("#queue") == "0"
    assert not page.value("document.querySelector('[data-sort=share]').checkVisibility()")
    seen = page.value("document.documentElement.innerHTML")
    for other in ("alpha", "admins"):
        assert other not in seen
    page.wait("!document.getElementById('forget').hidden")
    page.click("#forget")
    page.wait(ASKED)
    assert page.value("sessionStorage.length") == 0


def luminance(colour: str) -> float:
    """Of `rgb(r, g, b)`, by WCAG 2.2."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (390, 844, True)], ids=["desk", "phone"])
def test_it_fits_and_can_be_read(
    page: Page, server: Server, tmp_path: Path, dark: bool, width: int, height: int, phone: bool
) -> None:
    page.look(width, height, dark=dark, phone=phone)
    try:
        enter(page, server, "admins")
        assert page.value("document.documentElement.scrollWidth") <= width  # nothing to scroll sideways
        assert page.value("[...document.querySelectorAll('.scroll')].every(e => e.scrollWidth <= e.clientWidth)")
        cut = page.value("[...document.querySelectorAll('.big')].filter(e => e.scrollWidth > e.clientWidth).length")
        assert cut == 0
        for selector, ground in ((".big", "article"), ("article .muted", "article"), ("h1", "body"), ("th", ".card")):
            ink, paper = (
                page.value(f"getComputedStyle(document.querySelector('{of}')).{what}")
                for of, what in ((selector, "color"), (ground, "backgroundColor"))
            )
            light, deep = sorted([luminance(ink), luminance(paper)], reverse=True)
            assert (light + 0.05) / (deep + 0.05) >= 4.5, f"{selector}: {ink} on {paper}"
        assert (luminance(page.value("getComputedStyle(document.body).backgroundColor")) < 0.1) == dark
        taken = page.picture(tmp_path / "page.png").read_bytes()
        assert taken[:4] == b"\x89PNG"
        assert len(taken) > 20_000  # something is drawn
    finally:
        page.look(1280, 900)


def test_nothing_comes_from_elsewhere_and_nothing_complains(page: Page, server: Server) -> None:
    assert page.requested
    assert all(url.startswith((server.http_url, "data:")) for url in page.requested)
    assert [text for text in page.complaints if "401" not in text] == []


def test_a_server_that_has_gone_is_told(page: Page) -> None:
    with serving() as gone:
        page.open(f"{gone.http_url}/")  # without keys: shown at once
        page.wait(SHOWN)
        assert page.text("#state") == "Ready"
        assert post(gone, request_of([1, 2])).status_code == 200
        page.wait("document.querySelectorAll('#tenants tbody tr').length === 1")
    page.value("(() => { const now = Date.now; Date.now = () => now() + 20000; })()")
    page.wait("document.getElementById('state').textContent === 'No answer'")
    assert "last seen" in page.text("#seen")
    assert page.value("document.body.classList.contains('stale')")
