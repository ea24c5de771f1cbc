"""Find and download the weight files that Roboflow published.

They are kept where rfdetr keeps them, so that neither package downloads a file that the other one has.
"""

import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import pooch
import requests
from transformers.utils import logging

from ..atomic_files import make_directory, translate_disk_errors
from ..model.variants_rf_detr import ALIASES, normalize_name

BASE_URL = "https://storage.googleapis.com/rfdetr/"
_TIMEOUT_SECONDS = 30  # without a single byte
_NUM_RETRIES = 3
_CHUNK_BYTES = 1 << 20


class PublishedFile(NamedTuple):
    """One published file of weights."""

    name: str  # in the folder of weights
    remote: str  # path below BASE_URL
    md5: str
    variant: str  # the published variant with its architecture


# https://github.com/roboflow/rf-detr, its table of assets: name, remote path, md5.
_ROWS = """
rf-detr-nano.pth nano_coco/checkpoint_best_regular.pth fb6504cce7fbdc783f7a46991f07639f
rf-detr-small.pth small_coco/checkpoint_best_regular.pth fb37061c1af7bace359c91b723a8d5c1
rf-detr-medium.pth medium_coco/checkpoint_best_regular.pth 7223f764a87b863f02eb8d52bf0ce2ee
rf-detr-large-2026.pth rf-detr-large-2026.pth 5cb72153541cbcb9aa6efa26222acc75
rf-detr-base.pth rf-detr-base-coco.pth b4d3ce46099eaed50626ede388caf979
rf-detr-base-2.pth rf-detr-base-2.pth 462f4d9df407ddc1812f42614040e913
rf-detr-base-o365.pth top-secret-1234/lwdetr_dinov2_small_o365_checkpoint.pth d93f4921ccbb0f0a2e4364bed290892b
rf-detr-large.pth rf-detr-large.pth 992c8e862aa733a7bb2777e45d49f1a0
rf-detr-seg-preview.pt rf-detr-seg-preview.pt e35820c28fb86080558123e47a5e49ca
rf-detr-seg-nano.pt rf-detr-seg-n-ft.pth 9995497791d0ff1664a1d9ddee9cfd20
rf-detr-seg-small.pt rf-detr-seg-s-ft.pth 0a2a3006381d0c42853907e700eadd08
rf-detr-seg-medium.pt rf-detr-seg-m-ft.pth a49af1562c3719227ad43d0ca53b4c7a
rf-detr-seg-large.pt rf-detr-seg-l-ft.pth 275f7b094909544ed2841c94a677d07e
rf-detr-seg-xlarge.pt rf-detr-seg-xl-ft.pth 3693b35d0eea86ebb3e0444f4a611fba
rf-detr-seg-xxlarge.pt rf-detr-seg-2xl-ft.pth 040bc3412af840fa8a47e0ff69b552ba
rf-detr-keypoint-preview-xlarge.pth rf-detr-keypoint-preview-xlarge.pth 6de511943ee85a547d4c5cb527daf0eb
"""
# Files that are not named after their variant.
_VARIANT_OF = {
    "rf-detr-large-2026": "rf-detr-large",
    "rf-detr-base-2": "rf-detr-base",
    "rf-detr-base-o365": "rf-detr-base",
    "rf-detr-large": "rf-detr-large-deprecated",
    "rf-detr-seg-xxlarge": "rf-detr-seg-2xlarge",
    "rf-detr-keypoint-preview-xlarge": "rf-detr-keypoint-preview",
}


def _stem(name: str) -> str:
    return name.partition(".")[0]


PUBLISHED = {
    name: PublishedFile(name, remote, md5, _VARIANT_OF.get(_stem(name), _stem(name)))
    for name, remote, md5 in (row.split() for row in _ROWS.strip().splitlines())
}
# The name of a variant with several files means the first one.
_BY_VARIANT = {file.variant: file for file in reversed(PUBLISHED.values())}
# A variant's name has priority over a file's: rf-detr-large is the variant, whose file is rf-detr-large-2026.pth.
_BY_SPELLING = (
    {normalize_name(_stem(name)): file for name, file in PUBLISHED.items()}
    | {normalize_name(variant): file for variant, file in _BY_VARIANT.items()}
    | {spelling: _BY_VARIANT[variant] for spelling, variant in ALIASES.items()}
)


def published_file(name: str) -> PublishedFile | None:
    """Return the published file with a name, or None.

    Args:
        name: With an ending, exactly the name of a file: `rf-detr-large.pth` is the deprecated model. Without one, any
            usual spelling of a variant (`rf-detr-large`, `RFDETRLarge`: the file `rf-detr-large-2026.pth`) or of a file
            without its own variant (`rf-detr-base-o365`). A path with a folder is never a published name.
    """
    return PUBLISHED.get(name) if re.search(r"[./\\]", name) else _BY_SPELLING.get(normalize_name(name))


def weights_folder() -> Path:
    """Return rfdetr's folder of downloaded weights: $RF_HOME, else $ROBOFLOW_HOME, else ~/.roboflow/models."""
    folder = os.environ.get("RF_HOME") or os.environ.get("ROBOFLOW_HOME") or "~/.roboflow/models"
    return Path(folder).expanduser().absolute()


def download_weights(file: PublishedFile, folder: Path | None = None) -> Path:
    """Return the path of a published file, downloaded unless it exists; its md5 is checked in both cases.

    The file appears when it is complete. An interrupted download starts again from the beginning.

    Args:
        file: See [`published_file`].
        folder: Its folder; [`weights_folder`] by default.

    Raises:
        ValueError: Another file of that name exists, which is left alone, or the download has another md5.
        OSError: The server refuses, the connection fails at the last attempt, or the file cannot be written.
    """
    folder = weights_folder() if folder is None else Path(folder)
    path, url = folder / file.name, BASE_URL + file.remote
    if path.exists():
        if (md5 := pooch.file_hash(path, "md5")) != file.md5:
            raise ValueError(
                f"{path} must have the md5 {file.md5} of the published file, got {md5}. Move it away to download the"
                " published file, or pass its path to convert it as your own file."
            )
        return path
    make_directory(folder)
    cache = pooch.create(
        folder, BASE_URL, registry={file.name: f"md5:{file.md5}"}, urls={file.name: url}, retry_if_failed=_NUM_RETRIES
    )
    try:
        with translate_disk_errors(path):
            return Path(cache.fetch(file.name, downloader=_download))
    except requests.RequestException as error:
        raise ConnectionError(f"{url} could not be downloaded: {error}. Try again later.") from error


def _download(url: str, output: str, cache: pooch.Pooch) -> None:
    """Download to `output`; pooch tries again after the errors that requests raises."""
    has_bar = logging.is_progress_bar_enabled()
    download: Any = pooch.HTTPDownloader(has_bar, _CHUNK_BYTES, timeout=_TIMEOUT_SECONDS)
    try:
        download(url, output, cache)
    except requests.HTTPError as error:
        status = error.response.status_code
        if status in (408, 429) or status >= 500:
            raise
        raise OSError(f"{url} cannot be downloaded: the server answers {status} {error.response.reason}") from error
