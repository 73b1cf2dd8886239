"""Debian's Chromium without a window, driven over its DevTools protocol: real clicks, real keys, pictures."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
REASON = "no Chromium here (Debian: apt-get install chromium)"
WAIT_S = 30.0
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--hide-scrollbars",
    "--remote-debugging-port=0", "about:blank",
)  # fmt: skip


class Page:
    """One tab. `complaints`: what the page's console, its exceptions and its security policy have said."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self._sent = 0
        self.complaints: list[str] = []
        self.requested: list[str] = []  # URLs
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT_S))
            if message.get("id") == self._sent:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(told["exceptionDetails"]["exception"].get("description", "an exception"))
        elif message.get("method") == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.complaints.append(told["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requested.append(told["request"]["url"])

    def look(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        """How wide the window is, and what its user likes."""
        scale = 2 if phone else 1
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        self._ask("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        done = self._ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def wait(self, script: str) -> Any:
        """Until the expression is true."""
        deadline = time.monotonic() + WAIT_S
        while not (found := self.value(script)):
            assert time.monotonic() < deadline, f"{script}: {found!r}; the page says {self.text('body')!r}"
            time.sleep(0.05)
        return found

    def text(self, selector: str) -> str:
        """What one sees of it."""
        return str(self.value(f"(e => e.innerText ?? e.textContent)(document.querySelector({json.dumps(selector)}))"))

    def texts(self, selector: str) -> list[str]:
        return list(self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)"))

    def point(self, selector: str, across: float = 0.5) -> tuple[float, float]:
        found = json.dumps(selector)
        self.value(f"document.querySelector({found}).scrollIntoView({{block: 'center'}})")
        box = self.value(f"document.querySelector({found}).getBoundingClientRect().toJSON()")
        return box["x"] + across * box["width"], box["y"] + box["height"] / 2

    def move(self, selector: str, across: float = 0.5) -> None:
        x, y = self.point(selector, across)
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        x, y = self.point(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        self._ask("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self._ask(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )

    def picture(self, path: Path) -> Path:
        """Of the whole page, however long."""
        self.value("scrollTo(0, 0)")
        data = self._ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))
        return path


@contextlib.contextmanager
def browsing() -> Iterator[Page]:
    """A fresh browser with one tab."""
    assert CHROMIUM is not None, REASON
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [CHROMIUM, *OPTIONS[:-1], f"--user-data-dir={folder}", OPTIONS[-1]]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with _tab(_port(Path(folder) / "DevToolsActivePort")) as page:
                yield page
        finally:
            process.terminate()
            process.wait(WAIT_S)


def _port(file: Path) -> int:
    """That it listens on, as it says itself."""
    deadline = time.monotonic() + WAIT_S
    while not (file.exists() and file.read_text().count("\n")):
        assert time.monotonic() < deadline, "Chromium did not start"
        time.sleep(0.02)
    return int(file.read_text().splitlines()[0])


@contextlib.contextmanager
def _tab(port: int) -> Iterator[Page]:
    tabs = httpx.get(f"http://127.0.0.1:{port}/json/list", timeout=WAIT_S).json()
    url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
    with connect(url, max_size=None, compression=None) as socket:
        yield Page(socket)
