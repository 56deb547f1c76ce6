"""A real headless Chromium, steered over its debugging pipe: clicks, keys, screenshots."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from itertools import count
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
KEYS = {"Enter": ("\r", 13), "Tab": ("", 9)}


def find_browser() -> str:
    """Where a Chromium is; the test is skipped, and says so, where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no browser: install chromium")
    return found


class Browser:
    """The process of a browser; close it in the end, or use it as a context."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds the profile."""
        ours, theirs = os.pipe(), os.pipe()  # the browser reads descriptor 3 and writes descriptor 4
        flags = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-dev-shm-usage")
        switches = [
            *(f"--{flag}" for flag in flags),
            "--remote-debugging-pipe",
            f"--user-data-dir={folder / 'profile'}",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{ours[0]} 4>&{theirs[1]}', find_browser(), *switches, "about:blank"],
            pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(ours[0])
        os.close(theirs[1])
        self._to, self._from = os.fdopen(ours[1], "wb"), os.fdopen(theirs[0], "rb")
        self._numbers, self._rest = count(1), b""
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._to.close()  # at the end of its commands the browser ends
        self._process.wait(timeout=30)
        self._from.close()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol; what happens meanwhile is added to `events`."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer}"
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            got = self._from.read1(1 << 20)
            assert got, f"the browser ended with status {self._process.wait()}"
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\0")
        return json.loads(line)

    def visit(self, address: str, width: int = 1200, height: int = 900, beside: Visitor | None = None) -> Visitor:
        """A visitor with cookies of its own, at a page. beside: one of whose tabs it is another."""
        return Visitor(self, address, width, height, beside)


class Visitor:
    """One window. Selectors are CSS; what is expected is waited for."""

    def __init__(self, browser: Browser, address: str, width: int, height: int, beside: Visitor | None) -> None:
        self._browser = browser
        self._context = beside._context if beside else browser.call("Target.createBrowserContext")["browserContextId"]
        self._target = browser.call("Target.createTarget", url="about:blank", browserContextId=self._context)[
            "targetId"
        ]
        self._session = browser.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.call("Page.navigate", url=address)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the DevTools protocol for this window."""
        return self._browser.call(method, self._session, **parameters)

    def close(self) -> None:
        """Close the tab, as a user does."""
        self._browser.call("Target.closeTarget", targetId=self._target)

    def resize(self, width: int, height: int) -> None:
        """Give the window this size."""
        size = {"width": width, "height": height}
        self.call("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=False)

    def darken(self, dark: bool = True) -> None:
        """Ask for the page's dark colours."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def js(self, expression: str) -> Any:
        """What an expression in JavaScript gives."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 90) -> Any:
        """The first truthy value of an expression; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while not (value := self.js(expression)):
            assert time.monotonic() < deadline, f"{expression} is still {value!r}; the page says {self.text()[-800:]!r}"
            time.sleep(0.05)
        return value

    def text(self) -> str:
        """All words that are seen."""
        return self.js("document.body.innerText")

    def shown(self, selector: str) -> bool:
        """Whether an element is `usable` now."""
        return bool(
            self.js(f"(() => {{ const e = {_query(selector)}; return !!e && e.offsetHeight > 0 && !e.disabled }})()")
        )

    def click(self, selector: str) -> None:
        """Click into the middle of an element with the mouse, once it is shown."""
        self.wait(usable(selector))
        self.js(f"{_query(selector)}.scrollIntoView({{block: 'nearest'}})")
        x, y = self.js(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({_query(selector)}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, words: str) -> None:
        """Put words into a box that had others, or none."""
        self.click(selector)
        self.js(f"{_query(selector)}.select()")
        if words:
            self.call("Input.insertText", text=words)
        else:
            self.press("Backspace", 8)

    def upload(self, selector: str, file: Path) -> None:
        """Choose a file in an input for files."""
        self.wait(f"!!{_query(selector)}")
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def press(self, key: str, code: int | None = None, shift: bool = False) -> None:
        """Press a key, of `KEYS` or with its code."""
        text, number = KEYS.get(key, ("", code))
        about = {"key": key, "code": key, "windowsVirtualKeyCode": number, "modifiers": 8 if shift else 0}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, file: Path) -> None:
        """Save what is seen as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def complaints(self) -> list[str]:
        """What went wrong in the page's own scripts so far, and requests that failed."""
        self.js("0")
        found = []
        for event in self._browser.events:
            about = event.get("params", {})
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(about["exceptionDetails"].get("exception", {}).get("description", str(about)))
            elif event["method"] == "Log.entryAdded" and about["entry"]["level"] == "error":
                found.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        return found


def _query(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)})"


def usable(selector: str) -> str:
    """An expression: whether an element is there, has a size and is not disabled."""
    return f"(e => !!e && e.offsetHeight > 0 && !e.disabled)({_query(selector)})"
