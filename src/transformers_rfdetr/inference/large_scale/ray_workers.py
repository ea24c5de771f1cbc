"""Workers of Ray: actors that have loaded the model once and predict chunks of units.

A worker reads its images itself, so that neither images nor read tasks need the object store or further CPUs. A chunk
is given to a worker that is running, one at a time, so that there is never more than one result a worker to be written,
and a chunk whose worker is lost goes to any other one: the work does not wait for a lost machine.

Ray's actors: https://docs.ray.io/en/latest/ray-core/actors.html
"""

import os
from collections import deque
from collections.abc import Iterator, Sequence
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
_SECONDS_OF_SILENCE = 60


class Chunk(NamedTuple):
    """Units that a worker predicts at once, and how many workers died of them."""

    units: Sequence[Unit]
    num_deaths: int = 0


class Resources(NamedTuple):
    """What each of a number of workers needs."""

    num_workers: int
    cpus: int
    gpus: int


@contextmanager
def ray_workers(
    model: Any,
    processor: Any,
    options: FolderOptions,
    *,
    address: str | None = None,
    concurrency: int | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> Iterator["WorkerPool"]:
    """Yield workers on a cluster, and end them and what was started of Ray; see [`predict_dataset`]."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    try:
        import ray
    except ImportError as error:
        raise ImportError('engine="ray" requires Ray: pip install "transformers-rfdetr[distributed]"') from error
    was_initialized = ray.is_initialized()
    if not was_initialized:
        _connect(address)
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources = choose_resources(machines, concurrency, threads, device)
        payload = _Exported(model._path) if isinstance(model, RuntimeModel) else model
        pool = WorkerPool(ray.put((payload, processor, options)), resources)
        try:
            yield pool
        finally:
            pool.close()
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
    if room == 0:
        raise ValueError(
            f"a worker needs {threads} CPUs{' and a GPU' * gpus} on one machine, but the cluster is too small: its"
            f" machines have {', '.join(map(str, all_cpus))} CPUs. Lower `threads`, or add machines."
        )
    if concurrency is not None and concurrency > room:
        logger.warning(
            f"The cluster has room for {room} of {concurrency} workers with {threads} CPUs{' and a GPU' * gpus} each."
            " The others start when machines are added."
        )
    return Resources(concurrency or room, threads, gpus)


class _Exported(NamedTuple):
    """An exported model, which each worker opens itself."""

    path: Path


class _Worker:
    """The actor: a process that has loaded the model."""

    def __init__(self, payload: tuple[Any, Any, FolderOptions], resources: Resources) -> None:
        model, processor, options = payload
        torch.set_num_threads(resources.cpus)
        device = "cuda" if resources.gpus else "cpu"
        if isinstance(model, _Exported):
            model, _ = load_exported(model.path, device=device, threads=resources.cpus)
        self._predictor = UnitPredictor(model.to(device), processor, options)

    def ready(self) -> None:
        """Return when the model has been loaded."""

    def predict(self, units: Sequence[Unit]) -> Any:
        """Return the rows of some units."""
        return self._predictor(units)


class WorkerPool:
    """A number of workers, of which each that dies is replaced.

    Args:
        payload: Reference to model, processor and options.
        resources: What the workers need.
    """

    def __init__(self, payload: Any, resources: Resources) -> None:
        import ray

        self.resources = resources
        self._actor_class = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_restarts=0)(_Worker)
        self._payload = payload
        # What each worker does: a reference to its answer -> the worker and its chunk, or None while it starts.
        self._running: dict[Any, tuple[Any, Chunk | None]] = {}
        self._has_worked = False

    def predict(self, chunks: Sequence[Sequence[Unit]]) -> Iterator[Any]:
        """Yield the rows of each chunk once, as tables, in any order.

        A unit of which three workers died becomes a row with an error.

        Raises:
            Exception: the error of a worker, such as CUDA out of memory.
        """
        waiting = deque(Chunk(units) for units in chunks)
        for _ in range(min(self.resources.num_workers, len(waiting))):
            self._start_worker()
        while waiting or any(chunk for _, chunk in self._running.values()):
            yield from self._collect(waiting)

    def _start_worker(self) -> None:
        worker = self._actor_class.remote(self._payload, self.resources)
        self._running[worker.ready.remote()] = (worker, None)

    def _collect(self, waiting: deque[Chunk]) -> Iterator[Any]:
        """Wait for one answer, give its worker the next chunk, and yield the rows if there are any."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        answered, _ = ray.wait(list(self._running), timeout=_SECONDS_OF_SILENCE)
        if not answered:
            self._warn_of_silence()
            return
        worker, chunk = self._running.pop(answered[0])
        try:
            rows = ray.get(answered[0])
        except RayTaskError as error:
            raise error.as_instanceof_cause() from None
        except RayError as error:  # the worker or its machine died
            if getattr(error, "actor_init_failed", False):
                raise
            ray.kill(worker)
            self._start_worker()
            if chunk is not None:
                logger.warning(f"A worker of Ray died, and its {len(chunk.units)} units are predicted again: {error}")
                yield from _put_back(chunk, waiting, str(error))
            return
        self._has_worked = True
        if waiting:
            following = waiting.popleft()
            self._running[worker.predict.remote(following.units)] = (worker, following)
        if chunk is not None:
            yield rows

    def _warn_of_silence(self) -> None:
        import ray

        if not self._has_worked:
            needs = f"{self.resources.cpus} CPUs{' and a GPU' * self.resources.gpus}"
            logger.warning(
                f"No worker has started for {_SECONDS_OF_SILENCE} s. A worker needs {needs}; the cluster has"
                f" {ray.available_resources()} free. Wait, end other jobs, or lower `threads`."
            )

    def close(self) -> None:
        """End all workers."""
        import ray

        for worker, _ in self._running.values():
            ray.kill(worker)


def _put_back(chunk: Chunk, waiting: deque[Chunk], error: str) -> Iterator[Any]:
    """Let a chunk be predicted again: each unit by itself if workers died of it repeatedly, and finally not at all."""
    num_deaths = chunk.num_deaths + 1
    if num_deaths < _MAX_DEATHS:
        waiting.append(Chunk(chunk.units, num_deaths))
    elif len(chunk.units) > 1:
        waiting.extend(Chunk([unit], 1) for unit in chunk.units)
    else:
        yield to_table([error_row(chunk.units[0], f"{num_deaths} workers died of it: {error.splitlines()[0]}")])
