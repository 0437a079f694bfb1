"""Headless Chromium, driven over a pipe by its own protocol: no driver and no library stands between."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)

PATIENCE = 60.0
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-sandbox", "--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-default-browser-check", "--mute-audio", "--hide-scrollbars", "about:blank"),
)
#: Chromium speaks on the descriptors 3 and 4; whatever they are elsewhere is moved there first.
LAUNCH = """
import fcntl, os, sys
heard, said = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(heard, 3); os.dup2(said, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Chromium:
    """A browser that is driven over a pipe by its own protocol."""

    def __init__(self, folder: Path) -> None:
        heard, self._to = os.pipe()
        self._from, said = os.pipe()
        command = [sys.executable, "-ISc", LAUNCH, str(heard), str(said), CHROMIUM, f"--user-data-dir={folder}"]
        environment = {**os.environ, "HOME": str(folder)}
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen([*command, *FLAGS], pass_fds=(heard, said), env=environment, **quiet)
        os.close(heard)
        os.close(said)
        self._buffer, self._number = b"", 0
        self._events: dict[str, list[dict[str, Any]]] = {}

    def send(self, method: str, *, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._to, json.dumps({**message, **({"sessionId": session} if session else {})}).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events(answer.get("sessionId", "")).append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def events(self, session: str) -> list[dict[str, Any]]:
        return self._events.setdefault(session, [])

    def wait_for(self, method: str, *, session: str) -> None:
        while not any(event["method"] == method for event in self.events(session)):
            answer = self._next()
            self.events(answer.get("sessionId", "")).append(answer)

    def _next(self) -> dict[str, Any]:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                pytest.fail(f"the browser said nothing for {PATIENCE:g} s")
            part = os.read(self._from, 1 << 20)
            assert part, "the browser ended"
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def close(self) -> None:
        self.send("Browser.close")
        os.close(self._to)
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Tab:
    """One page in the browser."""

    def __init__(self, browser: Chromium, file: Path) -> None:
        self._browser, self.url = browser, file.as_uri()
        self._target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.send("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")
        self.load()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.send(method, session=self._session, **parameters)

    def load(self) -> None:
        self._browser.events(self._session).clear()
        self.send("Page.navigate", url=self.url)
        self._browser.wait_for("Page.loadEventFired", session=self._session)

    def events(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self._browser.events(self._session) if event["method"] == method]

    def look(self, *, width: int, media: str = "screen", scheme: str = "light") -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        wishes = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.send("Emulation.setEmulatedMedia", media=media, features=features)

    def run(self, script: str) -> Any:
        found = self.send("Runtime.evaluate", expression=f"(() => {{{script}}})()", returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def read_aloud(self) -> list[dict[str, Any]]:
        """What a screen reader is given, in the order of the page."""
        nodes = {node["nodeId"]: node for node in self.send("Accessibility.getFullAXTree")["nodes"]}
        waiting = [next(name for name, node in nodes.items() if "parentId" not in node)]
        found = []
        while waiting:
            node = nodes[waiting.pop()]
            waiting += [child for child in reversed(node.get("childIds", [])) if child in nodes]
            found += [] if node["ignored"] else [node]
        return found

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def close(self) -> None:
        self._browser.send("Target.closeTarget", targetId=self._target)
