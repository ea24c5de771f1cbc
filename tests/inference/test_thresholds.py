"""Calibrated score thresholds in predictions: whole images, tiles and videos."""

import numpy as np
import pytest

from transformers_rfdetr import load, predict, predict_tiled, predict_video
from transformers_rfdetr.data.synthetic import draw_scene

TREE, CAR = 1, 2
SCENES = [draw_scene(seed, (144, 144), metres_per_pixel=0.2)[0] for seed in (2_000_000, 2_000_001)]


@pytest.fixture(scope="module")
def calibrated():
    """A model that keeps half of the trees that score above 0.5, and two cars more; other classes have 0.5."""
    model, processor = load("rf-detr-seg-tiny")
    found = predict(model, processor, SCENES, threshold=0.0)
    scores, labels = (np.concatenate([getattr(one, name) for one in found]) for name in ("scores", "labels"))
    trees, cars = scores[(labels == TREE) & (scores > 0.5)], np.sort(scores[(labels == CAR) & (scores <= 0.5)])
    model.config.score_thresholds = {TREE: float(np.median(trees)), CAR: float(cars[-3])}
    return model, processor


def above(instances, model):
    thresholds = model.config.score_thresholds
    return instances.scores > np.array([thresholds.get(label, 0.5) for label in instances.labels.tolist()])


def test_instances_above_the_threshold_of_their_class_are_returned(calibrated):
    everything = predict(*calibrated, SCENES, threshold=0.0)
    found = predict(*calibrated, SCENES, threshold="calibrated")
    for all_of_image, kept in zip(everything, found, strict=True):
        expected = all_of_image.select(above(all_of_image, calibrated[0]))
        assert kept.to_dict() == expected.to_dict()
    labels, at_default = (
        np.concatenate([one.labels for one in each]).tolist() for each in (found, predict(*calibrated, SCENES))
    )
    assert labels.count(TREE) == at_default.count(TREE) // 2 > 0
    assert labels.count(CAR) == at_default.count(CAR) + 2


def test_a_model_without_thresholds_is_refused_with_the_remedy():
    model, processor = load("rf-detr-seg-tiny")
    for function, source in ((predict, SCENES), (predict_tiled, SCENES[0]), (predict_video, "a.mp4")):
        with pytest.raises(ValueError, match=r"not calibrated, got \"calibrated\". Call `calibrate\(model"):
            function(model, processor, source, threshold="calibrated")
    with pytest.raises(ValueError, match=r"must be a score in \[0, 1\] or \"calibrated\", got 'best'"):
        predict(model, processor, SCENES, threshold="best")


def test_tiles_are_merged_with_the_threshold_of_each_class(calibrated):
    image = draw_scene(2_000_002, (200, 200), metres_per_pixel=0.2)[0]
    found = predict_tiled(*calibrated, image, threshold="calibrated")
    assert len(found)
    assert above(found, calibrated[0]).all()
    single = predict_tiled(*calibrated, SCENES[0], threshold="calibrated")
    assert single.to_dict() == predict(*calibrated, SCENES[0], threshold="calibrated")[0].to_dict()
    for label, threshold in calibrated[
        0
    ].config.score_thresholds.items():  # each class is merged as with its threshold alone
        alone = predict_tiled(*calibrated, image, threshold=threshold)
        boxes = [one.boxes[one.labels == label] for one in (found, alone)]
        np.testing.assert_array_equal(*boxes)


def test_frames_of_a_video_are_filtered_by_class(calibrated, tmp_path):
    writer = pytest.importorskip("transformers_rfdetr.inference.video.writer")
    with writer.VideoWriter(tmp_path / "a.mp4", 5, SCENES[0].size) as video:
        for index, scene in enumerate(SCENES):
            video.write(scene, index / 5)
    frames = {}
    settings = {"on_frame": lambda frame, found, _: frames.setdefault(frame.index, found), "progress": False}
    predict_video(*calibrated, tmp_path / "a.mp4", threshold="calibrated", **settings)
    assert len(frames) == 2
    assert all(above(found, calibrated[0]).all() and len(found) for found in frames.values())
