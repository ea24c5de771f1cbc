"""Videos and live streams: reading, writing, tracking, and `predict_video`, which does all three.

Image number i of a video has one shade of grey, which tells its number after decoding. Videos to read are encoded here
with PyAV, videos that were written are decoded here with PyAV; the streams come from stream_servers.py.
"""

import _thread
import json
import os
import re
import signal
import struct
import sys
import threading
import time
import traceback
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image

from transformers_rfdetr import RfDetrImageProcessor, predict
from transformers_rfdetr.inference.instances import Instances
from transformers_rfdetr.inference.video import source
from transformers_rfdetr.inference.video.predict_video import predict_video
from transformers_rfdetr.inference.video.reader import VideoReader
from transformers_rfdetr.inference.video.tracking import Tracker
from transformers_rfdetr.inference.video.writer import VideoWriter

from small_models import small_model
from stream_servers import serve_file, serve_mjpeg, serve_rtsp

VIDEO = "transformers_rfdetr.inference.video"
STAND_IN = SimpleNamespace(config=SimpleNamespace(id2label={0: "red", 1: "green"}))  # for find_squares
MILLISECOND = Fraction(1, 1000)


def grey(number, size=(64, 48)):
    return Image.new("RGB", size, (15 * number + 10,) * 3)


def number_of(image):
    return round((np.asarray(image).mean() - 10) / 15)


def numbers_of(frames):
    return [number_of(frame.image) for frame in frames]


def encode_video(path, images, milliseconds=None, *, codec="libx264", gop=12, **options):
    """Encode images, by default 25 a second."""
    milliseconds = milliseconds or [40 * index for index in range(len(images))]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = images[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base, stream.codec_context.gop_size = MILLISECOND, gop
        for image, time in zip(images, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.asarray(image), format="rgb24")
            frame.pts, frame.time_base = time, MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decoded(path):
    """The images of a file and their seconds."""
    with av.open(str(path)) as container:
        frames = [(frame.to_image(), frame.time) for frame in container.decode(video=0)]
    return [image for image, _ in frames], [time for _, time in frames]


def rotate(path, matrix):
    """Set the rotation in the track header of an MP4: ISO/IEC 14496-12, 8.3.2."""
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # behind version, flags, times, track, duration, layer, group, volume
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(f"{VIDEO}.reader._RECONNECT_DELAYS", (0.05,))


# -- files -------------------------------------------------------------------------------------------------------------


def test_frames_of_a_file_have_indices_times_and_size(tmp_path):
    path = encode_video(tmp_path / "video.mp4", [grey(i) for i in range(15)])
    with VideoReader(path) as reader:
        assert (reader.fps, reader.num_frames, reader.is_live) == (25.0, 15, False)
        frames = list(reader)
        assert next(reader, None) is None
    assert [frame.index for frame in frames] == numbers_of(frames) == list(range(15))
    np.testing.assert_allclose([frame.seconds for frame in frames], [0.04 * i for i in range(15)], atol=1e-6)
    assert {(frame.image.size, frame.image.mode) for frame in frames} == {((64, 48), "RGB")}
    assert (reader.undecodable, reader.reopened, reader.dropped) == (0, 0, 0)


def test_times_start_at_zero_and_may_have_gaps(tmp_path):
    milliseconds = [5000, 5040, 5300, 5301, 9000]
    path = encode_video(tmp_path / "video.mkv", [grey(i) for i in range(5)], milliseconds)
    with VideoReader(path) as reader:
        seconds = [frame.seconds for frame in reader]
    np.testing.assert_allclose(seconds, [0.0, 0.04, 0.3, 0.301, 4.0], atol=1e-6)


def test_frames_are_taken_in_batches_until_the_end(tmp_path):
    with VideoReader(encode_video(tmp_path / "video.mp4", [grey(i) for i in range(12)])) as reader:
        assert [numbers_of(reader.take(5)) for _ in range(4)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11], []]


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [  # x, y of the corner to which the red one at the top left moves
        ((0, 1, -1, 0), (1, 0)),  # a quarter turn clockwise, as of a telephone held upright
        ((-1, 0, 0, -1), (1, 1)),
        ((0, -1, 1, 0), (0, 1)),
    ],
)
def test_a_frame_is_rotated_upright(tmp_path, matrix, corner):
    image = Image.new("RGB", (64, 48))
    image.paste((255, 0, 0), (0, 0, 16, 16))
    path = encode_video(tmp_path / "video.mp4", [image] * 2)
    rotate(path, matrix)
    with VideoReader(path) as reader:
        turned = next(reader).image
    assert turned.size == ((48, 64) if matrix[0] == 0 else (64, 48))
    pixel = turned.getpixel(((turned.width - 1) * corner[0], (turned.height - 1) * corner[1]))
    assert pixel[0] > 200
    assert max(pixel[1:]) < 60


def test_an_undecodable_frame_is_counted_and_skipped(tmp_path):
    path = encode_video(tmp_path / "video.mp4", [grey(i) for i in range(15)], gop=1)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for number in (6, 7):
        place, size = places[number]
        data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    with VideoReader(path) as reader:
        frames = list(reader)
    assert numbers_of(frames) == [0, 1, 2, 3, 4, 5, *range(8, 15)]
    assert reader.undecodable == 2
    np.testing.assert_allclose([frames[5].seconds, frames[6].seconds], [0.2, 0.32], atol=1e-6)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_truncated_file_yields_its_frames_and_a_warning(tmp_path, hf_log, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), np.uint8)
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    path = encode_video(tmp_path / f"video{suffix}", [Image.fromarray(pixels) for pixels in noise], gop=1, **options)
    whole = path.read_bytes()
    with VideoReader(path) as reader:
        assert sum(1 for _ in reader) == 50
    assert "truncated" not in hf_log.text
    path.write_bytes(whole[: len(whole) // 2])
    with VideoReader(path) as reader:
        count = sum(1 for _ in reader)
    assert 20 <= count <= 30
    assert f"video{suffix} is truncated" in hf_log.text
    assert "of 2.0 s" in hf_log.text


def test_an_incomplete_frame_is_counted_and_skipped(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8)
    path = encode_video(tmp_path / "video.ts", [Image.fromarray(pixels) for pixels in noise], gop=5)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with VideoReader(path) as reader:
        count = sum(1 for _ in reader)
    assert 6 <= count <= 14
    assert reader.undecodable == 1


def test_a_file_without_a_decodable_frame_is_refused(tmp_path):
    path = encode_video(tmp_path / "video.mp4", [grey(i) for i in range(4)], gop=1)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for place, size in places:
        data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    with VideoReader(path) as reader, pytest.raises(ValueError, match=r"video\.mp4 has no frame"):
        next(reader)
    assert reader.undecodable == 4


def test_a_file_that_is_not_a_video_is_refused_with_the_reason(tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("no video, but a text that is long enough to be looked at by every demuxer there is. " * 100)
    with pytest.raises(ValueError, match=r"notes\.mp4 .*format"):
        VideoReader(text)
    with pytest.raises(ValueError, match=r"source.*gone\.mp4"):
        VideoReader(tmp_path / "gone.mp4")
    with pytest.raises(ValueError, match=r"patience.* 0$"):
        VideoReader(text, patience=0)


def test_an_audio_file_is_refused(tmp_path):
    path = tmp_path / "sound.mka"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"sound\.mka .*only audio"):
        VideoReader(path)


def test_closing_ends_the_reading_thread(tmp_path):
    path = encode_video(tmp_path / "video.mp4", [grey(i % 16) for i in range(100)])
    with VideoReader(path) as reader:
        next(reader)
        assert "VideoReader" in [thread.name for thread in threading.enumerate()]
    assert "VideoReader" not in [thread.name for thread in threading.enumerate()]
    assert list(reader) == []


def test_without_pyav_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-rfdetr\[vision\]"'):
        VideoReader("video.mp4")


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serve", [serve_mjpeg, serve_rtsp])
def test_a_stream_that_reconnects_is_read_further(serve, no_pauses, hf_log):
    connections = [[grey(2)] * 30, [grey(6)] * 30, [grey(10)] * 30]
    with serve(*connections) as server, VideoReader(server.url, patience=0.7) as reader:
        assert reader.is_live
        assert reader.num_frames is None
        frames = list(reader)
    numbers = numbers_of(frames)
    assert set(numbers) == {2, 6, 10}
    assert numbers == sorted(numbers)
    assert len(frames) + reader.dropped + reader.undecodable >= 85  # the last ones of a connection may stay in a parser
    assert reader.reopened >= 2
    seconds = [frame.seconds for frame in frames]
    assert seconds == sorted(seconds)
    assert seconds[0] == 0
    assert "reopening it in 0.1 s" in hf_log.text
    assert "reading ends after" in hf_log.text


def test_delays_between_attempts_grow_up_to_ten_seconds(monkeypatch):
    pauses = []

    class Closing(threading.Event):
        def wait(self, timeout=None):
            if timeout is None:  # of a thread that starts
                return super().wait()
            pauses.append(timeout)
            return len(pauses) == 8

    with serve_rtsp() as server:
        address = server.url
    monkeypatch.setattr(threading, "Event", Closing)
    with VideoReader(address, patience=1e6) as reader:
        assert list(reader) == []
    assert pauses == [0.5, 1, 2, 4, 8, 10, 10, 10]


def test_a_slow_caller_gets_the_newest_frames_of_a_stream():
    with serve_mjpeg([grey(i // 4) for i in range(60)]) as server, VideoReader(server.url, patience=0.5) as reader:
        first = next(reader)
        assert server.sent.wait(10)
        while reader._num_decoded < 55:  # what was sent is decoded soon
            time.sleep(0.02)
        waiting = reader.take(100)
        assert first.index == 0
        assert [frame.index for frame in waiting] == sorted(frame.index for frame in waiting)
        assert len(waiting) <= 8
        assert waiting[-1].index >= 54
        assert reader.dropped >= waiting[-1].index - 8


def test_a_complete_file_over_http_is_not_live(tmp_path):
    data = encode_video(tmp_path / "video.ts", [grey(i) for i in range(12)]).read_bytes()
    with serve_file(data) as server, VideoReader(server.url, patience=2.0) as reader:
        assert not reader.is_live
        assert numbers_of(reader) == list(range(12))
    assert reader.reopened == 0


def test_a_stream_without_a_frame_is_an_error_after_the_patience(no_pauses, monkeypatch):
    monkeypatch.setattr(f"{VIDEO}.reader._TIMEOUT", 0.2)
    with serve_mjpeg() as server, pytest.raises(ValueError, match=r"0\.5 s \(timed out\)"):
        VideoReader(server.url, patience=0.5)
    with pytest.raises(ValueError, match=r"0\.5 s \(Connection refused\)"):
        VideoReader(server.url, patience=0.5)


def test_credentials_are_never_shown(no_pauses, hf_log):
    with serve_rtsp([grey(1)], password="secret") as server:
        address = f"rtsp://someone:secret@{server.address}/live"
        shown = f"rtsp://{server.address}/live"
        with pytest.raises(ValueError, match=re.escape(shown)) as refused:
            VideoReader(address, patience=5.0)
    with pytest.raises(ValueError, match=re.escape(shown)) as gone:
        VideoReader(address, patience=0.3)
    texts = ["".join(traceback.format_exception(error.value)) for error in (refused, gone)]
    assert shown in hf_log.text
    assert not any(secret in text for text in [*texts, hf_log.text] for secret in ("secret", "someone"))


def test_a_camera_number_is_a_live_source(no_pauses, monkeypatch):
    # A stand-in: there is no camera here, so FFmpeg is given a stream where it would be given the camera.
    with serve_mjpeg([grey(3)] * 30, [grey(5)] * 30) as server:
        monkeypatch.setattr(source, "_camera_input", lambda index: (server.url, "mpjpeg", {}) if index == 1 else None)
        with VideoReader("1", patience=0.5) as reader:
            assert reader.is_live
            assert set(numbers_of(reader)) == {3, 5}


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("linux", ("/dev/video2", "v4l2", {})),
        ("darwin", ("2", "avfoundation", {"framerate": "30"})),
    ],
)
def test_a_camera_has_the_name_that_the_system_gives_it(monkeypatch, platform, expected):
    monkeypatch.setattr(source.sys, "platform", platform)
    assert source._camera_input(2) == expected


def test_a_missing_camera_is_refused_without_retries():
    with pytest.raises(ValueError, match="camera 97"):
        VideoReader(97)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_a_written_video_has_the_images_and_times(tmp_path):
    seconds = [0.0, 0.04, 0.3, 0.301, 4.0]
    with VideoWriter(tmp_path / "video.mp4", 30000 / 1001, (64, 48)) as writer:
        for index, second in enumerate(seconds):
            writer.write(grey(index), second)
        assert not (tmp_path / "video.mp4").exists()
    images, times = decoded(tmp_path / "video.mp4")
    assert [number_of(image) for image in images] == list(range(5))
    np.testing.assert_allclose(times, seconds, atol=1 / 60_000)
    assert [path.name for path in tmp_path.iterdir()] == ["video.mp4"]
    with av.open(str(tmp_path / "video.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


def test_ffmpeg_without_x264_writes_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with VideoWriter(tmp_path / "video.mp4", 25, (64, 48)) as writer:
        for index in range(3):
            writer.write(grey(index), 0.04 * index)
    images, times = decoded(tmp_path / "video.mp4")
    assert [number_of(image) for image in images] == [0, 1, 2]
    np.testing.assert_allclose(times, [0, 0.04, 0.08], atol=1e-4)


def test_odd_sizes_repeat_their_edge_and_other_sizes_are_resized(tmp_path):
    image = grey(2, (63, 47))
    image.paste((250, 250, 250), (0, 30, 63, 47))
    with VideoWriter(tmp_path / "video.mp4", 25, (63, 47)) as writer:
        writer.write(image, 0)
        writer.write(grey(9, (200, 100)), 0.04)
    (first, second), _ = decoded(tmp_path / "video.mp4")
    assert first.size == second.size == (64, 48)
    assert np.asarray(first)[-1].min() > 240
    assert number_of(second) == 9


def test_times_that_do_not_increase_are_moved_behind_the_last(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", 25, (64, 48)) as writer:
        for second in (0.5, 0.5, 0.2):
            writer.write(grey(1), second)
    _, times = decoded(tmp_path / "video.mp4")
    np.testing.assert_allclose(np.diff(times), [1 / 60_000] * 2, atol=1e-6)


def test_after_an_exception_the_file_is_playable_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_text("the old one")

    def fail_in_the_middle():
        with VideoWriter(path, 25, (64, 48)) as writer:
            writer.write(grey(1), 0)
            writer.write(grey(2), 0.04)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    assert [number_of(image) for image in decoded(path)[0]] == [1, 2]


def test_without_an_image_there_is_no_file(tmp_path):
    with VideoWriter(tmp_path / "video.mp4", 25, (64, 48)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="limits the lengths of files")
def test_a_full_disk_keeps_the_old_file_and_leaves_no_partial_one(tmp_path):
    import resource

    path = tmp_path / "video.mp4"
    path.write_text("the old one")
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)

    def write_all():
        with VideoWriter(path, 25, (64, 48)) as writer:
            for index, pixels in enumerate(noise):
                writer.write(Image.fromarray(pixels), 0.04 * index)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"video\.mp4 .*File too large"):
            write_all()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_suffix_or_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"video\.avi.*video\.mp4"):
        VideoWriter(tmp_path / "video.avi", 25, (64, 48))
    with pytest.raises(ValueError, match="nowhere"):
        VideoWriter(tmp_path / "nowhere" / "video.mp4", 25, (64, 48))


# -- tracking ----------------------------------------------------------------------------------------------------------


def boxes_at(*corners, scores=None, side=20):
    boxes = np.array([(x, y, x + side, y + side) for x, y in corners], np.float32).reshape(-1, 4)
    scores = np.full(len(boxes), 0.9, np.float32) if scores is None else np.array(scores, np.float32)
    return Instances(boxes, scores, np.zeros(len(boxes), np.int64), ["object"] * len(boxes), None, (100, 200))


def test_objects_that_cross_keep_their_track_ids_in_any_order():
    tracker, seen = Tracker(25), []
    for step in range(36):
        right, left = (4 * step, 30 + step / 2), (150 - 4 * step, 40)
        found = tracker.update(boxes_at(right, left) if step % 3 else boxes_at(left, right))
        ids = found.track_ids.tolist() if step % 3 else found.track_ids.tolist()[::-1]
        expected = np.array([right, left] if step % 3 else [left, right], np.float32)
        np.testing.assert_array_equal(found.boxes[:, :2], expected)
        seen.append(tuple(ids))
    assert seen[0] == (-1, -1)
    assert len(set(seen[1:])) == 1
    assert -1 not in seen[1]
    assert seen[1][0] != seen[1][1]


def test_an_object_keeps_its_track_id_over_frames_without_it():
    tracker = Tracker(25)
    ids = [tracker.update(boxes_at((50, 50)) if step not in (4, 5, 6) else boxes_at()).track_ids for step in range(10)]
    [number] = ids[1]
    assert number >= 0
    assert [numbers.tolist() for numbers in ids] == [[-1], *[[number]] * 3, [], [], [], *[[number]] * 3]


def test_a_low_score_continues_a_track_but_does_not_start_one():
    tracker = Tracker(25, start_score=0.5)
    both = [(10, 10), (100, 50)]
    ids = [tracker.update(boxes_at(*both, scores=scores)).track_ids for scores in ([0.9, 0.3], [0.9, 0.3], [0.3, 0.3])]
    assert ids[1][0] == ids[2][0] >= 0
    assert [numbers[1] for numbers in ids] == [-1, -1, -1]


def test_without_trackers_the_error_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-rfdetr\[track\]"'):
        Tracker(25)


# -- predict_video -----------------------------------------------------------------------------------------------------


def scene(step):
    """A red square that goes right and a green one that goes left, on black."""
    image = Image.new("RGB", (128, 64))
    image.paste((255, 0, 0), (4 * step, 8, 4 * step + 16, 24))
    image.paste((0, 255, 0), (100 - 4 * step, 32, 116 - 4 * step, 48))
    return image


def find_squares(model, processor, images, *, threshold, classes, batch_size):
    """Stand in for `predict`: each square with its box, the green one first in every other image."""
    assert len(images) <= batch_size
    found = []
    for number, image in enumerate(images):
        pixels = np.asarray(image).astype(int)
        labels, boxes = [], []
        for label in (0, 1) if number % 2 else (1, 0):
            rows, columns = np.nonzero(pixels[..., label] > 128)
            labels.append(label)
            boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        names = [("red", "green")[label] for label in labels]
        shape = (np.array(boxes, np.float32), np.full(2, 0.9, np.float32), np.array(labels), names)
        found.append(Instances(*shape, None, image.size[::-1]))
    return found


@pytest.fixture
def squares(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{VIDEO}.predict_video.predict", find_squares)
    return encode_video(tmp_path / "squares.mp4", [scene(step) for step in range(21)])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_video_is_predicted_tracked_drawn_and_written(squares, tmp_path):
    shown = []
    summary = predict_video(
        STAND_IN,
        None,
        squares,
        tmp_path / "found.mp4",
        jsonl=tmp_path / "found.jsonl",
        track=True,
        on_frame=lambda *given: shown.append(given),
        progress=False,
    )
    assert summary.frames == 21
    assert (summary.undecodable, summary.reopened, summary.dropped, summary.interrupted) == (0, 0, 0, False)
    assert summary.frames_per_second == pytest.approx(21 / summary.seconds_taken)
    records = lines_of(tmp_path / "found.jsonl")
    assert [record["frame"] for record in records] == list(range(21))
    np.testing.assert_allclose([record["seconds"] for record in records], [0.04 * i for i in range(21)], atol=1e-6)
    for name, left in (("red", lambda step: 4 * step), ("green", lambda step: 100 - 4 * step)):
        of_name = [[one for one in record["instances"] if one["name"] == name] for record in records]
        assert [len(ones) for ones in of_name] == [1] * 21
        assert len({ones[0]["track_id"] for ones in of_name[1:]}) == 1
        np.testing.assert_allclose([ones[0]["box"][0] for ones in of_name], [left(step) for step in range(21)], atol=1)
    images, times = decoded(tmp_path / "found.mp4")
    np.testing.assert_allclose(times, [0.04 * i for i in range(21)], atol=1e-4)
    frame, instances, drawn = shown[20]
    expected = np.asarray(instances.draw(frame.image, color_by="instance")).astype(int)
    np.testing.assert_array_equal(np.asarray(drawn), expected)
    assert np.abs(np.asarray(images[20]) - expected).mean() < 8
    assert np.abs(np.asarray(frame.image) - expected).mean() > 16


@pytest.mark.parametrize(("weak_score", "num_ids"), [(0.2, 1), (0.05, 2)])
def test_a_track_continues_through_low_scores_that_are_not_returned(tmp_path, monkeypatch, weak_score, num_ids):
    """The square turns back while its score is low: a tracker that does not see it then loses it."""
    lefts = [*range(0, 60, 4), *range(60, 0, -4)]
    path = encode_video(tmp_path / "video.mp4", [grey(1)] * len(lefts))
    remaining = iter(enumerate(lefts))

    def find(model, processor, images, *, threshold, **_):
        found = []
        for _, (step, left) in zip(images, remaining, strict=False):
            square = boxes_at((left, 20), scores=[weak_score if 12 <= step < 24 else 0.9])
            found.append(square.select(square.scores > threshold))
        return found

    monkeypatch.setattr(f"{VIDEO}.predict_video.predict", find)
    predict_video(STAND_IN, None, path, jsonl=tmp_path / "found.jsonl", track=True, batch_size=5, progress=False)
    found = [record["instances"] for record in lines_of(tmp_path / "found.jsonl")]
    assert [len(instances) for instances in found] == [1] * 12 + [0] * 12 + [1] * 6
    ids = {one["track_id"] for instances in found for one in instances} - {-1}
    assert len(ids) == num_ids


@pytest.mark.parametrize("is_rotated", [False, True])
def test_rotation_and_the_shape_of_pixels_are_those_of_the_source(tmp_path, monkeypatch, is_rotated):
    path = tmp_path / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(16, 11)
        for frame in [av.VideoFrame.from_image(scene(step)) for step in range(3)]:
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    if is_rotated:
        rotate(path, (0, 1, -1, 0))
    monkeypatch.setattr(f"{VIDEO}.predict_video.predict", find_squares)
    predict_video(STAND_IN, None, path, tmp_path / "found.mp4", progress=False)
    with av.open(str(tmp_path / "found.mp4")) as container:
        stream = container.streams.video[0]
        found = (stream.width, stream.height, stream.sample_aspect_ratio)
    assert found == ((64, 128, Fraction(11, 16)) if is_rotated else (128, 64, Fraction(16, 11)))


def test_predict_video_finds_what_predict_finds_in_its_frames(tmp_path):
    model = small_model()
    model.class_embed.bias.data.add_(4.0)
    processor = RfDetrImageProcessor.from_config(model.config)
    path = encode_video(tmp_path / "squares.mp4", [scene(step) for step in range(3)])
    predict_video(model, processor, path, jsonl=tmp_path / "found.jsonl", threshold=0.3, batch_size=2, progress=False)
    expected = predict(model, processor, decoded(path)[0], threshold=0.3, batch_size=2)
    found = [Instances.from_dict(record) for record in lines_of(tmp_path / "found.jsonl")]
    assert sum(len(instances) for instances in found) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert (one.masks, one.names, one.track_ids) == (other.masks, other.names, None)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
def test_a_full_disk_is_an_error_that_names_the_jsonl_file(squares):
    with pytest.raises(OSError, match=r"/dev/full .*No space left on device"):
        predict_video(STAND_IN, None, squares, jsonl="/dev/full", progress=False)


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, which a shell takes away from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("track", [False, True])
def test_after_ctrl_c_the_files_contain_the_frames_so_far(squares, tmp_path, track):
    def press_ctrl_c(frame, instances, drawn):
        if frame.index == 5:
            signal.raise_signal(signal.SIGINT)

    files = {"output": tmp_path / "found.mp4", "jsonl": tmp_path / "found.jsonl"}
    summary = predict_video(STAND_IN, None, squares, **files, track=track, on_frame=press_ctrl_c, progress=False)
    assert summary.interrupted
    assert summary.frames == len(lines_of(files["jsonl"])) == len(decoded(files["output"])[0]) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.jsonl", "found.mp4", "squares.mp4"]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_wait_for_a_silent_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{VIDEO}.predict_video.predict", find_squares)
    monkeypatch.setattr(f"{VIDEO}.reader._TIMEOUT", 2.0)
    with serve_mjpeg([scene(0)] * 30, None) as server:

        def press_ctrl_c():
            server.sent.wait(10)
            _thread.interrupt_main()

        threading.Thread(target=press_ctrl_c, daemon=True).start()
        summary = predict_video(STAND_IN, None, server.url, tmp_path / "found.mp4", patience=20, progress=False)
    assert summary.interrupted
    assert summary.frames == len(decoded(tmp_path / "found.mp4")[0]) > 0


def test_a_live_stream_does_not_wait_for_a_full_batch(monkeypatch, no_pauses):
    sizes = []

    def find(model, processor, images, **settings):
        sizes.append(len(images))
        return find_squares(model, processor, images, **settings)

    monkeypatch.setattr(f"{VIDEO}.predict_video.predict", find)
    with serve_mjpeg([scene(0)] * 30, [scene(5)] * 30) as server:
        summary = predict_video(STAND_IN, None, server.url, batch_size=64, patience=0.5, progress=False)
    assert summary.frames == sum(sizes)
    assert summary.frames + summary.dropped + summary.undecodable >= 55
    assert max(sizes) <= 8
    assert summary.reopened >= 1


def test_predict_video_stops_after_max_frames(squares, tmp_path):
    summary = predict_video(
        STAND_IN, None, squares, tmp_path / "found.mp4", max_frames=10, batch_size=4, progress=False
    )
    assert summary.frames == len(decoded(tmp_path / "found.mp4")[0]) == 10
    assert not summary.interrupted


def test_invalid_arguments_of_predict_video_are_refused(squares, tmp_path):
    with pytest.raises(ValueError, match=r"max_frames.* 0$"):
        predict_video(STAND_IN, None, squares, max_frames=0)
    with pytest.raises(ValueError, match=r"batch_size.* 0$"):
        predict_video(STAND_IN, None, squares, batch_size=0)
    with pytest.raises(ValueError, match=r"output.*squares\.mp4"):
        predict_video(STAND_IN, None, squares, squares)
    with pytest.raises(ValueError, match=r"found\.gif"):
        predict_video(STAND_IN, None, squares, tmp_path / "found.gif")
