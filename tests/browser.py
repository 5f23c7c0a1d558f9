"""A headless Chromium, driven through its debugging pipe: a page as a person's browser shows it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest


class Browser:
    """One page. Messages are JSON, each ended by a zero byte, on the browser's fds 3 and 4."""

    def __init__(self, profile: Path, address: str):
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            pytest.skip("there is no chromium: apt-get install chromium")
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        above = [os.dup(to_read), os.dup(to_write)]  # neither end may be 3 or 4 itself

        def place():
            os.dup2(above[0], 3)
            os.dup2(above[1], 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        flags += ["--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"]
        self._process = subprocess.Popen(
            [program, *flags], preexec_fn=place, pass_fds=(3, 4), stderr=subprocess.DEVNULL
        )
        for each in (to_read, to_write, *above):
            os.close(each)
        self._rest, self._count, self.session = b"", 0, None
        self.events = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Page.navigate", url=address)
        while not any(each["method"] == "Page.loadEventFired" for each in self.events):
            self._receive()

    def call(self, method: str, **params) -> dict:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def close(self) -> None:
        os.close(self._write)
        self._process.terminate()
        self._process.wait(30)
        os.close(self._read)

    def _receive(self) -> dict:
        while b"\0" not in self._rest:
            more = os.read(self._read, 1 << 16)
            assert more, "the browser is gone"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message
