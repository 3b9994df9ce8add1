"""The page of a training's settings is what the code says, and so are the options and the checks."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import pytest

from models.core.errors import UserError
from models.core.knobs import add_options, check, knob
from models.networks.losses import FULL_ITEMS
from models.training import reference
from tests.support.airflow_tools import REPO


def test_the_page_of_settings_is_up_to_date() -> None:
    page = REPO / "docs" / "reference" / "options.md"
    assert page.read_text(encoding="utf-8") == reference.page(), "run: make reference"


def test_help_says_the_numbers_of_the_code() -> None:
    assert f"auto: full up to {FULL_ITEMS:,} items" in reference.page()


@dataclass(frozen=True, kw_only=True)
class Settings:
    width: int = knob(8, "how wide, 5 % more", low=1, high=9, option="--wide")
    share: float = knob(0.5, "a part", low=0, high=1, open_low=True, open_high=True)
    way: str = knob("a", "which way", choices=("a", "b"))
    rate: float = knob(1.0, "how fast", low=0)
    on: bool = knob(True, "whether")
    inner: int = knob(0, "by presets", low=0, hidden=True)


def test_a_setting_that_is_declared_is_an_option_and_is_checked() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Settings)
    told = parser.parse_args(["--wide", "9", "--share", ".1", "--way", "b", "--no-on"])
    assert vars(told) == {"width": 9, "share": 0.1, "way": "b", "rate": None, "on": False}
    assert "how wide, 5 % more" in parser.format_help()
    check(Settings(width=9, share=0.1, way="b", rate=0.0, inner=5))
    for wrong, says in (
        ({"width": 10}, "--wide 10: use a whole number, 1 to 9"),
        ({"inner": -1}, "--inner -1: use a whole number, 0 to 9,223,372,036,854,775,807"),
        ({"share": 0.0}, "--share 0.0: use a number above 0 to below 1"),
        ({"share": 1.0}, "--share 1.0: use a number above 0 to below 1"),
        ({"rate": float("inf")}, "--rate inf: use a number from 0, finite"),
        ({"rate": float("nan")}, "--rate nan: use a number from 0, finite"),
        ({"way": "c"}, "--way c: use one of a, b"),
    ):
        with pytest.raises(UserError) as error:
            check(Settings(**wrong))  # type: ignore[arg-type]
        assert str(error.value) == says
