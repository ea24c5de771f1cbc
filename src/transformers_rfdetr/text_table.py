"""Format a table as plain text that is the same on a terminal and in a pipe."""

import io
from collections.abc import Collection, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .atomic_files import escape_unprintable


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]], *, left: Collection[int] = (0,)) -> str:
    """Return the lines of a table; a cell is never cut or wrapped, however long it is.

    Args:
        header: Titles of the columns; without any, the columns are aligned left and have no titles.
        rows: The cells of each row.
        left: Indices of the columns that are aligned left; the others, of numbers, are aligned right.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="", show_header=bool(header))
    for index, title in enumerate(header):
        table.add_column(Text(title), justify="left" if index in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(escape_unprintable(str(cell))) for cell in row))
    text = io.StringIO()
    Console(file=text, width=1 << 20, color_system=None, force_jupyter=False).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
