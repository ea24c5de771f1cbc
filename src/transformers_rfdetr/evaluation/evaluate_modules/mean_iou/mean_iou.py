"""Mean IoU of predicted instances, for `evaluate.load`, which reads imports line by line."""

import evaluate

from transformers_rfdetr.evaluation.coco_evaluator import evaluator_from_rows
from transformers_rfdetr.evaluation.evaluate_modules import INPUTS, features

_DESCRIPTION = """
Mean intersection over union of the united masks of each class, summed over all images, without crowd regions, and the
same with all classes as one. `InstanceSegmentationEvaluator.mean_iou` of transformers_rfdetr defines it.
"""

_KWARGS_DESCRIPTION = f"""{INPUTS}
    iou_score_threshold: Score that a detection must exceed to count; 0.5 by default.

Returns:
    `mean_iou`, `mean_iou_class_blind`, and `per_class`: a dict of `iou` for each class name.

Example:
    >>> import evaluate
    >>> from transformers_rfdetr.evaluation.evaluate_modules import MEAN_IOU
    >>> metric = evaluate.load(str(MEAN_IOU))
    >>> left = {{"size": [2, 4], "counts": "044"}}  # the left half
    >>> objects = [{{"category_id": 1, "segmentation": left, "iscrowd": 0, "area": None}}]
    >>> metric.add_batch(
    ...     predictions=[{{"image_id": 1, "scores": [0.9], "labels": [1], "masks": [left]}}],
    ...     references=[{{"image_id": 1, "height": 2, "width": 4, "objects": objects}}],
    ... )
    >>> metric.compute()["mean_iou"]
    1.0
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MeanIou(evaluate.Metric):
    """Mean IoU of the united masks of each class."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION, citation="", inputs_description=_KWARGS_DESCRIPTION, features=features()
        )

    def _compute(self, predictions, references, class_names=None, iou_score_threshold=0.5):
        return evaluator_from_rows(
            predictions, references, class_names, iou_score_threshold=iou_score_threshold
        ).mean_iou()
