"""`transformers-rfdetr`: one sub-command a file."""

import typer

from . import convert, export

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="RF-DETR instance segmentation and detection for Hugging Face transformers.",
)
app.command(epilog=convert.TO_HF_EXAMPLE)(convert.convert)
app.command(epilog=convert.TO_RFDETR_EXAMPLE)(convert.convert_back)
app.command(epilog=export.EXAMPLE)(export.export)
