"""One webhook hears of what wants a person: a task that failed for good, a run that is late, a night
that looks unlike the others.

`SESSIONMILL_NOTIFY_URL` names it; unset, nothing is sent and nothing else changes. What is sent is
JSON by POST; its field `text` says everything in words (chat services show that one), the others
are for programs. Airflow's callbacks and jobs use it; a webhook that does not answer costs half a
minute and a line in the log, and never a night.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from jobs.core.settings import settings

PAUSES_S = (1.0, 4.0)  # ours: three attempts
TIMEOUT_S = 10.0
LONGEST = 4_000  # characters of a text: more is no message but a log


def send(kind: str, text: str, **facts: Any) -> bool:
    """Tell the webhook.

    Args:
        kind: `task failed`, `run late`, `drift` or `lists`.
        text: what happened, where, and what to do, for a person.
        facts: what a program needs of it; anything that JSON can say, others as their text.

    Returns:
        Whether it was taken. Never raises: a failed alert must not fail the job.
    """
    secret = settings().notify_url
    if secret is None:
        return False
    url = secret.get_secret_value()
    message = {"kind": kind, "text": text[:LONGEST], **facts}
    body = json.dumps(message, default=str).encode()
    why = ""
    for pause in (*PAUSES_S, None):
        try:
            request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return True
        except urllib.error.HTTPError as error:
            why = f"{error.code} {error.reason}"
        except (OSError, ValueError) as error:
            why = f"{type(error).__name__}: {getattr(error, 'reason', 'no URL')}"
        if pause is not None:
            time.sleep(pause)
    # (The path of a webhook is its secret: logs get the host only.)
    print(
        f"warning: SESSIONMILL_NOTIFY_URL ({_host(url)}) did not take {kind!r}: {why}", flush=True
    )
    return False


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "no host in it"
    except ValueError:
        return "no URL"
