"""Finds modules by name or glob, and suggests the nearest names if there is no match."""

from collections.abc import Collection
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from kdlayers._models.detectors import BACKBONE
from kdlayers._models.wrappers import plain_name
from kdlayers.errors import NoMatchError

WRAPPERS = ("module.", "_orig_mod.")


def match(
    pattern: str, names: Collection[str], model: nn.Module, label: str, advice: str = ""
) -> list[str]:
    """The ``names`` that match ``pattern``, a name or a glob, in their order.

    ``advice`` is added to the error message.

    Raises:
        NoMatchError: if there is none.
    """
    forms = readings(pattern)
    for plain in (*forms, forms[-1].removeprefix(f"{BACKBONE}.")):
        if plain in names:
            return [plain]
        found = [name for name in names if _glob(name, plain)] if is_glob(plain) else []
        if found:
            return found
    raise NoMatchError(_no_match(pattern, names, model, label) + advice)


def is_glob(pattern: str) -> bool:
    """Whether ``pattern`` may match several names."""
    return any(character in pattern for character in "*?[")


def _glob(name: str, pattern: str) -> bool:
    """Match part by part, so that ``layer*`` matches the stages and not the modules in them."""
    parts, patterns = name.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def readings(name: str) -> list[str]:
    """``name``, then without what checkpoint_wrapper, DDP and torch.compile put into it.

    A model may have a submodule called ``module``, so that the shortest form is not always meant.
    """
    found = [*dict.fromkeys((name, plain_name(name)))]
    while (prefix := next((w for w in WRAPPERS if found[-1].startswith(w)), None)) is not None:
        found.append(found[-1].removeprefix(prefix))
    return found


def strip(name: str) -> str:
    """``name`` without any of the prefixes that DDP and torch.compile put before it."""
    return readings(name)[-1]


def _no_match(pattern: str, names: Collection[str], model: nn.Module, label: str) -> str:
    """The error message for a name that does not exist."""
    # A suggestion that looks like a glob is rarely helpful.
    near = [] if is_glob(pattern) else get_close_matches(strip(pattern), names, n=4)
    hint = ", ".join(repr(name) for name in near or _stages(names)[-6:])
    unused = ""
    if _exists(pattern, model):
        unused = (
            f"; {pattern!r} exists, but it does not run in forward, returns no floating-point "
            "tensor, or is TorchScript, which has no hooks"
        )
    usual = _usual_name(pattern, model)
    if usual in names:
        return f"{pattern!r} of the {label} is another name of its module {usual!r}; use {usual!r}"
    return (
        f"no module {pattern!r} runs in the {label} ({type(model).__name__}){unused}; nearest "
        f"names: {hint}; find_points({label}) lists usable points"
    )


def _stages(names: Collection[str]) -> list[str]:
    """Names near the top of the model; if there are stages (nested modules), only theirs."""
    top = [name for name in names if "." not in name]
    below = [name for name in names if name.count(".") < 2]
    holders = {name.rsplit(".", 2)[0] for name in names if name.count(".") > 1}
    for level in (top, below):
        stages = [name for name in level if name in holders]
        if len(stages) > 2:
            return stages
    return top


def _exists(name: str, model: nn.Module) -> bool:
    return name in dict(model.named_modules())


def _usual_name(name: str, model: nn.Module) -> str | None:
    """The first name of a module that the model has under several names."""
    module = dict(model.named_modules(remove_duplicate=False)).get(name)
    return next((usual for usual, other in model.named_modules() if other is module), None)
