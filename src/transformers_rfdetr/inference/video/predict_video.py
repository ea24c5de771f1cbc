"""From a video or a live stream to instances, and to files."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from PIL import Image
from transformers.utils import logging

from ...atomic_files import translate_disk_errors
from ..instances import Instances
from ..predict import DEFAULT_SCORE, WEAK_SCORE, class_thresholds, predict
from .reader import DEFAULT_FPS, Frame, VideoReader
from .tracking import Tracker
from .writer import VideoWriter, check_video_output


@dataclass(frozen=True)
class VideoSummary:
    """What `predict_video` did.

    Attributes:
        frames: Number of frames that were predicted.
        seconds_taken: Wall-clock time.
        frames_per_second: `frames / seconds_taken`.
        undecodable: Number of frames that could not be decoded.
        reopened: How often a live source was reopened.
        dropped: Number of frames of a live source that the prediction was too slow for.
        interrupted: Whether Ctrl-C ended it.
        is_cut: Whether a source of known length ended early.
    """

    frames: int
    seconds_taken: float
    frames_per_second: float
    undecodable: int
    reopened: int
    dropped: int
    interrupted: bool
    is_cut: bool


def predict_video(
    model: Any,
    processor: Any,
    source: str | os.PathLike[str] | int,
    output: str | os.PathLike[str] | None = None,
    *,
    threshold: float | Literal["calibrated"] = DEFAULT_SCORE,
    batch_size: int = 8,
    classes: Sequence[str] | None = None,
    track: bool = False,
    color_by: Literal["class", "instance"] | None = None,
    max_frames: int | None = None,
    patience: float = 60.0,
    jsonl: str | os.PathLike[str] | None = None,
    on_frame: Callable[[Frame, Instances, Image.Image | None], None] | None = None,
    progress: bool = True,
) -> VideoSummary:
    """Predict the instances of a video or a live stream, and write them as a video and as JSON lines.

    Ctrl-C ends it like the end of the video: the files contain the frames so far.

    Example:
        >>> predict_video(model, processor, "street.mp4", "found.mp4", track=True)  # doctest: +SKIP

    Args:
        model: See [`predict`].
        processor: See [`predict`].
        source: Path of a file; URL (http, https, rtsp over TCP, rtmp, ...); or number of a camera, as int or str.
        output: The `.mp4` file to write: the frames, upright, with the instances drawn and the times of the source.
        threshold: See [`predict`].
        batch_size: Largest number of frames in a forward pass; a live source never waits until a batch is full.
        classes: See [`predict`].
        track: Whether objects keep an id from frame to frame; see [`Tracker`].
        color_by: See `Instances.draw`; by default "instance" where objects are tracked, else "class".
        max_frames: Number of frames after which to stop.
        patience: Seconds without a frame after which a live source has ended.
        jsonl: The file to write, one line a frame: `{"frame": index, "seconds": ..., **instances.to_dict()}`.
        on_frame: Called with each frame, its instances, and the drawn image if there is an `output`.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: an argument is out of range, or the video cannot be read or written.
        ImportError: PyAV, or with `track` trackers, is not installed.
    """
    thresholds = class_thresholds(model.config, threshold)
    _check_arguments(batch_size, max_frames, output, source)
    lowest = float(thresholds.min())
    least_score = min(lowest, WEAK_SCORE) if track else threshold
    find = partial(predict, model, processor, threshold=least_score, classes=classes, batch_size=batch_size)
    started = time.perf_counter()
    reader, frames, interrupted = None, 0, False
    try:
        with ExitStack() as stack:
            reader = stack.enter_context(VideoReader(source, patience=patience))
            fps = reader.fps or DEFAULT_FPS
            tracker = Tracker(fps, start_score=min(lowest, DEFAULT_SCORE)) if track else None
            colors = color_by or ("instance" if track else "class")
            sinks = stack.enter_context(_Sinks(output, jsonl, fps, colors, on_frame))
            bar = stack.enter_context(_progress_bar(reader, max_frames, progress))
            for frame, instances in _track(_predict_frames(reader, find, batch_size, max_frames), tracker, thresholds):
                frames += 1
                sinks.add(frame, instances)
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
    return _summarize(reader, frames, time.perf_counter() - started, interrupted)


def _predict_frames(
    reader: VideoReader, find: Callable[[list[Image.Image]], list[Instances]], batch_size: int, max_frames: int | None
) -> Iterator[tuple[Frame, Instances]]:
    count = 0
    while batch := reader.take(batch_size if max_frames is None else min(batch_size, max_frames - count)):
        count += len(batch)
        yield from zip(batch, find([frame.image for frame in batch]), strict=True)


def _track(
    frames: Iterator[tuple[Frame, Instances]], tracker: Tracker | None, thresholds: np.ndarray
) -> Iterator[tuple[Frame, Instances]]:
    """Add track ids. The tracker needs low scores to follow objects that are occluded; they are dropped afterwards."""
    for frame, instances in frames:
        if tracker is not None:
            instances = tracker.update(instances)
        yield frame, instances.select(instances.scores > thresholds[instances.labels])


def _progress_bar(reader: VideoReader, max_frames: int | None, progress: bool) -> Any:
    totals = [total for total in (reader.num_frames, max_frames) if total is not None]
    return logging.tqdm(total=min(totals, default=None), desc="Video", unit=" frames", disable=not progress)


def _summarize(reader: VideoReader | None, frames: int, seconds: float, interrupted: bool) -> VideoSummary:
    if reader is None:  # Ctrl-C while it was being opened
        return VideoSummary(0, seconds, 0.0, 0, 0, 0, interrupted, False)
    counts = (reader.undecodable, reader.reopened, reader.dropped)
    return VideoSummary(frames, seconds, frames / seconds, *counts, interrupted, reader.is_cut)


class _Sinks(ExitStack):
    """The files and the callback that get the frames of `predict_video`; a context manager that closes the files."""

    def __init__(
        self,
        output: str | os.PathLike[str] | None,
        jsonl: str | os.PathLike[str] | None,
        fps: float,
        color_by: Literal["class", "instance"],
        on_frame: Callable[[Frame, Instances, Image.Image | None], None] | None,
    ) -> None:
        super().__init__()
        self._output, self._fps, self._color_by, self._on_frame = output, fps, color_by, on_frame
        self._writer: VideoWriter | None = None
        self._lines = None if jsonl is None else self.enter_context(_open_lines(jsonl))

    def add(self, frame: Frame, instances: Instances) -> None:
        drawn = None
        if self._output is not None:
            drawn = instances.draw(frame.image, color_by=self._color_by)
            if self._writer is None:
                writer = VideoWriter(self._output, self._fps, drawn.size, pixel_aspect_ratio=frame.pixel_aspect_ratio)
                self._writer = self.enter_context(writer)
            self._writer.write(drawn, frame.seconds)
        if self._lines is not None:
            record = {"frame": frame.index, "seconds": round(frame.seconds, 6), **instances.to_dict()}
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        if self._on_frame is not None:
            self._on_frame(frame, instances, drawn)


@contextmanager
def _open_lines(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    with translate_disk_errors(Path(path)), open(path, "w", encoding="utf-8") as lines:
        yield lines


def _check_arguments(
    batch_size: int,
    max_frames: int | None,
    output: str | os.PathLike[str] | None,
    source: str | os.PathLike[str] | int,
) -> None:
    for name, value in (("batch_size", batch_size), ("max_frames", max_frames)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    path = None if output is None else check_video_output(output)
    with suppress(OSError):  # the source is not a file
        if path is not None and path.exists() and not isinstance(source, int) and path.samefile(source):
            raise ValueError(f"`output` must be another file than `source`, got {output} for both")
