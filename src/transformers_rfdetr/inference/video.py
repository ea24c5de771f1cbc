"""Videos and live streams, frame by frame: reading, predicting, tracking, drawing, writing.

`predict_video` does all of it; `VideoReader`, `VideoWriter` and `Tracker` are its parts. Reading and writing is by
PyAV, that is FFmpeg, and tracking by Roboflow's trackers; both are imported where they are used.
"""

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from transformers.utils import logging

from ..atomic_files import atomic_file, translate_disk_errors
from ..model.image_io import redact_url
from .instances import Instances
from .predict import predict

logger = logging.get_logger(__name__)

_WAITING = 8  # frames between the thread that decodes and the caller
_TIMEOUT = 10.0  # seconds, of one attempt to connect and of one read
_PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0, 10.0)  # seconds between attempts to reopen, the last one for all that follow
_CLOSING = 1.0  # seconds that closing waits for a read from the network, which then ends by its timeout
_TICK = Fraction(1, 60_000)  # seconds; whole for 24, 25, 30, 50, 60 and 30000/1001 frames/s, and MPEG-4 takes no finer
_USUAL_RATE = 30.0  # frames/s, of a source that does not tell
_TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    Attributes:
        index: Its number among the frames that were decoded, from 0; a frame that was dropped leaves a gap.
        seconds: Since the start of the video; of a live source by this machine's clock since its first frame.
        picture: RGB, upright.
    """

    index: int
    seconds: float
    picture: Image.Image


class VideoReader:
    """The frames of a file, a URL or a camera, decoded by a thread of its own; an iterator and a context manager.

    A frame that cannot be decoded is counted and skipped. A live source is one whose end nobody knows: a camera, or a
    stream without a length. Where the caller is too slow for it the oldest frames are dropped, and when it ends or
    fails it is opened again, after pauses of 0.5, 1, 2, 4, 8 and then 10 seconds, for as long as `patience` says.

    Example:
        >>> with VideoReader("street.mp4") as video:  # doctest: +SKIP
        ...     for frame in video:
        ...         print(frame.index, frame.seconds, frame.picture.size)

    Args:
        source: Path of a file; a URL of http, https, rtsp (read over TCP), rtmp, ...; or the number of a camera, as
            int or str.
        patience: Seconds without a frame after which a live source is given up.

    Attributes:
        fps: Frames in a second, as far as the source tells; None if it does not.
        num_frames: About how many there are, None of a live source.
        is_live: See above.
        undecodable: Frames that could not be decoded, so far.
        reopened: Times that a live source was opened again.
        dropped: Frames of a live source that came too fast.
        is_cut: Whether a source with a length ended before it.

    Raises:
        ValueError: there is no such source, it is no video, or, also while reading, it never delivered a frame.
        ImportError: PyAV is missing.
    """

    def __init__(self, source: str | os.PathLike[str] | int, *, patience: float = 60.0) -> None:
        _import_av()
        if not patience > 0:
            raise ValueError(f"patience {patience} is no time to wait; give seconds above 0, such as 60")
        self.patience = patience
        self.fps: float | None = None
        self.num_frames: int | None = None
        self.is_live = False
        self.undecodable = self.reopened = self.dropped = 0
        self.is_cut = False
        self._source = _read_source(source)
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()  # guards the frames and the three below
        self._is_open = self._has_ended = False
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._num_decoded = 0
        self._first_came: float | None = None
        self._last_came = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="VideoReader", daemon=True)
        self._thread.start()
        try:
            with self._changed:
                self._wait(lambda: self._is_open or self._has_ended)
            if self._error is not None and not self._is_open:  # what comes later is told with the frames
                raise self._error
        except BaseException:
            self.close()
            raise

    def take(self, count: int) -> list[Frame]:
        """The next frames, at most `count`; none at the end. Of a live source those that are there, at least one."""
        frames: list[Frame] = []
        with self._changed:
            while len(frames) < count and not (frames and self.is_live and not self._frames):
                self._wait(lambda: self._frames or self._has_ended)
                if not self._frames:
                    break
                frames.append(self._frames.popleft())
                self._changed.notify_all()
            if not frames and self._error is not None:
                raise self._error
        return frames

    def close(self) -> None:
        """Stop the thread and close the source; nothing comes any more."""
        self._closing.set()
        with self._changed:
            self._has_ended = True
            self._frames.clear()
            self._changed.notify_all()
        self._thread.join(_CLOSING)

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        frames = self.take(1)
        if not frames:
            raise StopIteration
        return frames[0]

    def _wait(self, is_so: Callable[[], Any]) -> None:
        while not is_so():
            self._changed.wait(0.5)  # in slices, because Windows delivers Ctrl-C in between only

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._read()
        except Exception as error:
            self._error = error
        finally:
            with self._changed:
                self._has_ended = True
                self._changed.notify_all()

    def _read(self) -> None:
        """Read a file to its end; a live source again and again, until it is closed or silent for too long."""
        attempts = 0
        while True:
            num_decoded = self._num_decoded
            problem = self._read_once()
            if self._closing.is_set():
                return
            if self._is_open and not self.is_live:
                if not self._num_decoded:
                    raise ValueError(f"{self._source.name} has no frame that can be decoded; {_REMEDY}")
                return
            attempts = 1 if self._num_decoded > num_decoded else attempts + 1
            left = self._last_came + self.patience - time.monotonic()
            if left <= 0:
                break
            pause = min(_PAUSES[min(attempts, len(_PAUSES)) - 1], left)
            logger.warning(f"{self._source.name}: {problem}; opening it again in {pause:.1f} s")
            if self._closing.wait(pause):
                return
        silence = f"{self._source.name}: no frame came for {self.patience:g} s ({problem})"
        if not self._num_decoded:
            raise ValueError(f"{silence}; check the address, and that it sends")
        logger.warning(f"{silence}; it is given up after {self._num_decoded} frames")

    def _read_once(self) -> str:
        """Open the source and read until it ends -> why it did."""
        av = _import_av()
        problem = "it sends no more"
        container = None
        try:
            container = self._open()
            stream = next((video for video in container.streams.video if not _is_cover(video)), None)
            if stream is None:
                raise ValueError(f"{self._source.name} has no video in it, but {_kinds(container)}; {_REMEDY}")
            self._describe(container, stream)
            self._decode(container, stream)
        except av.FFmpegError as error:
            problem = _reason(error)
        finally:
            if container is not None:
                container.close()
        return problem

    def _open(self) -> Any:
        """The open container; ValueError if it is of no use to try again, FFmpegError if it is."""
        av = _import_av()
        source = self._source
        timeout = None if source.kind == "file" else min(_TIMEOUT, self.patience)
        try:
            return av.open(source.file, format=source.format, options=source.options, timeout=timeout)
        except (av.FFmpegError, ValueError) as error:
            final = (av.InvalidDataError, av.HTTPClientError, av.LookupError, FileNotFoundError, PermissionError)
            is_final = source.kind != "stream" or isinstance(error, final) or not isinstance(error, av.FFmpegError)
            if self._is_open or not is_final:  # one that was there once may come back
                raise
            reason = _reason(error)
        # Outside of `except`, so that no traceback shows FFmpeg's error, which has the URL with its password.
        raise ValueError(f"{source.name} cannot be opened as a video: {reason}; {_REMEDY}")

    def _describe(self, container: Any, stream: Any) -> None:
        if self._is_open:
            self.reopened += 1
            return
        length = _length(container, stream)
        is_whole = self._source.kind == "file" or bool(length) or (container.size or 0) > 0
        self.is_live = self._source.kind == "camera" or not is_whole
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate else None
        if not self.is_live:
            self.num_frames = stream.frames or round((length or 0) * (self.fps or 0)) or None
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def _decode(self, container: Any, stream: Any) -> None:
        """Deliver the frames of an open source; those of a file that is cut end with a warning."""
        av = _import_av()
        start = (stream.start_time or 0) * stream.time_base
        reached, problem = 0.0, ""
        try:
            for packet in container.demux(stream):
                if self._closing.is_set() or (self.is_live and time.monotonic() - self._last_came > self.patience):
                    return
                if packet.pts is not None:
                    reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base - start))
                self._decode_packet(packet, float(start))
        except av.FFmpegError as error:
            if self.is_live:
                raise
            problem = f" ({_reason(error)})"
        length = 0.0 if self.is_live else _length(container, stream) or 0.0
        if problem or reached < length - max(0.5, 0.01 * length):
            self.is_cut = True
            logger.warning(
                f"{self._source.name} is cut{problem}: it ends after {reached:.1f} of {length:.1f} s, and so does what"
                " is made of it"
            )

    def _decode_packet(self, packet: Any, start: float) -> None:
        av = _import_av()
        try:
            for frame in packet.decode():
                if frame.is_corrupt:
                    self.undecodable += 1
                else:
                    self._deliver(_upright(frame), frame.time, start)
        except (av.FFmpegError, ValueError):
            self.undecodable += 1

    def _deliver(self, picture: Image.Image, stamp: float | None, start: float) -> None:
        now = self._last_came = time.monotonic()
        self._first_came = self._first_came or now
        if self.is_live:
            seconds = now - self._first_came
        else:
            seconds = self._num_decoded / (self.fps or _USUAL_RATE) if stamp is None else max(0.0, stamp - start)
        with self._changed:
            if self.is_live and len(self._frames) == _WAITING:
                self._frames.popleft()
                self.dropped += 1
            self._wait(lambda: len(self._frames) < _WAITING or self._closing.is_set())
            if not self._closing.is_set():
                self._frames.append(Frame(self._num_decoded, seconds, picture))
                self._num_decoded += 1
            self._changed.notify_all()


class VideoWriter:
    """Writes pictures with their times as an MP4 with H.264; a context manager.

    The file appears under its name when it is closed, and then plays, also where an exception or Ctrl-C closed it;
    without a picture there is none.

    Args:
        path: Of the file, `.mp4`; one that is there is replaced.
        fps: Frames in a second, about.
        size: (width, height) of the pictures in pixels; odd ones repeat their last row or column in the file. A
            picture of another size is scaled to this one: a camera that comes back may have changed its.

    Raises:
        ValueError: another suffix, or the folder does not exist; a picture after [`close`](VideoWriter.close).
        ImportError: PyAV is missing.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, size: tuple[int, int]) -> None:
        _import_av()
        self.path, self.size, self.fps = check_video_output(path), size, fps
        self._container: Any = None  # open from the first picture on
        self._last_pts = -1

    def _open(self, av: Any) -> None:
        # Builds of FFmpeg without GPL parts have no x264.
        codec, options = (
            ("libx264", {"crf": "20", "preset": "veryfast"})
            if "libx264" in av.codecs_available
            else ("mpeg4", {"qmin": "2", "qmax": "5"})
        )
        rate = Fraction(self.fps).limit_denominator(1001)
        with ExitStack() as stack:
            container = av.open(str(stack.enter_context(atomic_file(self.path))), "w", format="mp4")
            self._stream = container.add_stream(codec, rate=rate, options=options)
            self._stream.width, self._stream.height = (side + side % 2 for side in self.size)
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = _TICK
            self._container, self._file = container, stack.pop_all()

    def write(self, picture: Image.Image, seconds: float) -> None:
        """Append a picture that is shown from `seconds` on; a time not after the last one is moved behind it."""
        av = _import_av()
        if self._container is None:
            if self._last_pts >= 0:
                raise ValueError(f"{self.path} is closed; make another VideoWriter")
            self._open(av)
        if picture.size != self.size:
            picture = picture.resize(self.size)
        pixels = np.asarray(picture.convert("RGB"))
        pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._last_pts = max(round(seconds / _TICK), self._last_pts + 1)
        frame.pts, frame.time_base = self._last_pts, _TICK
        with translate_disk_errors(self.path):
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file and give it its name."""
        container, self._container = self._container, None
        if container is not None:
            with self._file:
                container.mux(self._stream.encode(None))
                container.close()

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Tracker:
    """Gives objects numbers that they keep from frame to frame: ByteTrack, by Roboflow's `trackers`.

    Args:
        frame_rate: Frames in a second; an object is remembered for one second after it was seen last.
        start_score: What starts a track; an instance below it can only continue one.

    Raises:
        ImportError: trackers is missing.
    """

    def __init__(self, frame_rate: float, *, start_score: float = 0.5) -> None:
        try:
            import supervision
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise ImportError(f'tracking needs trackers: pip install "transformers-rfdetr[track]" ({error})') from error
        self._detections = supervision.Detections
        self._tracker = ByteTrackTracker(
            frame_rate=frame_rate, track_activation_threshold=start_score, high_conf_det_threshold=start_score
        )

    def update(self, instances: Instances) -> Instances:
        """The next frame's instances, all of them in their order, with `track_ids`; -1 in an object's first frame."""
        numbers = np.arange(len(instances))
        detections = self._detections(xyxy=instances.boxes, confidence=instances.scores, data={"number": numbers})
        tracked = self._tracker.update(detections)  # in an order of its own
        track_ids: np.ndarray = np.full(len(instances), -1, np.int64)
        if len(tracked):
            track_ids[tracked.data["number"]] = tracked.tracker_id
        return replace(instances, track_ids=track_ids)


@dataclass(frozen=True)
class VideoSummary:
    """What `predict_video` did.

    Attributes:
        frames: Frames that were predicted.
        seconds_taken: By the clock.
        frames_per_second: The one by the other.
        undecodable: As of `VideoReader`.
        reopened: As of `VideoReader`.
        dropped: As of `VideoReader`.
        interrupted: Whether Ctrl-C ended it.
        is_cut: As of `VideoReader`.
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
    threshold: float = 0.5,
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
    """Find instances in a video or a live stream, and write them as a video, as lines of JSON, or hand them on.

    Ctrl-C ends it as the end of the video does: the files hold the frames so far.

    Example:
        >>> predict_video(model, processor, "street.mp4", "found.mp4", track=True)  # doctest: +SKIP

    Args:
        model: As of `predict`.
        processor: The model's.
        source: As of [`VideoReader`].
        output: The video to write, with the instances drawn over it and the times of the source: `.mp4`.
        threshold: Of `predict`.
        batch_size: Frames that go through the model at once; of a live source at most, so that none is waited for.
        classes: Of `predict`.
        track: Whether objects keep a number from frame to frame; see [`Tracker`].
        color_by: Of `Instances.draw`; by default "instance" where objects are tracked, else "class".
        max_frames: End after so many.
        patience: Of [`VideoReader`].
        jsonl: The file to write with one line a frame: `{"frame": index, "seconds": ..., **instances.to_dict()}`.
        on_frame: Called with each frame, its instances, and its drawing if there is an `output`.
        progress: Show a progress bar, with frames per second.

    Raises:
        ValueError: as of [`VideoReader`], [`VideoWriter`] and `predict`.
        ImportError: PyAV, or trackers, is missing.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} must be at least 1")
    if max_frames is not None and max_frames < 1:
        raise ValueError(f"max_frames {max_frames} must be at least 1")
    if output is not None:
        _check_not_the_source(check_video_output(output), source)
    started = time.perf_counter()
    reader, frames, interrupted = None, 0, False
    try:
        with ExitStack() as stack:
            reader = stack.enter_context(VideoReader(source, patience=patience))
            rate = reader.fps or _USUAL_RATE
            tracker = Tracker(rate, start_score=min(threshold, 0.5)) if track else None
            color_by = color_by or ("instance" if track else "class")
            lines = None
            if jsonl is not None:
                stack.enter_context(translate_disk_errors(Path(jsonl)))
                lines = stack.enter_context(open(jsonl, "w", encoding="utf-8"))
            sinks = _Sinks(stack, output, lines, rate, color_by, on_frame)
            totals = [total for total in (reader.num_frames, max_frames) if total is not None]
            bar = logging.tqdm(total=min(totals, default=None), desc="Video", unit=" frames", disable=not progress)
            stack.enter_context(bar)
            while batch := reader.take(batch_size if max_frames is None else min(batch_size, max_frames - frames)):
                pictures = [frame.picture for frame in batch]
                settings = {"threshold": threshold, "classes": classes, "batch_size": batch_size}
                for frame, found in zip(batch, predict(model, processor, pictures, **settings), strict=True):
                    instances = found if tracker is None else tracker.update(found)
                    frames += 1
                    sinks.add(frame, instances)
                    bar.update()
    except KeyboardInterrupt:
        interrupted = True
    taken = time.perf_counter() - started
    counts = (reader.undecodable, reader.reopened, reader.dropped) if reader is not None else (0, 0, 0)
    return VideoSummary(frames, taken, frames / taken, *counts, interrupted, reader is not None and reader.is_cut)


class _Sinks:
    """Where the frames of `predict_video` go; what it opens is closed by the stack."""

    def __init__(
        self,
        stack: ExitStack,
        output: str | os.PathLike[str] | None,
        lines: IO[str] | None,
        fps: float,
        color_by: Literal["class", "instance"],
        on_frame: Callable[[Frame, Instances, Image.Image | None], None] | None,
    ) -> None:
        self._stack, self._output, self._lines, self._fps = stack, output, lines, fps
        self._color_by, self._on_frame = color_by, on_frame
        self._writer: VideoWriter | None = None

    def add(self, frame: Frame, instances: Instances) -> None:
        drawn = None
        if self._output is not None:
            drawn = instances.draw(frame.picture, color_by=self._color_by)
            if self._writer is None:
                self._writer = self._stack.enter_context(VideoWriter(self._output, self._fps, drawn.size))
            self._writer.write(drawn, frame.seconds)
        if self._lines is not None:
            record = {"frame": frame.index, "seconds": round(frame.seconds, 6), **instances.to_dict()}
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()
        if self._on_frame is not None:
            self._on_frame(frame, instances, drawn)


def check_video_output(path: str | os.PathLike[str]) -> Path:
    """The path of a video to write; ValueError if it is no `.mp4`, or in no folder."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"videos are written as MP4, {path} has another suffix; name it {path.with_suffix('.mp4')}")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder; make it, or write {path.name} elsewhere")
    return path


def _check_not_the_source(output: Path, source: str | os.PathLike[str] | int) -> None:
    with suppress(OSError):  # a source that is no file
        if output.exists() and not isinstance(source, int) and output.samefile(source):
            raise ValueError(f"{output} is the video that is read; write to another file")


# -- sources -----------------------------------------------------------------------------------------------------------

_REMEDY = "give a video file, a URL (http, https, rtsp, rtmp), or the number of a camera"


class _Source(NamedTuple):
    """What FFmpeg opens; `name` is for people, without the password of a URL."""

    name: str
    kind: Literal["file", "stream", "camera"]
    file: str
    format: str | None = None
    options: dict[str, str] | None = None


def _read_source(source: str | os.PathLike[str] | int) -> _Source:
    text = os.fspath(source) if not isinstance(source, int) else str(source)
    if text.isdecimal():
        return _Source(f"camera {text}", "camera", *_camera(int(text)))
    if "://" in text:
        # FFmpeg looks at a stream for 5 s by default; a slow one would not be open within the timeout.
        options = {"analyzeduration": "2000000"} | ({"rtsp_transport": "tcp"} if text.startswith("rtsp") else {})
        return _Source(redact_url(text), "stream", text, None, options)
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"{text} is no file; {_REMEDY}")
    with path.open("rb") as file:
        if file.read(8).startswith((b"#EXTM3U", b"ffconcat")):
            raise ValueError(f"{text} is a playlist, which may name any file; give the videos themselves")
    return _Source(text, "file", str(path.absolute()))


def _camera(index: int) -> tuple[str, str, dict[str, str]]:
    """What FFmpeg calls a camera of this machine: file, format, options."""
    if sys.platform == "darwin":
        return str(index), "avfoundation", {"framerate": "30"}  # FFmpeg's 29.97 is refused by most of them
    if sys.platform == "win32":
        devices = [device for device in _import_av().enumerate_input_devices("dshow") if "video" in device.media_types]
        if index >= len(devices):
            raise ValueError(f"there is no camera {index}, but {len(devices)} in all, numbered from 0; {_REMEDY}")
        return f"video={devices[index].name}", "dshow", {}
    return f"/dev/video{index}", "v4l2", {}


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(f'video needs PyAV: pip install "transformers-rfdetr[vision]" ({error})') from error
    return av


def _reason(error: Exception) -> str:
    """What FFmpeg says, without the name of the source, which may hold a password."""
    av = _import_av()
    if isinstance(error, av.ExitError):
        return "nothing came in time"
    if isinstance(error, av.InvalidDataError):
        return "it is in no format that FFmpeg knows, or its beginning or its end is missing"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _length(container: Any, stream: Any) -> float | None:
    """Seconds, if they are known."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / _import_av().time_base if container.duration else None


def _kinds(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"


def _is_cover(stream: Any) -> bool:
    """Whether it is the picture that comes with a piece of music."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _upright(frame: Any) -> Image.Image:
    """A decoded frame as RGB, turned as its stream asks for."""
    picture = frame.to_image()
    turn = _TURNS.get(frame.rotation % 360)  # degrees counter-clockwise, as PIL's
    return picture if turn is None else picture.transpose(turn)
