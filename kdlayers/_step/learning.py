"""What a handle does before training: it fits the losses, or records the teachers' outputs."""

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

from kdlayers._models.detectors import Pictures
from kdlayers._records.dataset import RecordedDataset
from kdlayers._step.attachment import Attachment
from kdlayers._step.batches import check_loader
from kdlayers._step.fitting import fit_terms
from kdlayers._step.grids import StudentGrids
from kdlayers._step.image_statistics import ImageStatistics
from kdlayers._step.ranks import Ranks
from kdlayers._step.recording import record
from kdlayers._step.terms import Plan
from kdlayers.errors import AttachError
from kdlayers.functional import _checks as check


class Learning(Attachment):
    """Base of `KDHandle`: everything that runs the teachers before the first training step."""

    _plan: Plan
    _ranks: Ranks | None
    _images: ImageStatistics
    _pictures: Pictures | None

    def fit(
        self,
        loader: Iterable[Any],
        *,
        prepare: Callable[[Any], Any] | None = None,
        seed: int = 0,
        progress: bool = True,
        refit: bool = False,
    ) -> None:
        """Learn from the teacher what the losses need: codebooks, decisions, auto-encoders.

        Runs the teacher over the loader. All points share the passes: a codebook takes up to two,
        decisions up to four, an auto-encoder its ``epochs``. The student is not
        trained; it runs in eval mode on one image of each size that the example did not have, to
        find the size of its maps. No random state changes. While a codebook or decisions are
        fitted, each pass starts from ``seed``, so that a loader that shuffles or augments gives
        every pass the same data: torch, Python's ``random``, NumPy and the generators of the
        loader, its samplers and its data set are seeded, and restored at the end. Workers are
        restarted for each pass. Later passes, which only auto-encoders need, start from ``seed``
        plus the number of the pass, so order and augmentation change as in training. The same seed
        gives the same result. Under ``torch.distributed`` call it on all ranks, each with its part
        of the data.

        Args:
            loader: gives batches ``(images, labels)``, or dicts with ``pixel_values`` and
                ``labels`` as Hugging Face's models take them. Give it the training images without
                augmentation. It must be iterable again, as a ``DataLoader`` or a list is. A
                detector's loader may give lists of images of any size, and lists of dicts as
                targets.
            prepare: a function that turns a batch into ``(images, labels)``, for loaders of other
                dicts, or if your loop normalises its batches. Default: none.
            seed: seed of the clustering and of the loader's randomness; default 0.
            progress: show a bar on a terminal if tqdm is installed; default True.
            refit: also refit what is already fitted; default False: fit only what is missing.

        Raises:
            FitError: if the loader is empty, cannot be iterated again although several passes are
                needed, or its data cannot be fitted.
            ArgumentTypeError: if ``loader`` does not give batches, as a model does not.
            ArgumentError: if a batch is not a pair of tensors.
            CaptureError: if the teacher cannot run on a batch.
            AttachError: if the handle has no teacher, or was detached.

        Warns:
            KDLayersWarning: if passes that need the same data began with different batches; if the
                student cannot run on images whose size is not the example's; later, if the first
                training batches are normalised differently.
        """
        self._need_teacher("fit")
        check_loader(loader)
        if self._ranks is not None:
            self._ranks.start()
        fit_terms(
            self._terms,
            self._teachers,
            StudentGrids(self.student, self._tape, self._terms),
            loader,
            self._images,
            self._pictures,
            prepare=prepare,
            seed=check.integer("seed", seed),
            progress=progress,
            refit=refit,
        )
        self._look_again()

    def record(
        self,
        dataset: Any,
        path: str | PathLike[str],
        *,
        views: int = 8,
        batch_size: int = 256,
        num_workers: int = 0,
        dtype: str = "float16",
        topk: int | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> RecordedDataset:
        """Run the teachers once over seeded views of a data set, and write what the losses read.

        Train with the data set that this returns and with ``kd.loss(y, recorded=key)``. The
        teachers then do not run, and the student sees the same views as they did. A stopped call
        continues where it was. A finished record is only opened. Under ``torch.distributed`` call
        it on every rank: each rank writes a part.

        Args:
            dataset: a map-style data set of (image, label), with its random transform. Equal seeds
                of Python's, NumPy's and torch's generators must give equal images.
            path: the folder to write.
            views: number of augmented views of each sample; default 8.
            batch_size: images in a forward of the teachers; default 256.
            num_workers: processes that load images; default 0, none.
            dtype: dtype of the record: ``"float16"`` (default) or ``"float32"``, which gives the
                live teacher's numbers up to rounding.
            topk: number of the largest logits to store, with the total probability of the others;
                default: all. Only losses that compare probabilities can read such a record.
            seed: seed of the views; default 0.
            progress: print the size of the record and the free space before the teachers run, and
                show a bar on a terminal if tqdm is installed; default True.

        Returns:
            A data set of (image, label, key); see :class:`kdlayers.RecordedDataset`.

        Raises:
            RecordError: if the folder holds something else, the disk is too small, or a transform
                cannot be seeded.
            ArgumentError: if an option cannot be used, such as ``topk`` with a loss that does not
                compare probabilities or standardises the logits.
            AttachError: if the handle has no teacher, or was detached.
        """
        self._need_teacher("record")
        options = {"views": views, "batch_size": batch_size, "dtype": dtype, "topk": topk}
        workers = {"num_workers": num_workers, "seed": seed, "progress": progress}
        grids = StudentGrids(self.student, self._tape, self._terms)
        return record(self._plan, grids, dataset, Path(path), **options, **workers)  # type: ignore[arg-type]

    def _need_teacher(self, method: str) -> None:
        if not self._teachers:
            raise AttachError(
                f"kd.{method}() needs a teacher: this handle was detached, or attached with "
                "teacher=None; call attach_kd(student, teacher, ...) again after kd.remove()"
            )
