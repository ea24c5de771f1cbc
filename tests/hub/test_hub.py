"""Push to and load from a Hub on loopback with the real client, with and without the package.

HF_ENDPOINT is read when huggingface_hub is imported, so the checks run in a process of their own, one after the
other, and each test looks at the result of one check.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
import types
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, SpaceCard, hf_hub_download, snapshot_download
from PIL import Image
from transformers import AutoModelForInstanceSegmentation
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from typer.testing import CliRunner

from annotated_images import save_coco, save_images
from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor, load, load_instance_dataset
from transformers_rfdetr.cli.app import app
from transformers_rfdetr.conversion import architecture
from transformers_rfdetr.conversion.convert import convert_to_transformers
from transformers_rfdetr.data.synthetic import draw_dataset, save_dataset
from transformers_rfdetr.hub.model_code import CODE_FILES
from transformers_rfdetr.hub.push import upload
from transformers_rfdetr.hub.space import push_space
from transformers_rfdetr.training.trainer import RfDetrTrainer, RfDetrTrainingArguments

from hub_server import HubServer, code_blocks
from rfdetr_files import legacy, model_of
from small_models import assert_same_model, pixels, small_config, small_model
from training_run import QUICK, build_trainer, drawn

HOSTILE = {0: "<script>alert(1)</script>", 1: "a|b\n# c"}


# -- the session -----------------------------------------------------------------------------------------------------


class Hub:
    """A folder for the checks, the server's controls, and the pauses between attempts in seconds."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pauses = folder, []
        time.sleep = self.pauses.append  # type: ignore[assignment]

    def _control(self, path: str, content: Any = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        with urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/{path}", data) as answer:
            return json.load(answer)

    def faults(self, *faults: dict[str, Any]) -> None:
        self.pauses.clear()
        self._control("_faults", faults)

    def requests(self, method: str, part: str) -> list[int]:
        """Statuses of the answers since `faults`."""
        return [status for verb, path, status in self._control("_log") if verb == method and part in path]

    def files(self, name: str, revision: str = "main") -> set[str]:
        entries = self._control(f"api/models/{name}/tree/{revision}?recursive=true")
        return {entry["path"] for entry in entries if entry["type"] == "file"} - {".gitattributes"}


def refused(action: Callable[[], Any]) -> str:
    """Return the message of the OSError."""
    try:
        action()
    except OSError as error:
        return str(error)
    raise AssertionError("nothing was raised")


@contextmanager
def token(value: str) -> Iterator[None]:
    """Log in with another token, or with none: the client reads it at every request."""
    os.environ["HF_TOKEN"], before = value, os.environ["HF_TOKEN"]
    try:
        yield
    finally:
        os.environ["HF_TOKEN"] = before


def quick_trainer(folder: Path, **settings: Any) -> RfDetrTrainer:
    """One optimizer step on two images, without evaluation and checkpoints."""
    settings = QUICK | {"max_steps": 1, "save_strategy": "no", "eval_strategy": "no"} | settings
    model = RfDetrForInstanceSegmentation(small_config(num_labels=1))
    return RfDetrTrainer(model, RfDetrTrainingArguments(str(folder), **settings), train_dataset=drawn(2))


def card_of(name: str, **settings: Any) -> str:
    return Path(hf_hub_download(name, "README.md", **settings)).read_text(encoding="utf-8")


def check_a_model_and_its_processor_come_back_as_they_were(hub: Hub) -> None:
    model, processor = small_model(num_labels=2, id2label=HOSTILE), RfDetrImageProcessor(size=48, image_mean=[0.1] * 3)
    model.push_to_hub("me/barns", tags=["aerial"])
    processor.push_to_hub("me/barns")
    assert hub.files("me/barns") == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert_same_model(AutoModelForInstanceSegmentation.from_pretrained("me/barns"), model)
    again = AutoImageProcessor.from_pretrained("me/barns")
    assert again.to_dict() == processor.to_dict()


def check_the_card_of_an_untrained_model_loads_it(hub: Hub) -> None:
    card = card_of("me/barns")
    assert "# barns" in card
    assert "48 x 48 pixels, 6 queries, 2 classes." in card
    assert "<script>" not in card
    assert r"| 1 | a\|b \# c |" in card
    assert not any(title in card for title in ("## Results", "## Training", "Fine-tuned"))
    data = ModelCard(card).data
    assert (data.pipeline_tag, data.library_name, data.base_model) == ("image-segmentation", "transformers", None)
    assert data.tags == ["rf-detr", "instance-segmentation", "aerial"]
    os.chdir(hub.folder)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save("image.jpg")
    names: dict[str, Any] = {}
    exec(compile(code_blocks(card)[0], "card", "exec"), names)
    assert names["instances"].image_size == (40, 60)
    assert_same_model(names["model"], AutoModelForInstanceSegmentation.from_pretrained("me/barns"))


def check_an_existing_card_is_kept(hub: Hub) -> None:
    model = small_model()
    model.push_to_hub("me/card")
    own = hub.folder / "README.md"
    own.write_text("---\nlicense: mit\n---\n\nmy own words\n")
    from huggingface_hub import upload_file

    upload_file(path_or_fileobj=own, path_in_repo="README.md", repo_id="me/card")
    model.push_to_hub("me/card")
    assert card_of("me/card").endswith("my own words\n")
    model.push_to_hub("me/card", tags=["barn"])
    assert card_of("me/card").endswith("my own words\n")
    assert ModelCard(card_of("me/card")).data.to_dict() == {"license": "mit", "tags": ["barn"]}


def check_each_revision_holds_its_own_push(hub: Hub) -> None:
    first, second = small_model(), small_model(num_queries=5)
    commit = first.push_to_hub("me/revised").oid
    second.push_to_hub("me/revised", revision="small/5")
    kind = AutoModelForInstanceSegmentation
    assert_same_model(kind.from_pretrained("me/revised"), first)
    assert_same_model(kind.from_pretrained("me/revised", revision="small/5"), second)
    second.push_to_hub("me/revised")
    assert_same_model(kind.from_pretrained("me/revised"), second)
    assert_same_model(kind.from_pretrained("me/revised", revision=commit), first)
    assert_same_model(load("me/revised", revision=commit)[0], first)
    assert "nowhere" in refused(lambda: kind.from_pretrained("me/revised", revision="nowhere"))


def check_a_private_model_needs_its_token(hub: Hub) -> None:
    model = small_model()
    model.push_to_hub("me/secret", private=True)
    kind = AutoModelForInstanceSegmentation
    with token(""):
        assert "me/secret" in refused(lambda: kind.from_pretrained("me/secret"))
        assert "me/secret" in refused(lambda: kind.from_pretrained("me/secret", token="token-of-other"))
        assert_same_model(kind.from_pretrained("me/secret", token="token-of-me"), model)
        assert_same_model(load("me/secret", token="token-of-me")[0], model)


def check_private_never_uploads_to_a_public_repository(hub: Hub) -> None:
    model = small_model()
    model.push_to_hub("me/open")
    commit = HfApi().model_info("me/open").sha
    with pytest.raises(ValueError, match="`private` requires a private repository, but me/open exists and is public"):
        model.push_to_hub("me/open", private=True)
    assert HfApi().model_info("me/open").sha == commit
    trainer = quick_trainer(hub.folder / "public", push_to_hub=True, hub_model_id="me/public")
    with pytest.raises(ValueError, match="me/public exists and is public"):
        trainer.push_to_hub(private=True, num_images=0)
    assert hub.files("me/public") == set()


def check_train_pushes_to_a_private_repository(hub: Hub) -> None:
    save_dataset(hub.folder / "drawn" / "train", *draw_dataset(2, (96, 96), classes=["building"]))
    small_model(num_labels=1).save_pretrained(hub.folder / "start")
    command = ["train", str(hub.folder / "drawn"), "--model", str(hub.folder / "start"), "--device", "cpu"]
    command += ["-o", str(hub.folder / "private-run"), "--push-to-hub", "me/private-run", "--private"]
    for setting in ("max_steps=1", "gradient_accumulation_steps=1", "dataloader_num_workers=0", "multi_scale=false"):
        command += ["--set", setting]
    for _ in range(2):  # the run, and the same command when it has ended
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert "model.safetensors" in HfApi().list_repo_files("me/private-run")
    assert HfApi().model_info("me/private-run").private
    with token(""):
        assert "me/private-run" in refused(lambda: hf_hub_download("me/private-run", "model.safetensors"))
    commit, recipe = HfApi().model_info("me/private-run").sha, hub.folder / "private-run" / "train.yaml"
    repeat = ["train", "--config", str(recipe), "-o", str(hub.folder / "repeated"), "--set", "learning_rate=5e-5"]
    result = CliRunner().invoke(app, repeat)
    assert result.exit_code == 0, result.output
    assert HfApi().model_info("me/private-run").sha == commit  # the upload is not repeated
    result = CliRunner().invoke(app, [part.replace("private-run", "open") for part in command])
    assert result.exit_code == 2
    assert "me/open exists and is public" in result.stderr
    assert not (hub.folder / "open").exists()  # before the training


def check_a_wrong_token_is_reported_without_a_retry(hub: Hub) -> None:
    model = small_model()
    hub.faults()
    for other, status in (("token-of-nobody", "401"), ("token-of-other", "403")):
        message = refused(lambda other=other: model.push_to_hub("me/forbidden", token=other))
        assert message.startswith("me/forbidden was not uploaded: ")
        assert status in message
        assert "hf auth login" in message
    assert hub.pauses == []
    assert "me/forbidden" in refused(lambda: hf_hub_download("me/forbidden", "config.json"))


def check_a_missing_repository_is_named(hub: Hub) -> None:
    assert "me/nowhere" in refused(lambda: AutoModelForInstanceSegmentation.from_pretrained("me/nowhere"))
    with pytest.raises(ValueError, match="me/nowhere cannot be loaded"):
        load("me/nowhere")


def check_an_interrupted_upload_is_resumed(hub: Hub) -> None:
    model = small_model()
    model.save_pretrained(hub.folder / "shards", max_shard_size="50KB")
    count = len(list((hub.folder / "shards").glob("*.safetensors")))
    assert count >= 3
    # After one cut the upload is retried.
    hub.faults({"method": "PUT", "path": "^/lfs/", "status": 0})
    small_model(num_queries=4).push_to_hub("me/cut-once")
    assert hub.requests("PUT", "/lfs/") == [0, 200]
    # After some of the shards, every attempt fails.
    hub.faults(
        {"method": "PUT", "path": "^/lfs/", "status": 308, "times": 0},
        {"method": "PUT", "path": "^/lfs/[0-7]", "status": 0, "times": 1000},
    )
    message = refused(lambda: model.push_to_hub("me/cut", max_shard_size="50KB"))
    arrived = hub.requests("PUT", "/lfs/").count(200)
    assert 0 < arrived < count, arrived
    assert message.startswith("me/cut was not uploaded: ")
    assert message.endswith("Push again: files that have arrived are not sent twice.")
    assert hub.files("me/cut") == set()
    hub.faults()
    model.push_to_hub("me/cut", max_shard_size="50KB")
    assert hub.requests("PUT", "/lfs/") == [200] * (count - arrived)
    assert_same_model(AutoModelForInstanceSegmentation.from_pretrained("me/cut"), model)


def check_a_killed_push_changes_neither_side(hub: Hub) -> None:
    """`kill -9` when the Hub has half of the weights."""
    before = small_model(num_labels=1, num_queries=4)
    commit = before.push_to_hub("me/killed").oid
    trainer = quick_trainer(hub.folder / "killed")
    hub.faults({"method": "PUT", "path": "^/lfs/", "status": -1, "times": 1000})
    child = multiprocessing.get_context("fork").Process(target=trainer.push_to_hub, kwargs={"num_images": 0})
    child.start()
    for _ in range(1000):
        if hub.requests("PUT", "/lfs/") or not child.is_alive():
            break
        child.join(0.02)
    child.kill()
    child.join()
    assert (child.exitcode, hub.requests("PUT", "/lfs/")) == (-signal.SIGKILL, [-1])
    hub.faults()
    assert hub._control("api/models/me/killed")["sha"] == commit
    assert_same_model(AutoModelForInstanceSegmentation.from_pretrained("me/killed"), before)
    assert_same_model(RfDetrForInstanceSegmentation.from_pretrained(hub.folder / "killed"), trainer.model)
    trainer.push_to_hub(num_images=0)
    assert hub.requests("PUT", "/lfs/") == [200]
    assert_same_model(load("me/killed")[0], trainer.model.eval())


def check_rate_limits_and_server_errors_are_retried_after_a_pause(hub: Hub) -> None:
    model = small_model()
    hub.faults(
        {"method": "POST", "path": "^/api/repos/create", "status": 429, "headers": {"Retry-After": "7"}},
        {"method": "POST", "path": "/commit/", "status": 500, "times": 2},
    )
    model.push_to_hub("me/busy")
    assert hub.pauses == [7.0, 1.0, 4.0]
    assert hub.requests("POST", "/commit/") == [500, 500, 200]
    assert_same_model(AutoModelForInstanceSegmentation.from_pretrained("me/busy"), model)
    hub.faults({"method": "POST", "path": "/commit/", "status": 503, "times": 100})
    message = refused(lambda: small_model(num_queries=4).push_to_hub("me/busy"))
    assert hub.pauses == [1.0, 4.0, 16.0]
    assert "503" in message
    hub.faults()
    assert_same_model(AutoModelForInstanceSegmentation.from_pretrained("me/busy"), model)


def check_a_loaded_model_loads_again_without_the_hub(hub: Hub) -> None:
    expected = AutoModelForInstanceSegmentation.from_pretrained("me/barns")
    hub.faults({"method": "*", "path": "", "status": 503, "times": 1000})
    assert_same_model(AutoModelForInstanceSegmentation.from_pretrained("me/barns"), expected)
    before = len(hub._control("_log"))
    assert_same_model(load("me/barns", local_files_only=True)[0], expected)
    assert len(hub._control("_log")) == before
    hub.faults()


def check_an_interrupted_download_is_finished(hub: Hub) -> None:
    model = small_model(num_queries=9)
    model.push_to_hub("me/download")
    hub.faults({"method": "GET", "path": "model.safetensors$", "status": 0})
    assert_same_model(AutoModelForInstanceSegmentation.from_pretrained("me/download"), model)
    assert hub.requests("GET", "model.safetensors") == [200, 200]


def check_a_run_pushes_its_model_with_card_and_images_and_nothing_else(hub: Hub) -> None:
    settings = {"push_to_hub": True, "hub_model_id": "me/drawn", "hub_token": "token-of-me", "eval_base_model": True}
    settings |= {"hub_strategy": "checkpoint"}
    hub.faults()
    with token(""):
        data = {"train_dataset": drawn(4), "eval_dataset": drawn(3, 100)}
        trainer = build_trainer(hub.folder / "run", data, **settings)
        trainer.train()
        numbers = trainer.evaluate(drawn(3, 200), metric_key_prefix="test")
        model_files = {"config.json", "model.safetensors", "preprocessor_config.json"}
        trainer.push_in_progress.wait_until_done()
        found = hub.files("me/drawn")  # from the checkpoints
        assert {name for name in found if "/" not in name} == model_files, found
        assert {name.partition("/")[0] for name in found - model_files} == {"last-checkpoint"}
        whole = {f"last-checkpoint/{name}" for name in ("optimizer.pt", "trainer_state.json", "model.safetensors")}
        assert whole < found
        assert "last-checkpoint/training_args.bin" not in found  # it holds the token
        trainer.push_to_hub(dataset="me/aerial", finetuned_from="Roboflow/rf-detr-seg-nano", license="apache-2.0")
    images = {"training_curves.png", "predictions.png"}
    assert hub.files("me/drawn") - found == images | {"README.md", "training_arguments.json"}
    loaded, processor = load("me/drawn")
    assert_same_model(loaded, trainer.model.eval())
    assert processor.to_dict() == trainer.processing_class.to_dict()
    for name in images:
        with Image.open(hf_hub_download("me/drawn", name)) as image:
            assert image.width > 2 * 96
    arguments = Path(hf_hub_download("me/drawn", "training_arguments.json")).read_text()
    assert json.loads(arguments)["ema_decay"] == 0.993
    assert not any(word in arguments for word in ("token-of-me", str(hub.folder)))
    card = card_of("me/drawn")
    assert "[Roboflow/rf-detr-seg-nano](https://huggingface.co/Roboflow/rf-detr-seg-nano)" in card
    data = ModelCard(card).data
    assert (data.base_model, data.datasets, data.license) == ("Roboflow/rf-detr-seg-nano", ["me/aerial"], "apache-2.0")
    shown = {(r.dataset_split, r.metric_name): r.metric_value for r in data.eval_results}
    assert shown["test", "Mean IoU"] == round(numbers["test_mean_iou"], 4)
    assert shown["test", "Box AP50"] == round(numbers["test_bbox_AP50"], 4)
    best = max(entry.get("eval_segm_AP", -1) for entry in trainer.state.log_history)
    best = max(best, *(entry.get("eval_base_segm_AP", -1) for entry in trainer.state.log_history))
    assert shown["validation", "Mask AP"] == round(best, 4)


def check_a_run_with_lora_pushes_the_merged_model_and_its_adapter(hub: Hub) -> None:
    hub.faults()
    pytest.importorskip("peft")
    trainer = quick_trainer(hub.folder / "lora", lora=2)
    trainer.push_to_hub(num_images=0)
    expected = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model.safetensors", "config.json"}
    assert expected <= hub.files("me/lora")
    loaded, _ = load("me/lora")
    assert not any("lora" in name for name in loaded.state_dict())
    assert "| LoRA | rank 2, of the attention of DINOv2 |" in card_of("me/lora")


def check_a_run_whose_push_fails_is_complete_on_disk(hub: Hub) -> None:
    hub.faults({"method": "POST", "path": "/commit/", "status": 500, "times": 100})
    trainer = quick_trainer(hub.folder / "failed")
    trainer.train()
    message = refused(lambda: trainer.push_to_hub(with_code=True, num_images=0))
    assert "me/failed was not uploaded: " in message, message
    assert message.endswith(f"All files are in {hub.folder / 'failed'}.")
    found = {path.name for path in (hub.folder / "failed").iterdir()}
    assert found >= {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *CODE_FILES}
    assert "predictions.png" not in found
    assert_same_model(RfDetrForInstanceSegmentation.from_pretrained(hub.folder / "failed"), trainer.model)
    hub.faults()
    trainer.push_to_hub(with_code=True, blocking=False, num_images=0).result()
    assert set(CODE_FILES) < hub.files("me/failed")
    assert "training_args.bin" not in hub.files("me/failed")


def check_code_is_pushed_on_request(hub: Hub) -> None:
    model, processor = small_model(num_labels=2), RfDetrImageProcessor(size=48)
    model.push_to_hub("me/coded", with_code=True, endpoint=True)
    processor.push_to_hub("me/coded", with_code=True)
    assert not hasattr(model.config, "auto_map")  # the model is not changed
    assert {*CODE_FILES, "handler.py", "requirements.txt"} < hub.files("me/coded")
    assert not set(CODE_FILES) & hub.files("me/barns")
    outputs = model(pixels())
    torch.save([dict(model.state_dict()), outputs.logits, outputs.pred_masks], hub.folder / "expected.pt")
    # Where the package is imported, it loads the model.
    assert_same_model(AutoModelForInstanceSegmentation.from_pretrained("me/coded"), model)


def check_a_conversion_is_pushed_like_a_model(hub: Hub) -> None:
    architecture.ENCODERS["dinov2_windowed_small"] = (32, 2, 0)  # the width of small models
    model = model_of()
    torch.save(legacy(model), hub.folder / "checkpoint.pth")
    hub.faults({"method": "POST", "path": "/commit/", "status": 503})
    (hub.folder / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pth"):
        convert_to_transformers(hub.folder / "broken.pth", hub.folder / "never", push_to_hub="me/never")
    assert hub.requests("POST", "") == []
    convert_to_transformers(hub.folder / "checkpoint.pth", hub.folder / "converted", push_to_hub="me/converted")
    assert hub.pauses == [1.0]
    assert hub.requests("POST", "/commit/") == [503, 200]
    assert hub.files("me/converted") == {path.name for path in (hub.folder / "converted").iterdir()}
    loaded, _ = load("me/converted")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    hub.faults()


def check_a_converted_dataset_is_pushed_and_loaded(hub: Hub) -> None:
    source, output = hub.folder / "source", hub.folder / "rows"
    save_coco(save_images(source) / "_annotations.coco.json")
    command = ["convert-dataset", str(source), str(output), "--to", "hub", "--push", "trees", "--private"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    files = set(HfApi().list_repo_files("me/trees", repo_type="dataset"))
    assert files - {".gitattributes"} == {"README.md", "data/train-00000-of-00001.parquet"}
    assert refused(lambda: HfApi(token="token-of-other").list_repo_files("me/trees", repo_type="dataset"))
    data = load_instance_dataset("me/trees")
    assert data.id2label == {0: "roof", 1: "tree"}
    counts = [(1, 0), (2, 1)]  # objects and crowds
    assert [(count.objects, count.crowds) for count in data["train"].counts().values()] == counts
    assert [sample["file_name"] for sample in data["train"]] == ["0.png", "1.png", "2.png"]
    with token("token-of-other"):
        message = CliRunner().invoke(app, [*command[:2], f"{output}-2", *command[3:6], "me/trees"]).stderr
    assert "me/trees was not uploaded" in message
    assert f"The files are in {output}-2." in message


def check_a_page_is_pushed_as_a_space_that_loads_the_model(hub: Hub) -> None:
    local, file = hub.folder / "barns", hub.folder / "barns.onnx"
    small_model(num_labels=2, id2label=HOSTILE).save_pretrained(local)
    RfDetrImageProcessor(size=48).save_pretrained(local)
    file.write_bytes(b"an exported file")
    result = CliRunner().invoke(app, ["app", str(local), "--push-space", "page"])
    assert f"{os.environ['HF_ENDPOINT']}/spaces/me/page\n" in result.output, result.output
    push_space(str(file), None, None, "me/page-of-a-file")
    push_space("me/barns", None, None, "me/page-of-the-hub", private=True)
    push_space("rf-detr-seg-tiny", None, None, "me/page-of-tiny")
    for space, source, title, models in (
        ("page", "model", "barns", None),
        ("page-of-a-file", "model/barns.onnx", "barns.onnx", None),
        ("page-of-the-hub", "me/barns", "me/barns", ["me/barns"]),
        ("page-of-tiny", "rf-detr-seg-tiny", "rf-detr-seg-tiny", None),
    ):
        folder = Path(snapshot_download(f"me/{space}", repo_type="space"))
        data = SpaceCard.load(folder / "README.md").data
        assert (data.title, data.sdk, data.app_file, data.models) == (title, "gradio", "app.py", models)
        assert data.sdk_version == version("gradio")
        requirements = (folder / "requirements.txt").read_text().split()
        assert requirements == ["transformers-rfdetr[app]", *["onnxruntime"] * (space == "page-of-a-file")]
        assert run_app(folder) == [source, {"device": "auto"}, {"title": title}]
    assert (Path(snapshot_download("me/page-of-a-file", repo_type="space")) / "model/barns.onnx").read_bytes() == (
        file.read_bytes()
    )
    loaded, processor = load(str(Path(snapshot_download("me/page", repo_type="space")) / "model"))
    expected, _ = load(str(local))
    assert_same_model(loaded, expected)
    assert processor.size == {"height": 48, "width": 48}
    assert refused(lambda: HfApi(token="token-of-other").list_repo_files("me/page-of-the-hub", repo_type="space"))
    with token("token-of-other"):
        assert "me/page was not uploaded" in refused(lambda: push_space("rf-detr-seg-tiny", None, None, "me/page"))


def run_app(folder: Path) -> list[Any]:
    """Run the app.py of a Space, and return what it loads and serves."""
    seen: list[Any] = []
    web_page = types.ModuleType("transformers_rfdetr.inference.web_page")
    web_page.serve = lambda *loaded, **settings: seen.append(settings)
    package = types.ModuleType("transformers_rfdetr")
    package.load = lambda name, **settings: seen.extend([name, settings]) or (None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "transformers_rfdetr", package)
        patch.setitem(sys.modules, "transformers_rfdetr.inference.web_page", web_page)
        exec(compile((folder / "app.py").read_text(), "app.py", "exec"), {})
    return seen


CHECKS = [name for name in dict(globals()) if name.startswith("check_")]

# The arguments: a folder for the session, the code below, and the folders of the test modules. Importing torch and
# transformers takes longer than most of the rest, so it is done once, and the session of the checks is forked off.
SESSIONS = """
import os, shutil, sys
import torch, transformers.image_utils, transformers.modeling_utils

torch.set_num_threads(1)
folder, without_the_package, *test_folders = sys.argv[1:]
if os.fork() == 0:
    sys.path[:0] = test_folders
    import test_hub
    test_hub.run_checks(folder)
    sys.exit()
os.wait()
shutil.rmtree(os.environ["HF_HOME"])  # the downloads
os.chdir(folder)
exec(without_the_package)
"""

# Runs where the package cannot be imported and was not imported before.
WITHOUT_THE_PACKAGE = """
import sys
sys.modules["transformers_rfdetr"] = None  # every import of it fails
import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForInstanceSegmentation, AutoModelForObjectDetection, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

with open(hf_hub_download("me/coded", "README.md"), encoding="utf-8") as file:
    block = file.read().split("```python")[2].partition("```")[0]
try:
    from transformers import AutoImageProcessor as _
except ImportError:  # 5.4 to 5.17 without torchvision
    block = block.replace("from transformers import AutoImageProcessor, ", "from transformers import ")
names = {"AutoImageProcessor": AutoImageProcessor}
exec(block, names)
model, processor, result = (names[name] for name in ("model", "processor", "result"))
for thing in (model, model.config, processor):
    assert type(thing).__module__.startswith("transformers_modules."), type(thing)
weights, logits, masks = torch.load("expected.pt")
assert model.state_dict().keys() == weights.keys()
assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
pixels = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    outputs = model(pixels)
assert torch.equal(outputs.logits, logits) and torch.equal(outputs.pred_masks, masks)
assert result["segmentation"].shape == (40, 60)

segment = pipeline("image-segmentation", model="me/coded", trust_remote_code=True)
assert type(segment.model).__module__.startswith("transformers_modules.")
segment("image.jpg")
detector = AutoModelForObjectDetection.from_pretrained("me/coded", trust_remote_code=True)
assert type(detector).__name__ == "RfDetrForObjectDetection"

model.push_to_hub("me/coded-again")  # as transformers pushes it
model.save_pretrained("saved")
processor.save_pretrained("saved")
again = AutoModelForInstanceSegmentation.from_pretrained("saved", trust_remote_code=True)
assert torch.equal(again.eval()(pixels).logits, logits)
AutoImageProcessor.from_pretrained("saved", trust_remote_code=True)
"""


def environment(url: str, folder: Path) -> dict[str, str]:
    return os.environ | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "home"),
        "HF_TOKEN": "token-of-me",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The traceback of each check, "" if it passed. One worker of pytest-xdist runs them, the others wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "hub"
    report = folder / "results.json"
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(3000):
            if report.is_file():
                break
            time.sleep(0.1)
        return json.loads(report.read_text())
    server = HubServer()
    try:
        command = [
            sys.executable,
            "-c",
            SESSIONS,
            str(folder),
            WITHOUT_THE_PACKAGE,
            *map(str, Path(__file__).parents[:2]),
        ]
        done = subprocess.run(command, env=environment(server.url, folder), capture_output=True, text=True)
        checks = folder / "checks.json"
        found = json.loads(checks.read_text()) if checks.is_file() else {}
    finally:
        server.shutdown()
        server.server_close()
        found = {name: found.get(name, f"did not run: {done.stderr[-2000:]}") for name in CHECKS}
        found["code"] = done.stderr[-3000:] if done.returncode else ""
        report.with_suffix(".tmp").write_text(json.dumps(found))
        report.with_suffix(".tmp").rename(report)
    return found


@pytest.mark.parametrize("check", CHECKS)
def test_hub(check, results):
    assert not results[check], results[check]


def test_code_in_a_repository_loads_without_the_package(results):
    assert not results["code"], results["code"]


def run_checks(folder: str) -> None:
    hub, found = Hub(Path(folder)), {}
    for name in CHECKS:
        try:
            globals()[name](hub)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            hub.faults()
    Path(folder, "checks.json").write_text(json.dumps(found))


def test_a_hub_without_xet_is_not_asked_again_and_the_error_names_the_setting(monkeypatch, tmp_path):
    attempts = []

    def create_commit(*arguments: Any, **options: Any) -> None:
        attempts.append(arguments)
        raise RuntimeError("404 Client Error: Not Found for url: http://hub/api/models/me/a/xet-write-token/main")

    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    path = tmp_path / "a.txt"
    path.write_text("a")
    with pytest.raises(OSError, match=r"me/a was not uploaded: 404 .*/main Set HF_HUB_DISABLE_XET=1: .* It is in a\."):
        upload(tmp_path, [path], "me/a", kept="It is in a.")
    assert len(attempts) == 1
