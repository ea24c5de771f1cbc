"""An extension of griffe: read the docstrings of this package, whose conventions are those of transformers."""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Take "Example:" for a section of code, and [`name`] for code instead of a link."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring of an object."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"\[(`[^`\]]+`)\]", r"\1", text)
