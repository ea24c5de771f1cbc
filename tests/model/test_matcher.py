"""Assignment of all images at once, as on a GPU. Oracle: the cost of SciPy's assignment of each block alone."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from transformers_rfdetr.model import matcher_rf_detr
from transformers_rfdetr.model.matcher_rf_detr import assign, assign_together, is_assigned_on_gpu

from small_models import pixels, small_model, targets

QUERIES, GROUPS = 9, 3


def solve_with_scipy(cost: torch.Tensor) -> torch.Tensor:
    """What torch-linear-assignment documents: (B, workers, tasks) -> (B, workers), task of each worker, or -1."""
    tasks = torch.full(cost.shape[:2], -1)
    for found, one in zip(tasks, cost, strict=True):
        workers, assigned = linear_sum_assignment(one.numpy())
        found[workers] = torch.from_numpy(assigned)
    return tasks


@pytest.fixture(params=["SciPy in its place", "torch-linear-assignment"])
def _solver(request, monkeypatch):
    if request.param == "SciPy in its place":
        monkeypatch.setattr(matcher_rf_detr, "batch_linear_assignment", solve_with_scipy)
    elif matcher_rf_detr.batch_linear_assignment is None:
        pytest.skip("torch-linear-assignment is not installed")


def draw_costs(*counts: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(QUERIES * GROUPS, count, generator=generator) for count in counts]


@pytest.mark.usefixtures("_solver")
def test_all_costs_are_assigned_together_as_cheaply_as_each_alone():
    costs = draw_costs(4, 0, 1, QUERIES, 2)
    for cost, (queries, objects) in zip(costs, assign_together(costs, GROUPS), strict=True):
        expected = sum(block[linear_sum_assignment(block)].sum().item() for block in cost.split(QUERIES))
        assert cost[queries, objects].sum().item() == pytest.approx(expected, rel=1e-5)
        assert len({*queries.tolist()}) == len(queries) == GROUPS * cost.shape[1]
        for group in range(GROUPS):
            in_group = queries // QUERIES == group
            assert sorted(objects[in_group].tolist()) == list(range(cost.shape[1]))


@pytest.mark.usefixtures("_solver")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_costs_that_are_not_finite_are_assigned_together_as_alone(value):
    costs = draw_costs(3, 2)
    costs[0][2:8, 1] = costs[0][QUERIES:, 0] = value
    for cost, together in zip(costs, assign_together(costs, GROUPS), strict=True):
        pairs, expected = (
            {*zip(*map(torch.Tensor.tolist, ones), strict=True)} for ones in (together, assign(cost, GROUPS))
        )
        assert len(pairs) == len(expected)
        is_finite = cost.isfinite()
        assert {pair for pair in pairs if is_finite[pair]} == {pair for pair in expected if is_finite[pair]}


@pytest.mark.usefixtures("_solver")
def test_the_losses_are_those_of_the_assignment_of_each_image_alone(monkeypatch):
    model, labels = small_model(), targets(2, 0, 3)
    expected = model(pixels(3), labels=labels).loss_dict
    monkeypatch.setattr(matcher_rf_detr, "is_assigned_on_gpu", lambda *_: True)
    monkeypatch.setattr(matcher_rf_detr, "assign", None)
    torch.testing.assert_close(model(pixels(3), labels=labels).loss_dict, expected)


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("counts", "num_groups", "is_installed", "is_expected"),
    [
        ((4, 0), 100, True, True),
        ((4, 0), 99, True, False),  # too few problems
        ((4, 10), 100, True, False),  # more objects than queries: other objects would be left than SciPy leaves
        ((0, 0), 100, True, False),
        ((4, 0), 100, False, False),
    ],
)
def test_costs_on_a_gpu_are_assigned_there_if_that_is_possible_and_pays(
    counts, num_groups, is_installed, is_expected, monkeypatch
):
    monkeypatch.setattr(matcher_rf_detr, "batch_linear_assignment", solve_with_scipy if is_installed else None)
    costs = [torch.zeros(QUERIES * num_groups, count) for count in counts]
    assert not is_assigned_on_gpu(costs, num_groups)
    assert is_assigned_on_gpu([cost.as_subclass(OnGpu) for cost in costs], num_groups) == is_expected
