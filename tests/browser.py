"""A headless Chromium, spoken to over a pipe in its devtools protocol: pages, a pointer, keys, a finger, pictures."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"),
    *("--allow-file-access-from-files", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"),
]
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, " ": 32, "Enter": 13}


class Browser:
    """One process; `page` opens an address in it.

    Args:
        profile: An empty folder.
    """

    def __init__(self, profile: Path):
        down, self.to = os.pipe()
        self.back, up = os.pipe()
        kept = [os.open(os.devnull, os.O_RDONLY) for _ in range(5)]  # so that none of ours is 3 or 4

        def connect():
            high = [os.dup(os.dup(down)), os.dup(os.dup(up))]
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [CHROMIUM, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, close_fds=False, preexec_fn=connect, **quiet)
        for handle in (down, up, *kept):
            os.close(handle)
        self.count, self.rest, self.listeners = 0, b"", {}

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)
        os.close(self.to)
        os.close(self.back)

    def send(self, method: str, session: str | None = None, **parameters) -> int:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        os.write(self.to, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        return self.count

    def receive(self, seconds: float) -> dict | None:
        """The next message; None if there is none in that time."""
        while b"\0" not in self.rest:
            if not select.select([self.back], [], [], seconds)[0]:
                return None
            self.rest += os.read(self.back, 1 << 20)
        text, _, self.rest = self.rest.partition(b"\0")
        message = json.loads(text)
        if "method" in message and message.get("sessionId") in self.listeners:
            self.listeners[message["sessionId"]](message["method"], message["params"])
        return message

    def ask(self, method: str, session: str | None = None, seconds: float = 60, **parameters) -> dict:
        number, end = self.send(method, session, **parameters), time.time() + seconds
        while time.time() < end:
            message = self.receive(end - time.time())
            if message and message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]
        raise TimeoutError(method)

    def page(self, address: str, width: int = 1200, height: int = 900, dark: bool = False, scripts: bool = True,
             touch: bool = False) -> "Page":
        return Page(self, address, width, height, dark, scripts, touch)


class Page:
    """One open page; notes what goes wrong and what is fetched."""

    def __init__(self, browser: Browser, address: str, width: int, height: int, dark: bool, scripts: bool, touch: bool):
        self.browser, self.errors, self.fetched, self.loaded = browser, [], [], False
        target = browser.ask("Target.createTarget", url="about:blank")["targetId"]
        self.target = target
        self.session = browser.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        browser.listeners[self.session] = self.note
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        self.ask("Emulation.setTouchEmulationEnabled", enabled=touch)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Emulation.setScriptExecutionDisabled", value=not scripts)
        self.ask("Page.navigate", url=address)
        end = time.time() + 60
        while not self.loaded and time.time() < end:
            browser.receive(end - time.time())
        assert self.loaded, f"{address} does not load"

    def note(self, method: str, params: dict) -> None:
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Network.requestWillBeSent":
            self.fetched.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(part.get("value", part.get("description"))) for part in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def ask(self, method: str, **parameters) -> dict:
        return self.browser.ask(method, self.session, **parameters)

    def close(self) -> None:
        self.browser.ask("Target.closeTarget", targetId=self.target)

    def evaluate(self, script: str, seconds: float = 60):
        """The value of a JavaScript expression."""
        reply = self.ask("Runtime.evaluate", seconds=seconds, expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        """Until an expression is true."""
        end = time.time() + seconds
        while time.time() < end:
            if self.evaluate(script):
                return
            self.browser.receive(0.05)
        raise TimeoutError(f"{script}; errors: {self.errors}")

    def rest(self, seconds: float = 0.1) -> None:
        end = time.time() + seconds
        while time.time() < end:
            self.browser.receive(end - time.time())

    def centre(self, selector: str, index: int = 0) -> tuple[float, float]:
        """The middle of an element, after it has been scrolled into view."""
        script = (f"(() => {{ const e = document.querySelectorAll({json.dumps(selector)})[{index}];"
                  "e.scrollIntoView({ block: 'center', behavior: 'instant' }); const r = e.getBoundingClientRect();"
                  "return [r.x + r.width / 2, r.y + r.height / 2] })()")
        return tuple(self.evaluate(script))

    def mouse(self, kind: str, x: float, y: float) -> None:
        button = {"button": "left", "buttons": 1, "clickCount": 1} if kind != "mouseReleased" else {"button": "left"}
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **(button | {"clickCount": 1}))

    def click(self, selector: str, index: int = 0) -> None:
        place = self.centre(selector, index)
        self.mouse("mousePressed", *place)
        self.mouse("mouseReleased", *place)

    def drag(self, start: tuple[float, float], dx: float, dy: float, steps: int = 5) -> None:
        self.mouse("mousePressed", *start)
        for step in range(1, steps + 1):
            self.mouse("mouseMoved", start[0] + dx * step / steps, start[1] + dy * step / steps)
        self.mouse("mouseReleased", start[0] + dx, start[1] + dy)

    def swipe(self, start: tuple[float, float], dx: float, dy: float, steps: int = 5) -> None:
        """Drag with a finger."""
        self.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": start[0], "y": start[1]}])
        for step in range(1, steps + 1):
            point = {"x": start[0] + dx * step / steps, "y": start[1] + dy * step / steps}
            self.ask("Input.dispatchTouchEvent", type="touchMove", touchPoints=[point])
        self.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, shift: bool = False) -> None:
        same = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key],
                "modifiers": 8 if shift else 0}
        text = {"text": key} if key == " " else {}
        self.ask("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **same, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", **same)

    def picture(self, path: Path | str, selector: str | None = None, index: int = 0) -> None:
        """A picture of the window, or of one element."""
        clip = {}
        if selector:
            self.centre(selector, index)
            script = (f"(() => {{ const r = document.querySelectorAll({json.dumps(selector)})[{index}]"
                      ".getBoundingClientRect(); return [r.x + scrollX, r.y + scrollY, r.width, r.height] })()")
            x, y, w, h = self.evaluate(script)
            clip = {"clip": {"x": max(0, x - 8), "y": max(0, y - 8), "width": w + 16, "height": h + 16, "scale": 1}}
        Path(path).write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", **clip)["data"]))
