"""Which images are suggested for annotation."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from transformers_rfdetr import load, predict, suggest
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.inference.suggestions import expected_errors, rank

SCENES = [draw_scene(5_000_000 + seed, (144, 144), metres_per_pixel=0.2)[0] for seed in range(3)]
BLANK = Image.new("RGB", (144, 144), (90, 110, 80))


@pytest.fixture(scope="module")
def tiny():
    return load("rf-detr-seg-tiny")


def test_errors_are_expected_of_uncertain_scores():
    assert expected_errors(np.array([0.9, 0.5, 0.2])) == pytest.approx(0.1 + 0.5 + 0.2)
    assert expected_errors(np.array([])) == 0


def test_images_are_selected_by_errors_times_distance_to_what_is_selected():
    embeddings = np.array([[0.0], [0.1], [1.0], [3.0]])
    spread = embeddings.std()
    # Image 0 is the most uncertain. Image 1 is nearly as uncertain, and nearly equal to it.
    found = rank(np.array([5.0, 4.9, 2.0, 1.0]), embeddings, np.empty((0, 1)), 4)
    assert [one.image_index for one in found] == [0, 3, 2, 1]
    expected = [1.0, 3.0 / spread, 1.0 / spread, 0.1 / spread]
    assert [one.distance for one in found] == pytest.approx(expected)
    assert [one.expected_errors for one in found] == [5.0, 1.0, 2.0, 4.9]


def test_images_near_annotated_ones_rank_lower():
    embeddings = np.array([[0.0], [0.1], [1.0]])
    errors = np.array([5.0, 4.9, 2.0])
    assert [one.image_index for one in rank(errors, embeddings, np.array([[0.0]]), 3)] == [2, 1, 0]
    assert rank(errors[:0], embeddings[:0], embeddings, 3) == []


def test_images_without_uncertain_detections_are_ranked_by_distance():
    found = rank(np.zeros(3), np.array([[0.0], [0.1], [1.0]]), np.array([[0.0]]), 3)
    assert [one.image_index for one in found] == [2, 1, 0]


def test_a_model_suggests_scenes_before_an_empty_image(tiny):
    found = suggest(*tiny, [BLANK, *SCENES], 3)
    assert sorted(one.image_index for one in found) == [1, 2, 3]
    scores = [one.scores for one in predict(*tiny, SCENES, threshold=0.1)]
    assert found[0].expected_errors == pytest.approx(max(map(expected_errors, scores)), rel=1e-5)
    again = suggest(*tiny, SCENES, 1, annotated=[SCENES[found[0].image_index - 1]])
    assert again[0].image_index != found[0].image_index - 1
    with pytest.raises(ValueError, match="`count` must be an integer of at least 1, got 0"):
        suggest(*tiny, SCENES, 0)


def test_the_command_links_the_suggested_images_and_lists_unreadable_ones(tmp_path):
    for index, scene in enumerate(SCENES):
        path = tmp_path / "pool" / f"{index}" / "scene.png"
        path.parent.mkdir(parents=True)
        scene.save(path)
    (tmp_path / "pool" / "broken.jpg").write_bytes(b"no image")
    output = tmp_path / "next"
    command = [
        "suggest",
        str(tmp_path / "pool"),
        "--model",
        "rf-detr-seg-tiny",
        "--count",
        "2",
        "--output",
        str(output),
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "broken.jpg" in result.output
    content = json.loads((output / "suggestions.json").read_text())
    assert len(content) == 2
    assert content[0]["expected_errors"] > 0
    names = {str(path.relative_to(output / "images")) for path in (output / "images").rglob("*.png")}
    assert names == {one["image"] for one in content} < {"0/scene.png", "1/scene.png", "2/scene.png"}
    assert CliRunner().invoke(app, command).exit_code == 2  # the folder is not empty
    again = [*command[:5], "3", "--output", str(tmp_path / "again"), "--annotated", str(tmp_path / "pool/0/scene.png")]
    assert "1 of them look the same" in CliRunner().invoke(app, again).output


@pytest.mark.long
def test_each_round_of_the_simulated_annotation_loop_annotates_more_images(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    import recipes
    import suggest as benchmark

    monkeypatch.setattr(benchmark, "PER_ROUND", 4)
    pool, held_out = recipes.drawn_split(20_000, 14, recipes.OFTEN), recipes.drawn_split(9000, 4, recipes.RARELY)
    chosen = {name: benchmark.run(name, 0, 3, 2, pool, held_out) for name in benchmark.STRATEGIES}
    for result in chosen.values():
        assert result["objects"] == sorted(set(result["objects"]))
        assert all(0 <= ap <= 1 for ap in result["segm_AP"])
    first, second = (result["objects"] for result in chosen.values())
    assert first[0] == second[0]  # the first round is common
    assert first != second
