"""Evaluation that keeps compact records instead of masks: each process adds its own, and the first merges them."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.trainer_utils import EvalLoopOutput

from ..data.dataset import InstanceDataset, as_instance_dataset
from ..data.load import load_instance_dataset
from ..evaluation.coco_evaluator import InstanceSegmentationEvaluator
from ..evaluation.confidence import FEW_IMAGES
from ..evaluation.evaluation_loop import detect, label_to_category_id, to_category_ids
from ..model.configuration_rf_detr import RfDetrConfig
from .arguments import RfDetrTrainingArguments, non_ema_key
from .data_setup import check_eval_dataset, match_classes, unprepared
from .distributed import run_on_first_process
from .faults import translate_worker_errors
from .private_trainer_api import PrivateTrainerApi
from .weight_average import WeightAverage


@dataclass
class StreamedEvaluation:
    """One pass over a dataset, of which this process evaluates a shard."""

    dataset: Any  # not prepared
    evaluator: InstanceSegmentationEvaluator
    category_of: dict[int, int]  # class index -> category id; classes without one are not evaluated
    loss: float = 0.0  # summed over objects
    num_objects: int = 0

    def add_loss(self, outputs: Mapping[str, Any], labels: Sequence[Mapping[str, Tensor]]) -> None:
        """Add the loss of B images, summed over their objects."""
        self.loss += outputs["loss"].item()
        self.num_objects += sum(len(target["class_labels"]) for target in labels)

    def add_predictions(
        self,
        outputs: Mapping[str, Any],
        labels: Sequence[Mapping[str, Tensor]],
        pixel_mask: Tensor | None,
        score_threshold: float | None,
    ) -> None:
        """Match the predictions for B images with their ground truth, and keep the records.

        Args:
            outputs: Of the model.
            labels: With `image_id` and `orig_size` (height, width) of each image.
            pixel_mask: (B, H, W), 0 where batches are padded.
            score_threshold: Score that a prediction must exceed to be evaluated.
        """
        sizes = [target["orig_size"].tolist() for target in labels]
        predictions = detect(
            outputs,
            sizes,
            score_threshold=score_threshold,
            pixel_mask=pixel_mask,
            max_detections=self.evaluator.max_detections,
        )
        for target, found in zip(labels, predictions, strict=True):
            self.evaluator.update(target["image_id"].item(), **to_category_ids(found, self.category_of))

    def compute(self, process_index: int, num_processes: int, confidence: float | None) -> dict[str, Any]:
        """Merge the records of all processes on the first one; return the metrics on all of them.

        With `confidence` and at least 10 images, their intervals are among them; see
        [`InstanceSegmentationEvaluator.compute`].
        """
        parts: list[Any] = [(self.evaluator.state(), self.loss, self.num_objects)]
        if num_processes > 1:
            gathered = [None] * num_processes if process_index == 0 else None
            torch.distributed.gather_object(parts[0], gathered)
            parts = gathered or []

        def merge() -> dict[str, Any]:
            for state, _, _ in parts[1:]:
                self.evaluator.merge(state)
            loss = sum(part[1] for part in parts) / max(1, sum(part[2] for part in parts))
            level = confidence if len(self.evaluator) >= FEW_IMAGES else None
            return {"loss": loss, **(self.evaluator.compute(level) if len(self.evaluator) else {})}

        return run_on_first_process(merge, process_index)


def start_evaluation(
    dataset: Any,
    config: RfDetrConfig,
    annotations: Mapping[str, Any] | None,
    max_detections: int,
    earlier: Iterable[StreamedEvaluation] = (),
) -> StreamedEvaluation:
    """Return an empty evaluation against the ground truth of a dataset.

    Args:
        dataset: The dataset, prepared or not.
        config: Configuration of the model.
        annotations: COCO dictionary with the ground truth of samples that were prepared elsewhere, with class indices
            as category ids.
        max_detections: See the evaluator.
        earlier: Earlier evaluations; the ground truth of one of the same dataset is used again.

    Raises:
        ValueError: category ids of prepared samples are not class indices.
    """
    source = unprepared(dataset)
    for one in earlier:
        if one.dataset is source:
            one.evaluator.reset()
            return StreamedEvaluation(source, one.evaluator, one.category_of)
    if isinstance(source, InstanceDataset):
        category_of = label_to_category_id(config, source)
        evaluator = InstanceSegmentationEvaluator(source.coco(), max_detections=max_detections)
        return StreamedEvaluation(source, evaluator, category_of)
    if annotations is None:  # a datasets.Dataset whose transform prepares the samples
        annotations = load_instance_dataset(dataset.with_format(None))["train"].coco()
    category_ids = [category["id"] for category in annotations["categories"]]
    if not set(category_ids) <= set(range(config.num_labels)):
        raise ValueError(
            f"Category ids of prepared samples must be class indices 0 .. {config.num_labels - 1}, got category ids"
            f" {category_ids}. Pass load_instance_dataset(...) as `eval_dataset`, which maps them, or"
            " `eval_annotations` with class indices as ids."
        )
    evaluator = InstanceSegmentationEvaluator(annotations, max_detections=max_detections)
    return StreamedEvaluation(source, evaluator, {i: i for i in category_ids})


def count_new_samples(accelerator: Accelerator, args: RfDetrTrainingArguments, batch_size: int) -> int:
    """Return the number of this process's samples in a batch, without the repeats that fill the last batch."""
    state = accelerator.gradient_state
    if args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch_size
    return min(max(state.remainder - args.process_index * args.eval_batch_size, 0), batch_size)


class EvaluatingTrainer(PrivateTrainerApi):
    """A trainer that evaluates the average of the weights, and keeps compact records instead of masks."""

    args: RfDetrTrainingArguments
    eval_annotations: Mapping[str, Any] | None
    weight_average: WeightAverage | None
    measured: dict[str, dict[str, Any]]  # title -> metrics of the trained model
    _evaluations: Sequence[StreamedEvaluation] = ()  # the last one of each evaluation dataset, the present one at last
    _nested_metrics: Mapping[str, Any] = MappingProxyType({})  # dictionaries, which the log does not take

    @property
    def has_masks(self) -> bool:
        """Whether the model predicts masks."""
        return hasattr(self.model, "segmentation_head")

    @property
    def class_metric(self) -> str:
        """The metric that is logged for each class."""
        return "segm_AP" if self.has_masks else "bbox_AP"

    @property
    def _evaluates_average(self) -> bool:
        return self.weight_average is not None and self.is_in_train

    def evaluated_weights(self) -> AbstractContextManager[None]:
        """Put the weights that are evaluated and saved into the model inside the block: in training the average."""
        return self.weight_average.in_model() if self._evaluates_average else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the metrics of a dataset.

        `eval_per_class` and, after training, `eval_intervals` are dictionaries; one metric of each class is logged.
        """
        metrics = translate_worker_errors(partial(super().evaluate, *args, **kwargs), self.args.world_size)
        return metrics | self._nested_metrics

    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate the average during training, and with `eval_base_model` the weights too."""
        arguments = (dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        base: dict[str, Any] = {}
        if self._evaluates_average and self.args.eval_base_model:
            base = {non_ema_key(key): value for key, value in self._evaluate_weights(*arguments).metrics.items()}
        with self.evaluated_weights():
            output = self._evaluate_weights(*arguments)
        output.metrics.update(base)
        return output

    def _evaluate_weights(self, dataloader: Any, description: str, *args: Any) -> EvalLoopOutput:
        """Evaluate the weights in the model: `prediction_step` feeds the evaluator, and Trainer keeps nothing."""
        prefix = args[-1]
        evaluation = start_evaluation(
            dataloader.dataset,
            self.model.config,
            self.eval_annotations,
            self.args.eval_max_detections,
            self._evaluations,
        )
        num_datasets = len(self.eval_dataset) if isinstance(self.eval_dataset, dict) else 1
        others = [one for one in self._evaluations if one.dataset is not evaluation.dataset]
        self._evaluations = [*others, evaluation][-num_datasets:]
        output = super().evaluation_loop(dataloader, description, *args)
        confidence = None if self.is_in_train else self.args.eval_confidence
        metrics = evaluation.compute(self.args.process_index, self.args.world_size, confidence)
        if not self.is_in_train:
            self.measured[self._title_of(evaluation.dataset, prefix)] = dict(metrics)
        nested = {name: metrics.pop(name) for name in ("per_class", "intervals") if name in metrics}
        self._nested_metrics = {f"{prefix}_{name}": values for name, values in nested.items()}
        per_class = nested.get("per_class", {})
        if len(per_class) > 1:  # for the log, which takes numbers only
            metric = self.class_metric if self.class_metric in metrics else "bbox_AP"
            metrics |= {f"{metric}/{category}": values[metric] for category, values in per_class.items()}
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        if description == "Prediction":
            output = output._replace(predictions=list(evaluation.evaluator.predictions()))
        evaluation.evaluator.reset()
        return output

    def _title_of(self, dataset: Any, prefix: str) -> str:
        """Return the name of a dataset in the model card: the prefix of its metrics, or "validation"."""
        name = prefix.removeprefix("eval").strip("_")
        is_own = not isinstance(self.eval_dataset, dict) and dataset is unprepared(self.eval_dataset)
        return name or ("validation" if is_own else f"{len(dataset)} other images")

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Evaluate one batch, whose records are kept in the evaluator.

        Without compute_metrics `Trainer.evaluate` always asks for the loss only, so `args.prediction_loss_only` counts.
        """
        inputs = send_to_device(inputs, self.args.device)
        num_new = count_new_samples(self.accelerator, self.args, len(inputs["pixel_values"]))
        # Sharded models must run in step, so a batch of repeats only still runs one of them.
        inputs = {name: value[: max(1, num_new)] for name, value in inputs.items()}
        labels = inputs["labels"]
        missing = {"image_id", "orig_size"} - labels[0].keys()
        if missing:
            raise ValueError(f"`labels` must have {sorted(missing)}. Keep everything that the image processor returns.")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, num_objects=torch.ones((), device=self.args.device))
        if num_new:
            self._evaluations[-1].add_loss(outputs, labels)
            if not self.args.prediction_loss_only:
                threshold = self.args.eval_score_threshold or None
                self._evaluations[-1].add_predictions(outputs, labels, inputs.get("pixel_mask"), threshold)
        return None, None, None

    def prepare_evaluation(self, dataset: Any) -> Any:
        """Return a dataset of prepared samples; an [`InstanceDataset`] must have the model's classes."""
        dataset = as_instance_dataset(dataset)
        check_eval_dataset(dataset, self.eval_annotations)
        if not isinstance(dataset, InstanceDataset):
            return dataset
        match_classes(self.model.config, dataset)
        return dataset.with_processor(self.processing_class, masks=self.has_masks)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        """Return batches of prepared samples to evaluate."""
        return super().get_eval_dataloader(self.prepare_evaluation(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        """Return batches of prepared samples to predict."""
        return super().get_test_dataloader(self.prepare_evaluation(test_dataset))

    def log_metrics(self, split: str, metrics: dict[str, Any]) -> None:
        """Print the metrics of a split, without the dictionary of each class."""
        super().log_metrics(split, {name: value for name, value in metrics.items() if not isinstance(value, dict)})
