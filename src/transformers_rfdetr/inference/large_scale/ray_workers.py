"""Predict chunks of units with Ray Data, whose workers have loaded the model once.

A block of Ray Data is a chunk of units, in memory, and a worker reads its images itself: there are no read tasks, which
would wait for CPUs that the workers have, and images do not pass through the object store. A worker gets one chunk at a
time. A chunk whose worker or machine is lost is predicted again by another one, as Ray does without limit; workers
therefore count how often they begin with a chunk, so that an image that kills them does not stop the job.

Ray Data: https://docs.ray.io/en/latest/data/batch_inference.html
"""

import os
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.utils import logging

from ..folder import FolderOptions
from ..runners import RuntimeModel, load_exported
from .table import to_table
from .unit_predictor import UnitPredictor, error_row
from .units import Unit

logger = logging.get_logger(__name__)

_MAX_DEATHS = 3  # of workers with the same unit, which is then given up
_CPUS_WITHOUT_GPU = 4


class Resources(NamedTuple):
    """What each of a number of workers needs."""

    num_workers: int
    cpus: int
    gpus: int

    @property
    def needs(self) -> str:
        """Return the resources of a worker in words."""
        return f"{self.cpus} CPUs{' and a GPU' * self.gpus}"


@contextmanager
def ray_cluster(address: str | None, concurrency: int | None, threads: int | None, device: str) -> Iterator[Resources]:
    """Connect to a cluster, or start Ray on this machine; yield what its workers get. See [`predict_dataset`]."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    try:
        import ray.data
    except ImportError as error:
        raise ImportError('engine="ray" requires Ray Data: pip install "transformers-rfdetr[distributed]"') from error
    was_initialized = ray.is_initialized()
    if not was_initialized:
        _connect(address)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources = choose_resources(machines, concurrency, threads, device)
        free = ray.available_resources()
        if free.get("CPU", 0) < resources.cpus or free.get("GPU", 0) < resources.gpus:
            logger.warning(
                f"The cluster is busy: a worker needs {resources.needs}, and {free.get('CPU', 0):.0f} CPUs and"
                f" {free.get('GPU', 0):.0f} GPUs are free. Wait, end other jobs, or lower `threads`."
            )
        yield resources
    finally:
        if not was_initialized:
            ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    try:
        if address is None:
            ray.init(include_dashboard=False, log_to_driver=False)
        else:
            ray.init(address=address, log_to_driver=False)
    except ConnectionError as error:
        raise ValueError(
            f"`address` must be that of a running cluster, got {address}: {error}. Start one with `ray start --head`."
        ) from error


def choose_resources(
    machines: Sequence[dict[str, float]], concurrency: int | None, threads: int | None, device: str
) -> Resources:
    """Return how many workers to start and what each needs, so that at least one has room on a machine.

    Args:
        machines: "CPU" and "GPU" of each machine of the cluster.
        concurrency: See [`predict_dataset`].
        threads: See [`predict_dataset`].
        device: See [`predict_dataset`].

    Raises:
        ValueError: an argument is out of range, or no machine has room for a worker.
    """
    for name, value in (("concurrency", concurrency), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}")
    if device not in ("auto", "cpu"):
        raise ValueError(f'`device` must be "auto" or "cpu" with Ray, which assigns the GPUs, got {device!r}')
    gpus = int(device == "auto" and any(machine.get("GPU", 0) >= 1 for machine in machines))
    all_cpus = [int(machine.get("CPU", 0)) for machine in machines]
    if threads is None and gpus:
        threads = 1
    elif threads is None:
        share = sum(all_cpus) // concurrency if concurrency else _CPUS_WITHOUT_GPU
        threads = max(1, min([share, *(cpus for cpus in all_cpus if cpus)]))
    room = sum(
        min(cpus // threads, int(machine.get("GPU", 0)) if gpus else cpus)
        for cpus, machine in zip(all_cpus, machines, strict=True)
    )
    resources = Resources(concurrency or room, threads, gpus)
    if room == 0:
        raise ValueError(
            f"a worker needs {resources.needs} on one machine, but the cluster is too small: its machines have"
            f" {', '.join(map(str, all_cpus))} CPUs. Lower `threads`, or add machines."
        )
    if concurrency is not None and concurrency > room:
        logger.warning(
            f"The cluster has room for {room} of {concurrency} workers with {resources.needs} each. The others start"
            " when machines are added."
        )
    return resources


def predict_with_ray(
    model: Any, processor: Any, options: FolderOptions, chunks: Sequence[Sequence[Unit]], resources: Resources
) -> Generator[Any, None, None]:
    """Yield the rows of each unit once, as tables, in any order.

    A unit of which three workers died becomes a row with an error.

    Raises:
        Exception: the error of a worker, such as CUDA out of memory.
    """
    import ray

    class Attempts(Counter[Any]):
        """How often workers began with each chunk. Local, so that its process does not import this package."""

        def begin(self, *chunk: Any) -> int:
            self[chunk] += 1
            return self[chunk]

    payload = model._path if isinstance(model, RuntimeModel) else model
    attempts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
    arguments = (ray.put((payload, processor, options)), resources, attempts)
    while chunks:
        again: list[list[Unit]] = []
        for answer in _answers(chunks, arguments, resources):
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, list):
                logger.warning(f"{_MAX_DEATHS} workers died of {len(answer)} units, which are predicted one by one.")
                again += [[unit] for unit in answer]
            else:
                yield answer
        chunks = again


def _answers(chunks: Sequence[Sequence[Unit]], arguments: tuple[Any, ...], resources: Resources) -> Iterator[Any]:
    """Yield what [`_Worker`] answers to each chunk."""
    import ray.data
    from ray import cloudpickle

    dataset = ray.data.from_items(
        [{"units": cloudpickle.dumps(chunk)} for chunk in chunks], override_num_blocks=len(chunks)
    )
    dataset.context.enable_progress_bars = dataset.context.print_on_execution_start = False
    dataset.context.execution_no_progress_timeout_s = -1  # a video may take hours
    num_workers = min(resources.num_workers, len(chunks))
    answers = dataset.map_batches(
        _Worker,
        fn_constructor_args=arguments,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
    )
    for row in answers.iter_rows():
        yield cloudpickle.loads(row["answer"])


class _Worker:
    """The actor: a process that has loaded the model."""

    def __init__(self, payload: Any, resources: Resources, attempts: Any) -> None:
        import ray

        model, processor, options = ray.get(payload)
        torch.set_num_threads(resources.cpus)
        device = "cuda" if resources.gpus else "cpu"
        if isinstance(model, Path):
            model, _ = load_exported(model, device=device, threads=resources.cpus)
        self._predictor = UnitPredictor(model.to(device), processor, options)
        self._attempts = attempts

    def __call__(self, block: dict[str, Any]) -> dict[str, list[bytes]]:
        """Return the rows of a chunk; its units if workers died of it; or an exception, whose type Ray would change."""
        import ray
        from ray import cloudpickle

        units = cloudpickle.loads(block["units"][0])
        try:
            if ray.get(self._attempts.begin.remote(units[0].name, len(units))) <= _MAX_DEATHS:
                answer = self._predictor(units)
            elif len(units) > 1:
                answer = list(units)
            else:
                answer = to_table([error_row(units[0], f"{_MAX_DEATHS} workers died of it")])
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = error
        return {"answer": [cloudpickle.dumps(answer)]}
