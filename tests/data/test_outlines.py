"""Outlines of masks are drawn by pycocotools to the same masks."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco_mask
from scipy.ndimage import binary_fill_holes

from transformers_rfdetr.data.outlines import editable_polygons, join_rings, trace_outer_rings, trace_pixels

from properties import holds


def draw(rings, size) -> np.ndarray:
    polygons = [ring.ravel().tolist() for ring in rings]
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))).astype(bool)


@holds(100, mask=array_shapes(min_dims=2, max_dims=2, max_side=12).flatmap(lambda size: arrays(bool, size)))
def test_one_line_encloses_exactly_the_pixels_of_a_mask(mask):
    rings = trace_pixels(mask)
    assert bool(rings) == bool(mask.any())
    if rings:
        assert np.array_equal(draw([join_rings(rings)], mask.shape), mask)


@holds(100, mask=array_shapes(min_dims=2, max_dims=2, max_side=12).flatmap(lambda size: arrays(bool, size)))
def test_outer_rings_enclose_a_mask_and_at_most_its_holes(mask):
    rings = trace_outer_rings(coco_mask.encode(np.asfortranarray(mask.astype(np.uint8))))
    enclosed = draw(rings, mask.shape) if rings else np.zeros_like(mask)
    assert (enclosed >= mask).all()
    assert (enclosed <= binary_fill_holes(mask)).all()


def test_the_rings_of_a_square_with_a_hole_are_its_eight_corners():
    mask = np.ones((4, 5), bool)
    mask[1:3, 1:4] = False
    outer, inner = (set(map(tuple, ring.tolist())) for ring in trace_pixels(mask))
    assert outer == {(0, 0), (5, 0), (5, 4), (0, 4)}
    assert inner == {(1, 1), (4, 1), (4, 3), (1, 3)}


@holds(50, corners=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4))
def test_joined_rings_that_do_not_overlap_are_drawn_as_their_union(corners):
    squares = [
        np.array([[x, y], [x + 5, y], [x + 5, y + 5], [x, y + 5]], float) + 30 * np.array([number, 0])
        for number, (x, y) in enumerate(corners)
    ]
    size = (30, 30 * len(corners))
    assert np.array_equal(draw([join_rings(squares)], size), draw(squares, size))


def test_editable_polygons_of_a_disc_have_few_points_and_draw_exactly_its_pixels():
    rows, columns = np.mgrid[:80, :90]
    disc = np.hypot(rows - 40, columns - 50) < 30
    rle = coco_mask.encode(np.asfortranarray(disc.astype(np.uint8)))
    [polygon] = editable_polygons(rle)
    assert np.array_equal(draw([np.array(polygon)], disc.shape), disc)
    assert len(polygon) / 2 < 0.6 * len(trace_pixels(disc)[0])


def test_a_mask_of_two_parts_has_two_editable_polygons_and_one_with_a_hole_or_without_a_pixel_none():
    mask = np.zeros((20, 30), np.uint8, order="F")
    assert editable_polygons(coco_mask.encode(mask)) is None
    mask[2:9, 3:12] = mask[12:18, 20:29] = 1
    assert len(editable_polygons(coco_mask.encode(mask))) == 2
    mask[4:6, 5:8] = 0
    assert editable_polygons(coco_mask.encode(mask)) is None
