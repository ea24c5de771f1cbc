"""The classes of rfdetr's heads: which name each row gets, and which rows are never reported."""

import numpy as np
import pytest
import torch

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor
from transformers_rfdetr.conversion.class_names import read_class_names
from transformers_rfdetr.conversion.convert import convert_to_rfdetr, convert_to_transformers
from transformers_rfdetr.model.variants_rf_detr import COCO_ID2LABEL, COCO_NAMES

from rfdetr_files import NAMES, legacy, model_of


def test_a_head_of_91_rows_has_the_category_ids_of_coco(save, tmp_path):
    model = model_of(num_labels=91)
    for number, names in enumerate((None, list(COCO_NAMES.values()), COCO_NAMES)):
        done = convert_to_transformers(save(legacy(model, class_names=names)), tmp_path / str(number))
        assert done.config.id2label == COCO_ID2LABEL
        assert done.config.id2label[90] == "toothbrush"
    assert [change.what for change in done.changes] == []
    unnamed = convert_to_transformers(save(legacy(model, class_names=None)), tmp_path / "unnamed")
    assert [change.what for change in unnamed.changes] == ["class names"]
    names = [f"kind {number}" for number in range(90)]  # 90 classes of the user's are not COCO
    done = convert_to_transformers(save(legacy(model, class_names=names)), tmp_path / "own")
    assert done.config.id2label[17] == "kind 17"
    assert done.config.id2label[90] == "__background__"


# rfdetr's own rules: (version and data, rows, what its arguments hold) -> names by row. Before 1.6 `train` gave the
# head `num_classes` rows: one more than names of Roboflow's data, whose ids count from 1, and as many of YOLO's.
HEADS = {
    "1.4, Roboflow": (4, {"class_names": NAMES[:3], "num_classes": 4}, ["__parent__", *NAMES[:3]]),
    "1.4, YOLO": (3, {"class_names": NAMES[:3], "num_classes": 3}, NAMES[:3]),
    "1.4, Roboflow, a model made with num_classes": (
        7,
        {"class_names": NAMES[:3], "num_classes": 4},
        ["__parent__", *NAMES[:3], "__unused_4__", "__unused_5__", "__unused_6__"],
    ),
    "1.7": (4, {"class_names": NAMES[:3], "model_name": "RFDETRNano"}, [*NAMES[:3], "__background__"]),
    "1.11": (
        4,
        {"class_names": NAMES[:3], "num_classes": 3, "model_name": "RFDETRNano"},
        [*NAMES[:3], "__background__"],
    ),
    "1.11, weights.pt": (4, {"class_names": NAMES[:3], "num_classes": 3}, [*NAMES[:3], "__background__"]),
    "1.11, a model made with num_classes": (
        5,
        {"class_names": NAMES[:3], "num_classes": 4, "model_name": "RFDETRNano"},
        [*NAMES[:3], "__unused_3__", "__background__"],
    ),
    "no names": (4, {"num_classes": 3}, ["class 0", "class 1", "class 2", "class 3"]),
    "a mapping": (4, {"class_names": {2: "c", 0: "a", 1: "b"}, "num_classes": 3}, ["a", "b", "c", "__background__"]),
}


@pytest.mark.parametrize("head", HEADS)
def test_rows_get_the_names_of_the_classes_that_rfdetr_trained_them_for(head):
    rows, arguments, expected = HEADS[head]
    changes = []
    assert read_class_names(rows, arguments, None, changes) == dict(enumerate(expected))
    is_plain = expected in ([*NAMES[:3], "__background__"], NAMES[:3], ["a", "b", "c", "__background__"])
    assert bool(changes) == (not is_plain)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "c", "d"], r"`class_names` .* 4 rows .* got 4 names \(a, b, c, d\)"),
        (["a", "b", "a"], r"`class_names` .* distinct .* got a\."),
        (["a", "b", "__background__"], r"`class_names` .* got __background__"),
        (7, r"`class_names` must be a list .* got 7\."),
        ([1, 2, 3], r"`class_names` must be a list .* got \[1, 2, 3\]"),
        ({"a": 1}, r"`class_names` must be a list .* got a dict"),
    ],
)
def test_names_that_do_not_fit_the_rows_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        read_class_names(4, {"class_names": names, "model_name": "RFDETRNano"}, None, [])


def test_class_names_can_be_given(model, save, tmp_path):
    path = save(legacy(model, class_names=None))
    done = convert_to_transformers(path, tmp_path / "given", class_names=["a", "b", "c", "d"])
    assert list(done.config.id2label.values()) == ["a", "b", "c", "d", "__background__"]
    with pytest.raises(ValueError, match=r"`class_names` .* 5 rows .* got 6 names"):
        convert_to_transformers(path, tmp_path / "many", class_names=["a", "b", "c", "d", "e", "f"])


def test_a_head_without_names_is_converted_back_unchanged(model, save, tmp_path):
    convert_to_transformers(save(legacy(model, class_names=None)), tmp_path / "there")
    assert convert_to_rfdetr(tmp_path / "there", tmp_path / "back.pth").changes == []
    returned = torch.load(tmp_path / "back.pth", weights_only=True)
    assert all(torch.equal(returned["model"][name], tensor) for name, tensor in model.state_dict().items())
    assert returned["args"]["class_names"] is None


@pytest.mark.parametrize(("names", "never"), [(NAMES, [4]), (["barn", "house", "shed", "silo"], [0])])
def test_background_and_parent_rows_are_never_predicted(names, never, model, save, tmp_path):
    with torch.no_grad():
        model.class_embed.bias[never] = 20.0
    count = 4 if never == [4] else 5  # as of version 1.11, and of 1.4
    convert_to_transformers(save(legacy(model, class_names=names, num_classes=count)), tmp_path / "there")
    ours = RfDetrForInstanceSegmentation.from_pretrained(tmp_path / "there").eval()
    processor = RfDetrImageProcessor.from_pretrained(tmp_path / "there")
    inputs = processor(np.full((30, 40, 3), 90, np.uint8), return_tensors="pt")
    with torch.no_grad():
        outputs = ours(**inputs)
        raw = ours.class_embed(outputs.last_hidden_state)
    classes = [label for label in range(5) if label not in never]
    assert torch.equal(outputs.logits[..., classes], raw[..., classes])
    assert (raw[..., never].sigmoid() > 0.5).all()
    found = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[(30, 40)])[0]
    assert len(found["labels"]) == ours.config.num_queries
    assert set(found["labels"].tolist()) <= set(classes)
    ours.train()  # where every row is a target of the loss
    assert (ours(**inputs).logits > -100).all()


def test_our_heads_get_the_background_row_of_rfdetr(tmp_path):
    model = model_of(num_labels=None, id2label=dict(enumerate(["a", "b", "c"])))
    model.save_pretrained(tmp_path / "ours")
    done = convert_to_rfdetr(tmp_path / "ours", tmp_path / "back.pth")
    assert done.changes == [("class heads", "3 rows", "4: the last is rfdetr's background")]
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert content["args"]["class_names"] == ["a", "b", "c"]
    assert content["model_config"]["num_classes"] == 3
    heads = [name for name in content["model"] if "class_embed" in name]
    assert len(heads) == 2 * (1 + 3)
    for name, tensor in content["model"].items():
        if name == "_kp_active_mask":
            assert tensor.shape == (0, 0)
        elif name in heads:
            assert torch.equal(tensor[:3], model.state_dict()[name])
            assert (tensor[3:] == (-100 if name.endswith("bias") else 0)).all()
        else:
            assert torch.equal(tensor, model.state_dict()[name])
    there = convert_to_transformers(tmp_path / "back.pth", tmp_path / "again")
    assert list(there.config.id2label.values()) == ["a", "b", "c", "__background__"]


def test_heads_for_coco_are_converted_back_unchanged(tmp_path):
    model = model_of("rf-detr-nano", num_labels=None, id2label=COCO_ID2LABEL)
    model.save_pretrained(tmp_path / "ours")
    done = convert_to_rfdetr(tmp_path / "ours", tmp_path / "back.pth")
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    assert done.changes == []
    assert content["args"]["class_names"] == list(COCO_NAMES.values())
    assert content["model_config"]["num_classes"] == 90
    assert content["model_name"] == "RFDETRNano"
