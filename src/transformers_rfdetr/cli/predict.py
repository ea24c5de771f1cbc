"""`transformers-rfdetr predict`: instances of images, folders, datasets, videos and streams, as JSON and drawings."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from http.client import HTTPException
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast
from urllib.parse import urlsplit

import typer

from ..assets import TINY_NAME, sample_image
from ..atomic_files import escape_unprintable
from .errors import one_line_errors, terminated_as_interrupted
from .options import (
    AnyModelArgument,
    BatchSizeOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    Format,
    ThreadsOption,
    absolute,
    choose_threshold,
    load_model,
    read_names,
    read_size,
)
from .predict_tables import (
    AddressOption,
    CocoOption,
    ConcurrencyOption,
    Engine,
    EngineOption,
    RetryOption,
    check_engine,
    load_rows,
    predict_tables,
)

if TYPE_CHECKING:
    from ..inference.folder import FolderOptions, Summary
    from ..inference.image_list import InputImage
    from ..inference.video.predict_video import VideoSummary

EXAMPLE = """examples:

transformers-rfdetr predict rf-detr-seg-tiny

transformers-rfdetr predict rf-detr-seg-medium photos/ --output found

transformers-rfdetr predict my-model street.mp4 --track --batch-size 16

transformers-rfdetr predict my-model rtsp://camera.local/stream --show

transformers-rfdetr predict my-model survey.tif --tile auto --overlap 0.25

transformers-rfdetr predict my-model photos/ --save-as labelme --output to-correct

transformers-rfdetr predict my-model "s3://bucket/*.tar" --engine ray --address auto --output found

exit code: 0 on success; 1 if an image could not be read (the other images are done); 2 for wrong arguments; 130 after
Ctrl-C
"""
_STREAM = re.compile(r"(rtsp|rtsps|rtmp|rtmps|udp|tcp|srt)://", re.IGNORECASE)


_MAX_LISTED = 20  # unreadable images

SourcesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        help="Files, folders, patterns and URLs of images and videos; the number of a camera; rtsp:// streams. Default"
        " for rf-detr-seg-tiny: a sample image."
    ),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")]
DatasetOption = Annotated[
    str | None,
    typer.Option(metavar="USER/NAME|PATH", help="Dataset to predict instead of sources; its image ids are kept."),
]
SplitOption = Annotated[str, typer.Option(help="Split of the dataset.")]
ThresholdOption = Annotated[
    float | None,
    typer.Option(
        help="Score above which an instance is kept. Default: that of its class if the model is calibrated (`evaluate"
        " --calibrate`), else 0.5."
    ),
]
ClassesOption = Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Classes to predict. Default: all.")]
TileOption = Annotated[
    str | None,
    typer.Option(metavar="auto|N|HxW", help="Size of tiles in pixels; auto: the model's size. Default: no tiles."),
]
OverlapOption = Annotated[
    float | None, typer.Option(help="Minimum overlap of neighboring tiles, as a fraction of their side. Default: 0.2.")
]
ImagesOption = Annotated[bool, typer.Option(help="Write each image and video with the instances drawn on it.")]
SaveAsOption = Annotated[
    Format | None,
    typer.Option(
        help="Write the images and their instances to OUTPUT/FORMAT for an annotation program, to correct them there,"
        " instead of drawn images. Default: off."
    ),
]
CropsOption = Annotated[bool, typer.Option("--save-crops", help="Write a crop of each instance. Default: off.")]
ColorOption = Annotated[
    str | None, typer.Option(help="class or instance. Default: class, or with --track instance (one color per track).")
]
TrackOption = Annotated[bool, typer.Option("--track", help="Track objects in videos: each keeps its id. Default: off.")]
FramesOption = Annotated[int | None, typer.Option(help="Maximum number of frames of a video or stream. Default: all.")]
PatienceOption = Annotated[float, typer.Option(help="Seconds without a frame after which a stream counts as ended.")]
ShowOption = Annotated[
    bool, typer.Option("--show", help="Show results in a window: any key continues, q quits. Default: off.")
]
StrictOption = Annotated[bool, typer.Option("--strict", help="Stop at the first unreadable image. Default: skip it.")]


class _Inputs(NamedTuple):
    """The images and videos to predict, and their names in the settings; sources are rows of `dataset` if given."""

    names: list[str]
    images: "list[InputImage]"
    videos: "list[InputImage]"
    dataset: Sequence[Any] | None = None
    split: str = "train"


@dataclass(frozen=True)
class _Run:
    """The settings for both images and videos."""

    model: Any
    processor: Any
    output: Path
    options: "FolderOptions"
    origin: dict[str, Any]
    strict: bool
    show: Callable[[Any, int], None] | None
    save_as: Format | None


@one_line_errors
@terminated_as_interrupted()
def predict(
    model: AnyModelArgument,
    sources: SourcesArgument = None,
    output: OutputOption = Path("predictions"),
    dataset: DatasetOption = None,
    split: SplitOption = "test",
    threshold: ThresholdOption = None,
    classes: ClassesOption = None,
    batch_size: BatchSizeOption = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.FLOAT32,
    threads: ThreadsOption = None,
    tile: TileOption = None,
    overlap: OverlapOption = None,
    images: ImagesOption = True,
    save_crops: CropsOption = False,
    save_as: SaveAsOption = None,
    color_by: ColorOption = None,
    track: TrackOption = False,
    max_frames: FramesOption = None,
    patience: PatienceOption = 60.0,
    show: ShowOption = False,
    strict: StrictOption = False,
    engine: EngineOption = None,
    address: AddressOption = None,
    concurrency: ConcurrencyOption = None,
    coco: CocoOption = False,
    retry_errors: RetryOption = False,
) -> None:
    """Predict the instances of images, folders, datasets, videos, cameras and streams.

    Writes predictions.jsonl, predictions.coco.json, and the drawn images to OUTPUT/images. For a video NAME.mp4, writes
    the drawn video and NAME.jsonl, a line of instances for each frame, to OUTPUT/videos. With --engine, writes
    OUTPUT/predictions/*.parquet instead. The same command again skips what is done.
    """
    if model == TINY_NAME and not sources and dataset is None:
        sources = [str(sample_image())]
    if (sources is None) == (dataset is None):
        given_both = "both" if sources else "neither"
        raise ValueError(f"either sources (files, folders, URLs, ...) or --dataset must be given, got {given_both}")
    files = {"--save-crops": save_crops, "--save-as": save_as is not None}
    videos = {"--track": track, "--max-frames": max_frames is not None}
    for_people = {**files, **videos, "--show": show, "--strict": strict}
    check_engine(engine, for_people, address, concurrency, coco, retry_errors)
    inputs = None
    if engine is None:
        inputs = _read_inputs(sources, dataset, split, output)
        _check_options(inputs, {"images": {"--tile": tile is not None, **files}, "videos": videos})
    window = _open_window() if show else None
    loaded, processor = load_model(model, "cpu" if engine == Engine.RAY else device, dtype, threads)
    options = _folder_options(loaded.config, threshold, classes, batch_size, tile, overlap)
    options = replace(
        options,
        draw=images and save_as is None,
        crops=save_crops,
        color_by=cast(Any, color_by or ("instance" if track else "class")),  # FolderOptions checks it
    )
    origin: dict[str, Any] = {"model": absolute(model), "dtype": dtype.value}
    with _exit_codes(output):
        if inputs is None:
            ray: dict[str, Any] = {"address": address, "concurrency": concurrency, "threads": threads, "device": device}
            run_in = {
                "engine": engine,
                "coco": coco,
                "retry_errors": retry_errors,
                **(ray if engine == Engine.RAY else {}),
            }
            source = sources or (dataset, split)
            summary = predict_tables(loaded, processor, options, source, output, origin, run_in)
            num_failed = _report_images(summary, str(output / "predictions" / "*.parquet"))
        else:
            tracking = {"track": track, "max_frames": max_frames}
            origin |= {"sources": inputs.names, **tracking}
            run = _Run(loaded, processor, output, options, origin, strict, window, save_as)
            num_failed = _predict_images(run, inputs) if inputs.images or not inputs.videos else 0
            num_failed += _predict_videos(run, inputs.videos, {**tracking, "patience": patience})
    if num_failed:
        raise typer.Exit(1)


def _folder_options(
    config: Any, threshold: float | None, classes: str | None, batch_size: int, tile: str | None, overlap: float | None
) -> "FolderOptions":
    from ..inference.folder import FolderOptions

    if overlap is not None and tile is None:
        raise ValueError(f"--overlap requires --tile, got --overlap {overlap} alone. Add --tile auto.")
    is_one_class = classes in config.id2label.values()  # its name may contain a comma
    return FolderOptions(
        threshold=choose_threshold(config, threshold),
        classes=None if classes is None else [classes] if is_one_class else sorted(read_names("--classes", classes)),
        batch_size=batch_size,
        tile=tile if tile in (None, "auto") else read_size("--tile", tile),
        overlap=0.2 if overlap is None else overlap,
    )


def _check_options(inputs: "_Inputs", options: Mapping[str, Mapping[str, bool]]) -> None:
    """Raise ValueError for an option that would have no effect without images, or without videos."""
    for kind, is_given in options.items():
        for option in is_given:
            if is_given[option] and not getattr(inputs, kind):
                raise ValueError(f"{option} requires {kind}, got sources without {kind}. Omit it.")


@contextmanager
def _exit_codes(output: Path) -> Iterator[None]:
    """Convert an unreadable image in a strict run, and Ctrl-C, to a message and the command's exit code."""
    from ..inference.folder import UnreadableImageError

    try:
        yield
    except UnreadableImageError as error:
        typer.echo(f"predict: {escape_unprintable(str(error))}. Without --strict it is skipped.", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. Completed images are kept in {output}; the same command resumes.", err=True)
        raise typer.Exit(130) from None


# Inputs


def _read_inputs(sources: list[str] | None, dataset: str | None, split: str, output: Path) -> _Inputs:
    from ..inference.image_list import VIDEO_SUFFIXES, InputImage, list_images, unique_names
    from ..model.image_io import redact_url

    if dataset is not None:
        images, rows = _read_dataset(dataset, split)
        return _Inputs([f"{dataset} {split}"], images, [], rows, split)
    given = sources or []
    streams = [source for source in given if _is_stream(source, is_alone=len(given) == 1)]
    files = list_images([source for source in given if source not in streams], exclude=output)
    videos = [file for file in files if Path(file.name).suffix.lower() in VIDEO_SUFFIXES]
    names = unique_names([*(video.name for video in videos), *map(_name_of_stream, streams)])
    found = zip(names, [*(video.source for video in videos), *streams], strict=True)
    images = [file for file in files if file not in videos]
    settings = sorted({redact_url(absolute(source)) for source in given})
    return _Inputs(settings, images, [*starmap(InputImage, found)])


def _is_stream(source: str, is_alone: bool) -> bool:
    """Return whether a source is a camera, a stream or a video on a server; request a single URL without a suffix."""
    if _STREAM.match(source) or (source.isdecimal() and not Path(source).exists()):
        return True
    if not source.startswith(("http://", "https://")):
        return False
    from ..inference.image_list import VIDEO_SUFFIXES
    from ..model.image_io import open_url, redact_url

    try:
        suffix = Path(urlsplit(source).path).suffix.lower()
    except ValueError as error:
        raise ValueError(f"`sources` must be valid URLs, got {redact_url(source)}: {error}") from error
    if suffix or not is_alone:
        return suffix in VIDEO_SUFFIXES
    try:
        with open_url(source) as response:
            return response.headers.get_content_maintype() in ("video", "multipart")
    except (OSError, ValueError, HTTPException):
        return False  # reading it as an image reports the reason


def _is_endless(source: str) -> bool:
    """Return whether a video is a camera or a stream, not a file on this machine or on a server."""
    from ..inference.image_list import VIDEO_FILE_SUFFIXES

    address = urlsplit(source)
    is_remote_file = address.scheme.startswith("http") and Path(address.path).suffix.lower() in VIDEO_FILE_SUFFIXES
    return not is_remote_file and not Path(source).is_file()


def _name_of_stream(source: str) -> str:
    """Return the file name of a video on a server; for a camera or a stream, a name with the current time."""
    address = urlsplit(source)
    if not _is_endless(source):
        return Path(address.path).name
    title = f"{address.hostname}{address.path}" if address.scheme else f"camera {source}"
    safe = re.sub(r"[^\w.-]+", "_", title).strip("_") or "stream"
    return f"{safe} {datetime.now():%Y-%m-%d %H-%M-%S}.mp4"


def _read_dataset(name: str, split: str) -> "tuple[list[InputImage], Sequence[Any]]":
    """Return the images of a split, and their pixels: of annotation files, or of a dataset that `datasets` reads."""
    from ..data.label_maps import canonical_split_name
    from ..data.load import load_instance_dataset, recognise_format
    from ..inference.image_list import InputImage

    rows: Sequence[Any]
    ids: Sequence[int | None]
    if recognise_format(name)[0] is not None:
        splits = load_instance_dataset(name)
        if canonical_split_name(split) not in splits:
            raise ValueError(f"--split must be {' or '.join(splits)} for {name}, got {split}")
        dataset = splits[canonical_split_name(split)]
        rows, ids = _Column(dataset, "image"), dataset.image_ids()
    else:
        rows, ids = _read_rows(name, split)
    return [InputImage(f"{index:07d}.jpg", index, image_id) for index, image_id in enumerate(ids)], rows


def _read_rows(name: str, split: str) -> tuple[Sequence[Any], Sequence[int | None]]:
    rows = load_rows(name, split)
    import datasets

    columns = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"--dataset {name} must have a column of images, got {', '.join(rows.features)}")
    id_feature = rows.features.get("image_id")
    ids = list(rows["image_id"]) if getattr(id_feature, "dtype", "").startswith("int") else []
    has_ids = len(set(ids)) == len(rows) and None not in ids
    return _Column(rows, columns[0]), ids if has_ids else [None] * len(rows)


class _Column(Sequence):
    """The images of a dataset, each decoded on access: `datasets` < 4 decodes a whole column at once."""

    def __init__(self, rows: Any, column: str) -> None:
        self.rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index][self._column]


# Images


def _predict_images(run: _Run, inputs: _Inputs) -> int:
    """Predict the images, print a summary, and return the number of unreadable images."""
    from PIL import Image

    from ..inference.folder import predict_to_folder

    notes = [] if run.options.tile is None else [run.model.config.resolution]

    def on_image(image: Any, instances: Any) -> None:
        if notes:
            _note_scale(image.size, notes.pop())
        if run.show is not None:
            run.show(instances.draw(image, color_by=run.options.color_by), 0)

    max_pixels = Image.MAX_IMAGE_PIXELS
    try:
        if run.options.tile is not None:
            Image.MAX_IMAGE_PIXELS = None  # with tiles, large images are expected
        summary = predict_to_folder(
            run.model,
            run.processor,
            inputs.images,
            run.output,
            run.options,
            origin=run.origin,
            dataset=inputs.dataset,
            strict=run.strict,
            on_image=on_image,
        )
    finally:
        Image.MAX_IMAGE_PIXELS = max_pixels
    written = [run.output / name for name in ("images", "crops", "predictions.jsonl", "predictions.coco.json")]
    num_failed = _report_images(summary, ", ".join(str(path) for path in written if path.exists()))
    if run.save_as is not None:
        _save_as(run, inputs, run.save_as)
    return num_failed


def _note_scale(size: tuple[int, int], resolution: int | tuple[int, int]) -> None:
    """Print how much larger objects are in tiles than in the resized image (width, height), the scale of training."""
    from ..model.validation import as_pair

    width, height = size
    scales = [side / resized for side, resized in zip((height, width), as_pair(resolution), strict=True)]
    if max(scales) > 1:
        typer.echo(
            f"Note: objects are {scales[0]:.1f} x as high and {scales[1]:.1f} x as wide in tiles as in the image of"
            f" {width} x {height} pixels resized to {resolution}. Train the model on tiles, or on images of that scale."
        )


def _report_images(summary: "Summary", written: str) -> int:
    """Print a summary and the files that were written, and return the number of unreadable images."""
    before = f", {summary.skipped} done before" if summary.skipped else ""
    typer.echo(f"{summary.instances} instances in {summary.done} images{before}")
    if summary.done and not summary.instances:
        typer.echo("No score exceeds the threshold. Lower --threshold; if the model was fine-tuned, train it longer.")
    for name, reason in summary.failed[:_MAX_LISTED]:
        if "decompression bomb" in reason:
            reason = f"{reason.rstrip('.')}; --tile auto reads images of any size"
        typer.echo(f"  not read: {escape_unprintable(reason if name in reason else f'{name}: {reason}')}", err=True)
    if summary.failed:
        unlisted = len(summary.failed) - _MAX_LISTED
        more = f", {unlisted} more than listed here" if unlisted > 0 else ""
        typer.echo(f"{len(summary.failed)} images could not be read{more}", err=True)
    typer.echo(written)
    return len(summary.failed)


def _save_as(run: _Run, inputs: _Inputs, format: Format) -> None:
    """Write the predictions of the images for an annotation program, and print where they are."""
    from ..data.dataset import InstanceDataset
    from ..inference.save_as import save_predictions_as

    is_there = (run.output / format).exists()
    rows = getattr(inputs.dataset, "rows", None)
    dataset = rows if isinstance(rows, InstanceDataset) else inputs.dataset
    folder = save_predictions_as(
        run.output, format.value, inputs.images, run.model.config, dataset=dataset, split=inputs.split
    )
    typer.echo(f"{folder}{', which was there already and is kept. Delete it to write it again.' if is_there else ''}")


# Videos


def _predict_videos(run: _Run, videos: "Sequence[InputImage]", arguments: Mapping[str, Any]) -> int:
    """Predict the videos, and return how many could not be read."""
    from ..inference.prediction_files import check_settings, fingerprint, thresholds_setting

    if not videos:
        return 0
    options = run.options
    settings = {
        **run.origin,
        "threshold": thresholds_setting(run.model.config, options.threshold),
        "classes": options.classes,
        "images": options.draw,
        "color_by": options.color_by,
        "weights": fingerprint(run.model),
    }
    check_settings(run.output, settings)
    num_failed = 0
    for video in videos:
        try:
            _predict_video(run, video, settings, arguments)
        except (ValueError, OSError) as error:
            if run.strict or len(videos) == 1:
                raise
            num_failed += 1
            typer.echo(f"  not done: {escape_unprintable(f'{video.name}: {error}')}", err=True)
    return num_failed


def _predict_video(run: _Run, video: "InputImage", settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Write OUTPUT/videos/NAME.jsonl, which is called NAME.unfinished.jsonl until the video is complete."""
    from ..inference.prediction_files import write_settings
    from ..inference.video.predict_video import predict_video

    drawn_to = run.output / "videos" / video.name
    if drawn_to.suffix.lower() != ".mp4":
        drawn_to = drawn_to.with_name(f"{drawn_to.name}.mp4")
    lines, unfinished = (drawn_to.with_name(f"{drawn_to.stem}{end}") for end in (".jsonl", ".unfinished.jsonl"))
    if lines.exists():
        typer.echo(f"{escape_unprintable(video.name)}: done before, in {lines}")
        return
    drawn_to.parent.mkdir(parents=True, exist_ok=True)

    def on_frame(frame: Any, found: Any, drawn: Any) -> None:
        write_settings(run.output, settings)  # now that a prediction has shown that they are valid
        if run.show is not None:
            run.show(drawn or found.draw(frame.image), 1)

    try:
        done = predict_video(
            run.model,
            run.processor,
            video.source,
            drawn_to if run.options.draw else None,
            threshold=run.options.threshold,
            classes=run.options.classes,
            batch_size=run.options.batch_size,
            color_by=run.options.color_by,
            jsonl=unfinished,
            on_frame=on_frame,
            **arguments,
        )
    finally:
        if unfinished.exists() and not unfinished.stat().st_size:
            unfinished.unlink()
    is_endless = _is_endless(video.source)
    if done.is_cut and not is_endless and not Path(video.source).is_file():
        raise ValueError(f"the connection ended after {done.frames} frames. The same command starts the video again.")
    if unfinished.exists() and (not done.interrupted or is_endless):
        unfinished.rename(lines)
    typer.echo(f"{_describe(video.name, done)}: {f'{drawn_to}, ' if run.options.draw else ''}{lines}")
    if done.interrupted:
        raise KeyboardInterrupt


def _describe(name: str, done: "VideoSummary") -> str:
    line = f"{escape_unprintable(name)}: {done.frames} frames at {done.frames_per_second:.1f} frames/s"
    problems = {"undecodable": done.undecodable, "dropped": done.dropped, "reopened": done.reopened}
    return line + "".join(f", {count} {what}" for what, count in problems.items() if count)


def _open_window() -> Callable[[Any, int], None]:
    """Return a function that shows an image for some milliseconds (0: until a key is pressed); q is as Ctrl-C."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise ValueError("--show requires a display, and DISPLAY is not set. Open the files in the output folder.")
    try:
        import cv2
    except ImportError as error:
        raise ImportError("--show requires OpenCV: pip install opencv-python") from error

    import numpy as np

    def show(image: Any, milliseconds: int) -> None:
        cv2.imshow("transformers-rfdetr", np.asarray(image)[..., ::-1])
        if cv2.waitKey(milliseconds) & 0xFF == ord("q"):
            raise KeyboardInterrupt

    return show
