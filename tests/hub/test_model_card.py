"""The model card: metrics, untrusted names, usage, classes, and the code beside a model."""

import json
import re
from typing import Any

import torch
from huggingface_hub import ModelCard

from transformers_rfdetr import RfDetrForObjectDetection
from transformers_rfdetr.hub.model_card import Run, model_card
from transformers_rfdetr.hub.model_code import CODE_FILES, add_code

from hub_server import code_blocks
from small_models import small_config


def numbers(segm_ap: float, **others: Any) -> dict[str, Any]:
    return {"segm_AP": segm_ap, "segm_AP_large": -1.0, "bbox_AP": 0.5, "mean_iou": 0.25, **others}


def test_the_card_has_the_metrics_of_the_run_as_a_table_and_for_the_hub():
    run = Run(
        base_model="Roboflow/rf-detr-seg-medium",
        datasets=["me/barns", "my | own"],
        splits={"train": (10, 31), "validation": (7, 20)},
        objects={"cat": 30, "dog": 1},
        results={
            "validation": numbers(
                0.123456,
                per_class={"cat": {"segm_AP": 0.2}, "dog": {"segm_AP": -1.0}},
                intervals={"confidence": 0.9, "segm_AP": (0.1, 0.15), "segm_AP_large": (-1.0, -1.0), "per_class": {}},
            ),
            "test": numbers(0.5),
        },
        recipe={"epochs": 2},
        note="Not COCO's.",
    )
    card = model_card("me/pets", small_config(num_labels=2, id2label={0: "cat", 1: "dog"}), has_masks=True, run=run)
    assert "|  | validation | test |\n| --- | --- | --- |\n| Mask AP | 0.123 (0.100 to 0.150) | 0.500 |" in card
    assert "90 % confidence intervals" in card
    assert "| Mask AP, large objects | – | – |" in card
    assert "Not COCO's." in card
    assert "| label | class | objects to train on | mask AP, validation |" in card
    assert "| 0 | cat | 30 | 0.200 |\n| 1 | dog | 1 | – |" in card
    assert "| train | 10 | 31 |" in card
    assert r"[me/barns](https://huggingface.co/datasets/me/barns), my \| own." in card
    data = ModelCard(card).data
    assert data.datasets == ["me/barns"]
    found = [(r.dataset_split, r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results]
    assert found == [
        ("validation", "mean_average_precision", "Mask AP", 0.1235),
        ("validation", "mean_average_precision", "Box AP", 0.5),
        ("validation", "mean_iou", "Mean IoU", 0.25),
        ("test", "mean_average_precision", "Mask AP", 0.5),
        ("test", "mean_average_precision", "Box AP", 0.5),
        ("test", "mean_iou", "Mean IoU", 0.25),
    ]
    assert {(r.task_type, r.dataset_type) for r in data.eval_results} == {("image-segmentation", "me/barns")}


def test_untrusted_names_are_escaped_in_the_card_and_its_metadata():
    hostile = "x\n---\nlicense: mit\n# <img src=x onerror=alert(1)> [a](b) `c`"
    run = Run(datasets=[hostile], objects={hostile: 3}, splits={hostile: (1, 2)}, results={hostile: numbers(0.5)})
    card = model_card(
        f"me/{hostile}", small_config(num_labels=1, id2label={0: hostile}), has_masks=True, run=run, title=hostile
    )
    data = ModelCard(card).data
    assert data.license is None
    assert data.eval_results[0].dataset_split == " ".join(hostile.split())
    text = card.partition("\n---\n")[2]
    code = "".join(code_blocks(text))
    prose = text
    for block in code_blocks(text):
        prose = prose.replace(block, "")
    assert not re.search(r"(?<!\\)(<img|\[a\]|`c)", prose)
    assert "\n# <" not in code
    for block in code_blocks(card):
        compile(block, "card", "exec")
    assert [line for line in prose.splitlines() if line.startswith("# ")] == [
        r"# x --- license: mit \# \<img src=x onerror=alert(1)\> \[a\](b) \`c\`"
    ]


def test_the_card_has_code_without_the_package_only_where_it_loads_the_same_model():
    port, code = "transformers>=5.9", "trust_remote_code=True"
    square = small_config()
    card = model_card("me/x", square, has_masks=True)
    assert port in card
    assert code not in card
    card = model_card("me/x", square, has_masks=True, with_code=True)
    assert code in card
    assert port not in card
    for other in (small_config(resolution=[48, 96]), small_config(projector_scale=["P3", "P5"])):
        assert len(code_blocks(model_card("me/x", other, has_masks=True))) == 1
    card = model_card("me/x", square, has_masks=False)
    assert "AutoModelForObjectDetection" in card
    assert "Segmentation" not in card
    assert "segmentation" not in card
    assert "instances.masks" not in card


def test_many_classes_are_folded_and_background_rows_omitted():
    names = {label: f"class {label}" for label in range(30)} | {30: "__background__"}
    card = model_card("me/x", small_config(num_labels=31, id2label=names), has_masks=True)
    assert "<details><summary>30 classes</summary>\n\n| label | class |" in card
    assert "30 classes." in card
    assert "background" not in card


def test_the_card_of_a_calibrated_model_has_its_thresholds_and_what_they_promise():
    names = {0: "cat", 1: "dog"}
    config = small_config(num_labels=2, id2label=names, score_thresholds={1: 0.25}, score_thresholds_note="best | F1")
    card = model_card("me/pets", config, has_masks=True)
    assert "| label | class | score threshold |\n| --- | --- | --- |\n| 0 | cat |  |\n| 1 | dog | 0.250 |" in card
    assert r'`predict(..., threshold="calibrated")` of transformers-rfdetr uses: best \| F1.' in card
    assert '["image.jpg"], threshold="calibrated")' in card
    assert "calibrated" not in model_card("me/pets", small_config(num_labels=2, id2label=names), has_masks=True)


def test_the_code_of_a_detection_model_registers_no_segmentation_class(tmp_path):
    torch.manual_seed(0)
    RfDetrForObjectDetection(small_config()).save_pretrained(tmp_path)
    assert sorted(path.name for path in add_code(tmp_path)) == sorted(CODE_FILES)
    maps = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert sorted(maps) == ["AutoConfig", "AutoImageProcessor", "AutoModel", "AutoModelForObjectDetection"]
    assert isinstance(RfDetrForObjectDetection.from_pretrained(tmp_path), RfDetrForObjectDetection)
