"""`transformers-rfdetr convert` and `convert-back`: convert checkpoints of rfdetr to model folders, and back."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..text_table import format_table
from .errors import one_line_errors
from .options import ClassNamesOption, PrivateOption, PushToHubOption, VariantOption, read_names

if TYPE_CHECKING:
    from ..conversion.convert import Conversion

TO_HF_EXAMPLE = """examples:

transformers-rfdetr convert rf-detr-seg-nano seg-nano

transformers-rfdetr convert output/checkpoint_best_total.pth my-model --push-to-hub me/my-model
"""
TO_RFDETR_EXAMPLE = "example: transformers-rfdetr convert-back my-model my-model.pth"


@one_line_errors
def convert(
    source: Annotated[str, typer.Argument(help="A checkpoint file of rfdetr, or the name of a published checkpoint.")],
    output: Annotated[Path, typer.Argument(help="The new folder.")],
    variant: VariantOption = None,
    class_names: ClassNamesOption = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="Convert the EMA weights of the file. Default: its other weights.")
    ] = False,
    trust_checkpoint: Annotated[
        bool,
        typer.Option(
            "--trust-checkpoint", help="Also read a file that runs code, with your permissions. Default: refuse it."
        ),
    ] = False,
    push_to_hub: PushToHubOption = None,
    private: PrivateOption = False,
) -> None:
    """Convert a checkpoint of rfdetr (.pth, .pt, .ckpt) to a folder that from_pretrained loads."""
    from ..conversion.convert import convert_to_transformers

    conversion = convert_to_transformers(
        source,
        output,
        variant=variant,
        class_names=None if class_names is None else read_names("--class-names", class_names),
        ema=ema,
        trust_checkpoint=trust_checkpoint,
        push_to_hub=push_to_hub,
        private=private,
    )
    _report(conversion)
    auto = conversion.config.architectures[0].replace("RfDetr", "AutoModel")
    typer.echo(f'Load it with {auto}.from_pretrained("{push_to_hub or output}").')


@one_line_errors
def convert_back(
    source: Annotated[
        str, typer.Argument(help="A folder or Hub id of a model of this package or of transformers' port.")
    ],
    output: Annotated[Path, typer.Argument(help="The new file, such as model.pth.")],
) -> None:
    """Convert a folder of transformers to a checkpoint file that rfdetr loads."""
    from ..conversion.convert import convert_to_rfdetr

    conversion = convert_to_rfdetr(source, output)
    _report(conversion)
    typer.echo(f'Load it with rfdetr.RFDETR.from_checkpoint("{output}").')


def _report(conversion: "Conversion") -> None:
    from ..model.variants_rf_detr import class_labels

    config = conversion.config
    names = list(class_labels(config.id2label).values())
    shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
    kind = "Instance segmentation" if "Segmentation" in config.architectures[0] else "Detection"
    typer.echo(
        f"{kind} at {config.resolution} x {config.resolution}, {config.num_queries} queries,"
        f" {len(names)} classes ({shown}): {conversion.output}"
    )
    header = ["what", "in the source", "in the result"]
    typer.echo(
        format_table(header, conversion.changes, left=(0, 1, 2)) if conversion.changes else "Nothing was changed."
    )
