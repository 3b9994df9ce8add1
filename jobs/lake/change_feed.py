"""The words of Delta's change feed."""

from __future__ import annotations

GONE = ("delete", "update_preimage")
CAME = ("insert", "update_postimage")
