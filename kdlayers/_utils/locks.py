"""One lock per model, for work that must not run concurrently on the same model."""

from threading import Lock, RLock
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_MAKING = Lock()


def lock_of(model: nn.Module) -> RLock:
    """The lock of ``model``, which the same thread may take again.

    It is stored outside the model, so that copies and pickles of the model do not include it.
    """
    with _MAKING:
        return _LOCKS.setdefault(model, RLock())
