"""Write images as a video file."""

import os
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...atomic_files import atomic_file, translate_disk_errors
from .source import import_av

# Seconds. Whole numbers of it make 24, 25, 30, 50, 60 and 30000/1001 frames/s; MPEG-4 allows no finer time base.
_TIME_BASE = Fraction(1, 60_000)


class VideoWriter:
    """Writes images with their times as an MP4 with H.264; a context manager.

    The file appears under its name when the writer is closed, and is then playable, also where an exception or Ctrl-C
    closed it. Without an image there is no file.

    Args:
        path: The `.mp4` file. An existing file is replaced.
        fps: Approximate number of frames per second.
        size: (width, height) of the images in pixels. Where one is odd, the last row or column is repeated in the
            file. An image of another size is resized to this one: a camera that reconnects may have another.
        pixel_aspect_ratio: Width of a pixel, as a player shows it, divided by its height.

    Raises:
        ValueError: another suffix, or the folder does not exist; an image after [`close`](VideoWriter.close).
        ImportError: PyAV is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        size: tuple[int, int],
        *,
        pixel_aspect_ratio: Fraction = Fraction(1),
    ) -> None:
        import_av()
        self.path, self.size, self.fps = check_video_output(path), size, fps
        self.pixel_aspect_ratio = pixel_aspect_ratio
        self._container: Any = None  # open from the first image on
        self._last_pts = -1

    def _open(self, av: Any) -> None:
        # Builds of FFmpeg without GPL parts have no x264.
        codec, options = (
            ("libx264", {"crf": "20", "preset": "veryfast"})
            if "libx264" in av.codecs_available
            else ("mpeg4", {"qmin": "2", "qmax": "5"})
        )
        rate = max(Fraction(self.fps).limit_denominator(1001), Fraction(1, 1001))
        with ExitStack() as stack:
            container = av.open(str(stack.enter_context(atomic_file(self.path))), "w", format="mp4")
            self._stream = container.add_stream(codec, rate=rate, options=options)
            self._stream.width, self._stream.height = (side + side % 2 for side in self.size)
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = _TIME_BASE
            self._stream.codec_context.sample_aspect_ratio = self.pixel_aspect_ratio
            self._container, self._file = container, stack.pop_all()

    def write(self, image: Image.Image, seconds: float) -> None:
        """Append an image that is shown from `seconds` on; a time that does not increase is moved behind the last."""
        av = import_av()
        if self._container is None:
            if self._last_pts >= 0:
                raise ValueError(f"the VideoWriter of {self.path} must be open, got a closed one. Create another.")
            self._open(av)
        if image.size != self.size:
            image = image.resize(self.size)
        pixels = np.asarray(image.convert("RGB"))
        pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, pixels.shape[1] % 2), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._last_pts = max(round(seconds / _TIME_BASE), self._last_pts + 1)
        frame.pts, frame.time_base = self._last_pts, _TIME_BASE
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


def check_video_output(path: str | os.PathLike[str]) -> Path:
    """Return the path of a video to write; ValueError unless it ends in `.mp4` and its folder exists."""
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"the name of the output video must end in .mp4, got {path}. Pass {path.with_suffix('.mp4')}.")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of the output video must exist, got {path}. Create {path.parent}.")
    return path
