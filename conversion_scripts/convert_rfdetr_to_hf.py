"""Convert a checkpoint of rfdetr to a folder that from_pretrained loads, as `transformers-rfdetr convert` does.

python conversion_scripts/convert_rfdetr_to_hf.py rf-detr-seg-nano seg-nano
"""

import typer

from transformers_rfdetr.cli.convert import convert

if __name__ == "__main__":
    typer.run(convert)
