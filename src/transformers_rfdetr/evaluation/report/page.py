"""What the HTML pages have in common: templates, style and script, and images inside of the page.

A page is one file that loads nothing: its images are inside, its policy allows only its own script, and Jinja2 escapes
every text that comes from data or from a checkpoint.
"""

import base64
import hashlib
import io
from pathlib import Path

import jinja2
import PIL.Image
from markupsafe import Markup

_TEMPLATES = Path(__file__).with_name("templates")
_MAX_JPEG_BYTES, _JPEG_QUALITIES = 100_000, (85, 70, 50, 30, 15)


def page_environment() -> jinja2.Environment:
    """Return the environment of the templates, which escapes all values."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )


def style_and_script(name: str) -> dict[str, str]:
    """Return the `style` of all pages, the `script` in a file, and its `script_hash` for the page's policy."""
    script = (_TEMPLATES / name).read_text(encoding="utf-8")
    return {
        "style": Markup((_TEMPLATES / "page.css").read_text(encoding="utf-8")),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def to_data_uri(photo: PIL.Image.Image) -> str:
    """Return an image as JPEG in a data URI, in the first quality that is small enough."""
    for quality in _JPEG_QUALITIES:
        stream = io.BytesIO()
        photo.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= _MAX_JPEG_BYTES:
            break
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
