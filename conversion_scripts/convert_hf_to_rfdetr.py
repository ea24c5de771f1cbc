"""A folder or Hub id, ours or of transformers' port, to a checkpoint file that rfdetr loads; the same as
`transformers-rfdetr convert-back`.

    python conversion_scripts/convert_hf_to_rfdetr.py seg-nano seg-nano.pth
"""

import typer

from transformers_rfdetr.cli.convert import convert_back

if __name__ == "__main__":
    typer.run(convert_back)
