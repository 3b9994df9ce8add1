"""Takes the two pictures of README.md: the page of `models report`, and a DAG's graph in Airflow.

    make demo && make up
    python infra/docs/screenshots.py page .demo/lake/completejourney/report.html
    python infra/docs/screenshots.py dag http://127.0.0.1:8080/dags/sessions_daily.completejourney

Needs Chromium. Pictures go to docs/assets.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

ASSETS = Path(__file__).resolve().parents[2] / "docs" / "assets"
SIZES = {"page": (760, 575), "dag": (1300, 420)}
GRAPH = "localStorage.setItem('default_dag_view', '\"graph\"')"

PLAIN = "for (const one of document.querySelectorAll('.react-flow__minimap')) one.remove()"


class Browser:
    """A headless Chromium, spoken to by its DevTools protocol."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        if program is None:
            sys.exit("no Chromium here (Debian: apt install chromium)")
        self.process = subprocess.Popen(
            [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0",
             f"--user-data-dir={folder}", "about:blank"],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        port_file = folder / "DevToolsActivePort"
        while not port_file.exists() or not port_file.read_text():
            time.sleep(0.1)
        port, path = port_file.read_text().split()
        self.socket: ClientConnection = connect(
            f"ws://127.0.0.1:{port}{path}", max_size=None, legacy=True
        )
        self.number = 0
        self.session: str | None = None
        pages = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in pages if one["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        self.socket.send(
            json.dumps(message | ({"sessionId": self.session} if self.session else {}))
        )
        while True:
            answer = json.loads(self.socket.recv(timeout=60))
            if answer.get("id") == self.number:
                return dict(answer["result"])

    def picture(self, address: str, width: int, height: int, wait_s: float, before: str) -> bytes:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)  # fmt: skip
        self.call("Page.navigate", url=address)
        time.sleep(wait_s)
        if before:
            self.call("Runtime.evaluate", expression=before)
            self.call("Page.navigate", url=address)
            time.sleep(wait_s)
        self.call("Runtime.evaluate", expression=PLAIN)
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=list(SIZES))
    parser.add_argument("where", help="a file, or an address")
    parser.add_argument("--wait-s", type=float, default=10.0, help="until the page is drawn")
    args = parser.parse_args()
    address = args.where if "://" in args.where else Path(args.where).resolve().as_uri()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(Path(folder))
        try:
            picture = browser.picture(
                address, *SIZES[args.what], args.wait_s, GRAPH * (args.what == "dag")
            )
        finally:
            browser.close()
    (ASSETS / f"{args.what}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
