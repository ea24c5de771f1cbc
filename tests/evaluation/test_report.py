"""The report: outlines by the even-odd rule, the page by an HTML parser and by Chromium."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess

import matplotlib.path
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from evaluation_cases import SCENE, SCENE_PROCESSOR, ScriptedModel, rectangle, rle, scene, scene_model
from html_page import Page
from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.data.outlines import simplify_ring
from transformers_rfdetr.evaluation.error_analysis import analyse
from transformers_rfdetr.evaluation.report import save_report, write_report
from transformers_rfdetr.evaluation.report.outlines import outline, trace_rings
from transformers_rfdetr.inference.instances import Instances

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


class TestOutlines:
    def filled(self, rings, size):
        """The pixels whose centers are inside, by the even-odd rule."""
        rows, columns = np.mgrid[: size[0], : size[1]]
        centers = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5], axis=1)
        inside = [matplotlib.path.Path([*ring, ring[0]], closed=True).contains_points(centers) for ring in rings]
        return np.logical_xor.reduce(inside).reshape(size)

    @pytest.mark.parametrize("density", [0.05, 0.5, 0.95, 1.0])
    def test_rings_filled_give_the_mask(self, density):
        mask = np.random.default_rng(0).random((23, 31)) < density
        assert (self.filled(trace_rings(mask), mask.shape) == mask).all()

    def test_a_mask_with_a_hole_has_two_rings_and_an_empty_mask_none(self):
        mask = rectangle((5, 30), (5, 30)) & ~rectangle((10, 20), (12, 18))
        assert len(trace_rings(mask)) == 2
        assert trace_rings(np.zeros((4, 4), bool)) == []

    def test_a_simple_outline_has_few_points_and_the_same_shape(self):
        rows, columns = np.mgrid[:200, :200]
        disc = np.hypot(rows - 100, columns - 90) < 70
        (ring,) = trace_rings(disc)
        simple = simplify_ring(ring, 0.75)
        assert 20 < len(simple) < len(ring) / 4
        drawn_again = coco_mask.frPyObjects([simple.ravel().tolist()], 200, 200)
        assert coco_mask.iou(drawn_again, [rle(disc)], [0])[0, 0] > 0.98

    def test_corners_stay_within_the_tolerance_and_what_is_small_does_not_vanish(self):
        (ring,) = trace_rings(rectangle((5, 25), (10, 18)))
        simple = simplify_ring(ring, 0.75)
        assert len(simple) < 8
        for corner in ((10, 5), (18, 5), (18, 25), (10, 25)):
            assert np.hypot(*(simple - corner).T).min() <= 0.75
        (pixel,) = trace_rings(rectangle((5, 6), (7, 8)))
        assert len(simplify_ring(pixel, 6.0)) == 4

    def test_a_mask_that_vanishes_at_the_size_of_the_page_is_drawn_as_its_box(self):
        mask = rle(rectangle((100, 101), (200, 202), (400, 400)))
        boxes, scores = np.array([[200, 100, 202, 101]], np.float32), np.ones(1, np.float32)
        instances = Instances(boxes, scores, np.zeros(1, np.int64), ["house"], [mask], (400, 400))
        assert outline(instances, 0, (40, 40)) == "M20 10 20.2 10 20.2 10.1 20 10.1Z"


def galleries(page):
    """The worst and the best images."""
    return Page("".join(re.findall(r'<section id="(?:worst|best)">.*?</section>', page.text, re.DOTALL)))


NASTY = ['<script>alert("a")</script>', '"><img src=x onerror=alert(1)>', "a & b's {0} %s \udcff"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    state = {"log_history": [{"step": 10, "loss": 4.0}, {"step": 20, "loss": math.nan}, {"step": 30, "loss": 2.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    settings = {"training": folder, "title": NASTY[1], "progress": False}
    names, files = NASTY[:2], (NASTY[2], NASTY[0], NASTY[1], "</b></figure>.png")
    write_report(folder / "new", scene_model(names), SCENE_PROCESSOR, scene(names, files), **settings)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "new" / "report.html").read_text(encoding="utf-8"))


class TestPage:
    def test_names_are_text_whatever_characters_they_have(self, page):
        words = "".join(page.words)
        for name in (*NASTY[:2], "a & b's {0} %s ?", "</b></figure>.png"):
            assert name in words
        assert {tag for tag, _ in page.elements}.isdisjoint({"img", "iframe", "object", "embed", "base", "form"})
        assert len(page.of("script")) == 1
        assert "alert" not in page.script
        assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on")]

    def test_it_needs_no_network(self, page):
        for _, attrs in page.elements:
            for name, value in attrs.items():
                if name in ("href", "src", "xlink:href", "action", "srcset", "poster"):
                    assert value.startswith(("#", "data:image/jpeg;base64,")), value
                assert name != "style" or "url(" not in value
        assert "url(" not in page.style
        assert "@import" not in page.style
        ids = {one["id"] for _, one in page.elements if "id" in one}
        assert {link["href"][1:] for link in page.of("a")} <= ids
        assert {one["id"] for one in page.of("section")} <= {link["href"][1:] for link in page.of("a")}

    def test_its_policy_allows_only_its_own_script(self, page):
        [policy] = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
        digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
        assert policy.split("; ") == [
            "default-src 'none'",
            "img-src data:",
            "style-src 'unsafe-inline'",
            f"script-src 'sha256-{digest}'",
        ]

    def test_worst_and_best_images_are_shown_once_and_empty_ones_are_not(self, page):
        gallery = galleries(page)
        assert len(gallery.of("image")) == 3
        names = [one["aria-label"] for one in gallery.of("svg") if one["aria-label"] in ("</b></figure>.png", NASTY[0])]
        assert names == ["</b></figure>.png", NASTY[0]]  # the missed one is the worst, the correct one the best
        outcomes = [one["class"] for one in gallery.of("path") if "class" in one]
        assert sorted(outcomes) == sorted(
            [
                "missed",
                "found",
                "other-class",
                "crowd",
                "correct",
                "duplicate",
                "other-class",
                "in-a-crowd",
                "found",
                "correct",
            ]
        )

    def test_the_training_curve_leaves_out_nan(self, page):
        start = page.elements.index(next(one for one in page.elements if one[1].get("aria-label") == "Loss"))
        chart = page.elements[start:]
        curve = next(index for index, (_, attrs) in enumerate(chart) if attrs.get("class") == "curve")
        path = next(attrs["d"] for tag, attrs in chart[curve:] if tag == "path")
        points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
        assert len(points) == 2
        bottom = max(float(attrs["y"]) for tag, attrs in chart if tag == "use")  # where the ticks of x are
        assert bottom - points[0][1] == pytest.approx(2 * (bottom - points[1][1]), abs=0.3)

    def test_the_number_of_images_is_bounded(self, tmp_path):
        analysis = analyse(scene_model(), SCENE_PROCESSOR, scene(), progress=False)
        for wanted, expected in ((0, 0), (1, 2), (2, 3), (50, 3)):
            path = save_report(tmp_path, analysis, scene(), num_images=wanted)
            assert len(galleries(Page(path.read_text())).of("image")) == expected
        with pytest.raises(ValueError, match=r"`num_images` must be .* got -1"):
            save_report(tmp_path, analysis, scene(), num_images=-1)

    @pytest.mark.parametrize(("threshold", "words"), [(None, "the highest score is 0.900."), (0.95, "detects nothing")])
    def test_where_no_score_is_high_enough_the_page_says_so_and_shows_no_best_images(self, threshold, words, tmp_path):
        settings = {"min_score": 0.95, "score_threshold": threshold, "progress": False}
        path = save_report(tmp_path, analyse(scene_model(), SCENE_PROCESSOR, scene(), **settings), scene())
        page = Page(path.read_text())
        assert words in "".join(page.words)
        assert "best" not in {one["id"] for one in page.of("section")}
        assert len(galleries(page).of("image")) == 3  # all of them among the worst

    def test_pointing_at_an_instance_shows_its_class_and_that_of_its_match(self, tmp_path):
        page = Page(write_report(tmp_path, scene_model(), SCENE_PROCESSOR, scene(), progress=False).read_text())
        titles = re.findall(r"<title>(.*?)</title></path>", page.text)
        assert {"pool, missed: not detected", "house, found", "pool, found as house", "pool, crowd"} <= set(titles)
        assert {
            "house, score 0.90, correct, IoU 0.80",
            "house, score 0.80, duplicate",
            "house, score 0.70, annotated as pool, IoU 1.00",
            "pool, score 0.60, in a crowd",
        } <= set(titles)

    def test_each_reason_has_its_objects_by_class_and_size_and_an_example_of_them(self, tmp_path):
        page = Page(write_report(tmp_path, scene_model(), SCENE_PROCESSOR, scene(), progress=False).read_text())
        [section] = re.findall(r'<section id="missed">.*?</section>', page.text, re.DOTALL)
        rows = [re.findall(r"<t[hd].*?>(?:<a.*?>)?(.*?)(?:</a>)?</t[hd]>", row) for row in section.split("<tr")[1:]]
        assert rows == [  # the house has 400 pixels, one pool 100 and the other one 400
            ["reason", "objects", "small", "medium", "large"],
            ["not detected", "1", "1", "", ""],
            ["other class", "1", "1", "", ""],
            ["found twice", "1", "1", "", ""],
            ["all objects", "4", "4", "0", "0"],
            ["class", "objects", "not detected", "other class", "found twice"],
            ["pool", "2", "1", "1", ""],
            ["house", "2", "", "", "1"],
        ]
        figures = re.findall(r"<figure.*?</figure>", section, re.DOTALL)
        captions = [re.findall("<figcaption>(.*?)</figcaption>", one)[0] for one in figures]
        assert [re.sub("<.*?>", " ", caption).split() for caption in captions] == [
            ["pool", "in", "missed.png"],
            ["pool", "in", "many.png", "found", "as", "house"],
            ["house", "in", "many.png"],
        ]
        assert [re.findall(r'<path class="(.*?)"', one) for one in figures] == [
            ["missed"],
            ["other-class", "in-a-crowd", "other-class", "correct", "duplicate"],
            ["found", "in-a-crowd", "other-class", "correct", "duplicate"],
        ]
        assert "What the first stage proposed is not known." in section

    def test_examples_are_three_of_the_largest_objects_of_different_images(self, tmp_path):
        squares = [(0, 6), (0, 8), (0, 10), (1, 2), (1, 4)]  # image and side
        masks = [rectangle((0, side), (9 * side - 9, 10 * side - 9), (40, 90)) for _, side in squares]
        coco = {
            "images": [{"id": image, "height": 40, "width": 90} for image in (0, 1)],
            "annotations": [
                {"image_id": image, "category_id": 1, "segmentation": rle(mask)}
                for (image, _), mask in zip(squares, masks, strict=True)
            ],
            "categories": [{"id": 1, "name": "house"}],
        }
        dataset = InstanceDataset(coco, [Image.new("RGB", (90, 40))] * 2)
        page = write_report(tmp_path, ScriptedModel([[], []], ["house"]), SCENE_PROCESSOR, dataset, progress=False)
        [section] = re.findall(r'<section id="missed">.*?</section>', page.read_text(), re.DOTALL)
        paths = re.findall(r'class="missed" d="M(.*?)Z"', section)
        points = [np.array(path.split(), float).reshape(-1, 2) for path in paths]
        scale = 320 / 64  # from 64 x 40 pixels around each
        assert [np.ptp(one, axis=0).max() / scale for one in points] == pytest.approx([10, 4, 8], abs=0.2)

    def test_where_all_objects_are_found_once_there_is_no_such_section(self, tmp_path):
        coco = {
            "images": [{"id": 0, "height": 40, "width": 40}],
            "annotations": [{"image_id": 0, "category_id": 1, "segmentation": rle(rectangle((0, 9), (0, 9), SCENE))}],
            "categories": [{"id": 1, "name": "house"}],
        }
        model = ScriptedModel([[(0, 0.9, rectangle((0, 9), (0, 9), SCENE))]], ["house"])
        dataset = InstanceDataset(coco, [Image.new("RGB", SCENE)])
        page = Page(write_report(tmp_path, model, SCENE_PROCESSOR, dataset, progress=False).read_text())
        assert "missed" not in {one["id"] for one in page.of("section")}

    def test_the_page_is_small_whatever_the_images_contain(self, tmp_path):
        rng = np.random.default_rng(0)
        size = (500, 700)
        masks = [rng.random(size) < share for share in rng.random(3)]
        coco = {
            "images": [{"id": 0, "height": size[0], "width": size[1]}],
            "annotations": [{"image_id": 0, "category_id": 1, "segmentation": rle(mask)} for mask in masks],
            "categories": [{"id": 1, "name": "noise"}],
        }
        dataset = InstanceDataset(coco, [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))])
        model = ScriptedModel([[(0, 0.9, mask) for mask in masks]], ["noise"])
        path = write_report(tmp_path, model, RfDetrImageProcessor(size=500), dataset, progress=False)
        assert path.stat().st_size < 5_000_000 / 24

    def test_a_training_run_is_read_from_its_last_checkpoint(self, tmp_path):
        for step in (2, 10):
            (tmp_path / f"checkpoint-{step}").mkdir()
            state = {"log_history": [{"step": step, "loss": 1.0}]}
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
        analysis = analyse(scene_model(), SCENE_PROCESSOR, scene(), progress=False)
        settings = {"num_images": 0, "training": tmp_path}
        page = Page(save_report(tmp_path, analysis, scene(), **settings).read_text())
        [section] = re.findall(r'<section id="training">.*?</section>', page.text, re.DOTALL)
        assert ">10<" in section  # where its one point is
        (tmp_path / "trainer_state.json").write_text('{"log_history": 5}')
        with pytest.raises(ValueError, match=r"trainer_state\.json must be the log of a Trainer"):
            save_report(tmp_path, analysis, scene(), **settings)
        with pytest.raises(ValueError, match=r"`training` must be .* got .*nowhere"):
            save_report(tmp_path, analysis, scene(), training=tmp_path / "nowhere")

    def test_the_confusion_matrix_shows_20_of_many_classes(self, tmp_path):
        names = [f"class {number}" for number in range(30)]
        coco = {
            "images": [{"id": 0, "height": SCENE[0], "width": SCENE[1], "file_name": "all.png"}],
            "annotations": [
                {
                    "image_id": 0,
                    "category_id": number,
                    "segmentation": rle(rectangle((number, number + 3), (0, 30), SCENE)),
                }
                for number in range(30)
            ],
            "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        }
        dataset = InstanceDataset(coco, [Image.new("RGB", SCENE)])
        found = [(number, 0.9, rectangle((number, number + 3), (0, 30), SCENE)) for number in range(9, 30)]
        path = write_report(tmp_path, ScriptedModel([found], names), SCENE_PROCESSOR, dataset, progress=False)
        page = Page(path.read_text())
        words = " ".join(page.words)
        assert "The 20 classes with the most errors are shown; 10 are left out." in words
        assert [words.count(f"mean of classes {ap:.3f}") for ap in (21 / 30,)] == [4]  # keys and lines of two charts


def browse(page, *flags, profile, address=""):
    """Open a file in Chromium -> its document afterwards, and what it said on its console."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=2000", f"--user-data-dir={profile}", *flags]
    done = subprocess.run([*command, f"{page.as_uri()}{address}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


# What a reader does, one after the other, and the state of the page after each step.
CLICKS = """<script>
const seen = [];
const note = () => seen.push(document.body.className + "/" + document.querySelectorAll("path.off").length);
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
note();
press("t"); note();
document.getElementById("show-prediction").click(); note();
press("t"); press("p"); note();
document.querySelector(".card path title").dispatchEvent(new MouseEvent("click", {bubbles: true})); note();
press("Escape"); note();
document.title = "seen " + seen.join(" ");
</script>"""


def in_the_browser(folder, screenshots=False):
    """Look at a report in Chromium: nothing on the console, layers and instances come and go."""
    page = folder / "report.html"
    wide = ["--window-size=1280,6000", f"--screenshot={folder / 'whole.png'}"] if screenshots else []
    document, console = browse(page, *wide, profile=folder / "profile", address="#hide=truth")
    assert console == []
    assert re.search(r"<body class=\"hide-truth\">", document)
    # With the policy taken off, a script of ours plays the reader.
    played = folder / "played.html"
    text = page.read_text(encoding="utf-8")
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)[0]
    played.write_text(text.replace(policy, "").replace("</body>", f"{CLICKS}</body>"), encoding="utf-8")
    document, console = browse(played, profile=folder / "profile")
    assert console == []
    states = re.search(r"<title>seen (.*?)</title>", document)[1].split(" ")
    assert " ".join(states) == "/0 hide-truth/0 hide-truth hide-prediction/0 /0 /1 /0"


@needs_chromium
def test_layers_and_instances_can_be_hidden_in_a_browser(tmp_path):
    files = ("many.png", NASTY[0], NASTY[1], "missed.png")
    write_report(
        tmp_path, scene_model(NASTY[:2]), SCENE_PROCESSOR, scene(NASTY[:2], files), title=NASTY[0], progress=False
    )
    in_the_browser(tmp_path)


@needs_chromium
def test_a_foreign_script_does_not_run_and_is_reported_on_the_console(tmp_path):
    page = write_report(tmp_path, scene_model(), SCENE_PROCESSOR, scene(), progress=False)
    stranger = "<script>document.title = 'taken over'</script>"
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{stranger}</main>"), encoding="utf-8")
    document, console = browse(page, profile=tmp_path / "profile")
    assert "<title>Evaluation</title>" in document
    assert len(console) == 1
    assert "Content Security Policy" in console[0]


@needs_chromium
def test_tables_that_are_wider_than_a_phone_say_that_they_scroll(tmp_path):
    page = write_report(tmp_path, scene_model(), SCENE_PROCESSOR, scene(), progress=False)
    text = page.read_text(encoding="utf-8")
    for width, num_hints in (("1240px", 0), ("390px", 4)):  # metrics, classes, reasons, reasons by class
        page.write_text(text.replace("</style>", f"body{{width:{width}}}</style>"), encoding="utf-8")
        document, console = browse(page, "--window-size=1280,900", profile=tmp_path / "profile")
        assert console == []
        assert document.count('class="wide overflows"') == num_hints


@pytest.mark.long
def test_hidden_masks_are_not_visible_in_a_browser(tmp_path):
    assert CHROMIUM, "needs a browser: apt-get install chromium"
    write_report(tmp_path, scene_model(), SCENE_PROCESSOR, scene(), progress=False)
    in_the_browser(tmp_path, screenshots=True)

    def count(color, address):
        flags = ["--window-size=1280,6000", f"--screenshot={tmp_path / 'seen.png'}"]
        browse(tmp_path / "report.html", *flags, profile=tmp_path / "profile", address=address)
        pixels = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB")).astype(int)
        return int((np.abs(pixels - color).max(-1) < 12).sum())

    missed, correct = (250, 204, 21), (59, 157, 255)  # in the legend too
    assert count(missed, "") > 5 * count(missed, "#hide=truth")
    assert count(correct, "") > 5 * count(correct, "#hide=prediction")
