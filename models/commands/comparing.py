"""`compare`, `power`, `report`: what came of many trainings."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from models.commands.common import COMPARISON


def compare_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", required=True, metavar="ID", help=COMPARISON)
    command.add_argument("--expect", help="methods that should be there, by comma")


def power_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", metavar="ID", help="a pilot; default: the newest one")
    command.add_argument("--split", help="of the newest one that has this split")
    command.add_argument(
        "--methods", help="by comma; default: all that have another to compare with"
    )
    command.add_argument(
        "--against", metavar="METHOD", help="default: each method's backbone alone"
    )


def report_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--comparison", metavar="ID", help="default: the newest")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="default: report.html in the lake"
    )


def run_compare(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.selection.compare import compare, show

    expect = [name.strip() for name in (args.expect or "").split(",") if name.strip()]
    outcome = compare(source.name, args.comparison, expect)
    show(outcome)
    return outcome


def run_power(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.selection.power import power, show

    methods = [name.strip() for name in (args.methods or "").split(",") if name.strip()]
    outcome = power(source.name, args.comparison, args.split, methods, args.against)
    show(outcome)
    return outcome


def run_report(args: argparse.Namespace, source: Any, lake: str) -> dict[str, Any]:
    from models.report.report import report

    done = report(source, lake, args.comparison, args.out)
    print(
        f"{done['page']}: comparison {done['comparison']}"
        + (f"; {done['url']}" if done["url"] else "")
    )
    return done
