"""Right and wrong by hand arithmetic, curves by pycocotools, the page by an HTML parser and by Chromium."""

import base64
import copy
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from transformers_rfdetr import RfDetrImageProcessor
from transformers_rfdetr.data.dataset import InstanceDataset
from transformers_rfdetr.evaluation import report
from transformers_rfdetr.evaluation.coco_evaluator import InstanceSegmentationEvaluator
from transformers_rfdetr.evaluation.evaluation_loop import evaluate_instance_segmentation
from transformers_rfdetr.evaluation.report import analyse, save_report, simplify_ring, trace_rings, write_report

from small_models import small_model
from training_run import drawn

HOUSE, POOL = 0, 1
SIDE = 40
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")


def rectangle(top, bottom, left, right, size=(SIDE, SIDE)):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def rle(mask):
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


class Shows(torch.nn.Module):
    """A model that finds in each image, in their order, given (label, score, mask)."""

    def __init__(self, found, names, masks=True):
        super().__init__()
        self.config = SimpleNamespace(id2label=dict(enumerate(names)))
        self.device, self.found, self.has_masks = torch.device("cpu"), iter(found), masks

    def forward(self, pixel_values, pixel_mask=None):
        of_images = [next(self.found) for _ in pixel_values]
        num_queries = max([1, *map(len, of_images)])
        height, width = next((found[0][2].shape for found in of_images if found), (SIDE, SIDE))
        logits = torch.full((len(of_images), num_queries, len(self.config.id2label)), -20.0)
        boxes = torch.full((len(of_images), num_queries, 4), 0.5)
        masks = torch.full((len(of_images), num_queries, height, width), -5.0)
        for image, found in enumerate(of_images):
            for query, (label, score, mask) in enumerate(found):
                logits[image, query, label] = math.log(score / (1 - score))
                masks[image, query][torch.from_numpy(mask)] = 5.0
                x, y, w, h = coco_mask.toBbox(rle(mask))
                boxes[image, query] = torch.tensor(
                    [(x + w / 2) / width, (y + h / 2) / height, w / width, h / height], dtype=torch.float32
                )
        return SimpleNamespace(logits=logits, pred_boxes=boxes, pred_masks=masks if self.has_masks else None)


# Of each image the objects (label, crowd, mask) and what is found (label, score, mask).
IMAGES = {
    "many.png": (
        [
            (HOUSE, 0, rectangle(0, 20, 0, 20)),
            (POOL, 0, rectangle(25, 35, 25, 35)),
            (POOL, 1, rectangle(0, 10, 30, 40)),
        ],
        [
            (HOUSE, 0.9, rectangle(0, 20, 0, 16)),  # 320 of the house's 400 pixels
            (HOUSE, 0.8, rectangle(0, 20, 0, 20)),  # the same once more
            (HOUSE, 0.7, rectangle(25, 35, 25, 35)),  # the pool
            (POOL, 0.6, rectangle(2, 6, 32, 36)),  # in the crowd
            (POOL, 0.4, rectangle(25, 35, 25, 35)),
        ],
    ),
    "right.png": ([(HOUSE, 0, rectangle(10, 30, 10, 30))], [(HOUSE, 0.9, rectangle(10, 30, 10, 30))]),
    "empty.png": ([], []),
    "missed.png": ([(POOL, 0, rectangle(0, 20, 0, 20))], []),
}


def scene(names=("house", "pool"), files=tuple(IMAGES)):
    """The images above as a dataset, with category ids 3 and 7."""
    images, annotations = [], []
    for index, (objects, _) in enumerate(IMAGES.values()):
        images.append({"id": index, "file_name": files[index], "height": SIDE, "width": SIDE})
        annotations += [
            {"image_id": index, "category_id": (3, 7)[label], "iscrowd": crowd, "segmentation": rle(mask)}
            for label, crowd, mask in objects
        ]
    categories = [{"id": (3, 7)[label], "name": name} for label, name in enumerate(names)]
    pixels = np.random.default_rng(0).integers(0, 256, (len(images), SIDE, SIDE, 3), np.uint8)
    coco = {"images": images, "annotations": annotations, "categories": categories}
    return InstanceDataset(coco, [Image.fromarray(photo) for photo in pixels])


def shown(names=("house", "pool"), **settings):
    return Shows([found for _, found in IMAGES.values()], names, **settings)


PROCESSOR = RfDetrImageProcessor(size=SIDE, do_pad=False)


def analysed(masks=True, **settings):
    return analyse(shown(masks=masks), PROCESSOR, scene(), batch_size=3, progress=False, **settings)


class Page(HTMLParser):
    """A page's elements, words and script; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.words, self.script, self.open = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.script += data
        elif self.open[-1:] != ["style"]:
            self.words.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


class TestRightAndWrong:
    @pytest.mark.parametrize("masks", [True, False], ids=["masks", "boxes"])
    def test_detections_take_objects_of_their_class_and_then_of_others(self, masks):
        analysis = analysed(masks)
        assert [image.name for image in analysis.images] == ["missed.png", "many.png", "right.png", "empty.png"]
        assert [image.index for image in analysis.images] == [3, 0, 1, 2]
        # 1 right with an IoU of 0.8; wrong are 2 detections and 1 object.
        assert [image.quality for image in analysis.images] == pytest.approx([0, 0.8 / 2.5, 1, 1])
        assert [image.num_errors for image in analysis.images] == [1, 3, 0, 0]
        many = analysis.images[1]
        assert many.truth_outcomes == ["found", "other class", "crowd"]
        assert many.found_outcomes == ["right", "false", "other class", "in a crowd"]
        assert many.ious == pytest.approx([0.8, 0, 1, 0])
        assert many.truth.names == ["house", "pool", "pool"]
        assert many.found.names == ["house", "house", "house", "pool"]
        assert analysis.class_names == ["house", "pool"]
        assert analysis.confusion.tolist() == [[2, 0, 0], [1, 0, 1], [1, 0, 0]]
        assert ("segm_AP" in analysis.metrics) is masks

    def test_a_lower_score_lets_more_detections_count(self):
        many = next(image for image in analysed(min_score=0.3).images if image.name == "many.png")
        assert many.found_outcomes == ["right", "false", "false", "in a crowd", "right"]
        assert many.quality == pytest.approx((0.8 + 1) / (2 + 2 / 2))
        with pytest.raises(ValueError, match=r"min_score 50 is no score in \[0, 1\]"):
            analysed(min_score=50)

    def test_an_iou_of_one_half_is_enough(self):
        ious = np.array([[0.5, 0.5 - 1e-9]])
        for one, expected in ((0, 0), (1, -1)):
            object_of, _ = report._match(ious[:, one : one + 1], np.ones((1, 1), bool), np.zeros(1, bool))
            assert object_of.tolist() == [expected]

    def test_what_is_found_can_be_drawn(self):
        many = analysed().images[1]
        photo = scene()[many.index]["image"]
        drawn_there = np.asarray(many.truth.draw(photo)) != np.asarray(photo)
        assert drawn_there[:, :, 0][rectangle(25, 35, 25, 35)].any()

    def test_an_object_with_a_box_only_is_its_box_and_one_without_a_shape_is_none(self):
        annotations = [
            {"bbox": [4, 5, 10, 20], "segmentation": []},
            {"bbox": [4, 5, 0, 20], "segmentation": None},
            {"segmentation": [[0, 0, 10, 0, 10, 30, 0, 30]]},
        ]
        truth, is_crowd = report._read_truth(annotations, [0, 1, 0], (SIDE, SIDE), True)
        assert truth.boxes.tolist() == [[4, 5, 14, 25], [0, 0, 10, 30]]
        assert truth.dense_masks().tolist() == [
            rectangle(5, 25, 4, 14).tolist(),
            rectangle(0, 30, 0, 10).tolist(),
        ]
        assert is_crowd.tolist() == [False, False]

    def test_the_numbers_are_those_of_the_evaluation(self):
        dataset, model = drawn(3), small_model(num_labels=1)
        processor = RfDetrImageProcessor.from_config(model.config)
        expected = evaluate_instance_segmentation(model, processor, dataset, progress=False)
        analysis = analyse(model, processor, dataset, progress=False)
        assert analysis.metrics == expected
        assert len(analysis.images) == 3
        assert analysis.curves["building"].mean() == pytest.approx(expected["segm_AP"])


@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
def test_the_curves_are_those_of_pycocotools(backend):
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval")
    rng = np.random.default_rng(1)
    images = [{"id": image, "height": SIDE, "width": SIDE} for image in range(6)]
    annotations, results = [], []
    for image in range(6):
        for number in range(4):
            top, left = rng.integers(0, 25, 2)
            mask = rectangle(top, top + 12, left, left + 12)
            fields = {"image_id": image, "category_id": int(rng.integers(1, 3)), "iscrowd": int(number == 3)}
            box, area = coco_mask.toBbox(rle(mask)).tolist(), 144.0
            annotations.append(
                fields | {"id": len(annotations) + 1, "segmentation": rle(mask), "bbox": box, "area": area}
            )
            for _ in range(2):
                near = rle(np.roll(mask, rng.integers(-3, 4, 2), (0, 1)))
                results.append(
                    {**fields, "segmentation": near, "score": float(rng.random()), "bbox": coco_mask.toBbox(near)}
                )
    truth = {"images": images, "annotations": annotations, "categories": [{"id": i, "name": f"{i}"} for i in (1, 2, 9)]}
    evaluator = InstanceSegmentationEvaluator(truth, backend=backend)
    for image in range(6):
        of_image = [one for one in results if one["image_id"] == image]
        scores, labels, masks = ([one[k] for one in of_image] for k in ("score", "category_id", "segmentation"))
        evaluator.update(image, scores=scores, labels=labels, masks=masks)
    with redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        oracle = COCOeval(
            coco, coco.loadRes([{k: v for k, v in one.items() if k != "bbox"} for one in results]), "segm"
        )
        oracle.evaluate()
        oracle.accumulate()
    curves = evaluator.precision_curves()
    assert list(curves) == ["1", "2"]  # of the third class there is no object
    for place, curve in enumerate(curves.values()):
        assert curve.shape == (10, 101)
        np.testing.assert_allclose(curve, oracle.eval["precision"][:, :, place, 0, -1], atol=1e-12)
    assert 0.1 < curves["1"].mean() < 0.95
    assert evaluator.compute()["per_class"]["1"]["segm_AP"] == pytest.approx(curves["1"].mean())


class TestOutlines:
    def filled(self, rings, size):
        """By the even-odd rule: pixels that an odd number of upright edges lie to the left of."""
        edges = np.zeros((size[0], size[1] + 1), int)
        for ring in rings:
            for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                assert abs(x1 - x0) + abs(y1 - y0) == 1
                if x0 == x1:
                    edges[min(y0, y1), x0] += 1
        return edges.cumsum(1)[:, :-1] % 2 == 1

    @pytest.mark.parametrize("density", [0.05, 0.5, 0.95, 1.0])
    def test_rings_filled_give_the_mask(self, density):
        mask = np.random.default_rng(0).random((23, 31)) < density
        assert (self.filled(trace_rings(mask), mask.shape) == mask).all()

    def test_a_courtyard_has_two_rings(self):
        mask = rectangle(5, 30, 5, 30) & ~rectangle(10, 20, 12, 18)
        assert sorted(len(ring) for ring in trace_rings(mask)) == [2 * (10 + 6), 4 * 25]
        assert trace_rings(np.zeros((4, 4), bool)) == []

    def test_a_simple_outline_has_few_points_and_the_same_shape(self):
        rows, columns = np.mgrid[:200, :200]
        disc = np.hypot(rows - 100, columns - 90) < 70
        (ring,) = trace_rings(disc)
        simple = simplify_ring(ring, 0.75)
        assert 20 < len(simple) < len(ring) / 4
        drawn_again = coco_mask.frPyObjects([simple.ravel().tolist()], 200, 200)
        assert coco_mask.iou(drawn_again, [rle(disc)], [0])[0, 0] > 0.985

    def test_corners_stay_and_what_is_small_does_not_vanish(self):
        (ring,) = trace_rings(rectangle(5, 25, 10, 18))
        assert set(map(tuple, simplify_ring(ring, 0.75))) == {(10, 5), (18, 5), (18, 25), (10, 25)}
        (pixel,) = trace_rings(rectangle(5, 6, 7, 8))
        assert len(simplify_ring(pixel, 6.0)) == 4

    def test_a_mask_that_is_gone_at_the_size_of_the_page_is_its_box(self):
        mask = rectangle(100, 101, 200, 202, (400, 400))
        truth, _ = report._read_truth([{"bbox": [200, 100, 2, 1], "segmentation": rle(mask)}], [0], (400, 400), True)
        assert report._outline(truth, 0, (40, 40)) == "M20 10 20.2 10 20.2 10.1 20 10.1Z"


NASTY = ['<script>alert("a")</script>', '"><img src=x onerror=alert(1)>', "a & b's {0} %s \udcff"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    state = {"log_history": [{"step": 10, "loss": 4.0}, {"step": 20, "loss": math.nan}, {"step": 30, "loss": 2.0}]}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    settings = {"training": folder, "title": NASTY[1], "progress": False}
    names, files = NASTY[:2], (NASTY[2], NASTY[0], NASTY[1], "</b></figure>.png")
    write_report(folder / "new", shown(names), PROCESSOR, scene(names, files), **settings)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "new" / "report.html").read_text(encoding="utf-8"))


class TestPage:
    def test_names_are_words_and_nothing_else(self, page):
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
        assert "url(" not in report._STYLE
        assert "@import" not in report._STYLE
        assert {link["href"][1:] for link in page.of("a")} == {one["id"] for one in page.of("section")}

    def test_its_policy_allows_its_script_alone(self, page):
        [policy] = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
        digest = base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()
        assert policy.split("; ") == [
            "default-src 'none'",
            "img-src data:",
            "style-src 'unsafe-inline'",
            f"script-src 'sha256-{digest}'",
        ]

    def test_the_worst_and_the_best_are_shown_once_and_those_that_show_nothing_are_not(self, page):
        assert len(page.of("image")) == 3
        names = [one["aria-label"] for one in page.of("svg") if one["aria-label"] in {"</b></figure>.png", *NASTY[:1]}]
        assert names == ["</b></figure>.png", NASTY[0]]  # the missed one is the worst, the right one the best
        outcomes = [one["class"] for one in page.of("path") if "class" in one]
        assert sorted(outcomes) == sorted(
            ["missed", "found", "other-class", "crowd", "right", "false", "other-class", "in-a-crowd", "found", "right"]
        )

    def test_the_training_curve_leaves_out_what_is_no_number(self, page):
        start = page.elements.index(next(one for one in page.elements if one[1].get("aria-label") == "Loss"))
        chart = page.elements[start:]
        curve = next(index for index, (_, attrs) in enumerate(chart) if attrs.get("class") == "curve")
        path = next(attrs["d"] for tag, attrs in chart[curve:] if tag == "path")
        points = [tuple(map(float, point.split())) for point in re.split("[ML]", path)[1:]]
        assert len(points) == 2
        bottom = max(float(attrs["y"]) for tag, attrs in chart if tag == "use")  # where the ticks of x are
        assert bottom - points[0][1] == pytest.approx(2 * (bottom - points[1][1]), abs=0.3)

    def test_the_number_of_images_is_bounded(self, tmp_path):
        analysis = analysed()
        for wanted, expected in ((0, 0), (1, 2), (2, 3), (50, 3)):
            path = save_report(tmp_path, analysis, scene(), num_images=wanted)
            assert len(Page(path.read_text()).of("image")) == expected
        with pytest.raises(ValueError, match="num_images -1 must be at least 0"):
            save_report(tmp_path, analysis, scene(), num_images=-1)

    def test_it_stays_small_whatever_the_images_hold(self, tmp_path):
        rng = np.random.default_rng(0)
        size = (500, 700)
        masks = [rng.random(size) < share for share in rng.random(5)]
        coco = {
            "images": [{"id": 0, "height": size[0], "width": size[1]}],
            "annotations": [{"image_id": 0, "category_id": 1, "segmentation": rle(mask)} for mask in masks],
            "categories": [{"id": 1, "name": "noise"}],
        }
        dataset = InstanceDataset(coco, [Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))])
        model = Shows([[(0, 0.9, mask) for mask in masks]], ["noise"])
        path = write_report(tmp_path, model, RfDetrImageProcessor(size=500), dataset, progress=False)
        assert path.stat().st_size < 5_000_000 / 24

    def test_a_training_run_is_read_from_its_last_checkpoint(self, tmp_path):
        for step in (2, 10):
            (tmp_path / f"checkpoint-{step}").mkdir()
            state = {"log_history": [{"step": step, "loss": 1.0}]}
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
        assert report._read_history(tmp_path) == [{"step": 10, "loss": 1.0}]
        (tmp_path / "trainer_state.json").write_text('{"log_history": 5}')
        with pytest.raises(ValueError, match=r"is no log of a Trainer .*; give another training run"):
            report._read_history(tmp_path)
        with pytest.raises(ValueError, match=r"has no trainer_state\.json.*; give the output folder"):
            report._read_history(tmp_path / "nowhere")

    def test_many_classes_are_told_apart_in_numbers_and_cut_in_the_matrix(self, tmp_path):
        names = [f"class {number}" for number in range(30)]
        coco = {
            "images": [{"id": 0, "height": SIDE, "width": SIDE, "file_name": "all.png"}],
            "annotations": [
                {"image_id": 0, "category_id": number, "segmentation": rle(rectangle(number, number + 3, 0, 30))}
                for number in range(30)
            ],
            "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        }
        dataset = InstanceDataset(coco, [Image.new("RGB", (SIDE, SIDE))])
        found = [(number, 0.9, rectangle(number, number + 3, 0, 30)) for number in range(9, 30)]
        path = write_report(tmp_path, Shows([found], names), PROCESSOR, dataset, progress=False)
        page = Page(path.read_text())
        words = " ".join(page.words)
        assert "Shown are the 20 classes with the most errors; 10 are left out." in words
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
    wide = ["--window-size=1280,2400", f"--screenshot={folder / 'whole.png'}"] if screenshots else []
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
def test_in_a_browser_layers_and_instances_come_and_go(tmp_path):
    files = ("many.png", NASTY[0], NASTY[1], "missed.png")
    write_report(tmp_path, shown(NASTY[:2]), PROCESSOR, scene(NASTY[:2], files), title=NASTY[0], progress=False)
    in_the_browser(tmp_path)


@needs_chromium
def test_a_script_that_is_not_the_pages_own_does_not_run_and_is_heard_on_the_console(tmp_path):
    page = write_report(tmp_path, shown(), PROCESSOR, scene(), progress=False)
    stranger = "<script>document.title = 'taken over'</script>"
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{stranger}</main>"), encoding="utf-8")
    document, console = browse(page, profile=tmp_path / "profile")
    assert "<title>Evaluation</title>" in document
    assert len(console) == 1
    assert "Content Security Policy" in console[0]


@pytest.mark.long
def test_in_a_browser_masks_are_seen_and_hidden(tmp_path):
    assert CHROMIUM, "needs a browser: apt-get install chromium"
    write_report(tmp_path, shown(), PROCESSOR, scene(), progress=False)
    in_the_browser(tmp_path, screenshots=True)

    def count(color, address):
        flags = ["--window-size=1280,2400", f"--screenshot={tmp_path / 'seen.png'}"]
        browse(tmp_path / "report.html", *flags, profile=tmp_path / "profile", address=address)
        pixels = np.asarray(Image.open(tmp_path / "seen.png").convert("RGB")).astype(int)
        return int((np.abs(pixels - color).max(-1) < 12).sum())

    missed, right = (250, 204, 21), (59, 157, 255)  # in the legend too
    assert count(missed, "") > 5 * count(missed, "#hide=truth")
    assert count(right, "") > 5 * count(right, "#hide=prediction")
