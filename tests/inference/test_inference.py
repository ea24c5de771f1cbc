"""`predict`, and models compiled for inference."""

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_rfdetr import (
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    compile_for_inference,
    predict,
)
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.inference.compiled import InferenceModel

from small_models import pixels, small_model

SEGMENTATION, DETECTION = RfDetrForInstanceSegmentation, RfDetrForObjectDetection


@pytest.fixture(scope="module")
def images():
    return [draw_scene(seed=seed)[0].resize(size) for seed, size in enumerate([(60, 45), (31, 70), (48, 48)])]


def confident_model(kind=RfDetrForInstanceSegmentation, **overrides):
    """A small model whose scores lie around a half."""
    model = small_model(kind, **overrides)
    with torch.no_grad():
        model.class_embed.bias.add_(4.0)
    return model


def processor_of(model, **settings):
    return RfDetrImageProcessor.from_config(model.config, **settings)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_predict_returns_what_model_and_post_processing_return(images, batch_size):
    model = confident_model()
    processor = processor_of(model)
    found = predict(model, processor, images, threshold=0.3, top_k=9, batch_size=batch_size)
    for image, instances in zip(images, found, strict=True):
        with torch.no_grad():
            outputs = model(**processor(image, return_tensors="pt"))
        size = image.size[::-1]
        settings = {"threshold": 0.3, "target_sizes": [size], "top_k": 9}
        expected = processor.post_process_instance_segmentation(outputs, return_binary_maps=True, **settings)[0]
        segments = expected["segments_info"]
        assert len(instances) == len(segments) > 0
        np.testing.assert_allclose(instances.scores, [segment["score"] for segment in segments], atol=1e-5)
        np.testing.assert_allclose(instances.boxes, [segment["box"] for segment in segments], atol=1e-3)
        assert instances.labels.tolist() == [segment["label_id"] for segment in segments]
        assert instances.names == [model.config.id2label[segment["label_id"]] for segment in segments]
        assert (instances.dense_masks() != expected["segmentation"].numpy()).mean() < 1e-3
        assert instances.image_size == size


def test_padded_images_have_the_same_masks(images):
    model = confident_model()
    processor = processor_of(model, size={"shortest_edge": 48, "longest_edge": 96}, do_pad=True, pad_size=(96, 96))
    found = predict(model, processor, images[:2], threshold=0.2, batch_size=2)
    inputs = processor(images[:2], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    sizes = [image.size[::-1] for image in images[:2]]
    expected = processor.post_process_instance_segmentation(
        outputs, 0.2, target_sizes=sizes, return_binary_maps=True, pixel_mask=inputs["pixel_mask"]
    )
    for instances, result in zip(found, expected, strict=True):
        assert len(instances) > 0
        assert (instances.dense_masks() != result["segmentation"].numpy()).mean() < 1e-3


def test_instances_of_a_detection_model_have_boxes_only(images):
    model = confident_model(DETECTION)
    instances = predict(model, processor_of(model), images[0], threshold=0.0)[0]
    assert len(instances) == 6
    assert instances.masks is None
    assert instances.dense_masks().shape == (0, 45, 60)
    assert instances.polygons() == []
    assert [crop.mode for crop in instances.crops(images[0])] == ["RGB"] * 6


def test_only_the_given_classes_are_predicted(images):
    model = confident_model(id2label={0: "cat", 1: "dog", 2: "cat", 3: "horse"})
    processor = processor_of(model)
    for every, some in zip(
        predict(model, processor, images, threshold=0.0, top_k=24),  # all pairs of query and class
        predict(model, processor, images, threshold=0.0, top_k=24, classes=["cat"]),
        strict=True,
    ):
        cats = every.select([label in (0, 2) for label in every.labels])
        assert (some.names, some.masks, some.scores.tolist()) == (cats.names, cats.masks, cats.scores.tolist())
    with pytest.raises(ValueError, match=r"classes.*4 .*'hrose'.*horse"):
        predict(model, processor, images, classes=["cat", "hrose"])
    with pytest.raises(ValueError, match=r"classes.*\[\]"):
        predict(model, processor, images, classes=[])
    assert {name for one in predict(model, processor, images, threshold=0.0, classes="dog") for name in one.names} == {
        "dog"
    }


@pytest.mark.parametrize("form", ["array", "tensor", "generator", "tuple", "map"])
def test_images_may_be_a_4d_array_or_any_iterable(form, images):
    model = confident_model()
    processor = processor_of(model)
    same_size = [np.asarray(image.resize((60, 45))) for image in images]
    forms = {
        "array": lambda: np.stack(same_size),
        "tensor": lambda: torch.from_numpy(np.stack(same_size)),
        "generator": lambda: (Image.fromarray(image) for image in same_size),
        "tuple": lambda: tuple(same_size),
        "map": lambda: map(Image.fromarray, same_size),
    }
    expected = predict(model, processor, same_size, threshold=0.0, batch_size=2)
    found = predict(model, processor, forms[form](), threshold=0.0, batch_size=2)
    assert len(expected) == 3
    assert [one.masks for one in found] == [one.masks for one in expected]


def test_the_error_for_an_image_of_a_generator_has_its_index(images):
    model = confident_model()
    with pytest.raises(ValueError, match=r"image 2: .*none\.png"):
        predict(model, processor_of(model), (image for image in [*images[:2], "none.png"]), batch_size=2)


@pytest.mark.parametrize(("category_ids", "expected"), [([7, 9, 40, 41], True), ([7, 9], False), (None, False)])
def test_instances_have_the_category_ids_of_the_training_data(category_ids, expected, images):
    model = confident_model(id2label={0: "cat", 1: "dog", 2: "cow", 3: "horse"})
    model.config.category_ids = category_ids  # two ids belong to classes that the checkpoint had before
    [found] = predict(model, processor_of(model), images[0], threshold=0.0)
    wanted = [category_ids[label] for label in found.labels] if expected else found.labels.tolist()
    results = found.to_coco(1)
    assert len(results) > 0
    assert [one["category_id"] for one in results] == [n for n, area in zip(wanted, found.areas, strict=True) if area]


def test_a_column_of_a_dataset_is_a_sequence_of_images(images):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"photo": datasets.Image()})
    rows = datasets.Dataset.from_dict({"photo": images}, features)
    model = confident_model()
    found = predict(model, processor_of(model), rows["photo"], threshold=0.0)
    expected = predict(model, processor_of(model), images, threshold=0.0)
    assert [one.masks for one in found] == [one.masks for one in expected]


def test_only_masks_of_detections_are_materialized(images):
    model = confident_model(num_queries=40)
    rows = []
    model.segmentation_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape))
    found = predict(model, processor_of(model), images, threshold=0.6, batch_size=3)
    assert rows == [(1, len(instances), 32) for instances in found]
    assert max(len(instances) for instances in found) < 40


def test_all_forms_of_images_are_read_and_the_error_for_an_unreadable_one_has_its_index(images, tmp_path):
    model = confident_model()
    processor = processor_of(model)
    images[0].save(tmp_path / "image.png")
    array = np.asarray(images[0])
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    kinds = [tmp_path / "image.png", str(tmp_path / "image.png"), images[0], array, tensor, tensor / 255]
    first, *others = predict(model, processor, kinds, threshold=0.2)
    for other in others:
        np.testing.assert_array_equal(first.scores, other.scores)
        assert first.masks == other.masks
    with pytest.raises(ValueError, match=r"image 2: .*none\.png"):
        predict(model, processor, [*kinds[:2], tmp_path / "none.png"], batch_size=2)
    assert predict(model, processor, []) == []
    with pytest.raises(ValueError, match=r"threshold.*\[0, 1\], got 50"):
        predict(model, processor, kinds, threshold=50)
    with pytest.raises(ValueError, match=r"batch_size.* got 0"):
        predict(model, processor, kinds, batch_size=0)


def test_predict_restores_training_mode(images):
    model = confident_model()
    expected = predict(model, processor_of(model), images[0], threshold=0.1)[0]
    model.train()
    found = predict(model, processor_of(model), images[0], threshold=0.1)[0]
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert model.training


def test_crops_show_the_pixels_of_the_mask_and_nothing_else(images):
    model = confident_model()
    instances = predict(model, processor_of(model), images[0], threshold=0.2)[0]
    for crop, mask in zip(instances.crops(images[0]), instances.dense_masks(), strict=True):
        rows, columns = np.nonzero(mask)
        assert crop.size == (np.ptp(columns) + 1, np.ptp(rows) + 1)
        area = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        np.testing.assert_array_equal(np.asarray(crop)[..., 3] == 255, mask[area])
        np.testing.assert_array_equal(np.asarray(crop)[..., :3], np.asarray(images[0])[area])
    with pytest.raises(ValueError, match=r"image.*\(45, 60\), got \(48, 48\)"):
        instances.crops(Image.new("RGB", (48, 48)))


def test_polygons_follow_the_outlines_of_the_masks(images):
    from pycocotools import mask as coco_mask

    model = confident_model()
    instances = predict(model, processor_of(model), images[0], threshold=0.2)[0]
    for polygons, mask in zip(instances.polygons(), instances.masks, strict=True):
        area = coco_mask.area(mask)
        assert area > 100
        outline = coco_mask.merge(coco_mask.frPyObjects([p.ravel().astype(float).tolist() for p in polygons], 45, 60))
        assert coco_mask.area(coco_mask.merge([outline, mask], intersect=True)) == area
        assert coco_mask.iou([outline], [mask], [0])[0, 0] > 0.7  # the holes are filled


# Fast copies


@pytest.mark.parametrize("kind", [SEGMENTATION, DETECTION])
@pytest.mark.parametrize("size", [None, 72, (48, 96)])
def test_a_copy_for_one_size_computes_the_same(kind, size):
    model = confident_model(kind)
    fast = compile_for_inference(model, size=size, batch_size=2, compiled=False)
    height, width = (48, 48) if size is None else (72, 72) if size == 72 else size
    inputs = pixels(3, height, width)  # a whole batch and a part of one
    with torch.no_grad():
        expected = model(inputs)
    outputs = fast(inputs)
    for name in ("logits", "pred_boxes") + ("pred_masks",) * (kind is SEGMENTATION):
        torch.testing.assert_close(getattr(outputs, name), getattr(expected, name), atol=1e-4, rtol=1e-4)
    assert max(fast.differences.values()) < 1e-5
    assert set(fast.differences) == {"logits", "boxes", "features", "selected tokens"} | (
        {"masks"} if kind is SEGMENTATION else set()
    )
    assert fast.active == ["float32", f"2 x {height} x {width}"]
    assert model.config.backbone_config.image_size == 48
    with pytest.raises(ValueError, match=rf"`pixel_values` .*\({height}, {width}\).* got \(24, 24\)"):
        fast(pixels(1, 24, 24))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_in_half_precision_is_checked_and_predicts_nearly_the_same(dtype, images):
    model = confident_model()
    fast = compile_for_inference(model, dtype=dtype, compiled=False)
    assert fast.dtype == dtype
    assert model.dtype == torch.float32
    assert 1e-5 < max(fast.differences.values()) < 0.1
    instances = predict(fast, processor_of(model), images, threshold=0.2)
    assert len(instances[0]) > 0


def test_a_copy_that_computes_something_else_is_refused(monkeypatch):
    real = InferenceModel._tensors

    def wrong(self, pixel_values):
        chosen, logits, *rest = real(self, pixel_values)
        logits[0, 0, 0] += 0.1
        return chosen, logits, *rest

    monkeypatch.setattr(InferenceModel, "_tensors", wrong)
    with pytest.raises(ValueError, match=r"the logits of the compiled model .* 0.001, got"):
        compile_for_inference(confident_model(), compiled=False)


def test_where_nothing_can_be_compiled_a_warning_says_so_and_the_plain_path_runs(monkeypatch, hf_log):
    def broken(function, **options):
        def run(*args):
            raise RuntimeError("no C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    model = confident_model()
    fast = compile_for_inference(model)
    assert fast.active == ["float32", "1 x 48 x 48", "not compiled"]
    assert "torch.compile failed, so the model runs without it: RuntimeError: no C++ compiler" in hf_log.text
    with torch.no_grad():
        torch.testing.assert_close(fast(pixels()).logits, model(pixels()).logits)


def test_what_cannot_be_compiled_for_is_refused():
    with pytest.raises(ValueError, match=r"size.*24.*50"):
        compile_for_inference(confident_model(), size=50)
    with pytest.raises(ValueError, match=r"`dtype` .*got torch.float64"):
        compile_for_inference(confident_model(), dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be trained"):
        compile_for_inference(confident_model(), compiled=False).train(True)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_copy_is_compiled_and_computes_the_same(dtype, images):
    model = confident_model()
    fast = compile_for_inference(model, batch_size=2, dtype=dtype)
    assert "torch.compile" in fast.active
    if dtype == torch.float32:
        with torch.no_grad():
            torch.testing.assert_close(fast(pixels(3)).logits, model(pixels(3)).logits, atol=1e-4, rtol=1e-4)
    assert len(predict(fast, processor_of(model), images, threshold=0.2)[0]) > 0
    logits = fast(pixels()).logits
    for module in fast._model.modules():
        if type(module) is torch.nn.Linear:
            module.weight.zero_()
    torch.testing.assert_close(fast(pixels()).logits, logits, msg="the weights are not constants of the graph")


@pytest.mark.long
def test_more_models_can_be_compiled_than_graphs_of_one_code():
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        assert "torch.compile" in compile_for_inference(confident_model()).active
