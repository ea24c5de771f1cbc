"""transformers.exporters export our models, quantize them, and run the files."""

import pytest
import torch

from small_models import pixels, small_model

exporters = pytest.importorskip("transformers.exporters")

SMALL = {"decoder_layers": 1, "backbone_config": {"num_hidden_layers": 2, "out_indices": [1, 2]}}
# On CPUs that can, OpenVINO computes in bfloat16 unless it is told not to.
EXACT = {"config": {"INFERENCE_PRECISION_HINT": "f32"}}


def exporter_and_config(name, package, **settings):
    pytest.importorskip(package)
    return getattr(exporters, f"{name}Exporter")(), getattr(exporters, f"{name}Config")(**settings)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:var_to_val is deprecated:FutureWarning")  # by ExecuTorch on torch 2.14
@pytest.mark.parametrize(
    ("name", "package", "is_dynamic", "options"),
    [
        ("Onnx", "onnxscript", True, {}),
        ("OpenVINO", "openvino", True, EXACT),
        ("Executorch", "executorch", False, {}),
    ],
)
def test_an_exporter_writes_a_file_whose_runner_computes_what_the_model_computes(
    tmp_path, name, package, is_dynamic, options
):
    model, inputs = small_model(**SMALL).requires_grad_(False), pixels(2)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}} if is_dynamic else None
    exporter, config = exporter_and_config(name, package, dynamic_shapes=shapes)
    exporter.export(model, {"pixel_values": inputs}, config).save_pretrained(tmp_path)
    runner = exporters.ExportedModel.from_pretrained(tmp_path, **options)
    for number in (2, 1) if is_dynamic else (2,):
        found, expected = runner(pixel_values=inputs[:number]), model(inputs[:number])
        assert type(found) is type(expected)
        for output in ("logits", "pred_boxes", "pred_masks"):
            torch.testing.assert_close(found[output], expected[output], atol=1e-3, rtol=1e-3)


@pytest.mark.long
def test_its_quantizer_writes_an_int8_file_for_openvino(tmp_path):
    pytest.importorskip("nncf")
    model = small_model(**SMALL).requires_grad_(False)
    samples = [{"pixel_values": image[None]} for image in pixels(4)]
    quantizer = exporters.NNCFOpenVINOQuantizer(calibration_dataset=samples)
    exporter, config = exporter_and_config("OpenVINO", "openvino", quantizer=quantizer)
    exporter.export(model, samples[0], config).save_pretrained(tmp_path)
    found = exporters.ExportedModel.from_pretrained(tmp_path, **EXACT)(**samples[0])
    expected = model(**samples[0])
    assert not torch.equal(found.logits, expected.logits)
    assert found.logits.mean().item() == pytest.approx(expected.logits.mean().item(), abs=0.5)
