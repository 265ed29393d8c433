"""Tables in Markdown, and their places in a file."""

from __future__ import annotations

from pathlib import Path


def table_of(columns: list[str], rows: list[list[str]]) -> str:
    """A table with a cell for each column in each row."""
    lines = [f"| {' | '.join(cells)} |" for cells in [columns, *rows]]
    return "\n".join([lines[0], "|---" * len(columns) + "|", *lines[1:]])


def put_between_marks(file: Path, name: str, table: str) -> None:
    """Write between ``<!-- name -->`` and ``<!-- /name -->``; raises ValueError if they are missing."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = file.read_text(encoding="utf-8").partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"{file} has no place for the table: put the lines {begin} and {end} into it.")
    file.write_text(f"{head}{begin}\n{table}\n{end}{tail}", encoding="utf-8")
