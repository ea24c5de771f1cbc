"""The metrics as torchmetrics and `evaluate` know them. Oracles: pycocotools' numbers, the evaluator, torchmetrics."""

import doctest
import functools
import json
import socket

import numpy as np
import pytest
import torch
import torch.distributed
from pycocotools import mask as coco_mask

from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator
from transformers_rfdetr.evaluation.evaluate_modules import MASK_MAP, MEAN_IOU
from transformers_rfdetr.evaluation.torchmetrics_metric import InstanceSegmentationMetric

from small_models import shared_folder
from training_run import on_two_processes

TWELVE = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_1", "AR_10", "AR_100"]
TWELVE += ["AR_small", "AR_medium", "AR_large"]


def to_rle(segmentation, size):
    """COCO's three forms -> RLE with counts as str."""
    if isinstance(segmentation, list):
        segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    elif isinstance(segmentation["counts"], list):
        segmentation = coco_mask.frPyObjects(segmentation, *size)
    counts = segmentation["counts"]
    return {"size": list(size), "counts": counts if isinstance(counts, str) else counts.decode()}


@pytest.fixture(scope="module")
def sample():
    """COCO's sample: of each image its entry, its annotations and its results, all masks as RLE."""
    folder = shared_folder("coco_eval100")
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / "instances_val2014_fakesegm100_results.json").read_text())
    images = {image["id"]: (image, [], []) for image in sorted(truth["images"], key=lambda image: image["id"])}
    for kind, annotations in enumerate((truth["annotations"], results), 1):
        for annotation in annotations:
            image = images[annotation["image_id"]][0]
            mask = to_rle(annotation["segmentation"], (image["height"], image["width"]))
            images[image["id"]][kind].append({**annotation, "segmentation": mask})
    return list(images.values()), truth["categories"]


@pytest.fixture(scope="module")
def expected():
    return json.loads((shared_folder("coco_eval100") / "expected.json").read_text())


def as_tensors(image, objects, results, dense=True):
    """An image in torchmetrics' form -> prediction and target."""

    def part(annotations):
        masks = [annotation["segmentation"] for annotation in annotations]
        if dense:
            empty = np.zeros((0, image["height"], image["width"]), bool)
            masks = torch.from_numpy(np.stack([coco_mask.decode(mask) for mask in masks]) > 0 if masks else empty)
        labels = torch.tensor([annotation["category_id"] for annotation in annotations], dtype=torch.int64)
        return {"masks": masks, "labels": labels}

    # float64, so that no score is rounded.
    scores = torch.tensor([result["score"] for result in results], dtype=torch.float64)
    x, y, width, height = torch.tensor([one["bbox"] for one in objects], dtype=torch.float64).reshape(-1, 4).T
    target = part(objects) | {
        "boxes": torch.stack([x, y, x + width, y + height], dim=-1),
        "iscrowd": torch.tensor([one["iscrowd"] for one in objects], dtype=torch.int64),
        "area": torch.tensor([one["area"] for one in objects], dtype=torch.float64),
        "image_id": torch.tensor([image["id"]]),
    }
    return part(results) | {"scores": scores}, target


def evaluator_of(sample, chosen=slice(None)):
    images, categories = sample
    truth = {
        "images": [image for image, _, _ in images],
        "annotations": [one for _, objects, _ in images for one in objects],
        "categories": categories,
    }
    evaluator = InstanceSegmentationEvaluator(truth)
    for image, _, results in images[chosen]:
        evaluator.update(
            image["id"],
            scores=[one["score"] for one in results],
            labels=[one["category_id"] for one in results],
            masks=[one["segmentation"] for one in results],
        )
    return evaluator


def without_classes(numbers):
    return {name: number for name, number in numbers.items() if name != "per_class"}


class TestTorchmetrics:
    def test_the_sample_of_coco_has_the_metrics_of_pycocotools_and_of_the_evaluator(self, sample, expected):
        images, categories = sample
        metric = InstanceSegmentationMetric({category["id"]: category["name"] for category in categories})
        for index in range(0, 100, 7):
            preds, target = zip(*(as_tensors(*one) for one in images[index : index + 7]), strict=True)
            metric.update(list(preds), list(target))
        numbers = metric.compute()
        assert [numbers[f"segm_{name}"] for name in TWELVE] == pytest.approx(expected["segm"]["stats"], abs=1e-9)
        theirs = evaluator_of(sample).compute()
        assert numbers["per_class"] == theirs["per_class"]
        assert without_classes(numbers) == pytest.approx(without_classes(theirs), abs=1e-12)

    def test_the_mean_average_precision_of_torchmetrics_differs(self, sample, expected):
        pytest.importorskip("torchvision")
        detection = pytest.importorskip("torchmetrics.detection")
        theirs = detection.MeanAveragePrecision(iou_type="segm", backend="pycocotools")
        for one in sorted(sample[0], key=lambda one: one[0]["id"]):
            prediction, target = as_tensors(*one)
            theirs.update([prediction], [target])
        difference = expected["segm"]["stats"][0] - theirs.compute()["map"].item()
        assert difference == pytest.approx(5.1e-4, abs=2e-5)

    def test_rle_boxes_and_missing_fields(self):
        mask = np.zeros((40, 40), bool)
        mask[10:30, 10:30] = True
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        scores, labels = torch.tensor([0.9]), torch.tensor([3])
        box = torch.tensor([[10.0, 10, 30, 30]])
        forms = [{"masks": torch.from_numpy(mask)[None]}, {"masks": [rle]}, {"masks": [rle], "boxes": box}]
        for form in forms:
            metric = InstanceSegmentationMetric({3: "roof"})
            metric.update([form | {"scores": scores, "labels": labels}], [form | {"labels": labels}])
            numbers = metric.compute()
            assert (numbers["segm_AP"], numbers["bbox_AP"], numbers["mean_iou"]) == pytest.approx((1, 1, 1))
            assert numbers["per_class"]["roof"]["num_objects"] == 1
        metric = InstanceSegmentationMetric()
        metric.update([{"boxes": box, "scores": scores, "labels": labels}], [{"boxes": box, "labels": labels}])
        numbers = metric.compute()
        assert numbers["bbox_AP"] == pytest.approx(1)
        assert "segm_AP" not in numbers
        assert list(numbers["per_class"]) == ["3"]

    def test_images_without_an_id_are_all_counted_and_repeated_ids_once(self):
        box, labels, scores = torch.tensor([[10.0, 10, 30, 30]]), torch.tensor([1]), torch.tensor([0.9])
        found, nothing = {"boxes": box, "scores": scores, "labels": labels}, torch.zeros(0)
        missed = {"boxes": nothing.reshape(0, 4), "scores": nothing, "labels": nothing.long()}
        target = {"boxes": box, "labels": labels}
        metric = InstanceSegmentationMetric()
        metric.update([found, missed], [target, target])
        metric.update([found, found], [target | {"image_id": torch.tensor(1)}, target | {"image_id": 1}])
        assert metric.compute()["per_class"]["1"]["num_objects"] == 3
        assert metric.compute()["bbox_AR_100"] == pytest.approx(2 / 3)

    def test_reset_discards_images_and_forward_returns_the_metrics_of_the_batch(self):
        box, labels = torch.tensor([[10.0, 10, 30, 30]]), torch.tensor([1])
        found = {"boxes": box, "scores": torch.tensor([0.9]), "labels": labels}
        metric = InstanceSegmentationMetric()
        assert metric([found], [{"boxes": box, "labels": labels}])["bbox_AP"] == pytest.approx(1)
        assert metric([found], [{"boxes": box + 50, "labels": labels}])["bbox_AP"] == 0
        assert metric.compute()["per_class"]["1"]["num_objects"] == 2
        metric.reset()
        metric.update([found], [{"boxes": box, "labels": labels}])
        assert metric.compute()["per_class"]["1"]["num_objects"] == 1

    @pytest.mark.parametrize(
        ("prediction", "target", "message"),
        [
            ({"scores": [0.5, 0.4]}, {}, "image 0: .*got {'scores': 2, 'labels': 1"),
            ({}, {"iscrowd": [0, 0]}, "image 0: labels, boxes, iscrowd .* {'labels': 1, 'boxes': 1, 'iscrowd': 2}"),
            ({}, {"boxes": None}, "image 0: `masks` or `boxes` .* 1 objects"),
        ],
    )
    def test_predictions_and_targets_that_do_not_match_are_refused(self, prediction, target, message):
        box = torch.tensor([[10.0, 10, 30, 30]])
        prediction = {"boxes": box, "scores": [0.5], "labels": [1]} | prediction
        with pytest.raises(ValueError, match=message):
            InstanceSegmentationMetric().update([prediction], [{"boxes": box, "labels": [1]} | target])
        with pytest.raises(ValueError, match=r"`preds` and `target` .* 1 and 0"):
            InstanceSegmentationMetric().update([prediction], [])


def evaluate_share(folder, sample, shares):
    """Each process evaluates its share of the images, once for each way of sharing."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    results = []
    for share in shares:
        images = sample[0][slice(*share[rank])]
        metric = InstanceSegmentationMetric({category["id"]: category["name"] for category in sample[1]})
        for one in images:
            prediction, target = as_tensors(*one, dense=False)
            metric.update([prediction], [target])
        evaluator = evaluator_of(sample, slice(*share[rank]))
        states = [None, None]
        torch.distributed.all_gather_object(states, evaluator.state())
        evaluator.reset()
        for state in states:
            evaluator.merge(state)
        results.append((metric.compute(), evaluator.compute()))
    return results


def test_two_processes_have_the_metrics_of_one(sample, tmp_path):
    sample = (sample[0][:40], sample[1])
    # Half each, with 4 images in both, as padding samplers deal them; and everything against nothing.
    shares = [((0, 22), (18, 40)), ((0, 40), (0, 0))]
    evaluate = functools.partial(evaluate_share, sample=sample, shares=shares)
    one = evaluator_of(sample).compute()
    for results in on_two_processes(tmp_path, evaluate):
        for of_metric, of_evaluator in results:
            assert of_evaluator == one
            assert of_metric["per_class"] == one["per_class"]
            assert without_classes(of_metric) == pytest.approx(without_classes(one), abs=1e-12)


@pytest.fixture(scope="module")
def load():
    return pytest.importorskip("evaluate").load


class TestEvaluate:
    def rows(self, sample):
        """The sample as rows, in batches of unequal sizes."""
        predictions, references = [], []
        for image, objects, results in sample[0]:
            keys = ("category_id", "segmentation", "iscrowd", "area")
            references.append(
                {
                    "image_id": image["id"],
                    "height": image["height"],
                    "width": image["width"],
                    "objects": [{key: one[key] for key in keys} for one in objects],
                }
            )
            predictions.append(
                {
                    "image_id": image["id"],
                    "scores": [one["score"] for one in results],
                    "labels": [one["category_id"] for one in results],
                    "masks": [one["segmentation"] for one in results],
                }
            )
        for part in (slice(0, 1), slice(1, 40), slice(40, 100)):
            yield {"predictions": predictions[part], "references": references[part]}

    def test_mask_map_has_the_metrics_of_pycocotools(self, load, sample, expected, tmp_path):
        metric = load(str(MASK_MAP), cache_dir=str(tmp_path))
        for batch in self.rows(sample):
            metric.add_batch(**batch)
        numbers = metric.compute(class_names={category["id"]: category["name"] for category in sample[1]})
        assert [numbers[f"segm_{name}"] for name in TWELVE] == pytest.approx(expected["segm"]["stats"], abs=1e-9)
        names = {category["id"]: category["name"] for category in sample[1]}
        for category, ap in expected["segm"]["ap_per_category"].items():
            assert numbers["per_class"][names[int(category)]]["segm_AP"] == pytest.approx(ap, abs=1e-9)

    def test_mean_iou_is_that_of_the_evaluator(self, load, sample, tmp_path):
        metric = load(str(MEAN_IOU), cache_dir=str(tmp_path))
        for batch in self.rows(sample):
            metric.add_batch(**batch)
        numbers = metric.compute(iou_score_threshold=0.5)
        theirs = evaluator_of(sample).mean_iou()
        assert numbers["mean_iou"] == theirs["mean_iou"] > 0.1
        assert numbers["mean_iou_class_blind"] == theirs["mean_iou_class_blind"]

    def test_the_examples_run_without_a_network(self, load, monkeypatch):
        def refuse(*arguments):
            raise OSError("there is no network")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        for path in (MASK_MAP, MEAN_IOU):
            text = load(str(path)).inputs_description
            runner = doctest.DocTestRunner()
            runner.run(doctest.DocTestParser().get_doctest(text, {}, path.name, None, 0))
            assert runner.tries > 5
            assert not runner.failures
