"""Read a video, a stream or a camera frame by frame, in a thread that reconnects."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from PIL import Image
from transformers.utils import logging

from .source import RULE, describe_ffmpeg_error, import_av, read_source

logger = logging.get_logger(__name__)

DEFAULT_FPS = 30.0  # frames per second where the source does not say
_QUEUE_LENGTH = 8  # frames between the thread that decodes and the caller
_TIMEOUT = 10.0  # seconds for an attempt to connect, and for a read
_RECONNECT_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 10.0)  # seconds between attempts to reopen; the last one repeats
_CLOSE_TIMEOUT = 1.0  # seconds that closing waits for a read from the network, which then ends by its own timeout
_ROTATIONS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


@dataclass(frozen=True)
class Frame:
    """One image of a video.

    Attributes:
        index: Number of the frame among those that were decoded, from 0; a dropped frame leaves a gap.
        seconds: Time since the start of the video; of a live source, by this machine's clock since its first frame.
        image: RGB, upright.
        pixel_aspect_ratio: Width of a pixel, as a player shows it, divided by its height.
    """

    index: int
    seconds: float
    image: Image.Image
    pixel_aspect_ratio: Fraction = Fraction(1)


class VideoReader:
    """Iterates over the frames of a file, a URL or a camera, which a thread decodes; also a context manager.

    A frame that cannot be decoded is counted and skipped. A live source is a camera or a stream of unknown length. If
    the caller is too slow for it, the oldest frames are dropped. If it ends or fails, it is reopened after 0.5, 1, 2,
    4, 8 and then every 10 seconds, until no frame has arrived for `patience` seconds.

    Example:
        >>> with VideoReader("street.mp4") as video:  # doctest: +SKIP
        ...     for frame in video:
        ...         print(frame.index, frame.seconds, frame.image.size)

    Args:
        source: Path of a file; URL (http, https, rtsp over TCP, rtmp, ...); or number of a camera, as int or str.
        patience: Seconds without a frame after which a live source has ended.

    Attributes:
        fps: Frames per second; None if the source does not say.
        num_frames: Approximate number of frames; None for a live source.
        is_live: Whether the source is live, see above.
        undecodable: Number of frames that could not be decoded, so far.
        reopened: How often a live source was reopened.
        dropped: Number of frames of a live source that the caller was too slow for.
        is_cut: Whether a source of known length ended early.

    Raises:
        ValueError: the source does not exist or is not a video, or, also while reading, it never delivered a frame.
        ImportError: PyAV is not installed.
    """

    def __init__(self, source: str | os.PathLike[str] | int, *, patience: float = 60.0) -> None:
        import_av()
        if not patience > 0:
            raise ValueError(f"`patience` must be a number of seconds above 0, got {patience}")
        self.patience = patience
        self.fps: float | None = None
        self.num_frames: int | None = None
        self.is_live = False
        self.undecodable = self.reopened = self.dropped = 0
        self.is_cut = False
        self._source = read_source(source)
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()  # guards the frames and the three below
        self._was_opened = self._has_ended = False
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._num_decoded = 0
        self._first_arrival: float | None = None
        self._last_arrival = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="VideoReader", daemon=True)
        self._thread.start()
        try:
            with self._changed:
                self._wait(lambda: self._was_opened or self._has_ended)
            if self._error is not None and not self._was_opened:  # `take` raises a later error, behind the frames
                raise self._error
        except BaseException:
            self.close()
            raise

    def take(self, count: int) -> list[Frame]:
        """Return the next `count` frames, fewer at the end; of a live source those that have arrived, at least one."""
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
        """Stop the thread, close the source and discard the frames that were not taken."""
        self._closing.set()
        with self._changed:
            self._has_ended = True
            self._frames.clear()
            self._changed.notify_all()
        self._thread.join(_CLOSE_TIMEOUT)

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

    def _wait(self, condition: Callable[[], Any]) -> None:
        while not condition():
            self._changed.wait(0.5)  # in slices, because Windows delivers Ctrl-C only between them

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
        """Read a file to its end; reopen a live source until `close`, or until no frame arrives within `patience`."""
        attempts = 0
        while True:
            num_decoded = self._num_decoded
            problem = self._read_once()
            if self._closing.is_set():
                return
            if self._was_opened and not self.is_live:
                if not self._num_decoded:
                    raise ValueError(f"{self._source.name} has no frame that can be decoded. Give {RULE}.")
                return
            attempts = 1 if self._num_decoded > num_decoded else attempts + 1
            remaining = self._last_arrival + self.patience - time.monotonic()
            if remaining <= 0:
                break
            delay = min(_RECONNECT_DELAYS[min(attempts, len(_RECONNECT_DELAYS)) - 1], remaining)
            logger.warning(f"{self._source.name}: {problem}; reopening it in {delay:.1f} s")
            if self._closing.wait(delay):
                return
        silence = f"{self._source.name}: no frame arrived for {self.patience:g} s ({problem})"
        if not self._num_decoded:
            raise ValueError(f"{silence}. Check the address, and that it is sending.")
        logger.warning(f"{silence}; reading ends after {self._num_decoded} frames")

    def _read_once(self) -> str:
        """Open the source, read until it ends, and return the reason why it ended."""
        av = import_av()
        problem = "the stream ended"
        container = None
        try:
            container = self._open()
            stream = next((video for video in container.streams.video if not _is_cover_art(video)), None)
            if stream is None:
                found = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
                raise ValueError(f"{self._source.name} has no video stream, only {found}. Give {RULE}.")
            self._describe(container, stream)
            self._decode(container, stream)
        except av.FFmpegError as error:
            problem = describe_ffmpeg_error(error)
        finally:
            if container is not None:
                container.close()
        return problem

    def _open(self) -> Any:
        """Return the open container; raise ValueError if another attempt cannot succeed, FFmpegError if it may."""
        av = import_av()
        source = self._source
        timeout = None if source.kind == "file" else min(_TIMEOUT, self.patience)
        try:
            return av.open(source.file, format=source.format, options=source.options, timeout=timeout)
        except (av.FFmpegError, ValueError) as error:
            final = (av.InvalidDataError, av.HTTPClientError, av.LookupError, FileNotFoundError, PermissionError)
            is_final = source.kind != "stream" or isinstance(error, final) or not isinstance(error, av.FFmpegError)
            if self._was_opened or not is_final:  # a source that was there once may come back
                raise
            reason = describe_ffmpeg_error(error)
        # Outside of `except`: FFmpeg's error has the URL with its password, which no traceback must show.
        raise ValueError(f"{source.name} cannot be opened as a video: {reason}. Give {RULE}.")

    def _describe(self, container: Any, stream: Any) -> None:
        """Set the attributes of the source when it is opened for the first time."""
        if self._was_opened:
            self.reopened += 1
            return
        duration = _duration(container, stream)
        has_end = self._source.kind == "file" or bool(duration) or (container.size or 0) > 0
        self.is_live = self._source.kind == "camera" or not has_end
        rate = stream.average_rate or stream.guessed_rate
        self.fps = float(rate) if rate else None
        if not self.is_live:
            self.num_frames = stream.frames or round((duration or 0) * (self.fps or 0)) or None
        with self._changed:
            self._was_opened = True
            self._changed.notify_all()

    def _decode(self, container: Any, stream: Any) -> None:
        """Deliver the frames of an open source; warn if a file ends early."""
        av = import_av()
        start = (stream.start_time or 0) * stream.time_base
        reached, problem = 0.0, ""
        try:
            for packet in container.demux(stream):
                if self._closing.is_set() or (self.is_live and time.monotonic() - self._last_arrival > self.patience):
                    return
                if packet.pts is not None:
                    reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base - start))
                self._decode_packet(packet, float(start))
        except av.FFmpegError as error:
            if self.is_live:
                raise
            problem = f" ({describe_ffmpeg_error(error)})"
        duration = 0.0 if self.is_live else _duration(container, stream) or 0.0
        if problem or reached < duration - max(0.5, 0.01 * duration):
            self.is_cut = True
            lengths = f"{reached:.1f} of {duration:.1f} s"
            logger.warning(f"{self._source.name} is truncated{problem}: reading ends after {lengths}")

    def _decode_packet(self, packet: Any, start: float) -> None:
        av = import_av()
        try:
            for frame in packet.decode():
                if frame.is_corrupt:
                    self.undecodable += 1
                else:
                    ratio = packet.stream.sample_aspect_ratio or Fraction(1)
                    ratio = 1 / ratio if frame.rotation % 180 else ratio
                    self._deliver(_upright_image(frame), ratio, frame.time, start)
        except (av.FFmpegError, ValueError):
            self.undecodable += 1

    def _deliver(self, image: Image.Image, ratio: Fraction, timestamp: float | None, start: float) -> None:
        now = self._last_arrival = time.monotonic()
        self._first_arrival = self._first_arrival or now
        if self.is_live:
            seconds = now - self._first_arrival
        elif timestamp is None:
            seconds = self._num_decoded / (self.fps or DEFAULT_FPS)
        else:
            seconds = max(0.0, timestamp - start)
        with self._changed:
            if self.is_live and len(self._frames) == _QUEUE_LENGTH:
                self._frames.popleft()
                self.dropped += 1
            self._wait(lambda: len(self._frames) < _QUEUE_LENGTH or self._closing.is_set())
            if not self._closing.is_set():
                self._frames.append(Frame(self._num_decoded, seconds, image, ratio))
                self._num_decoded += 1
            self._changed.notify_all()


def _duration(container: Any, stream: Any) -> float | None:
    """Return the seconds of a video, or None if they are unknown."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / import_av().time_base if container.duration else None


def _is_cover_art(stream: Any) -> bool:
    """Whether a stream is the cover image of an audio file."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _upright_image(frame: Any) -> Image.Image:
    """Return a decoded frame as RGB, rotated as its stream says."""
    image = frame.to_image()
    rotation = _ROTATIONS.get(frame.rotation % 360)  # degrees counter-clockwise, like PIL's
    return image if rotation is None else image.transpose(rotation)
