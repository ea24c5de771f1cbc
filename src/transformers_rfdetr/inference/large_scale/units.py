"""What is read, predicted and written together: an image, a video, a row group of Parquet, a tar, a dataset's shard.

The rows of a unit are written into one file, so that a unit is either complete or absent, and a restart only compares
the names of units.
"""

import posixpath
import tarfile
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image

from ...model.image_io import open_image, read_rgb, redact_url
from ..image_list import VIDEO_SUFFIXES, is_skipped, list_images

_PARQUET_BATCH = 16  # rows that are read at once
_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif", ".jp2"}
_PATH_COLUMNS = ("image", "path", "file_name", "url")


class Unit(NamedTuple):
    """What is read together.

    Attributes:
        name: Unique, and the same in every run; for an image its key in the results.
        kind: How it is read.
        source: Path or URL; for "rows" a `datasets.IterableDataset` of one shard.
        column: Column of the images, in Parquet and rows.
        part: Row group of a Parquet file.
        first_row: Number of the first row of that row group.
    """

    name: str
    kind: Literal["image", "video", "parquet", "tar", "rows"]
    source: Any
    column: str = ""
    part: int = 0
    first_row: int = 0


class StoredImage(NamedTuple):
    """An image that has not been decoded.

    Attributes:
        key: Its name in the results, unique among all images.
        unit: Name of its unit.
        content: The bytes of the file, a path or a URL.
        image_id: Id of the image in a dataset that has one.
    """

    key: str
    unit: str
    content: bytes | str
    image_id: int | None = None

    @property
    def source(self) -> str:
        """Return the path or URL without its password, or the key of an image that was read from its unit."""
        return self.key if isinstance(self.content, bytes) else redact_url(self.content)

    def decode(self) -> Image.Image:
        """Return the image as [`read_rgb`] does; raise ValueError if it cannot be read."""
        if isinstance(self.content, str) and not _is_remote(self.content):
            return read_rgb(self.content)
        try:
            content = self.content
            if isinstance(content, str):
                with _open(content) as file:
                    content = file.read()
            with open_image(BytesIO(content)) as image:
                return read_rgb(image)
        except Exception as error:  # fsspec's file systems and Pillow raise errors of many types
            reason = repr(error)
            if isinstance(self.content, str):
                reason = reason.replace(self.content, self.source)  # which may contain a password
            raise ValueError(f"{self.source:.200} cannot be opened as an image: {reason}") from error


def list_units(sources: Sequence[str], exclude: Path | None = None) -> list[Unit]:
    """Return the units of files, folders, patterns and URLs in a fixed order.

    Args:
        sources: As in [`list_images`], and URLs that fsspec reads, of files, folders or patterns: `s3://bucket/a*.tar`.
            Parquet files must have one column of images: bytes, a struct of bytes and path, as `datasets` writes it, or
            paths and URLs. Tars are those of WebDataset.
        exclude: See [`list_images`].

    Raises:
        ValueError: a source does not exist, cannot be read, or has no images.
        ImportError: a file system or a kind of file requires a package that is not installed.
    """
    remote = [source for source in sources if _is_remote(source)]
    local = [source for source in sources if source not in remote]
    found = {image.name: image.source for image in list_images(local, exclude)} if local else {}
    for source in remote:
        listed = _list_remote(source)
        prefix = f"{posixpath.basename(source.rstrip('/'))}/" if len(sources) > 1 else ""
        found |= {f"{prefix}{name}": url for name, url in listed.items()}
    units: list[Unit] = []
    for name, source in found.items():
        # Parquet stores UTF-8 only, and names of files on Linux may be other bytes.
        units += _units_of_file(name.encode(errors="backslashreplace").decode(), source)
    return units


def list_row_units(dataset: Any) -> list[Unit]:
    """Return the shards of a `datasets.IterableDataset`, whose rows have one column of images, as units.

    Raises:
        ValueError: there is not one column of images.
    """
    import datasets

    features = dataset.features or dataset._resolve_features().features
    columns = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise ValueError(f"`sources` must have one column of images, got {', '.join(columns or features)}")
    rows = dataset.cast_column(columns[0], datasets.Image(decode=False))
    return [
        Unit(f"rows/{index:05d}", "rows", rows.shard(rows.num_shards, index), columns[0])
        for index in range(rows.num_shards)
    ]


def read_unit(unit: Unit) -> Iterator[StoredImage]:
    """Yield the images of a unit that is not a video, in a fixed order.

    Raises:
        Exception: the file is damaged; which error depends on its kind.
    """
    if unit.kind == "image":
        yield StoredImage(unit.name, unit.name, unit.source)
    elif unit.kind == "tar":
        yield from _read_tar(unit)
    else:
        rows = _read_parquet(unit) if unit.kind == "parquet" else unit.source
        for number, row in enumerate(rows, start=unit.first_row):
            yield _image_of_row(unit, number, row)


def _is_remote(source: str) -> bool:
    return "://" in source and not source.startswith(("http://", "https://", "rtsp"))


def _open(source: str) -> Any:
    """Open a path or a URL for reading, as a context manager of a binary file."""
    if "://" not in source:
        return open(source, "rb")
    import fsspec

    return fsspec.open(source, "rb")


def _list_remote(source: str) -> dict[str, str]:
    """Return the files of a URL by their names relative to the folder, or to the part before the first wildcard."""
    try:
        import fsspec
    except ImportError as error:
        raise ImportError(f"{redact_url(source)} requires fsspec: pip install fsspec") from error
    try:
        system, path = fsspec.url_to_fs(source)
        has_wildcard = any(letter in path for letter in "*?[")
        if has_wildcard:
            before = path[: min(path.index(letter) for letter in "*?[" if letter in path)]
            root, paths = before.rpartition("/")[0], sorted(system.glob(path))
        else:
            root = path if system.isdir(path) else path.rpartition("/")[0]
            paths = sorted(system.find(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"`sources` must be readable, got {redact_url(source)}: {error}") from error
    names = {posixpath.relpath(each, root): system.unstrip_protocol(each) for each in paths}
    found = {name: url for name, url in names.items() if not is_skipped(name)}
    if not found:
        raise ValueError(f"`sources` must contain images, got {redact_url(source)} without images. Check the URL.")
    return found


def _units_of_file(name: str, source: str) -> list[Unit]:
    suffix = Path(name).suffix.lower()
    if name.lower().endswith(_TAR_SUFFIXES):
        return [Unit(name, "tar", source)]
    if suffix in VIDEO_SUFFIXES:
        return [Unit(name, "video", source)]
    if suffix != ".parquet":
        return [Unit(name, "image", source)]
    import pyarrow.parquet

    with _open(source) as file:
        try:
            table = pyarrow.parquet.ParquetFile(file)
        except (OSError, pyarrow.ArrowInvalid) as error:
            raise ValueError(f"{redact_url(source)} must be a Parquet file: {error}") from error
        column, first, units = _image_column(table.schema_arrow, source), 0, []
        for part in range(table.num_row_groups):
            units.append(Unit(f"{name}/{part:05d}", "parquet", source, column, part, first))
            first += table.metadata.row_group(part).num_rows
    return units


def _image_column(schema: Any, source: str) -> str:
    """Return the name of the column of images of a Parquet file."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        return types.is_binary(kind) or types.is_large_binary(kind)

    names = [field.name for field in schema if is_bytes(field.type)]
    if not names:
        names = [field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)]
        names = [name for name in _PATH_COLUMNS if name in names][:1]
    if "image" in names:
        return "image"
    if len(names) != 1:
        rule = f"one column of image bytes, or one of paths named {', '.join(_PATH_COLUMNS)}"
        raise ValueError(f"{redact_url(source)} must have {rule}, got {', '.join(schema.names)}. Rename the column.")
    return names[0]


def _read_parquet(unit: Unit) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with _open(unit.source) as file:
        table = pyarrow.parquet.ParquetFile(file)
        columns = [name for name in (unit.column, "image_id") if name in table.schema_arrow.names]
        for batch in table.iter_batches(_PARQUET_BATCH, row_groups=[unit.part], columns=columns):
            yield from batch.to_pylist()


def _image_of_row(unit: Unit, number: int, row: dict[str, Any]) -> StoredImage:
    content, image_id = row[unit.column], row.get("image_id")
    if isinstance(content, dict):
        content = content["bytes"] if content.get("bytes") is not None else content.get("path")
    if content is None:
        content = b""
    if isinstance(content, str) and "://" not in content and isinstance(unit.source, str):
        content = posixpath.join(posixpath.dirname(unit.source), content)
    file = unit.name.rpartition("/")[0] if unit.kind == "parquet" else unit.name
    key = f"{file}/{number:07d}"
    return StoredImage(key, unit.name, content, image_id if isinstance(image_id, int) else None)


def _read_tar(unit: Unit) -> Iterator[StoredImage]:
    with _open(unit.source) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            if member.isfile() and Path(member.name).suffix.lower() in _IMAGE_SUFFIXES:
                stream = tar.extractfile(member)
                content = b"" if stream is None else stream.read()
                if len(content) < member.size:
                    raise tarfile.ReadError(f"the tar ends in {member.name}")
                name = member.name.encode(errors="backslashreplace").decode()
                yield StoredImage(f"{unit.name}/{name}", unit.name, content)
