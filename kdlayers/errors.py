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
    """The axis of the channels, or the grid that tokens form, cannot be told."""


class MissingPackageError(KDLayersError, ImportError):
    """What was asked needs a package that is not installed; the message says what to install."""


class AttachError(KDLayersError, RuntimeError):
    """The model cannot take a KD layer at this point, or not in its present state."""


class CaptureError(KDLayersError, RuntimeError):
    """The student's training forward did not leave what the losses need."""


class StaleCaptureError(CaptureError):
    """What was recorded does not belong to this loss: another batch, or changed since."""


class NotFittedError(KDLayersError, RuntimeError):
    """Targets are used before ``fit`` has learnt them from the teacher."""


class FitError(KDLayersError, ValueError):
    """The data given to ``fit`` cannot be learnt from."""


class CheckpointError(KDLayersError, ValueError):
    """A file or state does not fit the model, is damaged, or is of an unknown version."""


class RecordError(KDLayersError, ValueError):
    """A record of the teacher is damaged, unfinished, or of another teacher, data set or model."""


class KDLayersWarning(UserWarning):
    """Something is probably not what was meant; training can go on."""
