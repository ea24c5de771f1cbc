"""Labels with cropped masks. The oracle is always the labels with dense masks."""

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from transformers_rfdetr import FlipAndCrop, InstanceDataset, RfDetrImageProcessor
from transformers_rfdetr.data.prepared import PreparedDataset, collate_fn
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.model.mask_points_rf_detr import CroppedMasks, sample_nearest
from transformers_rfdetr.model.targets_rf_detr import read_targets

from processor_inputs import annotation, processor, random_image, target
from small_models import small_model


def dense(labels):
    """The masks of cropped labels at the size of the input."""
    masks = torch.zeros((len(labels["mask_boxes"]), *labels["size"].tolist()), dtype=torch.bool)
    rest = labels["mask_pixels"]
    for mask, (top, left, height, width) in zip(masks, labels["mask_boxes"].tolist(), strict=True):
        mask[top : top + height, left : left + width] = rest[: height * width].reshape(height, width)
        rest = rest[height * width :]
    assert len(rest) == 0
    return masks


def both(image, *annotations, size=(60, 100), **settings):
    """The labels of an image with dense and with cropped masks."""
    prepare = processor(size, **settings)
    return (
        prepare(image, target(*annotations), return_segmentation_masks=kind)["labels"][0] for kind in (True, "cropped")
    )


def star(generator, height, width):
    angles = np.sort(generator.uniform(0, 2 * np.pi, 9))
    center, radii = generator.uniform(0, (width, height)), generator.uniform(1, 15, (9, 1))
    return (center + radii * np.stack([np.cos(angles), np.sin(angles)], 1)).ravel().tolist()


@pytest.mark.parametrize("settings", [{}, {"pad_size": {"height": 64, "width": 128}}], ids=["plain", "padded"])
def test_cropped_masks_have_the_pixels_of_dense_ones(settings):
    generator = np.random.default_rng(0)
    polygons = [annotation(segmentation=[star(generator, 30, 50)], bbox=[0, 0, 50, 30]) for _ in range(12)]
    mask = np.zeros((30, 50), np.uint8, order="F")
    mask[3:9, 20:40:3] = 1
    rle = coco_mask.encode(mask)
    others = [
        annotation(segmentation=rle),
        annotation(segmentation=None),
        annotation(segmentation=[[0, 0, 0.1, 0, 0, 0.1]]),
    ]
    whole, cropped = both(random_image(30, 50), *polygons, *others, **settings)
    assert torch.equal(dense(cropped), whole.pop("masks"))
    assert whole["has_mask"].tolist() == [True] * 13 + [False]  # the last one has no pixel and is dropped
    pixels = cropped.pop("mask_pixels"), cropped.pop("mask_boxes")
    assert [value.dtype for value in pixels] == [torch.bool, torch.int64]
    assert whole.keys() == cropped.keys()
    assert all(torch.equal(whole[name], cropped[name]) for name in whole)


def test_an_image_without_objects_has_empty_fields():
    _, cropped = both(random_image(30, 50))
    assert (tuple(cropped["mask_boxes"].shape), tuple(cropped["mask_pixels"].shape)) == ((0, 4), (0,))


def test_another_word_is_refused():
    with pytest.raises(ValueError, match='`return_segmentation_masks` must be a bool or "cropped", got'):
        processor()(random_image(30, 50), target(annotation()), return_segmentation_masks="packed")


def test_cropped_masks_are_sampled_as_dense_ones():
    generator = torch.Generator().manual_seed(0)
    whole = torch.rand((3, 9, 14), generator=generator) > 0.5
    boxes = torch.tensor([[0, 0, 9, 14], [2, 3, 4, 5], [8, 13, 1, 1]])
    for mask, (top, left, height, width) in zip(whole, boxes.tolist(), strict=True):
        outside = torch.ones_like(mask)
        outside[top : top + height, left : left + width] = False
        mask[outside] = False
    pixels = [m[t : t + h, x : x + w].flatten() for m, (t, x, h, w) in zip(whole, boxes.tolist(), strict=True)]
    starts = torch.tensor([0, 126, 146])
    cropped = CroppedMasks(torch.cat([*pixels, torch.tensor([False])]), boxes, starts, torch.tensor([9, 14]))
    indices = torch.tensor([2, 0, 1, 1])
    ties = torch.cartesian_prod(torch.arange(29) / 28, torch.arange(19) / 18)  # edges and centers of all pixels
    points = torch.cat([torch.rand((4, 2000, 2), generator=generator), ties.expand(4, -1, -1)], dim=1)
    sampled = sample_nearest(whole, indices, points)
    assert 0 < sampled.mean() < 1
    assert torch.equal(sample_nearest(cropped, indices, points), sampled)


def test_losses_and_gradients_are_those_of_dense_masks():
    images, coco = draw_dataset(4, (70, 90), first_seed=1, classes=["tree", "car"])
    empty = coco["images"][2]["id"]
    coco["annotations"] = [item for item in coco["annotations"] if item["image_id"] != empty]
    coco["annotations"][1]["iscrowd"] = 1
    coco["annotations"][2]["segmentation"] = None  # a box is all that is known
    data = InstanceDataset(coco, images)
    shapes = [RfDetrImageProcessor(size=size) for size in ((24, 48), (48, 24))]  # whose batch is padded

    def losses(masks):
        prepared = [PreparedDataset(data, shape, augmentation=FlipAndCrop(crop=1.0), masks=masks) for shape in shapes]
        batch = collate_fn([prepared[index % 2][index] for index in range(4)])
        model = small_model(num_labels=2).train()
        torch.manual_seed(0)
        outputs = model(**batch)
        outputs.loss.backward()
        return outputs.loss, [weight.grad for weight in model.parameters()], batch

    loss, gradients, batch = losses(True)
    cropped_loss, cropped_gradients, cropped_batch = losses("cropped")
    labels = batch["labels"]
    assert not batch["pixel_mask"].all()
    assert [len(label["class_labels"]) for label in labels].count(0) >= 1
    assert any("has_mask" in label for label in labels)
    assert any("crowd_labels" in label for label in labels)
    assert not any("masks" in label for label in cropped_batch["labels"])
    assert torch.equal(loss, cropped_loss)
    for gradient, cropped in zip(gradients, cropped_gradients, strict=True):
        assert (gradient is None) == (cropped is None)
        assert gradient is None or torch.equal(gradient, cropped)


def test_masks_of_small_objects_take_at_most_a_fiftieth_of_the_bytes():
    outlines = [star(np.random.default_rng(seed), 256, 256) for seed in range(30)]
    objects = [annotation(segmentation=[outline], bbox=[0, 0, 256, 256]) for outline in outlines]
    whole, cropped = both(random_image(256, 256), *objects, size=(432, 432))
    assert cropped["mask_pixels"].nbytes + cropped["mask_boxes"].nbytes <= 0.02 * whole["masks"].nbytes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_pixels": None}, r"must have 'mask_pixels'"),
        ({"mask_pixels": torch.zeros(7)}, r"\['mask_pixels'\]` must be a bool tensor \(K,\), got torch.float32"),
        ({"mask_pixels": torch.zeros(7, dtype=torch.bool)}, r"\['mask_boxes'\]` must lie inside \[10, 20\].* 7 pixels"),
        ({"mask_boxes": torch.tensor([[8, 0, 3, 2]])}, r"\['mask_boxes'\]` must lie inside \[10, 20\].*8, 0, 3, 2"),
        ({"mask_boxes": torch.tensor([[-1, 0, 3, 2]])}, r"\['mask_boxes'\]` must lie inside"),
        ({"mask_boxes": torch.zeros(1, 4)}, r"\['mask_boxes'\]` must be an integer tensor \(T, 4\)"),
        ({"mask_boxes": torch.tensor([[0, 0, 1, 3]] * 2)}, "must have fields of equal length"),
        ({"size": torch.tensor([10, 20, 3])}, r"\['size'\]` must be an integer tensor \(2,\)"),
    ],
)
def test_cropped_masks_that_cannot_be_read_are_refused_by_name(changes, words):
    labels = {
        "class_labels": torch.tensor([0]),
        "boxes": torch.rand(1, 4),
        "mask_boxes": torch.tensor([[0, 0, 3, 2]]),
        "mask_pixels": torch.ones(6, dtype=torch.bool),
        "size": torch.tensor([10, 20]),
    }
    assert len(read_targets([labels], 1, 1, True)) == 1
    changed = {name: value for name, value in (labels | changes).items() if value is not None}
    with pytest.raises(ValueError, match=rf"`labels\[0\].*{words}|`labels\[0\]` {words}"):
        read_targets([changed], 1, 1, True)
