"""The label audit: evidence by hand arithmetic, the page, the marks in the written datasets, and what it finds."""

import html
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from evaluation_cases import rectangle, rle
from html_page import Page
from transformers_rfdetr import load_instance_dataset
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.writers.write import write_annotations
from transformers_rfdetr.evaluation.audit_files import explain, explain_recall, marked_images, suspect_rows
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator
from transformers_rfdetr.evaluation.label_audit import (
    audited_images,
    find_suspects,
    group_objects,
    rarity,
    recall_of,
    usual_ious,
)
from transformers_rfdetr.evaluation.report.audit_page import save_audit_page
from transformers_rfdetr.evaluation.report.crops import crop_instances

CLASSES = {3: "house", 7: "pool"}
HOUSE, POOL = CLASSES


def segmentation(x0, y0, x1, y1):
    mask = rle(rectangle((y0, y1), (x0, x1)))
    return {**mask, "counts": mask["counts"].decode()}


def audit(*images, masks=True, names=CLASSES):
    """Return a dataset and its audited images.

    Each image has objects (category, box, crowd) and detections (score, category, box), with boxes [x0, y0, x1, y1].
    """
    entries, annotations = [], []
    for image_id, (objects, _) in enumerate(images, start=40):
        entries.append({"id": image_id, "file_name": f"{image_id}.png", "height": 100, "width": 100})
        for category, (x0, y0, x1, y1), *crowd in objects:
            geometry = {"segmentation": segmentation(x0, y0, x1, y1)} if masks else {}
            head = {"id": 900 + len(annotations), "image_id": image_id, "category_id": category}
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append({**head, **geometry, "bbox": box, "iscrowd": int(bool(crowd))})
    categories = [{"id": category, "name": name} for category, name in names.items()]
    coco = {"images": entries, "annotations": annotations, "categories": categories}
    pixels = np.random.default_rng(0).integers(0, 256, (len(images), 100, 100, 3), np.uint8)
    dataset = InstanceDataset(coco, [Image.fromarray(photo) for photo in pixels])
    evaluator = InstanceSegmentationEvaluator(dataset.coco())
    for image_id, (_, found) in enumerate(images, start=40):
        scores, labels, boxes = zip(*found, strict=True) if found else ([], [], [])
        rles = [segmentation(*box) for box in boxes] if masks else None
        evaluator.update(image_id, scores=scores, labels=labels, masks=rles, boxes=np.reshape(boxes, (-1, 4)))
    return dataset, audited_images(evaluator, dataset)


LEFT, MIDDLE, RIGHT, BELOW = (0, 0, 20, 20), (30, 0, 50, 20), (60, 0, 80, 20), (0, 50, 20, 70)
# A house is found, a pool is a house, a house is not there, and a house is not annotated.
FIRST = (
    [(HOUSE, LEFT), (POOL, MIDDLE), (HOUSE, RIGHT)],
    [(0.9, HOUSE, LEFT), (0.8, HOUSE, MIDDLE), (0.7, HOUSE, BELOW)],
)
# Two houses are found; the detection of the third is the upper half of its mask.
SECOND = (
    [(HOUSE, LEFT), (HOUSE, MIDDLE), (HOUSE, RIGHT)],
    [(0.9, HOUSE, LEFT), (0.9, HOUSE, MIDDLE), (0.85, HOUSE, (60, 0, 80, 10))],
)


@pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
def test_each_kind_of_wrong_label_is_found_with_the_evidence_of_the_scores(masks):
    _, images = audit(FIRST, SECOND, masks=masks)
    suspects = find_suspects(images)
    assert [(one.kind, one.image, one.object, one.detection) for one in suspects] == [
        ("superfluous", 0, 2, None),
        ("sloppy mask", 1, 2, 2),
        ("wrong class", 0, 1, 1),
        ("missing", 0, None, 2),
    ]
    assert [one.evidence for one in suspects] == pytest.approx([1, 0.85, 0.8, 0.7], abs=1e-4)
    assert [(one.class_name, one.suggestion) for one in suspects] == [
        ("house", None),
        ("house", "house"),
        ("pool", "house"),
        (None, "house"),
    ]
    assert (suspects[1].iou, suspects[1].usual_iou) == pytest.approx((0.5, 1))
    assert [explain(one) for one in suspects] == [
        "Annotated as house; no detection overlaps it.",
        "Detected as house with a score of 0.85, but the IoU of the masks is 0.50; 1.00 is usual for this class and"
        " size.",
        "Annotated as pool, detected as house with a score of 0.80.",
        "Detected as house with a score of 0.70; nothing is annotated.",
    ]


def test_a_class_that_is_detected_too_weakens_the_evidence_of_another_class():
    _, [image] = audit(([(POOL, LEFT)], [(0.9, HOUSE, LEFT), (0.4, POOL, LEFT)]))
    [suspect] = find_suspects([image])
    assert (suspect.kind, suspect.evidence) == ("wrong class", pytest.approx(0.9 * 0.6))


def test_a_mask_is_compared_with_detections_that_fit_no_other_object_of_the_class_better():
    inner = (0, 0, 20, 6)
    _, images = audit(([(HOUSE, LEFT), (HOUSE, inner)], [(0.9, HOUSE, LEFT)]), SECOND)
    assert [(one.kind, one.image, one.object) for one in find_suspects(images)] == [("sloppy mask", 1, 2)]
    assert [one.kind for one in find_suspects(images, 0.001) if (one.image, one.object) == (0, 1)] == ["superfluous"]


def test_a_weak_detection_that_overlaps_an_object_weakens_the_evidence_that_it_is_superfluous():
    _, [image] = audit(([(HOUSE, LEFT)], [(0.3, POOL, (0, 0, 20, 10))]))
    [suspect] = find_suspects([image])
    assert (suspect.kind, suspect.evidence, suspect.score) == ("superfluous", pytest.approx(0.7), pytest.approx(0.3))


def test_detections_in_crowds_or_as_parts_of_an_object_of_their_class_and_repeated_ones_are_not_missing():
    big = (0, 0, 60, 60)
    found = [(0.9, HOUSE, (10, 10, 20, 20)), (0.8, POOL, (30, 30, 40, 40))]
    _, [crowd] = audit(([(HOUSE, big, True)], found))
    assert find_suspects([crowd]) == []
    _, [part] = audit(([(HOUSE, big)], [(0.95, HOUSE, big), *found]))
    assert [(one.kind, one.suggestion) for one in find_suspects([part])] == [("missing", "pool")]
    repeated = [(0.9, HOUSE, LEFT), (0.85, POOL, LEFT), (0.8, HOUSE, (0, 0, 20, 18)), (0.7, HOUSE, MIDDLE)]
    _, [image] = audit(([], repeated))
    assert [(one.suggestion, one.detection) for one in find_suspects([image])] == [("house", 0), ("house", 3)]


def test_detections_that_overlap_a_better_one_or_lie_inside_it_with_its_class_are_one_missing_object():
    big = (0, 0, 60, 60)
    fragments = [(0.8, POOL, (40, 0, 100, 60)), (0.7, HOUSE, (0, 0, 10, 10)), (0.6, HOUSE, (50, 50, 60, 70))]
    others = [(0.5, POOL, (20, 20, 30, 30)), (0.4, HOUSE, (55, 55, 100, 100))]  # in the house, and beside it
    _, [image] = audit(([], [(0.9, HOUSE, big), *fragments, *others]))
    assert [one.detection for one in find_suspects([image], 0.0)] == [0, 4, 5]


def test_a_detection_with_an_empty_mask_is_not_a_missing_object():
    found = [(0.9, HOUSE, LEFT), (0.8, POOL, (30, 0, 30, 20)), (0.7, HOUSE, RIGHT)]
    _, [image] = audit(([(HOUSE, LEFT)], found))
    assert image.detections.names == ["house", "house"]
    assert [(one.kind, one.score) for one in find_suspects([image])] == [("missing", pytest.approx(0.7))]


def test_images_without_objects_or_detections_have_no_suspects_and_an_object_without_detections_is_superfluous():
    _, images = audit(([], []), ([(HOUSE, LEFT)], []))
    assert [(one.kind, one.image) for one in find_suspects(images)] == [("superfluous", 1)]
    assert find_suspects(images[:1]) == []
    assert find_suspects([]) == []


def test_the_recall_counts_objects_with_a_sure_detection_of_their_class_and_a_low_one_is_a_warning():
    _, images = audit(FIRST, SECOND, ([(HOUSE, LEFT, True), (POOL, MIDDLE)], [(0.9, HOUSE, LEFT), (0.5, POOL, MIDDLE)]))
    assert [recall_of([image]) for image in images] == pytest.approx([1 / 3, 1, 0])
    assert recall_of(images) == pytest.approx(4 / 7)
    assert explain_recall(4 / 7) == "57 % of the annotated objects are found (class, score > 0.5, IoU >= 0.5)."
    assert explain_recall(1 / 3).startswith("Only 33 % of the annotated objects are found")
    assert "most suspects are probably errors of the model, not of the labels. Train it" in explain_recall(1 / 3)
    _, empty = audit(([(HOUSE, LEFT, True)], []))
    assert (recall_of(empty), recall_of([])) == (None, None)
    assert explain_recall(None) == "No objects are annotated."


def test_what_happens_often_in_a_group_is_little_evidence():
    values = np.array([0.9] * 40 + [0.1] * 60 + [0.5])
    groups = np.array([0] * 100 + [1])
    weights = rarity(values, groups)
    assert weights[[0, 50, 100]] == pytest.approx([5 / 40, 5 / 100, 1])


def test_a_class_with_many_objects_is_divided_into_thirds_by_area():
    labels = np.array([0] * 90 + [1] * 10)
    groups = group_objects(labels, np.arange(100.0))
    assert [len(set(groups[part])) for part in (slice(0, 30), slice(30, 60), slice(60, 90), slice(90, 100))] == [1] * 4
    assert len(set(groups)) == 4


def test_the_usual_iou_is_the_median_of_sure_detections_and_its_spread_that_of_a_normal_distribution():
    ious, is_sure = np.array([0.5, 0.7, 0.9, 0.0, 0.8]), np.array([True, True, True, False, False])
    medians, spreads = usual_ious(ious, is_sure, np.array([0, 0, 0, 0, 1]))
    assert medians.tolist() == [0.7] * 4 + [0]
    assert spreads == pytest.approx([1.4826 * 0.2] * 4 + [np.inf])


def test_rows_have_the_file_the_ids_the_box_and_the_detected_mask():
    dataset, images = audit(FIRST, SECOND)
    rows = json.loads(json.dumps(suspect_rows(images, find_suspects(images), dataset)))
    superfluous, sloppy, wrong, missing = rows
    assert (superfluous["image"], superfluous["image_id"], superfluous["annotation_id"]) == ("40.png", 40, 902)
    assert (superfluous["bbox"], superfluous["segmentation"]) == ([60, 0, 20, 20], None)
    assert (sloppy["image_id"], sloppy["annotation_id"], sloppy["iou"]) == (41, 905, 0.5)
    assert sloppy["segmentation"] == segmentation(60, 0, 80, 10)
    assert (wrong["class"], wrong["suggestion"], wrong["annotation_id"]) == ("pool", "house", 901)
    assert (wrong["iou"], wrong["usual_iou"]) == (None, None)  # its mask is not suspected
    assert (missing["class"], missing["annotation_id"], missing["bbox"]) == (None, None, [0, 50, 20, 20])


@pytest.mark.parametrize("format", ["coco", "labelme", "cvat", "label-studio"])
def test_a_written_dataset_has_all_objects_the_marks_and_missing_objects_as_crowd_regions(format, tmp_path):
    dataset, images = audit(FIRST, SECOND)
    marked = {"train": marked_images(dataset, images, find_suspects(images))}
    folder = write_annotations(marked, dataset.classes, tmp_path / "out", format=format)
    first, second = load_instance_dataset(folder)["train"]
    assert [one["category_id"] for one in first["annotations"]] == [0, 1, 0, 0]
    assert [one["iscrowd"] for one in first["annotations"]] == [0, 0, 0, 1]
    assert first["annotations"][3]["bbox"] == pytest.approx([0, 50, 20, 20], abs=1)
    assert len(second["annotations"]) == 3
    expected = "suspect, wrong class (0.80): Annotated as pool, detected as house with a score of 0.80."
    if format == "coco":
        content = json.loads((folder / "train" / "_annotations.coco.json").read_text())
        by_id = {one["id"]: one for one in content["annotations"]}
        assert by_id[901]["suspect"] == {"kind": "wrong class", "suggestion": "house", "evidence": 0.8}
        assert [key for key, one in by_id.items() if "suspect" in one] == [901, 902, 906, 905]
        found = by_id[901]["description"]
    elif format == "labelme":
        content = json.loads((folder / "train" / "40.json").read_text())
        assert content["flags"] == {"suspect": True}
        assert [shape["flags"].get("suspect", False) for shape in content["shapes"]] == [False, True, True, True]
        found = content["shapes"][1]["description"]
    elif format == "cvat":
        root = ElementTree.parse(folder / "annotations.xml")
        assert {element.text for element in root.iterfind(".//label//attribute/name")} == {"is_crowd", "description"}
        found = root.findall("image/mask")[1].find("attribute[@name='description']").text
    else:
        [found] = json.loads((folder / "train" / "tasks.json").read_text())[0]["annotations"][0]["result"][1]["meta"][
            "text"
        ]
    assert found == expected


def test_a_page_has_a_card_for_each_suspect_and_escapes_names(tmp_path):
    names = {HOUSE: '<script>alert("a")</script>', POOL: '"><img src=x onerror=alert(1)>'}
    dataset, images = audit(FIRST, SECOND, names=names)
    path = save_audit_page(tmp_path, images, find_suspects(images), dataset, title="</title><b>")
    page = Page(path.read_text(encoding="utf-8"))
    cards = [attributes for attributes in page.of("figure") if attributes["class"] == "card"]
    assert [card["data-kind"] for card in cards] == ["superfluous", "sloppy mask", "wrong class", "missing"]
    assert [card["data-class"] for card in cards] == [names[3], names[3], names[7], names[3]]
    assert len(page.of("script")) == 1
    assert page.of("img") == []
    detected = [attributes for attributes in page.of("path") if attributes["class"] == "correct"]
    assert len(detected) == 3
    assert len(re.findall(r"annotation 90\d", page.text)) == 3


@pytest.mark.parametrize(("image", "is_weak"), [(FIRST, True), (SECOND, False)])
def test_a_page_says_how_many_objects_the_model_finds(image, is_weak, tmp_path):
    dataset, images = audit(image)
    page = Page(save_audit_page(tmp_path, images, find_suspects(images), dataset).read_text(encoding="utf-8"))
    assert html.escape(explain_recall(recall_of(images))) in page.text
    assert any(attributes.get("class") == "warning" for attributes in page.of("p")) == is_weak


def test_instances_are_cut_at_a_window():
    _, [image] = audit(([(HOUSE, LEFT), (HOUSE, MIDDLE)], []))
    cut = crop_instances(image.objects, (10, 5, 40, 25))
    assert cut.boxes.tolist() == [[0, 0, 10, 15], [20, 0, 30, 15]]
    assert cut.dense_masks().sum((1, 2)).tolist() == [150, 150]
    assert cut.image_size == (20, 30)


def audit_drawn_scenes(monkeypatch, num_scenes):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import audit as benchmark

    result = benchmark.audit_scenes(num_scenes, 0.05, 0)
    is_right = [found is not None for found in result["right"]]
    num_sure = sum(suspect.evidence >= 0.5 for suspect in result["suspects"])
    return is_right, num_sure, len(result["broken"])


def test_most_labels_that_were_broken_in_drawn_scenes_are_found_first(monkeypatch):
    is_right, num_sure, num_broken = audit_drawn_scenes(monkeypatch, 24)
    assert num_broken >= 40
    assert np.mean(is_right[: num_broken // 4]) >= 0.8
    assert sum(is_right[:num_sure]) >= 0.6 * num_broken


@pytest.mark.long
def test_the_first_100_suspects_and_the_recall_in_200_drawn_scenes_are_as_documented(monkeypatch):
    is_right, num_sure, num_broken = audit_drawn_scenes(monkeypatch, 200)
    assert np.mean(is_right[:100]) >= 0.8
    assert sum(is_right[:num_sure]) >= 0.7 * num_broken
