"""The README's Python blocks run, with what a machine without network and time replaces, listed here."""

import re
from pathlib import Path

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.demo_data import draw_scene

from small_models import small_config, small_model

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def run(block: str, substitutions: dict[str, str], **names) -> dict:
    for written, replacement in substitutions.items():
        assert written in block
        block = block.replace(written, replacement)
    exec(compile(block, "README.md", "exec"), names)
    return names


def test_there_are_two_blocks():
    assert len(BLOCKS) == 2


def test_the_prediction_block_prints_instances(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = small_model()
    model.save_pretrained("checkpoint")
    RfDetrImageProcessor.from_config(model.config).save_pretrained("checkpoint")
    draw_scene(seed=0)[0].save("photo.jpg")
    substitutions = {
        '"Roboflow/rf-detr-seg-medium"': '"checkpoint"',
        "target_sizes=": "threshold=0.0, target_sizes=",  # random weights are sure of nothing
    }
    result = run(BLOCKS[0], substitutions)["result"]
    assert len(capsys.readouterr().out.splitlines()) == len(result["segments_info"]) == 6


def test_the_training_block_trains(tmp_path):
    scenes = [draw_scene(seed, size=(96, 96), metres_per_pixel=0.6) for seed in range(4)]
    dataset = [
        (image, {"image_id": index, "annotations": [annotation | {"category_id": 0} for annotation in annotations]})
        for index, (image, annotations) in enumerate(scenes)
    ]
    substitutions = {
        'RfDetrConfig.from_variant("rf-detr-seg-nano", id2label={0: "building"})': "small_config(num_labels=1)",
        'TrainingArguments("runs/buildings",': f'TrainingArguments({str(tmp_path)!r}, max_steps=2, report_to="none", '
        "use_cpu=True,",
    }
    trainer = run(BLOCKS[1], substitutions, train_dataset=dataset, small_config=small_config)["trainer"]
    assert trainer.state.global_step == 2
    assert 0 < trainer.state.log_history[-1]["train_loss"] < 1000
