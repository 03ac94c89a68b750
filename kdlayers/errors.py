"""Exceptions and warnings of kdlayers.

Every message says what was asked, what was found and what to type instead. Each class is also one
of Python's own exceptions, so that an existing ``except ValueError`` keeps working.
"""

__all__ = [
    "ArgumentError",
    "ArgumentTypeError",
    "AttachError",
    "CaptureError",
    "CheckpointError",
    "FitError",
    "KDLayersError",
    "KDLayersWarning",
    "LayoutError",
    "MissingPackageError",
    "NoMatchError",
    "NotFittedError",
    "RecordError",
    "ShapeError",
    "StaleCaptureError",
]


class KDLayersError(Exception):
    """Base of every exception raised by kdlayers."""


class ArgumentError(KDLayersError, ValueError):
    """An argument has a value that cannot be used, such as 0 templates."""


class ArgumentTypeError(KDLayersError, TypeError):
    """An argument has a type that cannot be used."""


class NoMatchError(KDLayersError, ValueError):
    """A name or glob matches no module of the model; the nearest names are listed."""


class ShapeError(KDLayersError, ValueError):
    """Two tensors do not fit together, or one does not fit the module it is given to."""


class LayoutError(KDLayersError, ValueError):
    """The channel axis, or the grid that tokens form, cannot be determined."""


class MissingPackageError(KDLayersError, ImportError, RuntimeError):
    """A function needs a package that is not installed; the message says what to install."""


class AttachError(KDLayersError, RuntimeError):
    """The model cannot get a KD layer at this point, or in its present state."""


class CaptureError(KDLayersError, RuntimeError):
    """The student's training forward did not record what the losses need."""


class StaleCaptureError(CaptureError):
    """The recorded tensors belong to another batch, or were changed in place."""


class NotFittedError(KDLayersError, RuntimeError):
    """Targets or a loss were used before ``kd.fit``."""


class FitError(KDLayersError, ValueError):
    """``fit`` got data that it cannot use."""


class CheckpointError(KDLayersError, ValueError):
    """A file or state does not fit the model, is damaged, or is of an unknown version."""


class RecordError(KDLayersError, ValueError):
    """A record of the teacher is damaged, unfinished, or of another teacher, data set or model."""


class KDLayersWarning(UserWarning):
    """Something is probably a mistake, but training can continue."""
