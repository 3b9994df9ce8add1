"""The page of a source file's keys is what the code says."""

from __future__ import annotations

import sys

from jobs.core.source_file import Source
from tests.support.make_tools import REPO

sys.path.insert(0, str(REPO / "infra" / "docs"))
import source_file_page


def test_every_key_says_what_it_means() -> None:
    """A key without a text under it has no row, so the page could not be made."""
    page = source_file_page.page({("sessions", "gap_s"): "gap_s = 900"})
    for name in Source.model_fields:
        assert f"\n## [{name}]\n" in page
    assert "| `gap_s` | number | `1800` | > 0 and <= 316,224,000 | A silence of more than" in page
    assert "exactly this many do not. | `gap_s = 900` |\n" in page
    assert (
        "| `format` | text | required | `csv`, `jsonl`, `json`, `parquet`, `orc`, `avro`, `delta`, "
        in page
    )
