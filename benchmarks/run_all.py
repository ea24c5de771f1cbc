"""Run all benchmarks and compare them with their targets: `make bench`, or

    python benchmarks/run_all.py                      # CPU -> benchmarks/RESULTS.md
    python benchmarks/run_all.py --device cuda        # GPU -> benchmarks/RESULTS_GPU.md
    python benchmarks/run_all.py --nuclei FOLDER      # real images for preprocessing, see preprocessing.py
    python benchmarks/run_all.py --quick              # check that everything runs, write nothing

Each script also runs alone; `--help` lists its options. On a GPU the scripts are forward.py (also images per second of
batches), prediction.py (latency of one image in fp32, in fp16, and compiled with CUDA graphs), runtimes.py (onnxruntime
and TensorRT), training_step.py (images per second, memory), step_parts.py (where the time of a step goes),
validation.py and post_processing.py; what is not installed is skipped, with a line that says so. The CPU run needs
Linux, and 14 GiB of free memory for the port's training step.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
from evaluation_memory import alone, count_outputs_of_the_port, stream
from peers import PEERS, Measurement, show, table

HERE = Path(__file__).parent
RESULTS = {"cpu": HERE / "RESULTS.md", "cuda": HERE / "RESULTS_GPU.md"}
PACKAGES = ("torch", "torchvision", "transformers", "rfdetr", "transformers-rfdetr", "numpy", "pycocotools")
NANO, MEDIUM = "rf-detr-seg-nano", "rf-detr-seg-medium"
SCRIPTS = {
    "cpu": [
        "forward --repeats 7",
        "training_step",
        "preprocessing",
        "post_processing",
        "prediction --repeats 5",
        "runtimes --repeats 7",
    ],
    "cuda": [
        f"forward --variant {NANO} {MEDIUM} --repeats 100 --throughput 1 8 64",
        f"prediction --variant {NANO} {MEDIUM} --repeats 100",
        f"runtimes --variant {NANO} {MEDIUM} --repeats 100",
        f"training_step --variant {NANO} --batch-sizes 16 --time-batch 16 --bf16 --repeats 10",
        f"step_parts --variant {NANO} --batch 16 --bf16 --repeats 10",
        f"validation --variant {NANO} {MEDIUM} --images 200 --batch 32",
        "post_processing",
    ],
}


class Target(NamedTuple):
    """An upper limit for one of our numbers: `limit` x the number of `against`, or `limit` itself."""

    area: str
    case: str
    ours: str
    limit: float
    against: str = ""
    against_case: str = ""  # if it differs from `case`
    variant: str = MEDIUM


TARGETS = {
    "cpu": [
        Target("forward", "FLOPs, B=1", "ours", 87e9),
        Target("forward", "time, B=1", "ours", 1.0, "rfdetr optimised"),
        Target("forward", "time, B=1", "ours compiled", 0.95, "rfdetr optimised"),
        Target("forward", "time, B=1", "ours bf16", 0.65, "rfdetr optimised"),
        Target("training step", "peak memory, B=4", "ours", 0.7, "rfdetr"),
        Target("training step", "peak memory, B=4", "ours checkpointed", 0.4, "rfdetr"),
        Target("training step", "time, B=2", "ours", 0.85, "rfdetr"),
        Target("preprocessing", "with masks", "ours", 0.35, "port"),
        Target("preprocessing", "with masks", "ours cropped", 0.25, "port"),
        Target("preprocessing", "with masks, 1 thread", "ours cropped", 0.25, "port"),
        Target("preprocessing", "labels", "ours cropped", 0.02, "ours"),
        Target("post-processing", "100 at 3000x4000, label map", "ours", 0.1, "port"),
        Target("post-processing", "100 at 3000x4000, masks", "ours", 0.1, "port"),
        Target("post-processing", "100 at 3000x4000, RLE", "ours", 0.1, "port", "100 at 3000x4000, masks"),
        Target("post-processing", "100 at 3000x4000, RLE, memory", "ours", 2.0**30),
        Target("post-processing", "30 at 480x640, label map", "ours", 0.4, "port"),
        Target("post-processing", "30 at 480x640, masks", "ours", 0.4, "port"),
        Target("post-processing", "records of 200 at 480x640, 2 threads", "ours", 0.010),
        Target("post-processing", "records of 200 at 1080x1920, 2 threads", "ours", 0.025),
        Target("evaluation", "host memory kept per image", "ours", 1e5),
        Target("runtimes", "export", "ours", 30.0, variant=NANO),
        *(
            Target("runtimes", "time, B=1", f"ours {runtime}", 0.95, f"rfdetr {runtime}", variant=variant)
            for variant in (NANO, MEDIUM)
            for runtime in ("onnxruntime", "OpenVINO")
        ),
        Target("evaluation", "compute() after 5000 images", "ours", 20),
    ],
    "cuda": [
        Target("prediction", "whole", "ours compiled fp16", 0.2, "port", variant=NANO),
        Target("prediction", "whole", "ours compiled fp16", 0.2, "port"),
        Target("training step", "time, B=16, bf16", "ours", 1 / 1.3, "rfdetr", variant=NANO),
        Target("training step", "peak memory, B=16, bf16", "ours", 0.7, "rfdetr", variant=NANO),
    ],
}
# Explanations of missed targets, by (area, case, ours).
NOTES: dict[tuple[str, str, str], str] = {
    ("forward", "time, B=1", "ours"): (
        "0.997 to 1.05 in five runs: both forms compute nearly the same (72.9 and 74.3 GFLOP) in the same libraries"
    ),
    ("forward", "time, B=1", "ours compiled"): (
        "the compiled model multiplies with oneDNN, the others with MKL: 460 and 212 GFLOP/s in float32 on an AMD EPYC"
        " with AVX512 (1,296 x 384 times 384 x 1,536, 2 threads)"
    ),
    ("forward", "time, B=1", "ours bf16"): (
        "0.46 to 0.67 in three runs with bf16 instructions; without them, bf16 takes 7 to 9 times as long as float32 in"
        " each of the three"
    ),
    ("preprocessing", "with masks", "ours cropped"): (
        "only the port gains from a second thread; a worker of a data loader has one"
    ),
    **{
        ("runtimes", "time, B=1", f"ours {runtime}"): (
            "0.985 to 1.06: rfdetr's export is its optimised form, with nearly the same FLOPs as ours. Materializing"
            " the masks of detections only cannot save 5 %: those of all 200 queries are 1.2 of 73 GFLOP"
        )
        for runtime in ("onnxruntime", "OpenVINO")
    },
    ("training step", "time, B=2", "ours"): (
        "60 % of the step is matrix products, in MKL: 432 GFLOP per image, against 496 in rfdetr (the"
        " counter says 501 and 565, because it counts depthwise convolutions as full ones in the backward pass);"
        " 13 % is attention. The ratio was 0.846 to 0.99 in six runs, and 0.847 in processor time, one thread,"
        " one image"
    ),
    ("preprocessing", "with masks", "ours"): (
        "0.26 to 0.45 in seven runs: a third of the time is the first access to the 245 MB of masks,"
        " which varies because the system must clear the memory; the rest is pycocotools drawing them"
    ),
}


def main(argv: list[str] | None = None) -> None:
    """Run all scripts and write the results; exit with status 1 if a script failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SCRIPTS), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--nuclei",
        type=Path,
        metavar="FOLDER",
        help="real images for preprocessing.py --folder (default: drawn images)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="check that all scripts run, with small models and inputs (default: off)"
    )
    arguments = parser.parse_args(argv)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "measurements.jsonl")
        lines.touch()
        for script in SCRIPTS[arguments.device]:
            print(f"\n{script}", flush=True)
            name, *options = script.split()
            options += ["--device", arguments.device, "--json", str(lines), *["--quick"] * arguments.quick]
            if name == "preprocessing" and arguments.nuclei:
                options += ["--folder", str(arguments.nuclei)]
            # Imports of the peers emit warnings, in each process.
            quiet = {**os.environ, "PYTHONWARNINGS": "ignore"}
            if subprocess.run([sys.executable, HERE / f"{name}.py", *options], env=quiet, check=False).returncode:
                failed.append(name)
        measurements = [Measurement(**json.loads(line)) for line in lines.read_text().splitlines()]
    if arguments.device == "cpu":
        measurements += measure_evaluation(50 if arguments.quick else 5000)
    shown = " --nuclei FOLDER" * bool(arguments.nuclei) + " --device cuda" * (arguments.device == "cuda")
    page = write_page(f"python benchmarks/run_all.py{shown}", measurements, TARGETS[arguments.device], failed)
    if not arguments.quick:
        RESULTS[arguments.device].write_text(page)
    print(f"\n{page}")
    sys.exit(f"{', '.join(failed)} failed; see the output above" if failed else 0)


def measure_evaluation(num_images: int) -> list[Measurement]:
    """Measure our streamed evaluation, and the bytes that the stock Trainer keeps per image with the port."""
    ours, port = alone(stream, num_images, "compact"), sum(size for _, size in alone(count_outputs_of_the_port))
    kept = "host memory kept per image"
    numbers = [
        (kept, "ours", ours["rss"] / num_images, "B"),
        (kept, "port", port, "B"),
        (f"compute() after {num_images} images", "ours", ours["compute"], "s"),
    ]
    return [Measurement("evaluation", MEDIUM, *number, "cpu") for number in numbers]


def write_page(command: str, measurements: list[Measurement], targets: list[Target], failed: list[str]) -> str:
    """Return the results in Markdown."""
    parts = [
        "# Benchmarks",
        f"`{command}`, {datetime.date.today()}, {describe_machine()}.",
        f"Python {platform.python_version()}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}.",
        "All three implementations have the same random weights and run in turns in the same process; bytes are"
        " measured in a fresh process for each number. `run_all.py` lists the scripts, and each script describes"
        " what it measures.",
        f"Failed, and missing below: {', '.join(failed)}." if failed else "",
        "## Targets",
        targets_table(measurements, targets),
        "\n".join(dict.fromkeys(f"* {t.area}, {t.case}, {t.ours}: {NOTES[t[:3]]}" for t in targets if t[:3] in NOTES)),
        "## Everything",
        table(measurements),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def targets_table(measurements: list[Measurement], targets: list[Target]) -> str:
    """Return a table with one row per target; "not measured" where a number is missing."""
    found = {m[:4]: m for m in measurements}
    lines = ["| what | port | rfdetr | ours | is | at most | met |", "|---|---:|---:|---:|---:|---:|---|"]
    for target in targets:
        place = (target.area, target.variant, target.against_case or target.case)
        model, form = target.variant.removeprefix("rf-detr-"), target.ours.removeprefix("ours")
        cells = [f"{target.area}, {model}, {target.case}{form and ','}{form}"]
        for peer in PEERS:
            forms = [m for m in measurements if m[:3] == place and m.implementation.split()[0] == peer]
            cells.append(", ".join(f"{m.implementation.removeprefix(peer)} {show(m.value, m.unit)}" for m in forms))
        ours = found.get((target.area, target.variant, target.case, target.ours))
        against = found.get((*place, target.against))
        if ours is None or (target.against and against is None):
            cells += ["not measured", "", "", ""]
        elif against is None:
            value, limit = show(ours.value, ours.unit), show(target.limit, ours.unit)
            cells += [value, value, limit, "yes" if ours.value <= target.limit else "**no**"]
        else:
            ratio = ours.value / against.value
            at_most, met = f"{target.limit:.2g} x {target.against}", "yes" if ratio <= target.limit else "**no**"
            cells += [show(ours.value, ours.unit), f"{ratio:.3g} x", at_most, met]
        lines.append(f"| {' | '.join(cell.strip() for cell in cells)} |")
    return "\n".join(lines)


def describe_machine() -> str:
    """Return the processor, its cores, memory, and whether it has bf16 instructions."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    fields = {name.strip(): value.strip() for name, value in lines}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    bf16 = "with" if {"avx512_bf16", "amx_bf16"} & set(fields.get("flags", "").split()) else "without"
    kind = f"{fields.get('model name', platform.machine())} ({torch.backends.cpu.get_cpu_capability()}, {bf16} bf16)"
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(os.sched_getaffinity(0))} cores of {kind}, {torch.get_num_threads()} threads, {memory:.0f} GiB{gpu}"


if __name__ == "__main__":
    main()
