"""Predictions as Parquet: one row an image whatever it is read from and whatever fails, in one process and with Ray."""

import functools
import importlib.util
import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from transformers_rfdetr import RfDetrForInstanceSegmentation, RfDetrImageProcessor, predict, predict_tiled
from transformers_rfdetr.data.synthetic import draw_dataset
from transformers_rfdetr.inference.folder import FolderOptions
from transformers_rfdetr.inference.video.writer import VideoWriter

from faults import attempt
from small_models import small_config

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet  # noqa: E402

from transformers_rfdetr.inference.large_scale import ray_workers as workers_module  # noqa: E402
from transformers_rfdetr.inference.large_scale.predict_dataset import divide, predict_dataset  # noqa: E402
from transformers_rfdetr.inference.large_scale.table import from_row  # noqa: E402
from transformers_rfdetr.inference.large_scale.units import Unit, list_units  # noqa: E402

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
OPTIONS = FolderOptions(threshold=0.02, batch_size=1)


@pytest.fixture(scope="module")
def model() -> RfDetrForInstanceSegmentation:
    torch.manual_seed(0)
    config = small_config(num_labels=2, id2label={0: "cat", 1: "dog"})
    config.category_ids = [10, 20]
    return RfDetrForInstanceSegmentation(config).eval()


@pytest.fixture(scope="module")
def processor(model: Any) -> RfDetrImageProcessor:
    return RfDetrImageProcessor.from_config(model.config)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 7 images and a corrupt one."""
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(draw_dataset(7, (40, 56))[0]):
        image.save(folder / f"{number}.png")
    (folder / "bad.png").write_bytes((folder / "0.png").read_bytes()[:99])
    return folder


def rows_of(output: Path) -> dict[str, dict[str, Any]]:
    """Return the rows by image; fail if an image has two."""
    found = {}
    for path in (output / "predictions").glob("*.parquet"):
        for row in pyarrow.parquet.read_table(path).to_pylist():
            assert row["image"] not in found
            found[row["image"]] = row
    return found


def assert_predicted(row: dict[str, Any], model: Any, processor: Any, image: Any) -> None:
    [expected] = predict(model, processor, image, threshold=0.02)
    found = from_row(row)
    assert (found.names, found.masks, found.image_size) == (expected.names, expected.masks, expected.image_size)
    np.testing.assert_array_equal(found.scores, expected.scores)
    np.testing.assert_array_equal(found.boxes, expected.boxes)
    np.testing.assert_array_equal(found.category_ids, expected.category_ids)


@pytest.fixture(scope="module")
def output(model: Any, processor: Any, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    summary = predict_dataset(model, processor, photos, folder, OPTIONS, coco=True, progress=False)
    assert (summary.done, summary.skipped, [name for name, _ in summary.failed]) == (7, 0, ["bad.png"])
    assert summary.instances > 7
    return folder


def test_each_image_has_one_row_with_what_predict_returns_or_an_error(model, processor, photos, output):
    rows = rows_of(output)
    assert rows.keys() == {*(f"{number}.png" for number in range(7)), "bad.png"}
    for number in range(7):
        assert_predicted(rows[f"{number}.png"], model, processor, photos / f"{number}.png")
        assert rows[f"{number}.png"]["source"] == str(photos / f"{number}.png")
    assert "cannot be opened as an image" in rows["bad.png"]["error"]
    assert rows["bad.png"]["scores"] is None


def test_duckdb_and_datasets_read_the_rows(output):
    pattern = str(output / "predictions" / "*.parquet")
    rows = rows_of(output)
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(output / "cache"))
    assert {row["image"]: row["scores"] for row in table} == {name: row["scores"] for name, row in rows.items()}
    duckdb = pytest.importorskip("duckdb")
    query = (
        f"SELECT name, count(*) FROM (SELECT unnest(names) AS name FROM '{pattern}' WHERE error IS NULL) GROUP BY name"
    )
    counted = dict(duckdb.sql(query).fetchall())
    names = [name for row in rows.values() for name in row["names"] or []]
    assert counted == {name: names.count(name) for name in set(names)}


def test_the_coco_file_has_the_masks_and_category_ids(output):
    coco = COCO(output / "predictions.coco.json")
    rows = rows_of(output)
    assert sorted(image["file_name"] for image in coco.imgs.values()) == sorted(rows.keys() - {"bad.png"})
    for image in coco.imgs.values():
        row = rows[image["file_name"]]
        annotations = coco.imgToAnns[image["id"]]
        masks = [mask for mask, area in zip(row["masks"], from_row(row).areas, strict=True) if area]
        assert [one["segmentation"] for one in annotations] == masks
        assert {one["category_id"] for one in annotations} <= {10, 20}


def test_a_second_run_predicts_only_what_is_missing(model, processor, photos, tmp_path, monkeypatch):
    few = [str(photos / f"{number}.png") for number in (1, 2)]
    predict_dataset(model, processor, few, tmp_path, OPTIONS, progress=False)
    before = rows_of(tmp_path)
    predicted = []

    def noted(self, *arguments):
        predicted.extend(arguments[2])
        return original(self, *arguments)

    original = FolderOptions.predict
    monkeypatch.setattr(FolderOptions, "predict", noted)
    again = predict_dataset(model, processor, [*few, str(photos / "3.png")], tmp_path, OPTIONS, progress=False)
    assert (again.done, again.skipped) == (1, 2)
    assert [image.size for image in predicted] == [(64, 64), (56, 40)]  # the first checks the options
    rows = rows_of(tmp_path)
    assert rows.keys() == {"1.png", "2.png", "3.png"}
    assert rows | before == rows
    with pytest.raises(ValueError, match=r"other settings: threshold 0\.02 instead of 0\.5"):
        predict_dataset(model, processor, few, tmp_path, FolderOptions(), progress=False)


def test_rows_with_an_error_are_kept_until_they_are_to_be_retried(model, processor, photos, tmp_path):
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.png").write_bytes((photos / f"{number}.png").read_bytes() if number else b"")
    predict_dataset(model, processor, source, output, OPTIONS, progress=False)
    before = rows_of(output)
    (source / "0.png").write_bytes((photos / "0.png").read_bytes())
    assert predict_dataset(model, processor, source, output, OPTIONS, progress=False).done == 0
    again = predict_dataset(model, processor, source, output, OPTIONS, retry_errors=True, progress=False)
    assert (again.done, again.skipped) == (1, 2)
    rows = rows_of(output)
    assert_predicted(rows.pop("0.png"), model, processor, photos / "0.png")
    assert before.pop("0.png")["error"]
    assert rows == before


def write_parquet(folder: Path, photos: Path) -> None:
    """Write 5 images in row groups of 2 rows, as `datasets` stores them, the last one corrupt."""
    images = [{"bytes": (photos / f"{name}.png").read_bytes(), "path": None} for name in (0, 1, 2, 3, "bad")]
    table = pa.table({"image": images, "image_id": [50, 51, 52, 53, 54], "caption": list("abcde")})
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=2)


def write_tar(folder: Path, photos: Path) -> None:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for number in range(3):
            for suffix, content in (("png", (photos / f"{number}.png").read_bytes()), ("json", b"{}")):
                member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_parquet_tars_and_videos_are_read_beside_images(model, processor, photos, tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_parquet(source, photos)
    write_tar(source, photos)
    (source / "cut.tar").write_bytes((source / "shard.tar").read_bytes()[:2600])
    (source / "no.mp4").write_bytes(b"no video")
    with VideoWriter(source / "film.mp4", 5, (48, 32)) as writer:
        for index in range(3):
            writer.write(Image.fromarray(np.full((32, 48, 3), 60 * index, np.uint8)), index / 5)
    output = tmp_path / "out"
    predict_dataset(model, processor, [source], output, OPTIONS, progress=False)
    rows = rows_of(output)
    parquet = [f"rows.parquet/{number:07d}" for number in range(5)]
    tar = [f"shard.tar/00{number}.png" for number in range(3)]
    film = [f"film.mp4/{number:07d}" for number in range(3)]
    assert rows.keys() - {"cut.tar/000.png"} == {*parquet, *tar, *film, "no.mp4", "cut.tar"}
    for number in range(3):
        for name in (parquet[number], tar[number]):
            assert_predicted(rows[name], model, processor, photos / f"{number}.png")
        assert rows[film[number]]["seconds"] == pytest.approx(number / 5)
        assert rows[parquet[number]]["image_id"] == 50 + number
    assert {name for name, row in rows.items() if row["error"]} == {parquet[4], "no.mp4", "cut.tar"}
    before = sorted((output / "predictions").iterdir())
    assert predict_dataset(model, processor, [source], output, OPTIONS, progress=False).done == 0
    assert sorted((output / "predictions").iterdir()) == before


def test_file_systems_of_fsspec_and_datasets_are_read(model, processor, photos, tmp_path):
    fsspec, datasets = pytest.importorskip("fsspec"), pytest.importorskip("datasets")
    memory = fsspec.filesystem("memory")
    for name in ("a/0.png", "a/b/1.png", "a/b/bad.png", "a/notes.txt"):
        memory.pipe(f"/bucket/{name}", (photos / Path(name).name).read_bytes() if name.endswith("png") else b"")
    predict_dataset(model, processor, "memory://bucket", tmp_path / "folder", OPTIONS, progress=False)
    rows = rows_of(tmp_path / "folder")
    assert rows.keys() == {"a/0.png", "a/b/1.png", "a/b/bad.png"}
    assert_predicted(rows["a/b/1.png"], model, processor, photos / "1.png")
    assert rows["a/b/bad.png"]["error"]
    assert [unit.name for unit in list_units(["memory://bucket/**/1*"])] == ["a/b/1.png"]
    write_parquet(tmp_path, photos)
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train", streaming=True)
    stream = stream.cast_column("image", datasets.Image())
    predict_dataset(model, processor, stream, tmp_path / "rows", OPTIONS, progress=False)
    rows = rows_of(tmp_path / "rows")
    assert [row["image_id"] for _, row in sorted(rows.items())] == [50, 51, 52, 53, 54]
    assert_predicted(rows["rows/00000/0000003"], model, processor, photos / "3.png")


def test_paths_in_parquet_are_relative_to_it_and_large_images_are_read_in_tiles(model, processor, tmp_path):
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 110, 3), np.uint8))
    large.save(tmp_path / "large.png")
    pyarrow.parquet.write_table(pa.table({"path": ["large.png"], "n": [1]}), tmp_path / "list.parquet")
    options = FolderOptions(threshold=0.02, tile="auto", overlap=0.25)
    predict_dataset(model, processor, tmp_path / "list.parquet", tmp_path / "out", options, progress=False)
    [row] = rows_of(tmp_path / "out").values()
    assert row["masks"] == predict_tiled(model, processor, large, overlap=0.25, threshold=0.02).masks
    pyarrow.parquet.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match=r"two\.parquet must have one column of image bytes.* got a, b"):
        list_units([str(tmp_path / "two.parquet")])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "spark"}, "`engine` must be 'local' or 'ray', got 'spark'"),
        ({"options": FolderOptions(classes=["cow"])}, "cow"),
        ({"sources": []}, "`sources` must be paths, URLs or a datasets.IterableDataset, got \\[]"),
        ({"sources": 3}, "`sources` must be paths, URLs or a datasets.IterableDataset, got 3"),
        ({"sources": "file:///nowhere/at/all"}, "file:///nowhere/at/all without images"),
    ],
)
def test_wrong_arguments_leave_no_folder(arguments, message, model, processor, photos, tmp_path):
    given = {"sources": photos, "options": OPTIONS} | arguments
    with pytest.raises(ValueError, match=message):
        predict_dataset(model, processor, given.pop("sources"), tmp_path / "out", progress=False, **given)
    assert not (tmp_path / "out").exists()


def test_after_any_fault_files_are_complete_and_the_next_run_finishes(model, processor, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers_rfdetr.inference.large_scale.table._MAX_ROWS", 2)
    few = [photos / f"{name}.png" for name in (0, 1, "bad")]
    job = functools.partial(predict_dataset, model, processor, few, options=OPTIONS, progress=False)
    clean = attempt(functools.partial(job, output=tmp_path / "clean"))
    assert (clean.signal, clean.error) == (0, None)
    expected = rows_of(tmp_path / "clean")
    assert len(expected) == 3
    limits = [{"longest": 2000}, {"longest": 2000, "dies_of_length": False}]  # of a file, for a full disk
    for number, fault in enumerate([{"dies_at": change} for change in range(0, clean.num_changes, 2)] + limits):
        output = tmp_path / str(number)
        ended = attempt(functools.partial(job, output=output), **fault)
        assert ended.signal or "parquet cannot be written: File too large" in str(ended.error), fault
        assert rows_of(output).items() <= expected.items()
        job(output=output)
        assert rows_of(output) == expected


# -- Ray, without a cluster ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machines", "concurrency", "threads", "device", "expected"),
    [
        ([(2, 0)], None, None, "auto", (1, 2, 0)),
        ([(2, 0)], 2, None, "auto", (2, 1, 0)),
        ([(16, 0), (8, 0)], None, None, "auto", (6, 4, 0)),
        ([(0, 0), (16, 0)], 2, None, "auto", (2, 8, 0)),
        ([(16, 4), (16, 4)], None, None, "auto", (8, 1, 1)),
        ([(16, 4)], None, None, "cpu", (4, 4, 0)),
        ([(2, 8)], None, None, "auto", (2, 1, 1)),  # a worker needs a CPU beside its GPU
    ],
)
def test_workers_are_as_many_as_fit_on_the_machines(machines, concurrency, threads, device, expected):
    nodes = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in machines]
    assert workers_module.choose_resources(nodes, concurrency, threads, device) == expected


def test_a_cluster_that_is_too_small_is_an_error_or_a_warning(hf_log):
    with pytest.raises(ValueError, match=r"needs 4 CPUs on one machine, but .* its machines have 2, 2 CPUs"):
        workers_module.choose_resources([{"CPU": 2}, {"CPU": 2}], None, 4, "auto")
    workers_module.choose_resources([{"CPU": 2}], 4, None, "auto")
    assert "The cluster has room for 2 of 4 workers with 1 CPUs each." in hf_log.text
    with pytest.raises(ValueError, match="`device` must be"):
        workers_module.choose_resources([{"CPU": 2}], None, None, "cuda:1")


def test_images_are_divided_into_batches_and_large_units_are_alone():
    images = [Unit(str(number), "image", "") for number in range(100)]
    large = [Unit(name, "tar", "") for name in ("a", "b")]
    chunks = divide([*images, *large], 4, 2)
    assert chunks[:2] == [[large[0]], [large[1]]]
    assert [unit for chunk in chunks[2:] for unit in chunk] == images
    assert {len(chunk) for chunk in chunks[2:]} == {8, 4}
    assert len(divide(images, 8, 1000)) == 13
    assert len(divide(images * 100, 8, 1)) == 40  # 256 each


# -- Ray, with a cluster ---------------------------------------------------------------------------------------------


@pytest.fixture
def two_cpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default, which starves them on a busy machine
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    yield ray
    ray.shutdown()


@needs_ray
def test_ray_writes_the_rows_that_one_process_has_not_written(model, processor, photos, output, tmp_path, two_cpus):
    few = [photos / f"{number}.png" for number in range(3)]
    assert predict_dataset(model, processor, few, tmp_path, OPTIONS, progress=False).done == 3
    arguments = {"engine": "ray", "concurrency": 2, "threads": 1, "coco": True, "progress": False}
    summary = predict_dataset(model, processor, f"file://{photos}/*.png", tmp_path, OPTIONS, **arguments)
    assert (summary.done, summary.skipped, len(summary.failed)) == (4, 3, 1)
    columns = ("labels", "masks", "names", "category_ids", "height", "width")
    found, expected = rows_of(tmp_path), rows_of(output)
    assert found.keys() == expected.keys()
    for name, row in found.items():
        assert {column: row[column] for column in columns} == {column: expected[name][column] for column in columns}
        for column in ("scores", "boxes"):  # this process may compute with more threads than the workers
            pair = [np.array(one[column], float) for one in (row, expected[name])]  # nan: an image that is not read
            np.testing.assert_allclose(*pair, rtol=1e-4)
    assert len(COCO(tmp_path / "predictions.coco.json").imgs) == 7
    assert two_cpus.is_initialized()  # it belongs to the caller
