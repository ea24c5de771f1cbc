"""Answer the requests to an Inference Endpoint: an image in, instances with masks as COCO RLE out.

https://huggingface.co/docs/inference-endpoints/guides/custom_handler. `push_to_hub(..., endpoint=True)` of
transformers-rfdetr puts this file beside a model, and requirements.txt, which installs that package.
"""

from typing import Any

from transformers_rfdetr import load
from transformers_rfdetr.inference.endpoint_request import answer_request


class EndpointHandler:
    """The model of a repository, which the endpoint calls for each request.

    Args:
        path: Folder of the repository.
    """

    def __init__(self, path: str = "") -> None:
        self.model, self.processor = load(path, device="auto")

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Return the instances of an image; see `answer_request`.

        Args:
            data: `inputs`, the image, which the endpoint decodes if the request has the type image/*, or an image file
                in base64, and `parameters`.
        """
        return answer_request(self.model, self.processor, data)
