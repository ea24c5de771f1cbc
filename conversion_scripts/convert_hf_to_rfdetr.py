"""Convert a model folder or Hub id to a checkpoint file that rfdetr loads, as `transformers-rfdetr convert-back` does.

python conversion_scripts/convert_hf_to_rfdetr.py seg-nano seg-nano.pth
"""

import typer

from transformers_rfdetr.cli.convert import convert_back

if __name__ == "__main__":
    typer.run(convert_back)
