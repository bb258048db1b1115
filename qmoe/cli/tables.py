"""Results for people, as rich tables on standard output."""

from typing import Any

from qmoe.system.sizes import format_size


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is left-aligned, the others right."""
    from rich.console import Console  # here, so that the library works where rich is missing
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    # Piped output has no width of its own; do not cut columns to a guess of 80.
    Console(width=None if Console().is_terminal else 160).print(table)


def bytes_rows(kinds: dict[str, int]) -> list[list[str]]:
    """One row per kind of bytes, with its share, and a total."""
    total = sum(kinds.values())
    rows = [
        [kind, format_size(n), f"{100 * n / max(total, 1):.1f} %"] for kind, n in kinds.items() if n
    ]
    return [*rows, ["total", format_size(total), "100.0 %"]]


def scores_rows(scores: dict[str, Any], key: str, digits: int) -> list[list[str]]:
    """One row per domain, one column per model."""
    domains = next(iter(scores.values()))
    return [[d, *(f"{model[d][key]:.{digits}f}" for model in scores.values())] for d in domains]
