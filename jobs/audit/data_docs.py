"""The Data Docs page of an audit: Great Expectations' own, and the checks that nobody evaluated.

Great Expectations knows expectations that hold, that fail and that raise. A check that could not be
evaluated is none of these, so it is no expectation of the suite: it is in the result's meta,
and this page shows it in a section of its own, with the reason.
"""

from __future__ import annotations

from typing import Any

from great_expectations.render import (
    RenderedSectionContent,
    RenderedStringTemplateContent,
    RenderedTableContent,
)
from great_expectations.render.renderer.page_renderer import ValidationResultsPageRenderer

NOT_EVALUATED = "not_evaluated"
"""Key in the result's meta: a list of `check`, `says`, `why`."""


class AuditPageRenderer(ValidationResultsPageRenderer):
    """As its base, with a section and a status for what was not evaluated."""

    def render(self, validation_results: Any, suite_parameters: Any = None) -> Any:
        page = super().render(validation_results, suite_parameters)
        missing = validation_results.meta.get(NOT_EVALUATED, [])
        if missing:
            total = len(validation_results.results) + len(missing)
            title = f"{len(missing)} of {total} checks not evaluated"
            overview, *rest = page.sections
            _mark(overview.content_blocks[0], validation_results.success, title)
            page.sections = [overview, _section(missing), *rest]
        return page


def _mark(header: Any, success: bool, title: str) -> None:
    """Replace the status: no green tick where checks were not evaluated."""
    params = header.subheader.string_template["params"]
    if success:
        params["html_success_icon"] = '<i class="fas fa-question-circle text-warning"></i>'
    params["success"] = f"{params['success']}, {title}"


def _section(missing: list[dict[str, str]]) -> RenderedSectionContent:
    rows = [[_icon(), one["check"], one["says"], one["why"]] for one in missing]
    table = RenderedTableContent(
        content_block_type="table",
        header_row=["Status", "Check", "Expectation", "Why it was not evaluated"],
        table=rows,
        styling={"body": {"classes": ["table"]}, "classes": ["m-2", "table-responsive"]},
    )
    return RenderedSectionContent(section_name="Not evaluated", content_blocks=[table])


def _icon() -> RenderedStringTemplateContent:
    """(Rendering changes it: each row needs its own.)"""
    return RenderedStringTemplateContent(
        content_block_type="string_template",
        string_template={
            "template": "$icon",
            "params": {"icon": "", "markdown_status_icon": "❓"},
            "styling": {
                "params": {
                    "icon": {"classes": ["fas", "fa-question-circle", "text-warning"], "tag": "i"}
                }
            },
        },
    )
