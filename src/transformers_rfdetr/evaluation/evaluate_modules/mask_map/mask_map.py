"""COCO's average precision of masks and of their boxes, for `evaluate.load`, which reads imports line by line."""

import evaluate

from transformers_rfdetr.evaluation.coco_evaluator import evaluator_from_rows
from transformers_rfdetr.evaluation.evaluate_modules import INPUTS, features

_DESCRIPTION = """
Average precision and recall of instance masks, and of the boxes around them, as COCOeval computes them: crowd regions
are ignored, and the best 100 detections of each class in an image count.
"""

_KWARGS_DESCRIPTION = f"""{INPUTS}
Returns:
    COCO's twelve metrics with the prefixes `segm_` and `bbox_`, such as `segm_AP`, -1 where there is no object, and
    `per_class`: a dict of `segm_AP`, `segm_AP50`, `bbox_AP` and `num_objects` for each class name.

Example:
    >>> import evaluate
    >>> from transformers_rfdetr.evaluation.evaluate_modules import MASK_MAP
    >>> metric = evaluate.load(str(MASK_MAP))
    >>> left = {{"size": [2, 4], "counts": "044"}}  # the left half
    >>> objects = [{{"category_id": 1, "segmentation": left, "iscrowd": 0, "area": None}}]
    >>> metric.add_batch(
    ...     predictions=[{{"image_id": 1, "scores": [0.9], "labels": [1], "masks": [left]}}],
    ...     references=[{{"image_id": 1, "height": 2, "width": 4, "objects": objects}}],
    ... )
    >>> round(metric.compute(class_names={{1: "roof"}})["per_class"]["roof"]["segm_AP"], 6)
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MaskMap(evaluate.Metric):
    """Average precision of masks and of their boxes."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_KWARGS_DESCRIPTION, features=features()
        )

    def _compute(self, predictions, references, class_names=None):
        return evaluator_from_rows(predictions, references, class_names).average_precision()
