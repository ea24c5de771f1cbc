"""Matches of detections with objects, which are kept. Oracle: COCOeval of pycocotools."""

import pickle

import numpy as np
import pytest

from evaluation_cases import evaluated, of_kind, plain_cocoeval, random_case, updates_of
from transformers_rfdetr.evaluation import coco_evaluator
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator
from transformers_rfdetr.evaluation.confidence import match_tables, per_image
from transformers_rfdetr.evaluation.matching import precision_and_recall


@pytest.fixture
def matched(monkeypatch):
    """Return a list to which the number of detections of each image is added that is matched."""
    counts = []

    def counting(objects, detections, *arguments, **settings):
        counts.append(len(detections.labels))
        return match_image(objects, detections, *arguments, **settings)

    match_image = coco_evaluator.match_image
    monkeypatch.setattr(coco_evaluator, "match_image", counting)
    return counts


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_each_detection_matches_as_in_cocoeval(kind, seed):
    truth, results = random_case(seed)
    oracle = plain_cocoeval(truth, of_kind(kind, results), kind)
    tables = evaluated(truth, updates_of(results)).class_tables(kind)
    image_ids = sorted(image["id"] for image in truth["images"])
    num_areas = num_matches = num_ignored = 0
    for one in filter(None, oracle.evalImgs):
        table = tables[str(one["category_id"])]
        area = oracle.params.areaRng.index(one["aRng"])
        image = image_ids.index(one["image_id"])
        here = np.flatnonzero((table.images == image) & (table.ranks < 100))
        assert table.scores[here].tolist() == one["dtScores"]
        np.testing.assert_array_equal(table.is_match[area][:, here], one["dtMatches"] > 0)
        np.testing.assert_array_equal(table.is_ignored[area][:, here], one["dtIgnore"] > 0)
        assert table.num_objects[area, image] == np.count_nonzero(one["gtIgnore"] == 0)
        num_areas, num_matches = num_areas + 1, num_matches + np.count_nonzero(one["dtMatches"])
        num_ignored += np.count_nonzero(one["dtIgnore"])
    assert min(num_areas, num_matches, num_ignored) > 50


@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_precision_and_recall_are_those_of_cocoeval(kind):
    truth, results = random_case(1)
    oracle = plain_cocoeval(truth, of_kind(kind, results), kind, [1, 10, 100, 150]).eval
    evaluator = evaluated(truth, updates_of(results), max_detections=150)
    for index, table in enumerate(evaluator.class_tables(kind).values()):
        precision, recall = precision_and_recall(table, [1, 10, 100, 150])
        np.testing.assert_array_equal(precision, oracle["precision"][:, :, index])
        np.testing.assert_array_equal(recall, oracle["recall"][:, index])


def test_an_image_is_matched_once_whatever_is_computed_and_merged(matched):
    truth, results = random_case(2)
    updates = updates_of(results)
    evaluator = evaluated(truth, updates)
    assert len(matched) == len(updates)
    numbers = evaluator.compute(confidence=0.9)
    evaluator.precision_curves()
    match_tables(evaluator)
    per_image(evaluator)
    merged = InstanceSegmentationEvaluator(truth)
    merged.merge(pickle.loads(pickle.dumps(evaluator.state())))
    assert merged.compute(confidence=0.9) == numbers
    assert len(matched) == len(updates)
