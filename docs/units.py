"""A hook of MkDocs: keep numbers and their units on one line in the cells of tables."""

import re
from typing import Any

UNITS = r"(?<=\d) (?=(?:%|x|[mµ]?s|h|[KMG]i?B?|MB|W|px)(?:[\s,;/)<]|$))"


def on_page_content(html: str, **_: Any) -> str:
    """Return the page with non-breaking spaces."""
    return re.sub(r"<td[^>]*>.*?</td>", lambda cell: re.sub(UNITS, "&nbsp;", cell[0]), html, flags=re.DOTALL)
