"""Headless Chromium through chromedriver's HTTP interface (the W3C WebDriver protocol), for tests of pages."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
KEYS = {
    "Enter": "\ue007", "Escape": "\ue00c", "Shift": "\ue008", "Tab": "\ue004",
    "Left": "\ue012", "Right": "\ue014", "Home": "\ue011", "End": "\ue010",
}  # fmt: skip
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
_UNTIL = """
const done = arguments[arguments.length - 1], started = performance.now();
const poll = () => {
  let value = null;
  try { value = (() => (EXPRESSION))(); } catch (error) { value = null; }
  if (value) done({ value });
  else if (performance.now() - started > 8000) done({ late: document.body.innerText });
  else requestAnimationFrame(poll);
};
poll();
"""


class Browser:
    """One window."""

    def __init__(self, http: httpx.Client, session: str) -> None:
        self._http, self._session = http, session

    def open(self, url: str) -> None:
        self._call("POST", "url", {"url": url})

    def run(self, script: str) -> Any:
        """What the page's script returns."""
        return self._call("POST", "execute/sync", {"script": script, "args": []})

    def until(self, expression: str) -> Any:
        """The expression's value once it is true, looked at in every frame."""
        answer = self._call("POST", "execute/async", {"script": _UNTIL.replace("EXPRESSION", expression), "args": []})
        assert "value" in answer, f"{expression} did not become true; the page says: {answer['late']}"
        return answer["value"]

    def text(self, selector: str) -> str:
        return str(self.run(f"return document.querySelector({selector!r}).innerText"))

    def click(self, selector: str) -> None:
        self._call("POST", f"element/{self._find(selector)}/click", {})

    def type(self, selector: str, *keys: str) -> None:
        """Text, or the names of keys; "Shift+Enter" holds the first down."""
        text = "".join(self._key(key) for key in keys)
        self._call("POST", f"element/{self._find(selector)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        actions = [{"type": kind, "value": KEYS.get(key, key)} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def screen(
        self, width: int, height: int, *, scale: float = 1, is_phone: bool = False, scheme: str = "light"
    ) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": is_phone}
        self.devtools("Emulation.setDeviceMetricsOverride", size)
        self.devtools("Emulation.setTouchEmulationEnabled", {"enabled": is_phone})
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", {"features": features})

    def devtools(self, command: str, params: dict[str, Any]) -> Any:
        return self._call("POST", "goog/cdp/execute", {"cmd": command, "params": params})

    def complaints(self) -> list[str]:
        """What the page wrote to the console as warnings and errors since last asked."""
        return [entry["message"] for entry in self._call("POST", "se/log", {"type": "browser"})]

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", "screenshot")))

    def _find(self, selector: str) -> str:
        return str(self._call("POST", "element", {"using": "css selector", "value": selector})[_ELEMENT])

    def _key(self, key: str) -> str:
        if key.startswith("Shift+"):
            return f"{KEYS['Shift']}{KEYS[key.removeprefix('Shift+')]}\ue000"
        return KEYS.get(key, key)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        answer = self._http.request(method, f"/session/{self._session}/{path}", json=body).json()["value"]
        if isinstance(answer, dict) and "error" in answer and "stacktrace" in answer:
            raise AssertionError(f"{path}: {answer['error']}: {answer['message']}")
        return answer


@contextmanager
def browser() -> Iterator[Browser]:
    """A fresh window with an empty profile; needs `CHROMIUM` and `CHROMEDRIVER`."""
    assert CHROMIUM and CHROMEDRIVER
    driver = subprocess.Popen([CHROMEDRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        port = next(match[1] for line in driver.stdout if (match := re.search(r"successfully on port (\d+)", line)))
        options = {
            "binary": CHROMIUM,
            "args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en"],
        }
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "WARNING"}}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as http:
            answer = http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()["value"]
            assert "sessionId" in answer, answer
            http.post(f"/session/{answer['sessionId']}/timeouts", json={"script": 30000})
            try:
                yield Browser(http, answer["sessionId"])
            finally:
                http.delete(f"/session/{answer['sessionId']}")
    finally:
        driver.terminate()
        driver.wait(10)
