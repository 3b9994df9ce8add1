"""A headless Chromium, where this machine has one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium here (Debian: apt install chromium)")


def shown(address: str, profile: Path, *options: str) -> tuple[str, str]:
    """The page's DOM in the end, and the browser's log. Waits (`setTimeout`) cost no time."""
    done = subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--allow-file-access-from-files", "--virtual-time-budget=600000",
         f"--user-data-dir={profile}", *options, "--dump-dom", address],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    return done.stdout, done.stderr


def reported(dom: str) -> Any:
    """What a page wrote as JSON into `<pre id="reported">`."""
    found = re.search(r'<pre id="reported">(.*?)</pre>', dom, re.S)
    assert found, dom[-2000:]
    return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
