"""Write rows for the Hub: Parquet files with images and objects, which `datasets.load_dataset` reads."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ..hub_rows import import_datasets
from .output import ImageObjects, Output, Splits, image_bytes

_MAX_SHARD_BYTES = 500_000_000
_GROUP_ROWS = 50  # which are read at once
_FIELDS = ("id", "category", "bbox", "segmentation", "rle", "area", "iscrowd")


def write_hub(splits: Splits, classes: Mapping[int, str], output: Output) -> None:
    """Write splits as data/SPLIT-*.parquet, and a dataset card. A mask is `segmentation`, polygons, or else `rle`."""
    for split in splits:
        if not re.fullmatch(r"\w+(\.\w+)*", split):
            raise ValueError(f"splits for the Hub must have letters, digits and dots, got {split!r:.60}. Rename it.")
    features = row_features(list(classes.values()))
    labels = {category: label for label, category in enumerate(classes)}
    counts = {}
    (output.folder / "data").mkdir()
    for split, images in splits.items():
        rows = (_row(index, image, labels, output, split) for index, image in enumerate(images))
        counts[split] = _write_shards(output.folder / "data", split, rows, features.arrow_schema)
    (output.folder / "README.md").write_text(_card(counts), encoding="utf-8")


def row_features(class_names: list[str]) -> Any:
    """Return the `datasets.Features` of the rows; the objects of an image are a dict of lists."""
    datasets = import_datasets()
    integer, number = datasets.Value("int64"), datasets.Value("float64")
    objects = {
        "id": [integer],
        "category": [datasets.ClassLabel(names=class_names)],
        "bbox": [[number]],
        "segmentation": [[[number]]],
        "rle": [{"size": [integer], "counts": datasets.Value("string")}],
        "area": [number],
        "iscrowd": [datasets.Value("int8")],
    }
    columns = {"image_id": integer, "file_name": datasets.Value("string"), "image": datasets.Image()}
    return datasets.Features({**columns, "width": integer, "height": integer, "objects": objects})


def _row(index: int, image: ImageObjects, labels: Mapping[int, int], output: Output, split: str) -> dict[str, Any]:
    name = output.name_image(image, Path(split))
    output.note_occluded(image)
    objects: dict[str, list[Any]] = {field: [] for field in _FIELDS}
    for number, item in enumerate(image.objects):
        segmentation = item.get("segmentation")
        is_rle = isinstance(segmentation, Mapping)
        values = {
            "id": number,
            **item,
            "category": labels[item["category_id"]],
            "segmentation": [] if is_rle or segmentation is None else segmentation,
            "rle": segmentation if is_rle else None,
        }
        for field in _FIELDS:
            objects[field].append(values[field])
    height, width = image.size
    content = {"bytes": image_bytes(image.image), "path": Path(name).name}
    image_id = index if image.image_id is None else image.image_id
    head = {"image_id": image_id, "file_name": name, "image": content}
    return {**head, "width": width, "height": height, "objects": objects}


def _write_shards(folder: Path, split: str, rows: Iterator[dict[str, Any]], schema: Any) -> int:
    """Write the rows of a split to files of limited size, and return their number."""
    from pyarrow import Table, parquet  # comes with datasets

    paths: list[Path] = []
    num_rows, group = 0, list(islice(rows, _GROUP_ROWS))
    while group or not paths:
        paths.append(folder / f"{split}-{len(paths):05d}.parquet")
        num_bytes = 0
        with parquet.ParquetWriter(paths[-1], schema) as writer:
            while group and num_bytes < _MAX_SHARD_BYTES:
                writer.write_table(Table.from_pylist(group, schema=schema))
                num_bytes += sum(len(row["image"]["bytes"]) for row in group)
                num_rows += len(group)
                group = list(islice(rows, _GROUP_ROWS))
    for number, path in enumerate(paths):
        path.rename(folder / f"{split}-{number:05d}-of-{len(paths):05d}.parquet")
    return num_rows


def _card(counts: Mapping[str, int]) -> str:
    """Return a dataset card that says which files belong to which split."""
    files = [{"split": split, "path": f"data/{split}-*"} for split in counts]
    head = {
        "task_categories": ["image-segmentation", "object-detection"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    lines = "".join(f"- {split}: {count} images\n" for split, count in counts.items())
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# Annotated images

{lines}
Each row has an `image` and its `objects`: `bbox` is [x, y, width, height] in pixels, `segmentation` contains polygons
in COCO's format, and `rle` is COCO's RLE of a mask that has no polygons.
"""
