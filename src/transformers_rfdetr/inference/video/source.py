"""Which video, stream or camera is read, as FFmpeg has to be told by PyAV."""

import os
import sys
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...model.image_io import redact_url

RULE = "a video file, a URL (http, https, rtsp, rtmp) or the number of a camera"


class Source(NamedTuple):
    """An input of FFmpeg.

    Attributes:
        name: The source in messages; a URL has no credentials in it.
        kind: A "file" has an end; a "stream" is read from a URL, and a "camera" from this machine.
        file: The path, URL or device that FFmpeg opens.
        format: FFmpeg's name of the format; None lets FFmpeg find out.
        options: FFmpeg's options.
    """

    name: str
    kind: Literal["file", "stream", "camera"]
    file: str
    format: str | None = None
    options: dict[str, str] | None = None


def read_source(source: str | os.PathLike[str] | int) -> Source:
    """Return the FFmpeg input of a path, a URL or a camera's number (int or str).

    Raises:
        ValueError: the file does not exist, is a playlist, or there is no such camera.
    """
    text = os.fspath(source) if not isinstance(source, int) else str(source)
    if text.isdecimal():
        return Source(f"camera {text}", "camera", *_camera_input(int(text)))
    if "://" in text:
        # FFmpeg analyzes a stream for 5 s by default; a slow one would not be open within the timeout.
        options = {"analyzeduration": "2000000"} | ({"rtsp_transport": "tcp"} if text.startswith("rtsp") else {})
        return Source(redact_url(text), "stream", text, None, options)
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"`source` must be {RULE}; there is no file {text}")
    with path.open("rb") as file:
        if file.read(8).startswith((b"#EXTM3U", b"ffconcat")):
            raise ValueError(f"`source` must not be a playlist, which may name any file, got {text}. Give the videos.")
    return Source(text, "file", str(path.absolute()))


def _camera_input(index: int) -> tuple[str, str, dict[str, str]]:
    """Return file, format and options of a camera of this machine."""
    if sys.platform == "darwin":
        return str(index), "avfoundation", {"framerate": "30"}  # most cameras refuse FFmpeg's default of 29.97
    if sys.platform == "win32":
        devices = [device for device in import_av().enumerate_input_devices("dshow") if "video" in device.media_types]
        if index >= len(devices):
            raise ValueError(f"`source` must be the number of a camera, below {len(devices)} here, got {index}")
        return f"video={devices[index].name}", "dshow", {}
    return f"/dev/video{index}", "v4l2", {}


def import_av() -> Any:
    """Return PyAV; ImportError with the remedy where it is missing."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f'video requires PyAV: pip install "transformers-rfdetr[vision]" ({error})') from error
    return av


def describe_ffmpeg_error(error: Exception) -> str:
    """Return FFmpeg's message without the name of the source, which may contain a password."""
    av = import_av()
    if isinstance(error, av.ExitError):
        return "timed out"
    if isinstance(error, av.InvalidDataError):
        return "FFmpeg does not know the format, or the beginning or the end of the data is missing"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
