"""What the model card says of a run: the metrics of the weights that were kept, images of predictions, adapters."""

from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor, load, predict, tiny_checkpoint
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.drawing import draw_instances
from transformers_rfdetr.training.run_card import describe_drawn, draw_examples, metrics_of_run, training_settings
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from hub_server import code_blocks
from small_models import assert_same_model, pixels, small_config, small_model
from training_run import QUICK, build_trainer, drawn


def metrics_of_trainer(trainer: RfDetrTrainer) -> dict[str, dict[str, Any]]:
    return metrics_of_run(trainer.args, trainer.state, [""], "segm_AP")


def test_the_metrics_of_a_run_are_those_of_the_weights_that_it_kept(tmp_path):
    trainer = build_trainer(tmp_path)
    log = [
        {"loss": 3.0, "step": 2},
        {"eval_segm_AP": 0.3, "eval_bbox_AP": 0.1, "eval_segm_AP/roof": 0.7, "step": 5},
        {"eval_segm_AP": 0.2, "eval_bbox_AP": 0.4, "eval_segm_AP/roof": 0.6, "step": 10},
        {"train_runtime": 1.0, "step": 10},
        {"eval_segm_AP": 0.9, "step": 10},  # of some other dataset
    ]
    trainer.state.log_history, trainer.state.global_step = log, 10
    [[title, best]] = metrics_of_trainer(trainer).items()
    assert (title, best["segm_AP"], best["bbox_AP"]) == ("validation", 0.3, 0.1)
    assert best["per_class"] == {"roof": {"segm_AP": 0.7}}
    trainer.args.load_best_model_at_end = False
    assert metrics_of_trainer(trainer)["validation"]["segm_AP"] == 0.2
    trainer.state.global_step = 12
    assert list(metrics_of_trainer(trainer)) == ["validation at optimizer step 10"]
    log[1] |= {"eval_base_segm_AP": 0.5, "eval_base_bbox_AP": 0.6}
    trainer.args.load_best_model_at_end = True
    assert metrics_of_trainer(trainer)["validation"]["bbox_AP"] == 0.6


@pytest.mark.parametrize(
    ("given", "name"),
    [({}, "default"), ({"augmentation": "strong"}, "strong"), ({"augmentation": None}, "none")],
)
def test_the_settings_name_the_augmentation(given, name, tmp_path):
    trainer = build_trainer(tmp_path, given)
    settings = training_settings(trainer.args, trainer.state, "", [], trainer.augmentation)
    assert settings["augmentation"] == name
    assert "started from" not in settings


def test_the_card_names_the_checkpoint_without_its_whole_path(tmp_path):
    trainer = build_trainer(tmp_path)
    for path, name in (
        (str(tiny_checkpoint()), "rf-detr-seg-tiny"),
        ("/data/me/runs/first/model", "first/model"),
        ("Roboflow/rf-detr-seg-medium", "Roboflow/rf-detr-seg-medium"),
    ):
        trainer.model.config.name_or_path = path
        trainer.create_model_card()
        assert f"| started from | {name} |" in (tmp_path / "README.md").read_text()


def test_crowds_are_not_drawn_and_objects_without_mask_are_drawn_as_boxes(monkeypatch):
    image = Image.new("RGB", (9, 8), "gray")
    square = {"bbox": [1.0, 2.0, 4.0, 3.0], "segmentation": [[1, 2, 5, 2, 5, 5, 1, 5]], "category_id": 0, "iscrowd": 0}
    crowd = square | {"bbox": [0.0, 0.0, 9.0, 8.0], "iscrowd": 1}
    mask = np.zeros((8, 9), bool)
    mask[2:5, 1:5] = True
    model, data = small_model(num_labels=1), drawn(1)
    monkeypatch.setattr(InstanceDataset, "__getitem__", lambda self, index: sample)
    for annotations, shapes in (
        ([square, crowd], {"masks": [mask]}),
        ([square, square | {"segmentation": None}], {"boxes": [(1, 2, 5, 5)] * 2}),
    ):
        sample = {"image": image, "height": 8, "width": 9, "annotations": annotations}
        [(truth, found)] = draw_examples(model, RfDetrImageProcessor(size=48), data, 1)
        assert np.array_equal(truth, draw_instances(image, **shapes)), shapes
        assert np.array_equal(found, image)  # random weights are sure of nothing
    assert describe_drawn(model.config) == "predictions with a score above 0.5"
    model.config.score_thresholds = {0: 0.001}
    assert describe_drawn(model.config) == "predictions with a score above the threshold of its class"
    [(_, found)] = draw_examples(model, RfDetrImageProcessor(size=48), data, 1)
    assert not np.array_equal(found, image)


# peft asks transformers >= 5.23 by an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_lora_is_trained_saved_loaded_and_merged(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = RfDetrForInstanceSegmentation(small_config(num_labels=1))
    base.save_pretrained(tmp_path / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    targets = r".*attention\.attention\.(query|value)|.*decoder.*linear1|class_embed|.*enc_out_class_embed\.\d+"
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=targets))
    arguments = RfDetrTrainingArguments(str(tmp_path / "run"), **(QUICK | {"num_train_epochs": 1}))
    trainer = RfDetrTrainer(model, arguments, train_dataset=drawn(4), eval_dataset=drawn(3, 100))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files
    assert "model.safetensors" not in files
    trained = model.eval()(pixels()).logits
    fresh = RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "base")
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    assert not torch.equal(fresh.eval()(pixels()).logits, trained)
    merged = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    assert merged.state_dict().keys() == before.keys()
    torch.testing.assert_close(merged.eval()(pixels()).logits, trained, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    again, _ = load(str(tmp_path / "merged"))
    assert_same_model(again, merged)
    [instances] = predict(model, RfDetrImageProcessor(size=48), [Image.new("RGB", (60, 40))], threshold=0.0)
    assert len(instances)
    trainer.create_model_card(finetuned_from="Roboflow/rf-detr-seg-nano")
    card = (tmp_path / "run" / "README.md").read_text()
    assert ModelCard(card).data.library_name == "peft"
    assert 'PeftModel.from_pretrained(base, "run").merge_and_unload()' in card
    compile(code_blocks(card)[0], "card", "exec")
