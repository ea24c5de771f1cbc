"""Videos and live streams: reading, writing, tracking, and all of it at once.

Picture number i of a film is of one grey, so that a decoded picture tells its number. Films to be read are encoded
here with PyAV, films that were written are decoded here with PyAV; the streams come from stream_servers.py.
"""

import _thread
import json
import os
import signal
import struct
import sys
import threading
import traceback
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from transformers_rfdetr import RfDetrImageProcessor, predict
from transformers_rfdetr.inference import video
from transformers_rfdetr.inference.instances import Instances
from transformers_rfdetr.inference.video import Tracker, VideoReader, VideoWriter, predict_video

from small_models import small_model
from stream_servers import serve_file, serve_mjpeg, serve_rtsp

MILLISECOND = Fraction(1, 1000)


def grey(number, size=(64, 48)):
    return Image.new("RGB", size, (15 * number + 10,) * 3)


def number_of(picture):
    return round((np.asarray(picture).mean() - 10) / 15)


def numbers_of(frames):
    return [number_of(frame.picture) for frame in frames]


def film(path, pictures, milliseconds=None, *, codec="libx264", gop=12, **options):
    """Encode pictures, by default 25 a second."""
    milliseconds = milliseconds or [40 * index for index in range(len(pictures))]
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = pictures[0].size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base, stream.codec_context.gop_size = MILLISECOND, gop
        for picture, time in zip(pictures, milliseconds, strict=True):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts, frame.time_base = time, MILLISECOND
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decoded(path):
    """The pictures of a file and their seconds."""
    with av.open(str(path)) as container:
        frames = [(frame.to_image(), frame.time) for frame in container.decode(video=0)]
    return [picture for picture, _ in frames], [time for _, time in frames]


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(video, "_PAUSES", (0.05,))


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_read_with_its_numbers_times_and_size(tmp_path):
    path = film(tmp_path / "film.mp4", [grey(i) for i in range(15)])
    with VideoReader(path) as reader:
        assert (reader.fps, reader.num_frames, reader.is_live) == (25.0, 15, False)
        frames = list(reader)
        assert next(reader, None) is None
    assert [frame.index for frame in frames] == numbers_of(frames) == list(range(15))
    np.testing.assert_allclose([frame.seconds for frame in frames], [0.04 * i for i in range(15)], atol=1e-6)
    assert {(frame.picture.size, frame.picture.mode) for frame in frames} == {((64, 48), "RGB")}
    assert (reader.undecodable, reader.reopened, reader.dropped) == (0, 0, 0)


def test_times_count_from_the_start_of_the_video_and_may_vary(tmp_path):
    milliseconds = [5000, 5040, 5300, 5301, 9000]
    path = film(tmp_path / "film.mkv", [grey(i) for i in range(5)], milliseconds)
    with VideoReader(path) as reader:
        seconds = [frame.seconds for frame in reader]
    np.testing.assert_allclose(seconds, [0.0, 0.04, 0.3, 0.301, 4.0], atol=1e-6)


def test_frames_are_taken_in_batches_until_the_end(tmp_path):
    with VideoReader(film(tmp_path / "film.mp4", [grey(i) for i in range(12)])) as reader:
        assert [numbers_of(reader.take(5)) for _ in range(4)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11], []]


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [  # x, y -> where the red corner at the top left comes to lie, by ISO/IEC 14496-12, 8.3.2
        ((0, 1, -1, 0), (1, 0)),  # a quarter turn clockwise, as of a telephone held upright
        ((-1, 0, 0, -1), (1, 1)),
        ((0, -1, 1, 0), (0, 1)),
    ],
)
def test_a_picture_is_turned_upright(tmp_path, matrix, corner):
    picture = Image.new("RGB", (64, 48))
    picture.paste((255, 0, 0), (0, 0, 16, 16))
    path = film(tmp_path / "film.mp4", [picture] * 2)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # behind version, flags, times, track, duration, layer, group, volume
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    with VideoReader(path) as reader:
        turned = next(reader).picture
    assert turned.size == ((48, 64) if matrix[0] == 0 else (64, 48))
    pixel = turned.getpixel(((turned.width - 1) * corner[0], (turned.height - 1) * corner[1]))
    assert pixel[0] > 200
    assert max(pixel[1:]) < 60


def test_a_frame_that_cannot_be_decoded_is_counted_and_the_others_come(tmp_path):
    path = film(tmp_path / "film.mp4", [grey(i) for i in range(15)], gop=1)
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
def test_a_file_whose_end_is_cut_yields_what_it_has_and_says_so(tmp_path, hf_log, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (50, 48, 64, 3), np.uint8)
    options = {"movflags": "faststart"} if suffix == ".mp4" else {}
    path = film(tmp_path / f"film{suffix}", [Image.fromarray(pixels) for pixels in noise], gop=1, **options)
    whole = path.read_bytes()
    with VideoReader(path) as reader:
        assert sum(1 for _ in reader) == 50
    assert "cut" not in hf_log.text
    path.write_bytes(whole[: len(whole) // 2])
    with VideoReader(path) as reader:
        count = sum(1 for _ in reader)
    assert 20 <= count <= 30
    assert f"film{suffix} is cut" in hf_log.text
    assert "of 2.0 s" in hf_log.text


def test_a_frame_that_is_there_in_part_is_counted_and_left_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8)
    path = film(tmp_path / "film.ts", [Image.fromarray(pixels) for pixels in noise], gop=5)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with VideoReader(path) as reader:
        count = sum(1 for _ in reader)
    assert 6 <= count <= 14
    assert reader.undecodable == 1


def test_a_file_without_a_whole_frame_is_refused(tmp_path):
    path = film(tmp_path / "film.mp4", [grey(i) for i in range(4)], gop=1)
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for place, size in places:
        data[place : place + size] = b"\xff" * size
    path.write_bytes(data)
    with VideoReader(path) as reader, pytest.raises(ValueError, match=r"film\.mp4 has no frame that can be decoded"):
        next(reader)
    assert reader.undecodable == 4


def test_what_is_no_video_is_refused_with_the_reason(tmp_path):
    text = tmp_path / "notes.mp4"
    text.write_text("no video, but a text that is long enough to be looked at by every demuxer there is. " * 100)
    with pytest.raises(ValueError, match=r"notes\.mp4 cannot be opened as a video: it is in no format.*; give"):
        VideoReader(text)
    with pytest.raises(ValueError, match=r"gone\.mp4 is no file; give a video file, a URL"):
        VideoReader(tmp_path / "gone.mp4")
    with pytest.raises(ValueError, match="patience 0 is no time"):
        VideoReader(text, patience=0)


def test_sound_alone_is_refused(tmp_path):
    path = tmp_path / "sound.mka"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1600), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"sound\.mka has no video in it, but audio; give"):
        VideoReader(path)


def test_closing_ends_the_thread_that_reads(tmp_path):
    path = film(tmp_path / "film.mp4", [grey(i % 16) for i in range(100)])
    with VideoReader(path) as reader:
        next(reader)
        assert "VideoReader" in [thread.name for thread in threading.enumerate()]
    assert "VideoReader" not in [thread.name for thread in threading.enumerate()]
    assert list(reader) == []


def test_a_missing_pyav_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-rfdetr\[vision\]"'):
        VideoReader("film.mp4")


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("serve", [serve_mjpeg, serve_rtsp])
def test_a_stream_that_is_cut_and_comes_back_goes_on(serve, no_pauses, hf_log):
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
    assert "opening it again in 0.1 s" in hf_log.text
    assert "it is given up after" in hf_log.text


def test_the_pauses_between_attempts_grow(monkeypatch):
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
            video.time.sleep(0.02)
        waiting = reader.take(100)
        assert first.index == 0
        assert [frame.index for frame in waiting] == sorted(frame.index for frame in waiting)
        assert len(waiting) <= 8
        assert waiting[-1].index >= 54
        assert reader.dropped >= waiting[-1].index - 8


def test_a_finished_file_behind_http_is_no_live_stream(tmp_path):
    data = film(tmp_path / "film.ts", [grey(i) for i in range(12)]).read_bytes()
    with serve_file(data) as server, VideoReader(server.url, patience=2.0) as reader:
        assert not reader.is_live
        assert numbers_of(reader) == list(range(12))
    assert reader.reopened == 0


def test_a_stream_that_never_delivers_is_an_error_after_the_patience(no_pauses, monkeypatch):
    monkeypatch.setattr(video, "_TIMEOUT", 0.2)
    with serve_mjpeg() as server, pytest.raises(ValueError, match=r"no frame came for 0\.5 s \(nothing came in time\)"):
        VideoReader(server.url, patience=0.5)
    with pytest.raises(ValueError, match=r"no frame came for 0\.5 s \(Connection refused\); check the address"):
        VideoReader(server.url, patience=0.5)


def test_a_password_is_never_shown(no_pauses, hf_log):
    with serve_rtsp([grey(1)], password="secret") as server:
        address = f"rtsp://someone:secret@{server.address}/live"
        with pytest.raises(ValueError, match=r"rtsp://\*\*\*@127\.0\.0\.1.*cannot be opened") as refused:
            VideoReader(address, patience=5.0)
    with pytest.raises(ValueError, match="no frame came") as gone:
        VideoReader(address, patience=0.3)
    texts = ["".join(traceback.format_exception(error.value)) for error in (refused, gone)]
    assert not any("secret" in text for text in [*texts, hf_log.text])


def test_a_camera_is_a_live_source_by_its_number(no_pauses, monkeypatch):
    # A stand-in: there is no camera here, so FFmpeg is given a stream where it would be given the camera.
    with serve_mjpeg([grey(3)] * 30, [grey(5)] * 30) as server:
        monkeypatch.setattr(video, "_camera", lambda index: (server.url, "mpjpeg", {}) if index == 1 else None)
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
def test_a_camera_is_found_as_the_system_names_it(monkeypatch, platform, expected):
    monkeypatch.setattr(video.sys, "platform", platform)
    assert video._camera(2) == expected


def test_a_camera_that_is_not_there_is_refused_at_once():
    with pytest.raises(ValueError, match=r"camera 97 cannot be opened as a video: .*; give"):
        VideoReader(97)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_what_is_written_has_the_pictures_and_the_times(tmp_path):
    seconds = [0.0, 0.04, 0.3, 0.301, 4.0]
    with VideoWriter(tmp_path / "film.mp4", 30000 / 1001, (64, 48)) as writer:
        for index, second in enumerate(seconds):
            writer.write(grey(index), second)
        assert not (tmp_path / "film.mp4").exists()
    pictures, times = decoded(tmp_path / "film.mp4")
    assert [number_of(picture) for picture in pictures] == list(range(5))
    np.testing.assert_allclose(times, seconds, atol=1 / 60_000)
    assert [path.name for path in tmp_path.iterdir()] == ["film.mp4"]
    with av.open(str(tmp_path / "film.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


def test_builds_without_x264_write_mpeg4(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", {"mpeg4"})
    with VideoWriter(tmp_path / "film.mp4", 25, (64, 48)) as writer:
        for index in range(3):
            writer.write(grey(index), 0.04 * index)
    pictures, times = decoded(tmp_path / "film.mp4")
    assert [number_of(picture) for picture in pictures] == [0, 1, 2]
    np.testing.assert_allclose(times, [0, 0.04, 0.08], atol=1e-4)


def test_odd_sizes_repeat_their_edge_and_other_sizes_are_scaled(tmp_path):
    picture = grey(2, (63, 47))
    picture.paste((250, 250, 250), (0, 30, 63, 47))
    with VideoWriter(tmp_path / "film.mp4", 25, (63, 47)) as writer:
        writer.write(picture, 0)
        writer.write(grey(9, (200, 100)), 0.04)
    (first, second), _ = decoded(tmp_path / "film.mp4")
    assert first.size == second.size == (64, 48)
    assert np.asarray(first)[-1].min() > 240
    assert number_of(second) == 9


def test_times_that_do_not_grow_are_moved_behind_the_last(tmp_path):
    with VideoWriter(tmp_path / "film.mp4", 25, (64, 48)) as writer:
        for second in (0.5, 0.5, 0.2):
            writer.write(grey(1), second)
    _, times = decoded(tmp_path / "film.mp4")
    np.testing.assert_allclose(np.diff(times), [1 / 60_000] * 2, atol=1e-6)


def test_a_file_plays_after_an_exception_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "film.mp4"
    path.write_text("the old one")

    def fail_in_the_middle():
        with VideoWriter(path, 25, (64, 48)) as writer:
            writer.write(grey(1), 0)
            writer.write(grey(2), 0.04)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_in_the_middle()
    assert [number_of(picture) for picture in decoded(path)[0]] == [1, 2]


def test_no_picture_makes_no_file(tmp_path):
    with VideoWriter(tmp_path / "film.mp4", 25, (64, 48)):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="limits the lengths of files")
def test_a_file_that_finds_no_room_goes_and_leaves_the_old_one(tmp_path):
    import resource

    path = tmp_path / "film.mp4"
    path.write_text("the old one")
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)

    def write_all():
        with VideoWriter(path, 25, (64, 48)) as writer:
            for index, pixels in enumerate(noise):
                writer.write(Image.fromarray(pixels), 0.04 * index)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"film\.mp4 cannot be written: File too large; free some space"):
            write_all()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "the old one"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"as MP4, .*film\.avi has another suffix; name it .*film\.mp4"):
        VideoWriter(tmp_path / "film.avi", 25, (64, 48))
    with pytest.raises(ValueError, match="nowhere is no folder; make it"):
        VideoWriter(tmp_path / "nowhere" / "film.mp4", 25, (64, 48))


# -- tracking ----------------------------------------------------------------------------------------------------------


def boxes_at(*corners, scores=None, side=20):
    boxes = np.array([(x, y, x + side, y + side) for x, y in corners], np.float32).reshape(-1, 4)
    scores = np.full(len(boxes), 0.9, np.float32) if scores is None else np.array(scores, np.float32)
    return Instances(boxes, scores, np.zeros(len(boxes), np.int64), ["thing"] * len(boxes), None, (100, 200))


def test_two_shapes_that_cross_keep_their_numbers_in_any_order():
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


def test_an_object_keeps_its_number_over_frames_without_it():
    tracker = Tracker(25)
    ids = [tracker.update(boxes_at((50, 50)) if step not in (4, 5, 6) else boxes_at()).track_ids for step in range(10)]
    [number] = ids[1]
    assert number >= 0
    assert [numbers.tolist() for numbers in ids] == [[-1], *[[number]] * 3, [], [], [], *[[number]] * 3]


def test_a_low_score_continues_a_track_and_starts_none():
    tracker = Tracker(25, start_score=0.5)
    both = [(10, 10), (100, 50)]
    ids = [tracker.update(boxes_at(*both, scores=scores)).track_ids for scores in ([0.9, 0.3], [0.9, 0.3], [0.3, 0.3])]
    assert ids[1][0] == ids[2][0] >= 0
    assert [numbers[1] for numbers in ids] == [-1, -1, -1]


def test_missing_trackers_are_named_with_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ImportError, match=r'pip install "transformers-rfdetr\[track\]"'):
        Tracker(25)


# -- all of it ---------------------------------------------------------------------------------------------------------


def scene(step):
    """A red square that goes right and a green one that goes left, on black."""
    picture = Image.new("RGB", (128, 64))
    picture.paste((255, 0, 0), (4 * step, 8, 4 * step + 16, 24))
    picture.paste((0, 255, 0), (100 - 4 * step, 32, 116 - 4 * step, 48))
    return picture


def find_squares(model, processor, pictures, *, threshold, classes, batch_size):
    """In place of `predict`: each square with its box and mask, the green one first in every other picture."""
    assert len(pictures) <= batch_size
    found = []
    for number, picture in enumerate(pictures):
        pixels = np.asarray(picture).astype(int)
        labels, boxes = [], []
        for label in (0, 1) if number % 2 else (1, 0):
            rows, columns = np.nonzero(pixels[..., label] > 128)
            labels.append(label)
            boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
        names = [("red", "green")[label] for label in labels]
        shape = (np.array(boxes, np.float32), np.full(2, 0.9, np.float32), np.array(labels), names)
        found.append(Instances(*shape, None, picture.size[::-1]))
    return found


@pytest.fixture
def squares(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "predict", find_squares)
    return film(tmp_path / "squares.mp4", [scene(step) for step in range(21)])


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_video_is_predicted_tracked_drawn_and_written(squares, tmp_path):
    shown = []
    summary = predict_video(
        None,
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
    pictures, times = decoded(tmp_path / "found.mp4")
    np.testing.assert_allclose(times, [0.04 * i for i in range(21)], atol=1e-4)
    frame, instances, drawn = shown[20]
    expected = np.asarray(instances.draw(frame.picture, color_by="instance")).astype(int)
    np.testing.assert_array_equal(np.asarray(drawn), expected)
    assert np.abs(np.asarray(pictures[20]) - expected).mean() < 8
    assert np.abs(np.asarray(frame.picture) - expected).mean() > 16


def test_a_model_finds_in_a_video_what_it_finds_in_its_pictures(tmp_path):
    model = small_model()
    model.class_embed.bias.data.add_(4.0)
    processor = RfDetrImageProcessor.from_config(model.config)
    path = film(tmp_path / "squares.mp4", [scene(step) for step in range(3)])
    predict_video(model, processor, path, jsonl=tmp_path / "found.jsonl", threshold=0.3, batch_size=2, progress=False)
    expected = predict(model, processor, decoded(path)[0], threshold=0.3, batch_size=2)
    found = [Instances.from_dict(record) for record in lines_of(tmp_path / "found.jsonl")]
    assert sum(len(instances) for instances in found) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert (one.masks, one.names, one.track_ids) == (other.masks, other.names, None)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's device that is always full")
def test_lines_that_find_no_room_are_named_with_their_file(squares):
    with pytest.raises(OSError, match=r"^/dev/full cannot be written: No space left on device; free some space"):
        predict_video(None, None, squares, jsonl="/dev/full", progress=False)


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, which a shell takes away from what it starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("track", [False, True])
def test_ctrl_c_leaves_files_that_hold_the_frames_so_far(squares, tmp_path, track):
    def press_ctrl_c(frame, instances, drawn):
        if frame.index == 5:
            signal.raise_signal(signal.SIGINT)

    files = {"output": tmp_path / "found.mp4", "jsonl": tmp_path / "found.jsonl"}
    summary = predict_video(None, None, squares, **files, track=track, on_frame=press_ctrl_c, progress=False)
    assert summary.interrupted
    assert summary.frames == len(lines_of(files["jsonl"])) == len(decoded(files["output"])[0]) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.jsonl", "found.mp4", "squares.mp4"]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_the_wait_for_a_stream_that_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "predict", find_squares)
    monkeypatch.setattr(video, "_TIMEOUT", 2.0)
    with serve_mjpeg([scene(0)] * 30, None) as server:

        def press_ctrl_c():
            server.sent.wait(10)
            _thread.interrupt_main()

        threading.Thread(target=press_ctrl_c, daemon=True).start()
        summary = predict_video(None, None, server.url, tmp_path / "found.mp4", patience=20, progress=False)
    assert summary.interrupted
    assert summary.frames == len(decoded(tmp_path / "found.mp4")[0]) > 0


def test_a_live_stream_is_not_waited_for_until_a_batch_is_full(monkeypatch, no_pauses):
    sizes = []

    def find(model, processor, pictures, **settings):
        sizes.append(len(pictures))
        return find_squares(model, processor, pictures, **settings)

    monkeypatch.setattr(video, "predict", find)
    with serve_mjpeg([scene(0)] * 30, [scene(5)] * 30) as server:
        summary = predict_video(None, None, server.url, batch_size=64, patience=0.5, progress=False)
    assert summary.frames == sum(sizes)
    assert summary.frames + summary.dropped + summary.undecodable >= 55
    assert max(sizes) <= 8
    assert summary.reopened >= 1


def test_it_ends_after_max_frames(squares, tmp_path):
    summary = predict_video(None, None, squares, tmp_path / "found.mp4", max_frames=10, batch_size=4, progress=False)
    assert summary.frames == len(decoded(tmp_path / "found.mp4")[0]) == 10
    assert not summary.interrupted


def test_impossible_settings_of_a_video_are_refused(squares, tmp_path):
    with pytest.raises(ValueError, match="max_frames 0 must be at least 1"):
        predict_video(None, None, squares, max_frames=0)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        predict_video(None, None, squares, batch_size=0)
    with pytest.raises(ValueError, match=r"squares\.mp4 is the video that is read; write to another file"):
        predict_video(None, None, squares, squares)
    with pytest.raises(ValueError, match="has another suffix"):
        predict_video(None, None, squares, tmp_path / "found.gif")
