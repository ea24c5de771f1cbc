"""Which polygons cross themselves, and how much of their area that affects."""

import itertools
from collections import Counter

import numpy as np
import pytest

from transformers_rfdetr import check_dataset, load_instance_dataset, write_dataset
from transformers_rfdetr.data.checks.crossings import affected_share, crosses_itself
from transformers_rfdetr.data.outlines import join_rings, trace_pixels

from coco_files import SQUARE, draw_image, image_entry, square, write_coco

pytestmark = pytest.mark.usefixtures("quiet")

SQUARE_AND_BACK = [0, 0, 10, 0, 10, 10, 0, 10, 0, 0]
# Bridges lead from the corner at 0, 0 through the opposite side of the square to the one or the other.
FAR_SQUARE = [20, 30, 30, 30, 30, 40, 20, 40, 20, 30]
OVERLAPPING_SQUARE = [5, 5, 15, 5, 15, 15, 5, 15, 5, 5]


@pytest.mark.parametrize(
    ("polygon", "crosses"),
    [
        (SQUARE, False),
        ([0, 0, 10, 10, 10, 0, 0, 10], True),
        ([5, 0, 8, 9, 0, 3, 10, 3, 2, 9], True),  # a star in one stroke
        ([0, 0, 9, 0, 9, 9, 0, 9, 0, 0, 3, 3, 3, 6, 6, 6, 6, 3, 3, 3], False),  # a hole at the end of a bridge
        ([0, 0, 5, 0.1, 10, 0, 10, 10, 5, 0.1, 0, 10], False),  # two triangles that share a point
        ([0, 0, 0, 0, 10, 0, 10, 10, 10, 10], False),  # points twice
        ([*SQUARE_AND_BACK, *FAR_SQUARE], False),  # a bridge across an edge
        ([*SQUARE_AND_BACK, *OVERLAPPING_SQUARE], True),  # the parts cross
        ([0, 0, 10, 10, 0, 0, 0, 10, 10, 0], False),  # a spike through the side of a triangle
    ],
)
def test_crossing_edges_are_distinguished_from_touching_edges(polygon, crosses):
    assert crosses_itself(np.array(polygon, float)) is crosses


def test_crossings_are_those_of_all_pairs_of_edges():
    generator = np.random.default_rng(0)
    found = Counter()
    for size in (4, 4, 5, 5, 6, 7, 8, 12) * 6:
        points = generator.integers(0, 30, (size, 2)).tolist()
        edges = list(zip(points, points[1:] + points[:1], strict=True))
        pairs = itertools.combinations(edges, 2)
        expected = any(are_separated(*a, *b) and are_separated(*b, *a) for a, b in pairs)
        assert crosses_itself(np.array(points, float).ravel()) is expected
        found[expected] += 1
    assert min(found[True], found[False]) > 5


def are_separated(a, b, c, d):
    """Whether c and d lie on different sides of the line through a and b, in exact integers."""
    sides = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in (c, d)]
    return sides[0] * sides[1] < 0


def test_a_crossing_is_found_in_a_long_polygon():
    angles = np.linspace(0, 2 * np.pi, 600, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1) * 100
    assert not crosses_itself(circle.ravel())
    circle[[500, 501]] = circle[[501, 500]]
    assert crosses_itself(circle.ravel())


def test_joined_outlines_of_masks_do_not_cross():
    generator = np.random.default_rng(0)
    num_crossed_bridges = 0
    for _ in range(30):
        rings = trace_pixels(generator.random((8, 8)) < 0.6)
        assert not crosses_itself(join_rings(rings).ravel())
        # Without the way back, the bridges are edges like others.
        num_crossed_bridges += crosses_itself(np.concatenate(rings).ravel())
    assert num_crossed_bridges > 5


@pytest.mark.parametrize(
    ("polygon", "share"),
    [
        (SQUARE, 0),
        ([0, 0, 10, 10, 10, 0, 0, 10], 1 / 2),  # two triangles, drawn in opposite directions
        # A square of 100 pixels, and in the same direction half of it again, which is not in the mask.
        ([0, 0, 10, 0, 10, 10, 0, 10, 0, 0, 5, 0, 5, 10, 0, 10], 1 / 2),
        ([*SQUARE_AND_BACK, *FAR_SQUARE], 0),
        ([*SQUARE_AND_BACK, *OVERLAPPING_SQUARE], 25 / 175),  # the intersection, of the union
        ([*SQUARE_AND_BACK, 5, 5, 5, 15, 15, 15, 15, 5, 5, 5], 25 / 175),
        # A square with a hole in the same direction, 64 pixels, and a figure eight of two triangles of 16 each.
        (
            [0, 0, 10, 0, 10, 10, 0, 10, 0, 0, 2, 2, 8, 2, 8, 8, 2, 8, 2, 2, 20, 0, 28, 8, 28, 0, 20, 8, 20, 0, 2, 2],
            1 / 6,
        ),
    ],
)
def test_the_share_of_a_polygon_that_crossings_affect(polygon, share):
    assert affected_share(np.array(polygon, float)) == pytest.approx(share, abs=1e-3)


def test_objects_of_several_parts_and_with_holes_written_as_yolo_cause_no_warning(tmp_path):
    mask = np.zeros((40, 60), bool)
    mask[5:35, 5:35] = mask[2:8, 50:58] = mask[30:39, 45:50] = True
    mask[10:20, 8:30] = mask[25:30, 8:12] = False
    source = write_coco(
        tmp_path / "coco" / "train.json",
        [image_entry(1, "a.png", (40, 60))],
        [square(1, segmentation=mask.astype(int).tolist(), bbox=..., area=...)],
    )
    draw_image(0, (40, 60)).save(source.parent / "a.png")
    write_dataset(load_instance_dataset(source), tmp_path / "yolo", format="yolo")
    [line] = (tmp_path / "yolo/labels/train/a.txt").read_text().splitlines()
    assert len(line.split()) > 40  # five rings in one polygon
    report = check_dataset(tmp_path / "yolo" / "data.yaml")
    assert not report.count("self_intersecting_polygon") + report.count("small_self_intersection")
