"""What the trainer does with its datasets before the first step: it checks them, matches classes and describes them."""

from typing import Any

from transformers.utils import logging

from ..data.class_balance import ClassBalance
from ..data.dataset import InstanceDataset, InstanceDatasets
from ..data.label_maps import describe_classes
from ..data.prepared import PreparedDataset
from ..data.streams import InstanceStream, PreparedStream
from ..model.configuration_rf_detr import RfDetrConfig
from ..model.validation import as_pair, check_resolution
from ..model.variants_rf_detr import class_labels

logger = logging.get_logger(__name__)


def unprepared(dataset: Any) -> Any:
    """Return the dataset that a prepared one reads from; other datasets as they are."""
    if isinstance(dataset, PreparedDataset):
        return dataset.dataset
    return dataset.stream if isinstance(dataset, PreparedStream) else dataset


def check_image_size(processor: Any, config: RfDetrConfig) -> None:
    """Raise a ValueError if the image processor makes images of a size that the model cannot divide into windows.

    Warn about another size than the configuration's: training, evaluation and the saved processor agree on it, but
    what reads `config.resolution`, such as an export, does not.
    """
    name, size = "size", processor.size if processor.do_resize else None
    if processor.do_pad and processor.pad_size:
        name, size = "pad_size", processor.pad_size
    if not size or "height" not in size:  # each image has its own size
        return
    height, width = size["height"], size["width"]
    backbone = config.backbone_config
    check_resolution((height, width), backbone.patch_size, backbone.num_windows, f"processing_class.{name}")
    if (height, width) != as_pair(config.resolution):
        resolution = height if height == width else (height, width)
        logger.warning(
            f"`processing_class.{name}` is {resolution}, at which the model is trained and evaluated, but"
            f" `model.config.resolution` is {config.resolution}, at which it will be exported. Pass"
            f" resolution={resolution} to from_pretrained of the model, or omit `processing_class`."
        )


def check_splits(train_dataset: Any, eval_dataset: Any) -> None:
    """Raise a ValueError for all splits instead of one, and for training samples that nothing has prepared."""
    columns = getattr(train_dataset, "column_names", None)
    is_raw = columns and "pixel_values" not in columns
    if isinstance(train_dataset, dict) or (is_raw and getattr(train_dataset, "format", {}).get("type") != "custom"):
        raise ValueError(
            "`train_dataset` must be one split of load_instance_dataset(...) or a dataset of prepared samples, got"
            f" {'all splits' if isinstance(train_dataset, dict) else f'rows of {columns}'}. Pass data['train'] of"
            " data = load_instance_dataset(...)."
        )
    if isinstance(eval_dataset, InstanceDatasets):
        raise ValueError(
            f"`eval_dataset` must be one split or a dict of splits, got all splits {list(eval_dataset)}. Pass one, such"
            " as data['validation']."
        )


def check_training_objects(dataset: Any, has_masks: bool) -> None:
    """Raise a ValueError for training data without an object that the model can learn."""
    if lack := _find_lack(dataset, has_masks):
        found, remedy = lack
        raise ValueError(f"`train_dataset` must have objects{' with masks' * has_masks}, got {found}. {remedy}")


def check_evaluated_objects(dataset: Any, metric: str) -> None:
    """Raise a ValueError for evaluation data without an object, from which a metric of COCO cannot be computed."""
    needs_masks = not metric.startswith("bbox_")
    if lack := _find_lack(dataset, needs_masks):
        found, remedy = lack
        other = "metric_for_best_model='bbox_AP' or " if "boxes" in found else ""
        raise ValueError(
            f"`eval_dataset` must have objects{' with masks' * needs_masks} for the metric {metric}, got {found}."
            f" {remedy} Otherwise set {other}eval_strategy='no'."
        )


def _find_lack(dataset: Any, needs_masks: bool) -> tuple[str, str] | None:
    """Return what a dataset has instead of objects, and the remedy; None for objects or an unknown number of them."""
    if hasattr(dataset, "__len__") and len(dataset) == 0:
        return "0 images", "Check that it is the right dataset."
    if not isinstance(dataset, InstanceDataset) or dataset.num_objects(with_mask=needs_masks):
        return None
    if boxes := dataset.num_objects():
        remedy = "Add their segmentations, or use a detection model, such as rf-detr-medium."
        return f"{boxes} objects with boxes only", remedy
    if crowds := sum(count.crowds for count in dataset.counts().values()):
        return f"{len(dataset)} images with {crowds} crowds only", "Set `iscrowd` to 0 for single objects."
    return f"{len(dataset)} images without annotations", "`transformers-rfdetr check-dataset` shows what was read."


def check_eval_dataset(dataset: Any, eval_annotations: Any) -> None:
    """Raise a ValueError for a dataset without a known ground truth."""
    is_known = dataset is None or isinstance(dataset, str | InstanceDataset | PreparedDataset)
    if not is_known and eval_annotations is None and not hasattr(dataset, "column_names"):
        raise ValueError(
            "`eval_dataset` must be a dataset from load_instance_dataset unless `eval_annotations` is given, got"
            f" {type(dataset).__name__}. Pass its ground truth, a COCO dictionary, as `eval_annotations`."
        )


def match_classes(
    config: RfDetrConfig, dataset: InstanceDataset | InstanceStream, *, keep_category_ids: bool = False
) -> None:
    """Check that a model has the classes of a dataset; classes that have no names yet are named by the dataset.

    Args:
        config: Configuration of the model, which is changed.
        dataset: The dataset.
        keep_category_ids: Whether to store the dataset's category ids in the configuration, as `category_ids`.

    Raises:
        ValueError: the number or the names of the classes differ.
    """
    names, wanted = dict(config.id2label), dict(dataset.id2label)
    if names != wanted and len(names) == len(wanted) and all(name.startswith("LABEL_") for name in names.values()):
        config.id2label, config.label2id = wanted, {name: label for label, name in wanted.items()}
        names = wanted
    # The heads of rfdetr's fine-tuned checkpoints have one row more.
    if class_labels(names) != wanted:
        raise ValueError(
            f"`model` must have the dataset's {len(wanted)} classes {describe_classes(wanted)}, got {len(names)}"
            f" classes {describe_classes(names)}. Load it with from_pretrained(..., id2label=data.id2label,"
            " ignore_mismatched_sizes=True)."
        )
    if keep_category_ids:
        config.category_ids = list(dataset.category_ids)


def describe_data(train_dataset: Any, eval_dataset: Any, num_queries: int, has_masks: bool) -> None:
    """Print a table of the classes; warn about objects without a mask, and about more objects than queries."""
    parts = {"train": train_dataset, "validation": eval_dataset}
    known = {name: part.dataset for name, part in parts.items() if isinstance(part, PreparedDataset)}
    if known:
        print(InstanceDatasets(known), flush=True)
    if (balance := getattr(train_dataset, "balance", None)) is not None:
        print(_describe_balance(balance, known["train"].id2label), flush=True)
    if "train" in known and has_masks:
        train = known["train"]
        if without_mask := train.num_objects() - train.num_objects(with_mask=True):
            logger.warning(
                f"{without_mask} of {train.num_objects()} training objects have no mask: they train classes and boxes,"
                " but no masks. Add their segmentations if you have them."
            )
    for name, dataset in known.items():
        if crowded := dataset.crowded(num_queries):
            listed = ", ".join(f"{image} ({count})" for image, count in crowded[:5])
            logger.warning(
                f"{len(crowded)} images of {name} have more objects than the model has queries ({num_queries}), so that"
                f" some objects cannot be found: {listed}{', ...' if len(crowded) > 5 else ''}. Pass a larger"
                " num_queries to from_pretrained."
            )


def _describe_balance(balance: ClassBalance, names: dict[int, str]) -> str:
    """Return the number of samples of an epoch, and the classes that are repeated, in one line."""
    factors = {names[label]: factor for label, factor in enumerate(balance.class_factors) if factor > 1}
    repeated = ", ".join(f"{name} x {factor:.2g}" for name, factor in factors.items())
    return (
        f"class balance {balance.threshold:g}: an epoch has {balance.num_samples} samples of {len(balance.factors)}"
        f" images; repeated: {repeated or 'none, because no class is in a smaller fraction of the images'}"
    )
