"""`transformers-rfdetr app`: try a model on a web page, or make a Space of the page."""

from typing import Annotated

import typer

from .errors import one_line_errors, terminated_as_interrupted
from .options import AnyModelArgument, DeviceOption, Dtype, DtypeOption, PrivateOption, ThreadsOption, load_model

EXAMPLE = """examples:

transformers-rfdetr app rf-detr-seg-tiny

transformers-rfdetr app my-model.onnx --host 0.0.0.0 --port 8000

transformers-rfdetr app my-model --push-space me/my-model
"""


@one_line_errors
@terminated_as_interrupted()
def app(
    model: AnyModelArgument,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen at; 0.0.0.0 for all of this computer's, which other computers can reach. Default:"
            " GRADIO_SERVER_NAME, else 127.0.0.1."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port. Default: the first free one from 7860 on.")
    ] = None,
    push_space: Annotated[
        str | None,
        typer.Option(metavar="USER/NAME", help="Upload the page to this Space of the Hub instead of serving it here."),
    ] = None,
    private: PrivateOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.FLOAT32,
    threads: ThreadsOption = None,
) -> None:
    """Serve a web page on which images are uploaded and their instances shown, filtered and downloaded as JSON.

    POST requests to /predict are answered as by the handler of an Inference Endpoint.
    """
    from ..hub.space import page_title
    from ..hub.space import push_space as push

    loaded, processor = load_model(model, device, dtype, threads)
    if push_space is not None:
        typer.echo(f"Pushed; the page will be at {push(model, loaded, processor, push_space, private=private or None)}")
        return
    from ..inference.web_page import serve

    page = serve(loaded, processor, title=page_title(model), host=host, port=port, wait=False)
    typer.echo(f"{page.local_url} (Ctrl-C ends it)")
    page.block_thread()
