"""`transformers-rfdetr predict`: images, folders, datasets, videos and streams to images, JSON and cut-outs."""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from ..atomic_files import escape_unprintable
from .errors import one_line_errors, terminated_as_interrupted
from .options import DeviceOption, Dtype, DtypeOption, ModelArgument, absolute, read_names, read_size

if TYPE_CHECKING:
    from ..inference.folder import Summary
    from ..inference.image_list import InputImage
    from ..inference.video.predict_video import VideoSummary

EXAMPLE = """examples:

transformers-rfdetr predict rf-detr-seg-medium photos/ --output found

transformers-rfdetr predict my-model street.mp4 --track --batch-size 16

transformers-rfdetr predict my-model rtsp://camera.local/stream --show

transformers-rfdetr predict my-model survey.tif --tile auto --overlap 0.25

torchrun --nproc-per-node 8 -m transformers_rfdetr.cli.app predict my-model photos/

exit code: 0 if all went well, 1 if images could not be read (the others are done; of several processes each ends with
0 all the same), 2 for wrong arguments
"""
_STREAM = re.compile(r"(rtsp|rtsps|rtmp|rtmps|udp|tcp|srt)://", re.IGNORECASE)
VIDEO_SUFFIXES = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".m3u8"}
_NUM_NAMED = 20


@one_line_errors
@terminated_as_interrupted()
def predict(
    model: ModelArgument,
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="files, folders, patterns, URLs; videos; a camera's number; rtsp:// and other streams"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder for what is found")] = Path("predictions"),
    dataset: Annotated[str | None, typer.Option(metavar="USER/NAME", help="a dataset instead of files")] = None,
    split: Annotated[str, typer.Option(help="of that dataset")] = "test",
    threshold: Annotated[float, typer.Option(help="least score of an instance")] = 0.5,
    classes: Annotated[str | None, typer.Option(metavar="NAME,NAME", help="look for these only")] = None,
    batch_size: Annotated[int, typer.Option(help="images, frames or tiles at a time")] = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.FLOAT32,
    tile: Annotated[
        str | None, typer.Option(metavar="auto|N|HxW", help="cut images of any size into tiles of this many pixels")
    ] = None,
    overlap: Annotated[
        float | None, typer.Option(help="of neighbouring tiles, as a part of their side; 0.2 by default")
    ] = None,
    images: Annotated[bool, typer.Option(help="write what is found drawn over each image or video")] = True,
    save_crops: Annotated[bool, typer.Option("--save-crops", help="write each instance's cut-out")] = False,
    color_by: Annotated[
        str | None, typer.Option(help="class or instance; by default class, of tracks instance")
    ] = None,
    track: Annotated[bool, typer.Option("--track", help="number the objects of a video from frame to frame")] = False,
    max_frames: Annotated[int | None, typer.Option(help="end a video or stream after so many")] = None,
    patience: Annotated[float, typer.Option(help="seconds without a frame after which a stream has ended")] = 60.0,
    show: Annotated[bool, typer.Option("--show", help="show it in a window too; a key goes on, q ends it")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first image that cannot be read")] = False,
) -> None:
    """Find instances in images, folders, datasets, videos, cameras and streams.

    Images come out as OUTPUT/images, predictions.jsonl and predictions.coco.json, videos as OUTPUT/videos. The same
    command again skips what is done. Started by torchrun or accelerate launch, each process takes its share.
    """
    import torch
    from PIL import Image

    from ..hub.load import load
    from ..inference.folder import FolderOptions, UnreadableImageError, predict_to_folder
    from ..inference.image_list import InputImage, list_images, unique_names
    from ..inference.prediction_files import check_settings, fingerprint
    from ..model.image_io import redact_url

    if (sources is None) == (dataset is None):
        raise ValueError("give either sources (files, folders, URLs, ...) or --dataset")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    rows = None if dataset is None else _open_dataset(dataset, split)
    streams = [source for source in sources or [] if _is_stream(source, is_alone=len(sources or []) == 1)]
    items = list_images([source for source in sources or [] if source not in streams], exclude=output)
    if rows is not None:
        items = [InputImage(f"{index:07d}.jpg", index) for index in range(len(rows))]
    videos = [item for item in items if rows is None and Path(item.name).suffix.lower() in VIDEO_SUFFIXES]
    items = [item for item in items if item not in videos]
    names = unique_names([*(video.name for video in videos), *map(_name_of_stream, streams)])
    videos = [InputImage(*both) for both in zip(names, [*(video.source for video in videos), *streams], strict=True)]
    _check_that_it_applies(bool(items), bool(videos), tile, save_crops, track, max_frames)
    if overlap is not None and tile is None:
        raise ValueError(f"--overlap {overlap} is of tiles, and --tile is not given; add --tile auto, or leave it out")
    show_image = _open_window() if show else None
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    loaded, processor = load(model, device=device, dtype=getattr(torch, dtype))
    is_a_class = classes in loaded.config.id2label.values()
    shared: dict[str, Any] = {
        "threshold": threshold,
        "classes": None if classes is None else [classes] if is_a_class else sorted(read_names("--classes", classes)),
        "batch_size": batch_size,
        "progress": rank == 0,
    }
    origin = {
        "model": absolute(model),
        "sources": [f"{dataset} {split}"] if dataset else sorted({redact_url(absolute(s)) for s in sources or []}),
        "dtype": dtype.value,
        "track": track,
        "max_frames": max_frames,
    }
    failed: list[tuple[str, str]] = []
    limit = Image.MAX_IMAGE_PIXELS
    try:
        if tile is not None:
            Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is for images that were not expected to be so large
        if items or not videos:
            summary = predict_to_folder(
                loaded,
                processor,
                items,
                output,
                FolderOptions(
                    tile=tile if tile in (None, "auto") else read_size("--tile", tile),
                    overlap=0.2 if overlap is None else overlap,
                    draw=images,
                    crops=save_crops,
                    color_by=color_by or "class",
                    **{name: shared[name] for name in ("threshold", "classes", "batch_size")},
                ),
                origin=origin,
                dataset=rows,
                strict=strict,
                shard=(rank, world),
                progress=shared["progress"],
                on_image=None
                if show_image is None
                else lambda image, found: show_image(found.draw(image, color_by=color_by or "class"), 0),
            )
            _report(summary, output, rank, world)
            failed += summary.failed
        settings = {**origin, "threshold": threshold, "classes": shared["classes"], "images": images}
        if videos:
            settings["weights"] = fingerprint(loaded)
            check_settings(output, settings)
        for video in videos[rank::world]:
            style = {"track": track, "color_by": color_by, "max_frames": max_frames, "patience": patience}
            try:
                _predict_video(loaded, processor, video, output, settings, images, show_image, **style, **shared)
            except (ValueError, OSError) as error:
                if strict or len(videos) == 1:
                    raise
                failed.append((video.name, str(error)))
                typer.echo(f"  not done: {escape_unprintable(f'{video.name}: {error}')}", err=True)
    except UnreadableImageError as error:
        typer.echo(f"predict: {escape_unprintable(str(error))}; without --strict the others are done", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; the same command goes on: images that are done stay in {output}", err=True)
        raise typer.Exit(130) from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    # One process of several that fails would have the others stopped.
    if failed and world == 1:
        raise typer.Exit(1)


def _check_that_it_applies(
    images: bool, videos: bool, tile: str | None, save_crops: bool, track: bool, max_frames: int | None
) -> None:
    """ValueError for an option that would do nothing."""
    for given, option in ((tile is not None, "--tile"), (save_crops, "--save-crops")):
        if given and not images:
            raise ValueError(f"{option} is for images, and the sources are videos; leave it out")
    for given, option in ((track, "--track"), (max_frames is not None, "--max-frames")):
        if given and not videos:
            raise ValueError(f"{option} is for videos, and the sources have none; leave it out")


def _is_stream(source: str, is_alone: bool) -> bool:
    """Whether a source is a camera, a stream, or a video on a server: by its name or by what the server says it is."""
    if _STREAM.match(source) or (source.isdecimal() and not Path(source).exists()):
        return True
    if not source.startswith(("http://", "https://")):
        return False
    from ..model.image_io import open_url, redact_url

    try:
        suffix = Path(urlsplit(source).path).suffix.lower()
    except ValueError as error:
        raise ValueError(f"{redact_url(source)} is no URL: {error}; correct it") from error
    if suffix or not is_alone:  # of many without an ending none is asked twice
        return suffix in VIDEO_SUFFIXES
    try:
        with open_url(source) as response:
            return response.headers.get_content_maintype() in ("video", "multipart")
    except (OSError, ValueError, HTTPException):
        return False  # reading it as an image says what is wrong


def _is_endless(source: str) -> bool:
    """Whether a video is a camera or a stream, and no file here or on a server."""
    place = urlsplit(source)
    is_there = place.scheme.startswith("http") and Path(place.path).suffix.lower() in VIDEO_SUFFIXES - {".m3u8"}
    return not is_there and not Path(source).is_file()


def _name_of_stream(source: str) -> str:
    """Of a video on a server its own name; of a camera or a stream, which is another one each time, with the time."""
    place = urlsplit(source)
    if not _is_endless(source):
        return Path(place.path).name
    title = f"{place.hostname}{place.path}" if place.scheme else f"camera {source}"
    safe = re.sub(r"[^\w.-]+", "_", title).strip("_") or "stream"
    return f"{safe} {datetime.now():%Y-%m-%d %H-%M-%S}.mp4"


def _open_dataset(name: str, split: str) -> Sequence[Any]:
    """The images of a split of a dataset on the Hub or in a folder that `datasets` reads."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError('--dataset needs datasets: pip install "transformers-rfdetr[train]"') from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except (datasets.exceptions.DatasetsError, FileNotFoundError) as error:
        raise ValueError(f"--dataset {name} cannot be loaded: {error}") from error
    columns = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"--dataset {name} has no column of images, only {', '.join(rows.features)}")
    return _Column(rows, columns[0])


class _Column(Sequence):
    """The images of a dataset, each decoded when it is asked for: before 4.0, `datasets` decodes all at once."""

    def __init__(self, rows: Any, column: str) -> None:
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index][self._column]


def _predict_video(
    model: Any,
    processor: Any,
    video: "InputImage",
    output: Path,
    settings: Mapping[str, Any],
    images: bool,
    window: Callable[[Any, int], None] | None,
    **options: Any,
) -> None:
    from ..inference.prediction_files import write_settings
    from ..inference.video.predict_video import predict_video

    drawn_to = output / "videos" / video.name
    if drawn_to.suffix.lower() != ".mp4":
        drawn_to = drawn_to.with_name(f"{drawn_to.name}.mp4")
    lines, unfinished = (drawn_to.with_name(f"{drawn_to.stem}{end}") for end in (".jsonl", ".unfinished.jsonl"))
    if lines.exists():
        typer.echo(f"{escape_unprintable(video.name)}: done before, in {lines}")
        return
    drawn_to.parent.mkdir(parents=True, exist_ok=True)

    def on_frame(frame: Any, found: Any, drawn: Any) -> None:
        write_settings(output, settings)  # which are possible, as has just been seen
        if window is not None:
            window(drawn or found.draw(frame.image), 1)

    try:
        done = predict_video(
            model,
            processor,
            video.source,
            drawn_to if images else None,
            jsonl=unfinished,
            on_frame=on_frame,
            **options,
        )
    finally:
        if unfinished.exists() and not unfinished.stat().st_size:
            unfinished.unlink()
    is_there = not Path(video.source).is_file() and not _is_endless(video.source)
    if done.is_cut and is_there:
        raise ValueError(f"the connection ended after {done.frames} frames; the same command begins it again")
    if unfinished.exists() and (not done.interrupted or _is_endless(video.source)):
        unfinished.rename(lines)
    typer.echo(f"{_video_line(video.name, done)}: {drawn_to if images else lines}")
    if done.interrupted:
        raise KeyboardInterrupt


def _video_line(source: str, done: "VideoSummary") -> str:
    line = f"{escape_unprintable(source)}: {done.frames} frames at {done.frames_per_second:.1f} a second"
    trouble = {"undecodable": done.undecodable, "dropped": done.dropped, "reopened": done.reopened}
    return line + "".join(f", {count} {what}" for what, count in trouble.items() if count)


def _report(summary: "Summary", output: Path, rank: int, world: int) -> None:
    share = f" (process {rank} of {world})" if world > 1 else ""
    before = f", {summary.skipped} done before" if summary.skipped else ""
    typer.echo(f"{summary.instances} instances in {summary.done} images{before}{share}")
    for key, reason in summary.failed[:_NUM_NAMED]:
        if "decompression bomb" in reason:
            reason = f"{reason.rstrip('.')}; --tile auto reads images of any size"
        typer.echo(f"  not read: {escape_unprintable(reason if key in reason else f'{key}: {reason}')}", err=True)
    if summary.failed:
        more = f", {len(summary.failed) - _NUM_NAMED} more than listed here" * (len(summary.failed) > _NUM_NAMED)
        typer.echo(f"{len(summary.failed)} images could not be read{more}", err=True)
    if summary.complete:
        typer.echo(f"{output / 'predictions.jsonl'}, {output / 'predictions.coco.json'}")
    elif world > 1:
        typer.echo("other processes have not finished; whichever is the last one writes the results of all")


def _open_window() -> Callable[[Any, int], None]:
    """A function that shows an image in a window for a while, and raises KeyboardInterrupt when q is pressed there."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError(
            "--show needs a display, and there is none (DISPLAY is not set); look at the files in --output"
        )
    try:
        import cv2
    except ImportError as error:
        raise ImportError("--show needs OpenCV: pip install opencv-python") from error

    import numpy as np

    def show(image: Any, milliseconds: int) -> None:
        cv2.imshow("transformers-rfdetr", np.asarray(image)[..., ::-1])
        if cv2.waitKey(milliseconds) & 0xFF == ord("q"):  # 0 waits for a key
            raise KeyboardInterrupt

    return show
