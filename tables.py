"""Tables as aligned plain text."""

from collections.abc import Container, Iterable

from files import printable


def table(rows: Iterable, head: Iterable[str] = (), right: Container[int] = ()) -> str:
    """Aligned plain text of `rows`, lists of cells; columns whose index is in `right` end flush. None is shown as –."""
    cells = [["–" if cell is None else printable(str(cell)) for cell in row] for row in ([list(head)] if head else []) + list(rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.rjust(width) if i in right else cell.ljust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in cells]
    if head:
        lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)
