"""A model over a dataset: detections, labels and metrics. Oracles: the image processor and pycocotools."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from evaluation_cases import ground_truth, of_kind, plain_cocoeval, rectangle, rle, twelve
from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.evaluation.evaluation_loop import detect, evaluate_instance_segmentation, label_to_category_id

from small_models import small_model


def outputs_of(masks, scores, labels, num_classes):
    """Model outputs that show `masks` (B, Q, h, w) bool, one class a query."""
    logits = torch.full((*masks.shape[:2], num_classes), -20.0)
    logits.scatter_(2, labels[..., None], torch.logit(scores)[..., None])
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.4]).expand(*masks.shape[:2], 4)
    return SimpleNamespace(logits=logits, pred_boxes=boxes, pred_masks=masks.float() * 8 - 4)


class TestDetect:
    def outputs(self, classes=3):
        generator = torch.Generator().manual_seed(0)
        return SimpleNamespace(
            logits=torch.randn(2, 9, classes, generator=generator),
            pred_boxes=torch.rand(2, 9, 4, generator=generator),
            pred_masks=torch.randn(2, 9, 12, 12, generator=generator),
        )

    @pytest.mark.parametrize("threshold", [None, 0.7])
    @pytest.mark.parametrize("padded", [False, True])
    def test_equals_the_instances_of_the_image_processor(self, threshold, padded):
        outputs, sizes = self.outputs(), [(37, 61), (80, 20)]
        pixel_mask = torch.zeros(2, 48, 48, dtype=torch.int64)
        pixel_mask[0, :30], pixel_mask[1, :, :20] = 1, 1
        pixel_mask = pixel_mask if padded else None
        found = detect(outputs, sizes, score_threshold=threshold, pixel_mask=pixel_mask)
        theirs = RfDetrImageProcessor().post_process_instance_segmentation(
            outputs, -1 if threshold is None else threshold, 0.0, sizes, True, pixel_mask=pixel_mask
        )
        for ours, their in zip(found, theirs, strict=True):
            segments = their["segments_info"]
            assert len(segments) == 9 if threshold is None else 0 < len(segments) < 9
            rles = [{**rle, "counts": rle["counts"].decode()} for rle in ours["masks"].rles(range(len(segments)))]
            assert rles == their["segmentation"]
            assert ours["labels"].tolist() == [segment["label_id"] for segment in segments]
            assert ours["scores"].tolist() == [segment["score"] for segment in segments]
            assert ours["boxes"].tolist() == [segment["box"] for segment in segments]

    def test_a_detection_model_has_no_masks(self):
        outputs = self.outputs()
        outputs.pred_masks = None
        (found, _) = detect(outputs, torch.tensor([[37, 61], [80, 20]]))
        assert found["masks"] is None
        assert found["boxes"].shape == (9, 4)
        with pytest.raises(ValueError, match="target_sizes"):
            detect(outputs, None)

    def test_at_most_100_detections_of_a_class_are_kept(self):
        outputs = SimpleNamespace(logits=torch.zeros(1, 150, 2), pred_boxes=torch.rand(1, 150, 4))
        outputs.logits[..., 1] = -torch.linspace(1, 2, 150)
        outputs.logits[0, 120:, 1] = 1
        (found,) = detect(outputs, [(10, 10)])
        assert np.bincount(found["labels"]).tolist() == [100, 30]


class Answers(torch.nn.Module):
    """A model that answers each batch with the outputs prepared for it."""

    def __init__(self, answers, id2label):
        super().__init__()
        self.answers, self.config = iter(answers), SimpleNamespace(id2label=id2label)
        self.device = torch.device("cpu")

    def forward(self, pixel_values, pixel_mask=None):
        assert not self.training
        assert not torch.is_grad_enabled()
        answer = next(self.answers)
        assert len(pixel_values) == len(answer.logits)
        return answer


class Images:
    """Images with one class, as an InstanceDataset."""

    id2label, category_ids = {0: "class 4"}, [4]

    def __init__(self, images, truth):
        self.images, self.truth = images, truth

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "image_id": self.truth["images"][index]["id"]}

    def coco(self):
        return self.truth


class Drawn:
    """Three images of 24 x 24, with an object of each of two classes, as an InstanceDataset."""

    id2label, category_ids = {0: "roof", 1: "pool"}, [4, 9]

    def __init__(self):
        self.images = [Image.new("RGB", (24, 24))] * 3
        shapes = [rectangle((0, 10), (0, 10), (24, 24)), rectangle((12, 20), (8, 24), (24, 24))]
        self.masks = torch.from_numpy(np.stack([[np.roll(m, 2 * i, 1) for m in shapes] for i in range(3)]))

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return {"image": self.images[index], "image_id": 100 + index, "annotations": []}

    def coco(self):
        annotations = [
            {"image_id": 100 + index, "category_id": category, "segmentation": rle(mask)}
            for index in range(3)
            for category, mask in zip(self.category_ids, self.masks[index].numpy(), strict=True)
        ]
        categories = [{"id": 4, "name": "roof"}, {"id": 9, "name": "pool"}]
        images = [{"id": 100 + index, "height": 24, "width": 24} for index in range(3)]
        return {"images": images, "annotations": annotations, "categories": categories}


class TestEvaluateAModel:
    def test_a_model_that_finds_the_objects_with_other_labels_has_an_ap_of_1(self):
        dataset = Drawn()
        # Three queries: the two objects, and a third with a label that the dataset does not have.
        masks = torch.cat([dataset.masks, dataset.masks[:, :1]], dim=1)
        labels = torch.tensor([[2, 1, 0]] * 3)
        answers = [
            outputs_of(masks[part], torch.tensor([[0.9, 0.8, 0.95]] * 3)[part], labels[part], 3)
            for part in (slice(0, 2), slice(2, 3))
        ]
        model = Answers(answers, {0: "__background__", 1: "pool", 2: "roof"}).train()
        processor = RfDetrImageProcessor(size=24, do_pad=False)
        numbers = evaluate_instance_segmentation(model, processor, dataset, batch_size=2, progress=False)
        assert (numbers["segm_AP"], numbers["mean_iou"]) == pytest.approx((1, 1))
        assert numbers["per_class"]["pool"]["num_objects"] == 3
        assert model.training

    def test_images_are_evaluated_upright_and_without_padding(self):
        stored, turned = io.BytesIO(), Image.new("RGB", (40, 20))
        turned.getexif()[0x0112] = 6  # by 90 degrees: it is 40 high and 20 wide
        turned.save(stored, "png", exif=turned.getexif())
        images = [Image.open(stored), Image.new("RGB", (40, 20))]
        halves = [rectangle((0, 40), (0, 10), (40, 20)), rectangle((0, 10), (0, 40), (20, 40))]
        truth = ground_truth((halves[0], 4, {}), images=((100, 40, 20), (101, 20, 40)), categories=(4,))
        truth["annotations"].append({"image_id": 101, "category_id": 4, "segmentation": rle(halves[1])})
        dataset = Images(images, truth)
        masks = torch.zeros(2, 1, 40, 40, dtype=torch.bool)  # the model's input, padded
        for mask, half in zip(masks[:, 0], halves, strict=True):
            mask[: half.shape[0], : half.shape[1]] = torch.from_numpy(half)
        masks[0, 0, :, 20:], masks[1, 0, 20:] = True, True  # in the padding
        answer = outputs_of(masks, torch.full((2, 1), 0.9), torch.zeros(2, 1, dtype=torch.int64), 1)
        processor = RfDetrImageProcessor(size={"shortest_edge": 20, "longest_edge": 40})
        numbers = evaluate_instance_segmentation(Answers([answer], {0: "class 4"}), processor, dataset, progress=False)
        assert (numbers["segm_AP"], numbers["mean_iou"]) == pytest.approx((1, 1))

    def test_a_model_has_the_metrics_of_pycocotools_on_its_instances(self):
        model = small_model(num_labels=2)
        processor = RfDetrImageProcessor.from_config(model.config)
        noise = np.random.default_rng(0).integers(0, 256, (3, 60, 80, 3), np.uint8)
        dataset = Drawn()  # its names, and other images
        dataset.images = [Image.fromarray(pixels) for pixels in noise]
        results = []
        for image_id, image in enumerate(dataset.images, 100):
            with torch.no_grad():
                outputs = model(**processor(image, return_tensors="pt"))
            (found,) = processor.post_process_instance_segmentation(outputs, -1, 0.0, [(60, 80)], True)
            for segment, mask in zip(found["segments_info"], found["segmentation"], strict=True):
                category = dataset.category_ids[segment["label_id"]]
                fields = {"image_id": image_id, "category_id": category, "score": segment["score"]}
                results.append(fields | {"segmentation": mask})
        # The objects are what some of the instances show, so that these are right.
        annotations = []
        for number, one in enumerate(results[::3], 1):
            area, box = float(coco_mask.area(one["segmentation"])), coco_mask.toBbox(one["segmentation"]).tolist()
            annotations.append({**one, "id": number, "iscrowd": 0, "area": area, "bbox": box})
        assert all(annotation["area"] for annotation in annotations)
        images = [{"id": 100 + index, "height": 60, "width": 80} for index in range(3)]
        truth = {**dataset.coco(), "images": images, "annotations": annotations}
        dataset.coco = lambda: truth
        numbers = evaluate_instance_segmentation(model, processor, dataset, batch_size=2, progress=False)
        assert twelve(numbers, "segm") == pytest.approx(
            plain_cocoeval(truth, of_kind("segm", results), "segm").stats, abs=1e-9
        )
        assert 0.1 < numbers["segm_AP"] < 1

    def test_a_detection_model_has_metrics_of_boxes(self):
        answer = outputs_of(Drawn().masks, torch.full((3, 2), 0.9), torch.tensor([[0, 1]] * 3), 2)
        answer.pred_masks = None
        model = Answers([answer], {0: "roof", 1: "pool"}).eval()
        processor = RfDetrImageProcessor(size=24, do_pad=False)
        numbers = evaluate_instance_segmentation(model, processor, Drawn(), progress=False)
        assert "segm_AP" not in numbers
        assert 0 <= numbers["bbox_AP"] < 1
        assert not model.training


class TestLabels:
    def dataset(self, *names):
        return SimpleNamespace(id2label=dict(enumerate(names)), category_ids=[10 * (i + 1) for i in range(len(names))])

    def test_labels_are_matched_by_name(self):
        config = SimpleNamespace(id2label={0: "__background__", 1: "roof", 2: "tree", 3: "pool"})
        assert label_to_category_id(config, self.dataset("pool", "roof")) == {3: 10, 1: 20}

    def test_labels_without_names_are_matched_in_order(self):
        config = SimpleNamespace(id2label={0: "LABEL_0", 1: "LABEL_1"})
        assert label_to_category_id(config, self.dataset("pool", "roof")) == {0: 10, 1: 20}
        with pytest.raises(ValueError, match=r"LABEL_0.*\['pool', 'roof', 'tree'\].*id2label"):
            label_to_category_id(config, self.dataset("pool", "roof", "tree"))

    def test_equal_maps_may_repeat_a_name(self):
        config = SimpleNamespace(id2label={0: "roof", 1: "roof"})
        assert label_to_category_id(config, self.dataset("roof", "roof")) == {0: 10, 1: 20}

    @pytest.mark.parametrize(
        ("model_names", "names", "message"),
        [
            (["roof", "tree"], ["roof", "pool"], r"\['roof', 'tree'\].*\['pool'\].*id2label"),
            (["roof", "roof", "x"], ["roof"], r"\['roof', 'roof', 'x'\].*\['roof'\]"),
            (["roof", "tree"], ["roof", "roof"], r"unique.*\['roof'\]"),
        ],
    )
    def test_ambiguous_and_unknown_names_are_refused(self, model_names, names, message):
        config = SimpleNamespace(id2label=dict(enumerate(model_names)))
        with pytest.raises(ValueError, match=message):
            label_to_category_id(config, self.dataset(*names))
