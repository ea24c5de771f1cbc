"""rf-detr-seg-tiny, the trained model in the package: what it finds, and where it can be loaded."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from transformers import AutoImageProcessor, AutoModelForInstanceSegmentation, Trainer, TrainingArguments, pipeline
from typer.testing import CliRunner

from transformers_rfdetr import (
    InstanceDataset,
    Instances,
    analyse,
    collate_fn,
    compile_for_inference,
    evaluate_instance_segmentation,
    load,
    predict,
    predict_tiled,
    predict_video,
    sample_image,
    tiny_checkpoint,
)
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.data.synthetic import CLASSES, draw_dataset, draw_scene, draw_trays, save_dataset
from transformers_rfdetr.model.variants_rf_detr import resolve_variant

from small_models import shared_folder

ROOT = Path(__file__).parents[2]
UNSEEN = 2_000_000  # seeds from here on were never drawn in training
SCENES_64 = {"segm_AP": 0.8056, "segm_AP50": 0.9776, "segm_AP75": 0.9193, "bbox_AP": 0.7722, "mean_iou": 0.8764}
SCALE = {"size": (144, 144), "metres_per_pixel": (0.15, 0.28)}


@pytest.fixture(scope="module")
def tiny():
    return load("rf-detr-seg-tiny")


def analysed(model, processor, num_scenes):
    images, coco = draw_dataset(num_scenes, **SCALE, first_seed=UNSEEN)
    return analyse(model, processor, InstanceDataset(coco, images), progress=False)


def share_of_duplicates(analysis) -> float:
    return analysis.num_duplicates / sum(len(image.detections) for image in analysis.images)


def test_it_is_small_and_is_not_a_published_variant():
    assert sum(path.stat().st_size for path in tiny_checkpoint().iterdir()) < 8_000_000
    model, _ = load("rf-detr-seg-tiny")
    assert model.num_parameters() < 4_000_000
    assert "not one of the published variants" in (tiny_checkpoint() / "README.md").read_text()
    with pytest.raises(ValueError, match="must be a published RF-DETR variant"):
        resolve_variant("rf-detr-seg-tiny")


def test_the_auto_classes_load_it_as_float32(tiny):
    model = AutoModelForInstanceSegmentation.from_pretrained(tiny_checkpoint())
    processor = AutoImageProcessor.from_pretrained(tiny_checkpoint())
    assert model.dtype == torch.float32
    assert processor.to_dict() == tiny[1].to_dict()
    for name, tensor in tiny[0].state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.long
def test_the_command_evaluates_it_on_64_unseen_scenes_with_these_numbers(tmp_path):
    save_dataset(tmp_path / "valid", *draw_dataset(64, **SCALE, first_seed=UNSEEN))
    numbers = tmp_path / "numbers.json"
    result = CliRunner().invoke(app, ["evaluate", "rf-detr-seg-tiny", str(tmp_path), "--output", str(numbers)])
    assert result.exit_code == 0, result.output
    found = json.loads(numbers.read_text())
    assert {name: found[name] for name in SCENES_64} == pytest.approx(SCENES_64, abs=1e-3)


def test_it_finds_the_objects_of_32_unseen_scenes(tiny):
    analysis = analysed(*tiny, 32)
    assert analysis.metrics["segm_AP50"] > 0.96
    assert analysis.metrics["segm_AP"] > 0.79
    assert analysis.precision > 0.94
    assert analysis.recall > 0.93
    assert share_of_duplicates(analysis) < 0.025


@pytest.mark.long
def test_it_has_the_quality_that_the_readme_states(tiny):
    analysis = analysed(*tiny, 200)
    found = [analysis.metrics[name] for name in ("segm_AP", "segm_AP50")]
    found += [analysis.precision, analysis.recall, share_of_duplicates(analysis)]
    assert found == pytest.approx([0.805, 0.975, 0.970, 0.951, 0.018], abs=0.003)


def test_the_command_finds_objects_in_the_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["predict", "rf-detr-seg-tiny"])
    assert result.exit_code == 0, result.output
    [line] = (tmp_path / "predictions" / "predictions.jsonl").read_text().splitlines()
    found = Instances.from_dict(json.loads(line))
    assert {"pool", "tree", "car"} <= set(found.names)
    with Image.open(sample_image()) as sample, Image.open(tmp_path / "predictions" / "images" / "sample.png") as drawn:
        assert not np.array_equal(np.asarray(drawn), np.asarray(sample))


def test_other_models_need_images(tmp_path):
    result = CliRunner().invoke(app, ["predict", str(tmp_path)])
    assert result.exit_code == 2
    assert "sources" in result.output


def recall(found: Instances, annotations) -> float:
    """Return the share of the objects for which a detection of their class has a mask IoU of at least 0.5."""
    objects = [item for item in annotations if not item["iscrowd"]]
    rles = [
        shape if isinstance(shape, dict) else coco_mask.merge(coco_mask.frPyObjects(shape, *found.image_size))
        for shape in (item["segmentation"] for item in objects)
    ]
    ious = np.array(coco_mask.iou(found.masks, rles, [0] * len(rles))).reshape(len(found), len(rles))
    same = found.labels[:, None] == np.array([item["category_id"] - 1 for item in objects])
    return float((ious * same >= 0.5).any(0).mean())


def test_tiles_find_what_images_of_the_size_of_a_tile_show(tiny):
    image, annotations = draw_scene(UNSEEN + 1, (400, 500), metres_per_pixel=0.2)
    assert len(annotations) > 40
    tiled = recall(predict_tiled(*tiny, image, overlap=0.3), annotations)
    [whole] = predict(*tiny, image)
    assert tiled > 0.8
    assert tiled > recall(whole, annotations) + 0.3


def test_a_drawn_flight_keeps_the_identities_of_its_objects(tiny, tmp_path):
    pytest.importorskip("trackers")
    from transformers_rfdetr.inference.video.writer import VideoWriter

    town, annotations = draw_scene(UNSEEN, (144, 288), metres_per_pixel=0.2)
    with VideoWriter(tmp_path / "flight.mp4", 10, (144, 144)) as video:
        for step in range(24):
            video.write(town.crop((6 * step, 0, 6 * step + 144, 144)), step / 10)
    frames: list[Instances] = []
    predict_video(*tiny, tmp_path / "flight.mp4", track=True, on_frame=lambda frame, found, drawn: frames.append(found))
    switches = crossings = 0
    last: dict[int, int] = {}
    for step, found in enumerate(frames):
        for number, item in enumerate(annotations):
            x, y, width, height = item["bbox"]
            center = np.array([x + width / 2 - 6 * step, y + height / 2])
            inside = (found.boxes[:, :2] < center).all(1) & (center < found.boxes[:, 2:]).all(1)
            near = inside & (found.labels == item["category_id"] - 1) & (found.track_ids >= 0)
            if near.sum() == 1:
                track = int(found.track_ids[near][0])
                crossings += 1
                switches += last.get(number, track) != track
                last[number] = track
    assert crossings > 5 * len(last) > 30
    assert switches <= 0.02 * crossings


def test_half_precision_has_the_same_ap(tiny):
    expected = analysed(*tiny, 4).metrics["segm_AP"]
    for dtype in (torch.float16, torch.bfloat16):
        found = analysed(*load("rf-detr-seg-tiny", dtype=dtype), 4).metrics["segm_AP"]
        assert found == pytest.approx(expected, abs=0.02), dtype


@pytest.mark.long  # compiles with the C++ compiler
def test_a_compiled_model_has_the_same_ap(tiny):
    model, processor = tiny
    fast = compile_for_inference(model, batch_size=4)
    assert "torch.compile" in fast.active
    expected = analysed(model, processor, 12).metrics["segm_AP"]
    assert analysed(fast, processor, 12).metrics["segm_AP"] == pytest.approx(expected, abs=1e-3)


def test_the_pipeline_of_transformers_finds_the_same_objects(tiny):
    image, _ = draw_scene(UNSEEN, (144, 144), metres_per_pixel=0.2)
    [expected] = predict(*tiny, image)
    segment = pipeline("image-segmentation", model=str(tiny_checkpoint()))
    found = segment(image, threshold=0.5)
    assert len(found) == len(expected) > 5
    assert sorted(one["label"] for one in found) == sorted(expected.names)
    assert sorted(one["score"] for one in found) == pytest.approx(sorted(expected.scores.tolist()), abs=1e-5)


@pytest.mark.long
def test_the_stock_trainer_improves_it_on_classes_that_it_does_not_know(tmp_path):
    data, held_out = (
        InstanceDataset(coco, images) for images, coco in (draw_trays(48), draw_trays(16, first_seed=1_000_000))
    )
    model, processor = load("rf-detr-seg-tiny", id2label=data.id2label)

    def mask_ap50() -> float:
        return evaluate_instance_segmentation(model, processor, held_out, progress=False)["segm_AP50"]

    before = mask_ap50()
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=48,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data.with_processor(processor), data_collator=collate_fn).train()
    assert mask_ap50() > before + 0.15


@pytest.mark.long  # half an hour on one core
def test_it_learns_to_find_real_nuclei(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "nuclei.py"), str(shared_folder("dsb2018_nuclei"))]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("segm", "bbox", "mean_iou")))
    assert float(printed["segm_AP50"]) > 0.55  # measured: 0.643
    assert float(printed["mean_iou"]) > 0.55


@pytest.mark.long
def test_a_wheel_in_an_empty_folder_finds_objects(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "transformers_rfdetr/hub/endpoint/handler.py" in archive.namelist()
        archive.extractall(tmp_path / "installed")
    (tmp_path / "empty").mkdir()
    command = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r}); sys.argv[0] = 'transformers-rfdetr'\n"
    command += "from transformers_rfdetr.cli.app import app; app()"
    result = subprocess.run(
        [sys.executable, "-I", "-c", command, "predict", "rf-detr-seg-tiny"],
        cwd=tmp_path / "empty",
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "empty" / "predictions" / "images" / "sample.png").is_file()


def test_the_classes_are_those_of_the_scenes(tiny):
    assert tuple(tiny[0].config.id2label.values()) == CLASSES
