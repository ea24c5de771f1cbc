"""The command `transformers-rfdetr`; each sub-command is in a file of its own."""

import typer

from . import (
    audit,
    benchmark,
    check_dataset,
    compare,
    convert,
    convert_dataset,
    evaluate,
    export,
    info,
    predict,
    suggest,
    train,
    web_app,
)

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="RF-DETR instance segmentation and detection for Hugging Face transformers.",
)
app.command(epilog=predict.EXAMPLE)(predict.predict)
app.command(epilog=train.EXAMPLE)(train.train)
app.command(epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command(epilog=compare.EXAMPLE)(compare.compare)
app.command(epilog=suggest.EXAMPLE)(suggest.suggest)
app.command(epilog=check_dataset.EXAMPLE)(check_dataset.check_dataset)
app.command(epilog=audit.EXAMPLE)(audit.audit)
app.command(epilog=convert_dataset.EXAMPLE)(convert_dataset.convert_dataset)
app.command(epilog=info.EXAMPLE)(info.info)
app.command(epilog=benchmark.EXAMPLE)(benchmark.benchmark)
app.command(epilog=export.EXAMPLE)(export.export)
app.command(epilog=web_app.EXAMPLE)(web_app.app)
app.command(epilog=convert.TO_HF_EXAMPLE)(convert.convert)
app.command(epilog=convert.TO_RFDETR_EXAMPLE)(convert.convert_back)

if __name__ == "__main__":
    app()
