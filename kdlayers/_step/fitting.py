"""What `kd.fit` does: passes of the teachers over a loader, for the losses that learn from them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from kdlayers._models.detectors import Pictures
from kdlayers._models.undisturbed import cuda_devices
from kdlayers._records.dataset import is_key
from kdlayers._step.batches import as_batch, split_batch
from kdlayers._step.grids import StudentGrids
from kdlayers._step.image_statistics import ImageStatistics
from kdlayers._step.replay import teacher_tensors
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Plan, Term
from kdlayers._targets.fitter import Fitter, pass_seed, run_passes
from kdlayers._targets.passes import Passes


def fit_terms(
    terms: Sequence[Term],
    teachers: Sequence[Teacher],
    grids: StudentGrids,
    loader: Iterable[Any],
    images: ImageStatistics,
    pictures: Pictures | None,
    *,
    prepare: Callable[[Any], Any] | None,
    seed: int,
    progress: bool,
    refit: bool,
) -> None:
    """Fit the terms that have something to learn; all of them in shared passes."""
    wanted = [term for term in terms if refit or not term.loss.fitted]
    pairs = [(term, term.loss.fitter(seed=seed)) for term in wanted]
    fitters = {id(fitter): (term, fitter) for term, fitter in pairs if fitter is not None}
    devices = {d for teacher in teachers for d in cuda_devices(teacher.model)}

    def batches(active: Sequence[Fitter], index: int) -> Iterator[Any]:
        plan = Plan([fitters[id(fitter)][0] for fitter in active], teachers)
        title = f"fit, pass {index + 1}: {', '.join({f.stage: None for f in active})}"
        start = pass_seed(seed, active, index)
        for batch in passes.batches(start, title, progress=progress):
            ready = batch if prepare is None else prepare(batch)
            ready = ready if pictures is None else as_batch(ready, pictures)
            inputs, labels = split_batch(ready)
            if index == 0:
                images.of_fit(inputs)
            labels = None if is_key(labels) else labels  # a record of images without labels
            yield teacher_tensors(plan, grids, ready, inputs), labels

    if fitters:
        images.begin_fit()
    with Passes(loader, devices) as passes:
        run_passes([fitter for _, fitter in fitters.values()], batches)
    for term, _ in fitters.values():
        term.remember(teachers)
