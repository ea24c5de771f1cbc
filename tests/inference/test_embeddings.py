"""The vectors of instances and images that `predict` returns if it is asked for them."""

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_rfdetr import (
    RfDetrForInstanceSegmentation,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    compile_for_inference,
    load,
    predict,
    predict_tiled,
)
from transformers_rfdetr.data.synthetic import draw_dataset, draw_scene
from transformers_rfdetr.inference.fixed_size import FixedSizeModel
from transformers_rfdetr.inference.instances import Instances
from transformers_rfdetr.inference.tile_merging import Tile, merge_tiles
from transformers_rfdetr.model.predictions_rf_detr import StagePrediction

from small_models import small_model

KINDS = [RfDetrForInstanceSegmentation, RfDetrForObjectDetection]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [draw_scene(seed=seed)[0].resize(size) for seed, size in enumerate([(60, 45), (31, 70), (48, 48)])]


def model_and_processor(kind=RfDetrForInstanceSegmentation, **settings):
    model = small_model(kind)
    return model, RfDetrImageProcessor.from_config(model.config, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_last_hidden_state_of_the_queries_and_the_mean_of_the_feature_map(kind, images):
    model, processor = model_and_processor(kind)
    [found] = predict(model, processor, images[0], threshold=0.0, top_k=24, embeddings=True)
    with torch.no_grad():
        outputs = model(**processor(images[0], return_tensors="pt"))
    scores = outputs.logits[0].sigmoid().numpy()
    queries = np.abs(scores[:, found.labels] - found.scores).argmin(0)
    assert len(found) == 24  # several classes of one query
    np.testing.assert_allclose(found.embeddings, outputs.last_hidden_state[0].numpy()[queries], atol=1e-5)
    expected = outputs.backbone_features[0].numpy().mean((1, 2))
    np.testing.assert_allclose(found.image_embedding, expected, atol=1e-5)
    assert found.embeddings.dtype == found.image_embedding.dtype == np.float32
    [without] = predict(model, processor, images[0], threshold=0.0)
    assert without.embeddings is without.image_embedding is None


def test_padding_does_not_count_in_the_vector_of_an_image(images):
    model, processor = model_and_processor(
        size={"shortest_edge": 48, "longest_edge": 96}, do_pad=True, pad_size=(96, 96)
    )
    found = predict(model, processor, images[:2], threshold=0.0, embeddings=True)
    inputs = processor(images[:2], return_tensors="pt")
    with torch.no_grad():
        features = model(**inputs).backbone_features.numpy()
    for one, feature, mask in zip(found, features, inputs["pixel_mask"].numpy(), strict=True):
        is_image = mask[::12, ::12].astype(bool)  # patches of 12 pixels; 48 x 64 and 96 x 43 pixels are image
        assert 0.3 < is_image.mean() < 0.7
        np.testing.assert_allclose(one.image_embedding, feature[:, is_image].mean(1), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_copy_returns_the_same(kind, images):
    model, processor = model_and_processor(kind)
    fast = compile_for_inference(model, batch_size=2, compiled=False)
    settings = {"threshold": 0.0, "embeddings": True}
    for one, other in zip(
        predict(fast, processor, images, **settings), predict(model, processor, images, **settings), strict=True
    ):
        np.testing.assert_allclose(one.embeddings, other.embeddings, atol=1e-4)
        np.testing.assert_allclose(one.image_embedding, other.image_embedding, atol=1e-4)


def test_half_precision_returns_float32(images):
    model, processor = model_and_processor()
    [found] = predict(model.bfloat16(), processor, images[0], threshold=0.0, embeddings=True)
    assert len(found) > 0
    assert found.embeddings.dtype == found.image_embedding.dtype == np.float32


def test_a_file_without_them_is_refused(images):
    class ExportedFile(FixedSizeModel):
        def _run(self, pixel_values):
            return torch.zeros(len(pixel_values), 6, 4), torch.full((len(pixel_values), 6, 4), 0.5)

        def _stage(self, tensors):
            return StagePrediction(*tensors)

    model, processor = model_and_processor()
    file = ExportedFile(model.config, torch.device("cpu"), (48, 48), None)
    assert len(predict(file, processor, images[0], threshold=0.1)[0]) > 0
    with pytest.raises(ValueError, match=r"`embeddings` requires a PyTorch model, got an exported file"):
        predict(file, processor, images[0], embeddings=True)


def test_an_object_in_tiles_has_the_vector_of_its_largest_piece_and_the_image_the_mean_of_its_tiles():
    def piece(box, number):
        vector = np.full((1, 3), number, np.float32)
        boxes, scores, labels = np.array([box], np.float32), np.full(1, 0.9, np.float32), np.zeros(1, np.int64)
        return Instances(boxes, scores, labels, ["car"], None, (40, 40), embeddings=vector, image_embedding=vector[0])

    # One object from x = 10 to 62 in two tiles that share x = 30 to 40.
    tiles = [(Tile(0, 0, 40, 40), piece([10, 5, 40, 20], 1)), (Tile(0, 30, 40, 40), piece([0, 5, 32, 20], 2))]
    found = merge_tiles(tiles, (40, 70))
    assert found.boxes.tolist() == [[10, 5, 62, 20]]
    assert found.embeddings.tolist() == [[2, 2, 2]]
    assert found.image_embedding.tolist() == [1.5, 1.5, 1.5]
    none = [(tile, instances.select([])) for tile, instances in tiles]
    assert merge_tiles(none, (40, 70)).image_embedding.tolist() == [1.5, 1.5, 1.5]


def test_instances_of_one_class_are_neighbors():
    model, processor = load("rf-detr-seg-tiny")
    scenes, _ = draw_dataset(6, (144, 144), metres_per_pixel=0.2, first_seed=2_000_000)
    found = predict(model, processor, scenes, embeddings=True)
    vectors, labels = (np.concatenate([getattr(one, name) for one in found]) for name in ("embeddings", "labels"))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    assert len(labels) > 50
    assert np.bincount(labels).max() < 0.6 * len(labels)
    assert (labels[similarity.argmax(1)] == labels).mean() > 0.95
    tiled = predict_tiled(model, processor, scenes[0].crop((0, 0, 144, 144)), embeddings=True)
    np.testing.assert_allclose(tiled.image_embedding, found[0].image_embedding, atol=1e-5)
