"""ExecuTorch files: what they contain and compute, and which files and options are refused."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from transformers_rfdetr import RfDetrImageProcessor, load, predict
from transformers_rfdetr.data.synthetic import draw_scene
from transformers_rfdetr.export import export
from transformers_rfdetr.export import exporter as export_module
from transformers_rfdetr.export.comparison import run_executorch
from transformers_rfdetr.export.executorch_file import write_executorch

from small_models import pixels, small_model

pytest.importorskip("executorch")
pytestmark = pytest.mark.filterwarnings("ignore:var_to_val is deprecated:FutureWarning")  # by ExecuTorch on torch 2.14

NAMES = {0: "__parent__", 1: "Scheune", 2: "家屋", 3: "__background__"}
SMALL = {"decoder_layers": 1, "backbone_config": {"num_hidden_layers": 2, "out_indices": [1, 2]}, "id2label": NAMES}


class StandIn(nn.Module):
    """Mean colors (B, 3) -> boxes and logits of six queries, selected by a top-k, with some rows of a weight."""

    def __init__(self, config):
        super().__init__()
        self.model = SimpleNamespace(config=config)
        self.weight = nn.Parameter(torch.linspace(-9, 9, 24 * 3).reshape(24, 3).sin())

    def forward(self, pixel_values):
        colors = pixel_values.mean((2, 3))
        rows = F.linear(colors, self.weight[4:]).unflatten(1, (10, 2))
        best = torch.topk(rows.sum(-1), 6, dim=1).indices
        chosen = rows.gather(1, best[..., None].expand(-1, -1, 2))
        return torch.cat([chosen, chosen], -1).sigmoid(), torch.cat([chosen, -chosen], -1)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A file of a stand-in for batches of 2, and what it was written from."""
    path = tmp_path_factory.mktemp("files") / "model.pte"
    model = small_model(**SMALL)
    processor = RfDetrImageProcessor.from_config(model.config)
    metadata = export_module._metadata(model, processor, ["boxes", "logits"], (48, 48), "float32", "executorch")
    module = StandIn(model.config).eval().requires_grad_(False)
    write_executorch(module, pixels(2), metadata, path)
    return SimpleNamespace(path=path, module=module, metadata=metadata, processor=processor)


def test_metadata_survive_and_one_file_is_enough(stand_in):
    runner, processor = load(str(stand_in.path))
    assert [path.name for path in stand_in.path.parent.iterdir()] == ["model.pte"]
    assert runner.metadata == stand_in.metadata
    assert json.loads(runner.metadata["class_names"]) == {"1": "Scheune", "2": "家屋"}
    assert "executorch" in json.loads(runner.metadata["versions"])
    assert runner.config.id2label == NAMES
    assert processor.to_dict() == stand_in.processor.to_dict()
    assert (runner.batch_size, runner.size) == (2, (48, 48))


def test_any_number_of_images_is_computed_as_by_pytorch(stand_in):
    inputs = pixels(3)
    boxes, logits = stand_in.module(inputs)
    outputs = load(str(stand_in.path))[0](inputs)
    torch.testing.assert_close(outputs.pred_boxes, boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-5, rtol=1e-5)


def test_the_indices_of_a_top_k_follow_the_outputs(stand_in):
    outputs, [indices] = run_executorch(stand_in.path, 2)(pixels(2))
    assert len(outputs) == 2
    rows = F.linear(pixels(2).mean((2, 3)), stand_in.module.weight[4:])
    assert indices.tolist() == rows.unflatten(1, (10, 2)).sum(-1).topk(6).indices.tolist()


class Sum(nn.Module):
    def forward(self, *inputs):
        return sum(inputs)


def write_foreign(path, num_inputs, metadata=None):
    from executorch.exir import to_edge_transform_and_lower

    program = torch.export.export(Sum(), (torch.ones(1, 3, 8, 8),) * num_inputs)
    methods = None if metadata is None else {"metadata": metadata}
    path.write_bytes(to_edge_transform_and_lower(program, constant_methods=methods).to_executorch().buffer)


@pytest.mark.parametrize(
    ("num_inputs", "metadata", "words"),
    [
        (1, None, "must have the metadata that `transformers-rfdetr export` writes, got none.*Export the model"),
        (1, "[1]", "must have the metadata"),
        (1, 3, "must have the metadata"),
        (2, None, r"must have one input, pixel_values .*got {'input 0': \[1, 3, 8, 8\]"),
    ],
)
def test_foreign_files_are_refused_with_what_was_expected(tmp_path, num_inputs, metadata, words):
    write_foreign(tmp_path / "model.pte", num_inputs, metadata)
    with pytest.raises(ValueError, match=words):
        load(str(tmp_path / "model.pte"))


def test_a_file_with_fewer_outputs_than_its_metadata_names_is_refused(stand_in, tmp_path):
    metadata = stand_in.metadata | {"outputs": '["boxes", "logits"]'}
    write_foreign(tmp_path / "model.pte", 1, json.dumps(metadata))
    with pytest.raises(ValueError, match=r"must have the outputs .*'logits'.* got .'boxes'.\."):
        load(str(tmp_path / "model.pte"))


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "model.pte").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"model\.pte.* ExecuTorch cannot read the file"):
        load(str(tmp_path / "model.pte"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"device": "cuda"}, "`device` must be cpu or auto for ExecuTorch, got 'cuda'"),
        ({"providers": ["CPUExecutionProvider"]}, "`providers` must be None for executorch"),
    ],
)
def test_what_the_runtime_does_not_have_is_refused(stand_in, arguments, words):
    with pytest.raises(ValueError, match=words):
        load(str(stand_in.path), **arguments)


def test_threads_do_not_change_under_an_open_file(stand_in):
    import executorch.extension.pybindings.portable_lib as portable_lib

    inputs, before = pixels(2), portable_lib._threadpool_get_thread_count()
    runner, _ = load(str(stand_in.path), threads=before)
    with pytest.raises(ValueError, match=f"`threads` must be {before}, as for the .pte files that are open, got"):
        load(str(stand_in.path), threads=before + 1)
    expected = runner(inputs).logits
    del runner
    other, _ = load(str(stand_in.path), threads=before + 1)
    assert portable_lib._threadpool_get_thread_count() == before + 1
    torch.testing.assert_close(other(inputs).logits, expected)
    del other
    load(str(stand_in.path), threads=before)


@pytest.mark.long
def test_a_file_of_another_size_that_selects_pairs_finds_what_the_model_finds(tmp_path):
    model = small_model(**SMALL)
    settings = {"format": "executorch", "resolution": (72, 48), "post_process": True, "batch_size": 2}
    done = export(model, tmp_path / "model.pte", **settings)
    assert all(0 <= value < 1e-3 for value in done.differences.values())
    assert done.differences["boxes"] > 0
    runner, processor = load(str(done.path))
    images = [draw_scene(seed, (90, 120), metres_per_pixel=0.6)[0] for seed in range(3)]
    expected = predict(model, processor, images, threshold=0.01)
    assert min(map(len, expected)) > 3
    for one, other in zip(predict(runner, processor, images, threshold=0.01), expected, strict=True):
        assert one.names == other.names
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
        assert (one.dense_masks() != other.dense_masks()).mean() <= 1e-4
