"""COCO annotations to labels. Oracles: hand arithmetic, pycocotools, the port in transformers."""

import json
import logging

import numpy as np
import PIL.Image
import pytest
import torch
from pycocotools import mask as coco_mask

from transformers_rfdetr.data.synthetic import draw_dataset

from processor_inputs import annotation, labels_of, port, processor, random_image, target


class TestLabels:
    def test_by_hand(self):
        labels = labels_of(annotation(), image_size=(30, 50), size=(60, 100))
        assert labels["class_labels"].tolist() == [2]
        torch.testing.assert_close(labels["boxes"], torch.tensor([[15 / 50, 9 / 30, 20 / 50, 12 / 30]]))
        assert labels["masks"].shape == (1, 60, 100)
        assert labels["masks"][0, 6:30, 10:50].all()
        assert labels["masks"].sum() == 24 * 40
        assert labels["area"].tolist() == [240 * 4]
        assert labels["iscrowd"].tolist() == [0]
        assert labels["image_id"].tolist() == [7]
        assert labels["orig_size"].tolist() == [30, 50]
        assert labels["size"].tolist() == [60, 100]

    def test_have_fixed_dtypes_with_and_without_objects(self):
        integers = dict.fromkeys(["class_labels", "iscrowd", "image_id", "orig_size", "size"], torch.int64)
        dtypes = integers | {"boxes": torch.float32, "area": torch.float32, "masks": torch.bool}
        for number in (0, 2):
            labels = labels_of(*[annotation()] * number)
            assert {name: value.dtype for name, value in labels.items()} == dtypes
            shapes = {name: tuple(labels[name].shape) for name in ("class_labels", "boxes", "area", "iscrowd", "masks")}
            assert shapes == {
                "class_labels": (number,),
                "boxes": (number, 4),
                "area": (number,),
                "iscrowd": (number,),
                "masks": (number, 60, 100),
            }

    def test_are_the_port_s_where_it_works(self):
        generator = np.random.default_rng(0)
        annotations = []
        for number in range(6):
            x, y, width, height = generator.uniform(8, 20, 4)
            polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
            annotations.append(annotation(bbox=[x, y, width, height], segmentation=[polygon], area=number + 0.5))
        image = random_image(40, 40)
        kwargs = {"return_segmentation_masks": True, "return_tensors": "pt"}
        theirs = port(size={"height": 80, "width": 60})(image, annotations=target(*annotations), **kwargs).labels[0]
        ours = processor((80, 60))(image, annotations=target(*annotations), **kwargs).labels[0]
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"masks"}:
            torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-6)
            assert ours[name].dtype == theirs[name].dtype
        overlap = (ours["masks"] & theirs["masks"]).sum((1, 2)) / (ours["masks"] | theirs["masks"]).sum((1, 2))
        assert overlap.min() > 0.8  # theirs are drawn at 40 x 40 and enlarged

    def test_serve_the_hugging_face_guide(self):
        images = [PIL.Image.fromarray(random_image(30, 50, seed)) for seed in range(2)]
        inputs = processor()(
            images=images,
            annotations=[target(annotation(image_id=1)), target(annotation(), annotation(id=2))],
            return_segmentation_masks=True,
            return_tensors="pt",
        )
        assert list(inputs) == ["pixel_values", "pixel_mask", "labels"]
        assert [len(labels["boxes"]) for labels in inputs["labels"]] == [1, 2]

    def test_without_masks_need_no_segmentation(self):
        labels = labels_of(annotation(segmentation=None), masks=None)
        assert "masks" not in labels
        assert len(labels["boxes"]) == 1

    def test_are_numpy_on_demand(self):
        inputs = processor()(random_image(), target(annotation()), return_segmentation_masks=True, return_tensors="np")
        assert all(isinstance(value, np.ndarray) for value in inputs.labels[0].values())

    def test_boxes_stay_pixels_without_conversion(self):
        labels = labels_of(annotation(), do_convert_annotations=False)
        torch.testing.assert_close(labels["boxes"], torch.tensor([[10.0, 6, 50, 30]]))

    def test_boxes_of_a_padded_image_are_relative_to_the_image_and_masks_to_the_input(self):
        labels = labels_of(annotation(), pad_size=(80, 120))
        torch.testing.assert_close(labels["boxes"], labels_of(annotation())["boxes"])
        assert labels["size"].tolist() == [80, 120]
        assert labels["masks"].shape == (1, 80, 120)
        assert torch.equal(labels["masks"][:, :60, :100], labels_of(annotation())["masks"])
        assert labels["masks"].sum() == 24 * 40
        assert labels["area"].tolist() == [240 * 4]

    def test_boxes_are_clamped_to_the_image(self):
        labels = labels_of(annotation(bbox=[-10, -5, 100, 10], segmentation=[[0, 0, 50, 0, 50, 5, 0, 5]]))
        torch.testing.assert_close(labels["boxes"], torch.tensor([[0.5, 2.5 / 30, 1.0, 5 / 30]]))

    def test_missing_box_and_area_come_from_the_shape(self):
        labels = labels_of(annotation(bbox=None, area=None))
        torch.testing.assert_close(labels["boxes"], labels_of(annotation())["boxes"])
        assert labels["area"].tolist() == [240 * 4]
        without = annotation()
        del without["bbox"], without["area"], without["iscrowd"]
        assert labels_of(without, masks=False)["area"].tolist() == [240 * 4]

    def test_missing_area_without_a_shape_is_the_box_s(self):
        assert labels_of(annotation(area=None, segmentation=None), masks=False)["area"].tolist() == [240 * 4]

    @pytest.mark.parametrize("kind", [np.array, torch.tensor, np.float64, lambda value: np.array([value])])
    def test_are_the_same_of_numbers_of_numpy_and_torch(self, kind):
        def whole(value):
            return kind(value) if kind is not np.float64 else np.int32(value)

        fields = {"id": whole(1), "category_id": whole(2), "area": kind(240.0), "iscrowd": whole(0)}
        boxes = [[kind(float(side)) for side in (5, 3, 20, 12)], np.array([5, 3, 20, 12], np.float16)]
        for box in (*boxes, torch.tensor([5, 3, 20, 12])):
            objects = target(annotation(bbox=box, **fields), image_id=whole(7), height=whole(30), width=whole(50))
            labels = processor((60, 100))(np.zeros((30, 50, 3), np.uint8), objects, True).labels[0]
            expected = labels_of(annotation())
            assert all(torch.equal(labels[name], expected[name]) for name in expected)
        assert len(labels_of(annotation(iscrowd=whole(1)))["boxes"]) == 0

    @pytest.mark.parametrize("image_id", [12, "12", np.int64(12)])
    def test_image_id_is_an_integer(self, image_id):
        inputs = processor()(random_image(), target(image_id=image_id))
        assert inputs.labels[0]["image_id"].tolist() == [12]


class TestObjectsThatLeave:
    def test_crowds_leave_in_step(self):
        labels = labels_of(
            annotation(category_id=1),
            annotation(category_id=5, iscrowd=1, segmentation={"size": [30, 50], "counts": [100, 1000, 400]}),
            annotation(category_id=3, bbox=[0, 0, 10, 10], segmentation=[[0, 0, 10, 0, 10, 10, 0, 10]], area=100),
        )
        assert labels["class_labels"].tolist() == [1, 3]
        assert labels["area"].tolist() == [960, 400]
        assert labels["iscrowd"].tolist() == [0, 0]
        assert labels["masks"].flatten(1).sum(1).tolist() == [960, 400]
        assert labels["boxes"][:, 2].tolist() == pytest.approx([0.4, 0.2])

    def test_crowds_become_regions_of_their_class(self):
        runs = {"size": [30, 50], "counts": [300, 600, 600]}  # columns 10 to 29
        crowds = [annotation(category_id=5, iscrowd=1, segmentation=runs)]
        crowds.append(annotation(category_id=2, iscrowd=1, bbox=[40, 0, 10, 15], segmentation=None))
        for masks in (True, False):
            labels = labels_of(*crowds, annotation(), masks=masks, size=(60, 100))
            assert labels["crowd_labels"].tolist() == [5, 2]
            first, second = labels["crowd_regions"]
            assert first.shape == (60, 100)
            assert torch.equal(first.any(0).nonzero()[:, 0], torch.arange(20, 60))
            assert torch.equal(second.nonzero().amin(0), torch.tensor([0, 80]))
            assert second.sum() == 30 * 20
        assert "crowd_labels" not in labels_of(annotation())

    @pytest.mark.parametrize(
        "segmentation",
        [
            *([[1, 2]], [[1, 2, 3, 4]], [[5, 5, 20, 5, 9, 5]], [[90, 90, 99, 90, 99, 99]]),
            *(np.zeros((30, 50), bool), {"size": [30, 50], "counts": [1500]}),
        ],
    )
    def test_shapeless_objects_leave_in_step(self, segmentation):
        labels = labels_of(annotation(category_id=1), annotation(category_id=5, segmentation=segmentation))
        assert labels["class_labels"].tolist() == [1]
        assert len(labels["boxes"]) == len(labels["masks"]) == len(labels["area"]) == len(labels["iscrowd"]) == 1

    @pytest.mark.parametrize("segmentation", [[], [[]], None])
    def test_objects_with_a_box_only_stay_without_a_mask(self, segmentation):
        labels = labels_of(annotation(category_id=1), annotation(category_id=5, segmentation=segmentation))
        assert labels["class_labels"].tolist() == [1, 5]
        assert labels["has_mask"].tolist() == [True, False]
        assert labels["masks"].flatten(1).any(1).tolist() == [True, False]
        assert torch.equal(labels["boxes"][0], labels["boxes"][1])
        assert "has_mask" not in labels_of(annotation())  # all have one
        assert "has_mask" not in labels_of(annotation(segmentation=segmentation), masks=False)

    def test_a_missing_key_is_no_segmentation(self):
        shapeless = annotation()
        del shapeless["segmentation"]
        assert labels_of(shapeless)["has_mask"].tolist() == [False]
        del shapeless["bbox"]
        assert len(labels_of(shapeless)["boxes"]) == 0
        assert len(labels_of(shapeless, masks=False)["boxes"]) == 0

    @pytest.mark.parametrize("bbox", [[5, 5, 0, 9], [5, 5, 9, 0], [5, 5, -3, 9], [60, 5, 9, 9], [5, -20, 9, 9]])
    def test_boxes_without_an_area_in_the_image_leave(self, bbox):
        for masks in (True, False):
            assert labels_of(annotation(bbox=bbox), annotation(), masks=masks)["boxes"].shape == (1, 4)

    def test_an_object_too_small_for_the_model_s_input_leaves(self):
        bitmap = np.zeros((30, 50), bool)
        bitmap[1, 1] = True
        assert len(labels_of(annotation(segmentation=bitmap), size=(6, 10))["boxes"]) == 0
        assert len(labels_of(annotation(segmentation=bitmap), size=(30, 50))["boxes"]) == 1

    def test_an_object_that_vanishes_between_others_takes_its_own_area_along(self):
        speck = np.zeros((30, 50), bool)
        speck[1, 1] = True
        corner = {"bbox": [0, 0, 10, 10], "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}
        labels = labels_of(
            annotation(category_id=1, area=25),
            annotation(category_id=2, area=50, segmentation=speck),
            annotation(category_id=3, area=100, **corner),
            size=(6, 10),
        )
        assert labels["class_labels"].tolist() == [1, 3]
        assert labels["area"].tolist() == pytest.approx([1, 4])  # a 25th of the pixels
        assert labels["boxes"][:, 2].tolist() == pytest.approx([0.4, 0.2])
        assert labels["masks"].flatten(1).sum(1).tolist() == [8, 4]

    def test_the_warning_comes_once_and_each_image_is_named(self, hf_log):
        logging.Logger.warning_once.cache_clear()
        with hf_log.at_level(logging.INFO, logger="transformers_rfdetr.model.coco_labels"):
            for _ in range(3):
                labels_of(annotation(segmentation=[[1, 2]]))
        assert [record.levelname for record in hf_log.records].count("WARNING") == 1
        assert hf_log.text.count("image 0 (image_id 7): dropped 1 of 1 annotations") == 3

    def test_nothing_leaves_in_silence(self, hf_log):
        with hf_log.at_level(logging.INFO, logger="transformers_rfdetr.model.coco_labels"):
            labels_of(annotation(segmentation=[[1, 2]]), annotation())
        assert "image 0 (image_id 7): dropped 1 of 2 annotations" in hf_log.text


class TestWhatCannotBeRead:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"segmentation": [[1, 2, 3, 4, 5]]}, "segmentation: polygon 0.* 5 coordinates"),
            ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "segmentation: polygon 0"),
            ({"segmentation": [["1", 2, 3, 4, 5, 6]]}, "segmentation: polygon 0"),
            ({"segmentation": {"size": [50, 30], "counts": [1500]}}, r"segmentation: .*\[30, 50\].*got \[50, 30\]"),
            ({"segmentation": {"size": [30, 50], "counts": "zz"}}, "segmentation: .*counts"),
            ({"segmentation": np.ones((50, 30), bool)}, "segmentation: .*50x30"),
            ({"category_id": -1}, "category_id.*-1"),
            ({"category_id": 1.0}, "category_id.*1.0"),
            ({"category_id": "1"}, "category_id.*'1'"),
            ({"category_id": True}, "category_id.*True"),
            ({"category_id": None}, "category_id.*None"),
            ({"bbox": [1, 2, 3]}, r"bbox.*\[1, 2, 3\]"),
            ({"bbox": [1, 2, 3, "4"]}, "bbox.*'4'"),
            ({"bbox": [1, 2, 3, True]}, "bbox"),
            ({"bbox": [1, 2, 3, float("nan")]}, "bbox"),
            ({"bbox": []}, "bbox"),
            ({"bbox": "1234"}, "bbox"),
            ({"area": -1}, "area.*-1"),
            ({"area": "12"}, "area.*'12'"),
            ({"area": float("inf")}, "area.*inf"),
            ({"iscrowd": 2}, "iscrowd.*2"),
            ({"iscrowd": np.array([0, 1])}, r"iscrowd.*\[0, 1\]"),
            ({"iscrowd": torch.tensor([1, 0])}, r"iscrowd.*\[1, 0\]"),
            ({"category_id": torch.tensor([1, 2])}, r"category_id.*\[1, 2\]"),
            ({"bbox": torch.tensor(3.0)}, "bbox.*3.0"),
        ],
    )
    def test_names_image_annotation_and_field(self, fields, message):
        pair = [target(image_id=3), target(annotation(), annotation(id=99, **fields))]
        place = r"image 1 \(image_id 7\), annotation 1 \(id 99\): .*"
        with pytest.raises(ValueError, match=place + message):
            processor()([random_image(30, 50)] * 2, pair, return_segmentation_masks=True)

    @pytest.mark.parametrize(
        ("annotations", "message"),
        [
            (target(image_id="a1"), "image 0: .*image_id.*'a1'"),
            (target(image_id=None), "image 0: .*image_id.*None"),
            (target(image_id=1.5), "image 0: .*image_id.*1.5"),
            ({"annotations": []}, "image 0: .*image_id.*None"),
            ({"image_id": 1}, "image 0: .*annotations"),
            ({"image_id": 1, "annotations": {}}, "image 0: .*annotations"),
            ({"image_id": 1, "annotations": np.array({})}, "image 0: .*annotations"),
            (target(image_id=torch.tensor([1, 2])), r"image 0: .*image_id.*\[1, 2\]"),
            (target(height=np.array([30, 30])), r"height.*30.*\[30, 30\]"),
            ([[annotation()]], "image 0: .*annotations"),
            (target("square"), "annotation 0: .*'square'"),
            (target(width=51), r"image 0 \(image_id 7\): .*width.*50.*51"),
            ([target(), target()], "annotations.*1 images.*2"),
        ],
    )
    def test_names_what_stands_around_the_annotations(self, annotations, message):
        with pytest.raises(ValueError, match=message):
            processor()(random_image(30, 50), annotations)


@pytest.fixture(scope="module")
def dataset():
    """Five images of houses, the fourth without any, as objects in rows and in columns; in whole pixels."""
    datasets = pytest.importorskip("datasets")
    photos, coco = draw_dataset(5, classes=["building"])
    fields = ("id", "category_id", "bbox", "area", "iscrowd", "segmentation")
    rows = []
    for photo, image in zip(photos, coco["images"], strict=True):
        found = [item for item in coco["annotations"] if item["image_id"] == image["id"]]
        found = [item for item in found if isinstance(item["segmentation"], list)]
        for item in found:
            item["segmentation"] = [[float(round(side)) for side in polygon] for polygon in item["segmentation"]]
        columns = {field: [item[field] for item in found] for field in fields}
        size = {"height": 96, "width": 96}
        rows.append({"image": photo, "image_id": image["id"], "annotations": found, "objects": columns} | size)
    return datasets.Dataset.from_list(rows)


class TestDatasets:
    @staticmethod
    def from_columns(objects):
        return [dict(zip(objects, values, strict=True)) for values in zip(*objects.values(), strict=True)]

    @pytest.mark.parametrize("layout", ["annotations", "objects"])
    @pytest.mark.parametrize("form", ["numpy", "torch"])
    def test_with_a_format_give_the_same_labels(self, dataset, form, layout):
        for plain, row in zip(dataset, dataset.with_format(form), strict=True):
            labels = []
            for item in (plain, row):
                objects = item[layout] if layout == "annotations" else self.from_columns(item["objects"])
                objects = {"image_id": item["image_id"], "annotations": objects, "height": item["height"]}
                labels.append(processor(96)(plain["image"], objects, return_segmentation_masks=True).labels[0])
            expected, found = labels
            for name in expected:
                torch.testing.assert_close(found[name], expected[name], msg=f"{name} of image {plain['image_id']}")

    def test_with_an_empty_image_give_every_batch_of_one(self, dataset):
        def transform(rows):
            targets = [
                {"image_id": image_id, "annotations": self.from_columns(objects)}
                for image_id, objects in zip(rows["image_id"], rows["objects"], strict=True)
            ]
            return processor(96)(rows["image"], targets, return_segmentation_masks=True, return_tensors="pt")

        rows = dataset.with_transform(transform)
        batches = list(torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=lambda batch: batch))
        counts = [len(batch[0]["labels"]["boxes"]) for batch in batches]
        assert counts == [len(objects) for objects in dataset["annotations"]]
        assert len(counts) == 5
        assert counts[3] == 0


def test_every_row_of_the_port_s_crashes_now_trains():
    """One image with each encoding of one square, after a crowd: known_defects.md, "Images and annotations"."""
    bitmap = np.zeros((30, 50), np.uint8)
    bitmap[3:15, 5:25] = 1
    compressed = coco_mask.encode(np.asfortranarray(bitmap))
    text = {"size": [30, 50], "counts": compressed["counts"].decode()}
    shapes = [annotation()["segmentation"], compressed, text, bitmap, bitmap.tolist()]
    labels = labels_of(annotation(iscrowd=1), *[annotation(segmentation=shape) for shape in shapes], size=(30, 50))
    assert labels["masks"].shape == (5, 30, 50)
    assert (labels["masks"] == torch.from_numpy(bitmap).bool()).all()
    json.dumps(text)
