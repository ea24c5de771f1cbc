"""Objects of ignored classes are regions in which nothing is rewarded or punished."""

import copy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transformers_rfdetr import InstanceSegmentationEvaluator, RfDetrImageProcessor, load_instance_dataset
from transformers_rfdetr.data.dataset import InstanceDataset, InstanceDatasets
from transformers_rfdetr.data.synthetic import save_dataset

NAMES = {3: "ignore", 5: "cat", 8: "dog"}


def square(number: int, category: int, x: int, y: int, side: int = 10) -> dict:
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    box = {"bbox": [x, y, side, side], "area": side * side, "segmentation": [polygon], "iscrowd": 0}
    return {"id": number, "image_id": 7, "category_id": category, **box}


def given(folder: Path) -> InstanceDatasets:
    """One image with a cat, a dog and a large region to ignore."""
    coco = {
        "images": [{"id": 7, "file_name": "a.png", "height": 48, "width": 48}],
        "annotations": [square(1, 5, 2, 2), square(2, 3, 20, 20, 24), square(3, 8, 2, 30)],
        "categories": [{"id": number, "name": name} for number, name in NAMES.items()],
    }
    return load_instance_dataset(save_dataset(folder, [Image.new("RGB", (48, 48))], coco))


def test_the_class_is_removed_and_its_objects_are_crowds_of_every_other_class(tmp_path):
    data = given(tmp_path).ignore_classes(["ignore"])
    train = data["train"]
    assert (data.id2label, train.category_ids) == ({0: "cat", 1: "dog"}, [5, 8])
    found = [(one["category_id"], one["iscrowd"], one["bbox"]) for one in train[0]["annotations"]]
    region = [20, 20, 24, 24]
    assert found == [(0, 0, [2, 2, 10, 10]), (0, 1, region), (1, 1, region), (1, 0, [2, 30, 10, 10])]
    assert [tuple(count) for count in train.counts().values()] == [(1, 1, 1), (1, 1, 1)]
    assert len({one["id"] for one in train.coco()["annotations"]}) == 4
    labels = train.with_processor(RfDetrImageProcessor(size=48))[0]["labels"]
    assert labels["class_labels"].tolist() == [0, 1]
    assert labels["crowd_labels"].tolist() == [0, 1]
    assert labels["crowd_regions"][:, 20:44, 20:44].all()
    assert labels["crowd_regions"].sum() == 2 * 24 * 24


def test_detections_of_any_class_in_a_region_are_ignored_as_pycocotools_does(tmp_path):
    coco = given(tmp_path).ignore_classes(["ignore"])["train"].coco()
    masks = np.zeros((4, 48, 48), bool)
    masks[0, 2:12, 2:12] = masks[1, 24:34, 24:34] = masks[2, 30:40, 30:40] = masks[3, 30:40, 2:12] = True
    evaluator = InstanceSegmentationEvaluator(coco)
    evaluator.update(7, scores=[0.6, 0.9, 0.8, 0.5], labels=[5, 5, 8, 8], masks=masks)
    metrics = evaluator.compute()
    assert (metrics["segm_AP"], metrics["bbox_AP"]) == pytest.approx((1.0, 1.0), abs=1e-12)
    truth = COCO()
    truth.dataset = copy.deepcopy(coco)
    truth.createIndex()
    boxes = [[2, 2, 10, 10], [24, 24, 10, 10], [30, 30, 10, 10], [2, 30, 10, 10]]
    rows = zip([5, 5, 8, 8], boxes, [0.6, 0.9, 0.8, 0.5], strict=True)
    detections = [{"image_id": 7, "category_id": c, "bbox": box, "score": score} for c, box, score in rows]
    evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


def test_unknown_names_and_ignoring_everything_are_refused_and_no_name_changes_nothing(tmp_path):
    data = given(tmp_path)
    assert data.ignore_classes([]) is data
    with pytest.raises(ValueError, match=r"ignored classes must be among .*'cat'.* got \['cow'\]"):
        data.ignore_classes(["cow"])
    with pytest.raises(ValueError, match="at least one class"):
        data.ignore_classes(["ignore", "cat", "dog"])


def test_a_stream_ignores_classes_too():
    datasets = pytest.importorskip("datasets")
    names = ["ignore", "cat"]
    feature = {"bbox": datasets.Sequence(datasets.Value("float32"), 4), "category": datasets.ClassLabel(names=names)}
    features = datasets.Features({"image": datasets.Image(), "objects": [feature]})
    objects = [{"bbox": [1, 1, 9, 9], "category": 0}, {"bbox": [20, 20, 9, 9], "category": 1}]
    rows = datasets.Dataset.from_list([{"image": Image.new("RGB", (48, 48)), "objects": objects}], features=features)
    for source in (rows, rows.to_iterable_dataset()):
        data = load_instance_dataset({"train": source}).ignore_classes(["ignore"])
        split = data["train"]
        sample = split[0] if isinstance(split, InstanceDataset) else next(split.samples(split.rows))
        assert [(one["category_id"], one["iscrowd"]) for one in sample["annotations"]] == [(0, 1), (0, 0)]
