"""The page of a source file's keys is what the code says."""

from __future__ import annotations

from jobs.core import reference
from jobs.core.source_file import Source
from tests.support.airflow_tools import REPO


def test_the_page_of_keys_is_up_to_date() -> None:
    page = REPO / "docs" / "reference" / "source-file.md"
    assert page.read_text(encoding="utf-8") == reference.page(), "run: make reference"


def test_every_key_says_what_it_means() -> None:
    """A key without a text under it has no row, so the page could not be made."""
    page = reference.page()
    for name in Source.model_fields:
        assert f"\n## [{name}]\n" in page
    assert "| `gap_s` | number | `1800` | > 0 and <= 316,224,000 | A silence of more than" in page
    assert (
        "| `format` | text | required | `csv`, `jsonl`, `json`, `parquet`, `orc`, `avro`, `delta`, "
        in page
    )
