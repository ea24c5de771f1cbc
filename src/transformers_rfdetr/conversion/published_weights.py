"""Where Roboflow's published weight files are, and their download.

They are kept where rfdetr keeps them, so that neither package downloads what the other one already has.
"""

import hashlib
import os
import re
import time
import urllib.request
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError

from transformers.utils import logging

from ..model.variants_rf_detr import ALIASES, normalize_name

logger = logging.get_logger(__name__)

BASE_URL = "https://storage.googleapis.com/rfdetr/"
_TIMEOUT_SECONDS = 30  # without a single byte
_PAUSES_SECONDS = (1, 2, 4, 8)  # before the second, third, ... try
_BLOCK_BYTES = 1 << 20


class PublishedFile(NamedTuple):
    """One published file of weights."""

    name: str  # in the folder of weights
    remote: str  # path below BASE_URL
    md5: str
    variant: str  # whose architecture it has


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
# Of several files of one variant the first is the one that its name means.
_BY_VARIANT = {file.variant: file for file in reversed(PUBLISHED.values())}
# A variant's name goes before a file's: rf-detr-large is the variant, whose file is rf-detr-large-2026.pth.
_BY_SPELLING = (
    {normalize_name(_stem(name)): file for name, file in PUBLISHED.items()}
    | {normalize_name(variant): file for variant, file in _BY_VARIANT.items()}
    | {spelling: _BY_VARIANT[variant] for spelling, variant in ALIASES.items()}
)


def published_file(name: str) -> PublishedFile | None:
    """The published file behind a name, None if there is none.

    Args:
        name: With an ending, exactly the name of a file: `rf-detr-large.pth` is the deprecated model. Without one,
            any usual spelling of a variant (`rf-detr-large`, `RFDETRLarge`: the file `rf-detr-large-2026.pth`) or of
            a file that has no variant of its own (`rf-detr-base-o365`). A name with a folder is none of these.
    """
    return PUBLISHED.get(name) if re.search(r"[./\\]", name) else _BY_SPELLING.get(normalize_name(name))


def weights_folder() -> Path:
    """The folder of downloaded weights, which is rfdetr's: $RF_HOME, else $ROBOFLOW_HOME, else ~/.roboflow/models."""
    folder = os.environ.get("RF_HOME") or os.environ.get("ROBOFLOW_HOME") or "~/.roboflow/models"
    return Path(folder).expanduser().absolute()


def download_weights(file: PublishedFile, folder: Path | None = None) -> Path:
    """The path of a published file, downloaded unless it is there; either way its md5 was checked.

    What an interrupted download has received stays beside it as `<name>.part`, which the next call continues.

    Args:
        file: See [`published_file`].
        folder: Where it is or shall be; [`weights_folder`] by default.

    Raises:
        ValueError: another file of that name is there, which is left alone, or the download has another md5.
        OSError: the server refuses, the connection fails time and again, or the file cannot be written.
    """
    folder = weights_folder() if folder is None else Path(folder)
    path, part, url = folder / file.name, folder / f"{file.name}.part", BASE_URL + file.remote
    if path.exists():
        if (found := md5_of(path)) != file.md5:
            raise ValueError(
                f"{path} has md5 {found}, the published {file.name} has {file.md5}; move it away to have that one"
                " downloaded, or pass its path to convert it as a file of yours"
            )
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if not part.exists() or md5_of(part) != file.md5:
        _download(url, part)
    if (found := md5_of(part)) != file.md5:
        part.unlink()
        raise ValueError(f"{url} came with md5 {found}, published is {file.md5}; it was deleted, so run again")
    os.replace(part, path)
    return path


def md5_of(path: Path) -> str:
    """The md5 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


class _Interrupted(Exception):
    """A failure that another try may mend."""


def _download(url: str, part: Path) -> None:
    """Complete `part`, in several tries if need be."""
    for pause in (*_PAUSES_SECONDS, None):
        try:
            return _try_download(url, part)
        except _Interrupted as interruption:
            if pause is None:
                raise ConnectionError(
                    f"{url} could not be downloaded: {interruption}; {part} holds the {_size(part)} bytes received so"
                    " far, and running again continues it"
                ) from interruption
            logger.warning(f"{url}: {interruption}; trying again in {pause} s")
            time.sleep(pause)


def _try_download(url: str, part: Path) -> None:
    """Append what `part` lacks, or write it anew if the server does not continue it."""
    start = _size(part)
    response = _open(url, start) or _open(url, 0)
    if response.status != 206:
        start = 0
    total = None if response.length is None else start + response.length
    try:
        with (
            response,
            open(part, "ab" if start else "wb") as file,
            logging.tqdm(desc=part.stem, total=total, initial=start, unit="B", unit_scale=True) as bar,
        ):
            while block := _read(response):
                file.write(block)
                bar.update(len(block))
    except OSError as error:  # of the disk; what write() raises does not say where
        error.filename = error.filename or str(part)
        raise
    if total is not None and _size(part) < total:
        raise _Interrupted(f"the connection ended after {_size(part)} of {total} bytes")


# urllib: torch's and pooch's downloaders do not continue, and huggingface_hub's that does is not public.
def _open(url: str, start: int) -> HTTPResponse | None:
    """The answer from byte `start` on, or the whole file if the server sends no parts; None if it sends neither."""
    headers = {"User-Agent": "transformers-rfdetr"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_SECONDS)
    except HTTPError as error:
        error.close()
        if error.code == 416 and start:  # the file is shorter: this is no part of it
            return None
        answer = f"the server answers {error.code} {error.reason}"
        if error.code in (408, 429) or error.code >= 500:
            raise _Interrupted(answer) from error
        raise OSError(f"{url} cannot be downloaded: {answer}") from error
    except (OSError, HTTPException) as error:
        raise _Interrupted(str(error) or type(error).__name__) from error
    if start and response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
        response.close()
        return None
    return response


def _read(response: HTTPResponse) -> bytes:
    """The next bytes, empty at the end."""
    try:
        return response.read1(_BLOCK_BYTES)  # read() would lose the bytes of a block that breaks off
    except (OSError, HTTPException) as error:
        raise _Interrupted(str(error) or type(error).__name__) from error
