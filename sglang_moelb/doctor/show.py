"""The report as one table for people, or as JSON for programs."""

from __future__ import annotations

import msgspec
from rich.markup import escape
from rich.table import Table

from sglang_moelb.doctor.facts import Facts, Mark, Report

STYLES = {Mark.OK: "green", Mark.NO: "bold red", Mark.NOTE: "dim"}


def table_of(report: Report) -> Table:
    """One table, a section a block."""
    table = Table("", "what", "", "found", "fix", title="moelb doctor", title_justify="left")
    for column in table.columns:
        column.overflow = "fold"  # a command cut short cannot be run
    section = ""
    for row in report.rows:
        if section and row.section != section:
            table.add_section()
        shown = "" if row.section == section else row.section
        section = row.section
        style = STYLES[row.mark]
        mark = f"[{style}]{row.mark}[/]"
        table.add_row(shown, escape(row.what), mark, escape(row.found), escape(row.fix))
    return table


def json_of(facts: Facts, report: Report) -> str:
    """`{"can_run": bool, "rows": [...], "facts": {...}}`, indented."""
    tree = {"can_run": report.can_run, "rows": report.rows, "facts": facts}
    return msgspec.json.format(msgspec.json.encode(tree), indent=1).decode()
