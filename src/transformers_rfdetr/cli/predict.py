"""`transformers-rfdetr predict`: pictures, folders, data sets, videos and streams to pictures, JSON and cut-outs."""

import os
import re
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import torch
import typer

from ..bulk_prediction import VIDEO_SUFFIXES, Picture, Summary, UnreadablePictureError, list_pictures, predict_to_folder
from ..loading import load
from ..video import VideoSummary, predict_video
from .errors import one_line_errors
from .options import read_dtype, read_size

EXAMPLE = """examples:

transformers-rfdetr predict rf-detr-seg-medium photos/ --output found

transformers-rfdetr predict my-model street.mp4 --track --batch-size 16

transformers-rfdetr predict my-model rtsp://camera.local/stream --show

transformers-rfdetr predict my-model survey.tif --tile auto --overlap 0.25

torchrun --nproc-per-node 8 -m transformers_rfdetr.cli.app predict my-model photos/

exit code: 0 if all went well, 1 if pictures could not be read (the others are done), 2 for wrong arguments
"""
_STREAM = re.compile(r"(rtsp|rtsps|rtmp|rtmps|udp|tcp|srt)://", re.IGNORECASE)
_NUM_NAMED = 20


@one_line_errors
def predict(
    model: Annotated[str, typer.Argument(help="a folder, a Hub id, or a published name such as rf-detr-seg-medium")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(help="files, folders, patterns, URLs; videos; a camera's number; rtsp:// and other streams"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="the folder for what is found")] = Path("predictions"),
    dataset: Annotated[str | None, typer.Option(metavar="USER/NAME", help="a data set instead of files")] = None,
    split: Annotated[str, typer.Option(help="of that data set")] = "test",
    threshold: Annotated[float, typer.Option(help="least score of an instance")] = 0.5,
    classes: Annotated[str | None, typer.Option(metavar="NAME,NAME", help="look for these only")] = None,
    batch_size: Annotated[int, typer.Option(help="pictures, frames or tiles at a time")] = 8,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    tile: Annotated[
        str | None, typer.Option(metavar="auto|N|HxW", help="cut large pictures into tiles of this many pixels")
    ] = None,
    overlap: Annotated[float, typer.Option(help="of neighbouring tiles, as a part of their side")] = 0.2,
    pictures: Annotated[bool, typer.Option(help="write what is found drawn over each picture or video")] = True,
    save_crops: Annotated[bool, typer.Option("--save-crops", help="write each instance's cut-out")] = False,
    color_by: Annotated[
        str | None, typer.Option(help="class or instance; by default class, of tracks instance")
    ] = None,
    track: Annotated[bool, typer.Option("--track", help="number the objects of a video from frame to frame")] = False,
    max_frames: Annotated[int | None, typer.Option(help="end a video or stream after so many")] = None,
    patience: Annotated[float, typer.Option(help="seconds without a frame after which a stream has ended")] = 60.0,
    show: Annotated[bool, typer.Option("--show", help="show it in a window too; q ends it")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="stop at the first picture that cannot be read")] = False,
) -> None:
    """Find instances in pictures, folders, data sets, videos, cameras and streams.

    Pictures come out as OUTPUT/pictures, predictions.jsonl and predictions.coco.json, videos as OUTPUT/videos. The same
    command again skips what is done. Started by torchrun or accelerate launch, each process takes its share.
    """
    if (sources is None) == (dataset is None):
        raise ValueError("give either sources (files, folders, URLs, ...) or --dataset")
    videos = [source for source in sources or [] if _is_video(source)]
    rows = None if dataset is None else _open_dataset(dataset, split)
    items = list_pictures([source for source in sources or [] if source not in videos])
    videos += [item.key for item in items if Path(item.key).suffix.lower() in VIDEO_SUFFIXES]
    items = [item for item in items if item.key not in videos]
    if rows is not None:
        items = [Picture(f"{dataset} {split} {index}", index, f"{index:07d}.jpg") for index in range(len(rows))]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_picture = _open_window() if show else None
    if device == "auto" and torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    loaded, processor = load(model, device=device, dtype=read_dtype(dtype))
    shared: dict[str, Any] = {
        "threshold": threshold,
        "classes": None if classes is None else [name.strip() for name in classes.split(",")],
        "batch_size": batch_size,
        "progress": rank == 0,
    }
    failed = False
    try:
        if items:
            summary = predict_to_folder(
                loaded,
                processor,
                items,
                output,
                model_name=model,
                dataset=rows,
                tile=None if tile is None else 0 if tile == "auto" else read_size("--tile", tile),
                overlap=overlap,
                draw=pictures,
                crops=save_crops,
                color_by=color_by or "class",
                strict=strict,
                shard=(rank, world),
                on_picture=None if on_picture is None else lambda _, image, found: on_picture(found.draw(image)),
                **shared,
            )
            _report(summary, output, rank, world)
            failed = bool(summary.failed)
        for index, source in enumerate(videos):
            if index % world == rank:
                style = {"track": track, "color_by": color_by, "max_frames": max_frames, "patience": patience}
                _predict_video(loaded, processor, source, output / "videos", pictures, on_picture, **style, **shared)
    except UnreadablePictureError as error:
        typer.echo(f"predict: {error}; without --strict the others are done", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"\nstopped; what was done is in {output}, and the same command goes on from there", err=True)
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


def _is_video(source: str) -> bool:
    """Whether a source is a video or stream by its name or, of an http(s) URL, by what the server says it is."""
    if _STREAM.match(source) or (source.isdigit() and not Path(source).exists()):
        return True
    if not source.startswith(("http://", "https://")):
        return Path(source).suffix.lower() in VIDEO_SUFFIXES and Path(source).expanduser().is_file()
    suffix = Path(urlsplit(source).path).suffix.lower()
    if suffix in VIDEO_SUFFIXES or not suffix:
        if suffix:
            return True
        try:
            request = Request(source, headers={"User-Agent": "transformers-rfdetr"})
            with urlopen(request, timeout=30) as response:
                return response.headers.get_content_maintype() in ("video", "multipart")
        except (URLError, OSError, ValueError):
            return False  # reading it as a picture says what is wrong
    return False


def _open_dataset(name: str, split: str) -> Sequence[Any]:
    """The pictures of a split of a data set on the Hub or in a folder that `datasets` reads."""
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
        raise ValueError(f"--dataset {name} has no column of pictures, only {', '.join(rows.features)}")
    return rows[columns[0]]


def _predict_video(
    model: Any,
    processor: Any,
    source: str,
    folder: Path,
    pictures: bool,
    window: Callable[[Any], None] | None,
    **options: Any,
) -> None:
    is_file = Path(source).expanduser().is_file()
    place = urlsplit(source) if "://" in source else None
    stem = Path(source).stem if is_file else f"{place.hostname}{place.path}" if place else f"camera {source}"
    name = re.sub(r"[^\w .-]+", "_", stem).strip("_")
    if not is_file:
        name += f" {datetime.now():%Y-%m-%d %H-%M-%S}"
    video, lines = folder / f"{name}.mp4", folder / f"{name}.jsonl"
    if lines.exists():
        typer.echo(f"{source}: done before, in {lines}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.unfinished.jsonl"
    partial.unlink(missing_ok=True)
    done = predict_video(
        model,
        processor,
        source,
        video if pictures else None,
        jsonl=partial,
        on_frame=None if window is None else lambda frame, found, drawn: window(drawn or found.draw(frame.picture)),
        **options,
    )
    if done.interrupted and is_file:
        typer.echo(f"{_video_line(source, done)}; stopped before its end")
        raise KeyboardInterrupt
    partial.rename(lines)
    typer.echo(f"{_video_line(source, done)}: {video if pictures else lines}")
    if done.interrupted:
        raise KeyboardInterrupt


def _video_line(source: str, done: VideoSummary) -> str:
    line = f"{re.sub('//[^/@]*@', '//', source)}: {done.frames} frames at {done.frames_per_second:.1f} a second"
    trouble = {"undecodable": done.undecodable, "dropped": done.dropped, "reopened": done.reopened}
    return line + "".join(f", {count} {what}" for what, count in trouble.items() if count)


def _report(summary: Summary, output: Path, rank: int, world: int) -> None:
    share = f" (process {rank} of {world})" if world > 1 else ""
    before = f", {summary.skipped} done before" if summary.skipped else ""
    typer.echo(f"{summary.instances} instances in {summary.done} pictures{before}{share}")
    for key, reason in summary.failed[:_NUM_NAMED]:
        typer.echo(f"  not read: {reason if key in reason else f'{key}: {reason}'}", err=True)
    if summary.failed:
        more = f", {len(summary.failed) - _NUM_NAMED} more than listed here" * (len(summary.failed) > _NUM_NAMED)
        typer.echo(f"{len(summary.failed)} pictures could not be read{more}", err=True)
    if summary.complete:
        typer.echo(f"{output / 'predictions.jsonl'}, {output / 'predictions.coco.json'}")
    else:
        typer.echo("other processes have not finished; whichever is the last one writes the results of all")


def _open_window() -> Callable[[Any], None]:
    """A function that shows a picture in a window, and raises KeyboardInterrupt when q is pressed there."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError(
            "--show needs a display, and there is none (DISPLAY is not set); look at the files in --output"
        )
    try:
        import cv2
    except ImportError as error:
        raise ImportError('--show needs OpenCV: pip install "transformers-rfdetr[vision]"') from error

    def show(picture: Any) -> None:
        cv2.imshow("transformers-rfdetr", np.asarray(picture)[..., ::-1])
        if cv2.waitKey(1) & 0xFF == ord("q"):
            raise KeyboardInterrupt

    return show
