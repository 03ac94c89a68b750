"""Damaged files of students and of handles: refused, or loaded as if nothing had happened.

A try takes a whole file, damages its bytes or its content at random, and loads it. The file must be
refused with a `CheckpointError` that leaves the model as it was, or must give exactly what was
saved: a changed byte may be padding. Anything else is silently wrong or a raw error.
"""

import io
import random
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    FitNetLoss,
    KDPoint,
    attach_kd,
    load_student,
    save_student,
)
from kdlayers.errors import CheckpointError
from tests.nets import Net, batch

IMAGES, LABELS = batch()
OLD = Path(__file__).parents[1] / "data" / "student_v1.pt"
COUNTS = ("tried", "refused", "loaded unchanged", "silently wrong", "raw errors")


def run(tries: int, seed: int) -> dict[str, int]:
    """Damage files ``tries`` times, and count what came of it."""
    counts = dict.fromkeys(COUNTS, 0)
    with torch.random.fork_rng(devices=[]):
        for index in range(tries):
            counts["tried"] += 1
            counts[one_try(random.Random(f"{seed}/{index}"))] += 1
    return counts


def one_try(rng: random.Random) -> str:
    """Damage one file; what came of loading it, one of `COUNTS`."""
    name = rng.choice(["student", "student", "old student", "handle"])
    damage = rng.choice(BYTES if name == "old student" else BYTES + CONTENT)
    data = damage(rng, files()[name])
    return try_handle(data) if name == "handle" else try_student(data, name)


@cache
def files() -> dict[str, bytes]:
    """A whole file of each kind; of the "other student" the values alone are different."""
    torch.manual_seed(0)
    made = {"old student": OLD.read_bytes(), "handle": written(handle().state_dict())}
    for name in ("student", "other student"):
        file = io.BytesIO()
        save_student(handle().student, file)
        made[name] = file.getvalue()
    return made


@cache
def teacher():
    """The same teacher for all handles: a state warns if it is loaded beside another."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Net(6)


def handle():
    """A handle with fitted targets of both kinds and a loss with parameters."""
    points = [
        KDPoint("first", targets=DecisionTargets(1, components=2), alpha=0.5),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    losses = [FitNetLoss(at="first")]
    kd = attach_kd(Net(4), teacher(), points, losses=losses, example=IMAGES)
    kd.fit([(IMAGES, LABELS)])
    return kd


def written(content) -> bytes:
    """A file of torch.save."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


# ------------------------------------------------------------------ damage to bytes


def flip_bits(rng, data):
    """One to eight bits, often a single one."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_high_bits(rng, data):
    """A high bit inside the archive's data, which makes a weight huge."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [e for e in archive.infolist() if "/data/" in e.filename and e.file_size]
        held = archive.read(rng.choice(entries))
    at = data.index(held) + rng.randrange(len(held))
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def piece(rng, data):
    """Begin and end of a random piece of up to 400 bytes."""
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.randint(1, 400))


def cut(rng, data):
    """The beginning of the file alone."""
    return data[: rng.randrange(len(data))]


def drop(rng, data):
    """A piece is missing."""
    start, end = piece(rng, data)
    return data[:start] + data[end:]


def zero(rng, data):
    """A piece is zeros, as after a crash of the file system."""
    start, end = piece(rng, data)
    return data[:start] + bytes(end - start) + data[end:]


def noise(rng, data):
    """A piece is random."""
    start, end = piece(rng, data)
    return data[:start] + rng.randbytes(end - start) + data[end:]


def double(rng, data):
    """A piece is there twice."""
    start, end = piece(rng, data)
    return data[:end] + data[start:]


def append(rng, data):
    """Random bytes follow."""
    return data + rng.randbytes(rng.randint(1, 400))


def mix(rng, data):
    """The beginning of the file and the end of another one, as two writers may leave it."""
    other = files()["other student"]
    pairs = enumerate(zip(data, other, strict=False))
    differ = [at for at, (ours, theirs) in pairs if ours != theirs]
    at = rng.randint(differ[0] + 1, differ[-1])  # parts of both, and not one of them as a whole
    return data[:at] + other[at:]


# ------------------------------------------------------------------ damage to the content


def changed_content(change: Callable) -> Callable:
    """Damage that is written by torch.save again, so that the archive itself is whole."""

    def damage(rng, data):
        content = torch.load(io.BytesIO(data), weights_only=True)
        change(rng, content)
        return written(content)

    return damage


def tables(content):
    """The dicts in which the file's tensors are."""
    return [content["state"]] if "state" in content else list(content["losses"].values())


def change_value(rng, content):
    """One number of one tensor is another one."""
    table = rng.choice(tables(content))
    tensor = table[rng.choice(sorted(table))]
    flat = tensor.view(-1)
    at = rng.randrange(len(flat))
    if tensor.is_floating_point():
        flat[at] = rng.choice([float("nan"), float("inf"), -4.9e35, 0.0, float(flat[at]) * 1.001])
    else:
        flat[at] += 1


def change_tensor(rng, content):
    """One tensor has another shape, dtype or kind, or belongs to another key."""
    table = rng.choice(tables(content))
    key = rng.choice(sorted(table))
    value = table[key]
    table[key] = rng.choice(
        [
            lambda: value[None],
            lambda: value.double() if value.dtype != torch.float64 else value.float(),
            lambda: value.to("meta"),
            lambda: value.reshape(-1).to_sparse(),
            lambda: value.reshape(-1)[:1].expand(10**6, 10**6),
            lambda: table[rng.choice(sorted(table))] + 1,
            lambda: "much",
        ]
    )()


def change_keys(rng, content):
    """One tensor is missing, or there is one more."""
    table = rng.choice(tables(content))
    if rng.random() < 0.5:
        del table[rng.choice(sorted(table))]
    else:
        table["more"] = torch.zeros(3)


def change_description(rng, content):
    """One number or name that is not in a tensor is another one, or missing."""
    table = rng.choice([content, *content.get("layers", [])])
    key = rng.choice(sorted(table))
    if rng.random() < 0.2:
        del table[key]
        return
    other = [None, -1, 0, 1, 2, 10**12, 0.25, float("nan"), "", "last", "low", [], {}, True]
    table[key] = rng.choice([value for value in other if value != table[key]])


BYTES = [flip_bits, flip_bits, flip_high_bits, cut, drop, zero, noise, double, append, mix]
CONTENT = [
    changed_content(change)
    for change in (change_value, change_value, change_tensor, change_keys, change_description)
]

# ------------------------------------------------------------------ what came of it


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether two states have the same keys and the same bits."""
    return list(ours) == list(theirs) and all(
        value.dtype == theirs[key].dtype and torch.equal(value, theirs[key])
        for key, value in ours.items()
    )


@cache
def expected(name: str):
    """State, output and layers of the student in a whole file."""
    return seen(load_student(Net(4).eval(), io.BytesIO(files()[name])))


def seen(model):
    """Everything that a file decides about a model."""
    layers = [
        (name, m.alpha, m.memory, m.head.channel_dim)
        for name, m in model.named_modules()
        if name.endswith(".kd")
    ]
    with torch.no_grad():
        return model.state_dict(), model(IMAGES), layers


def try_student(data: bytes, name: str) -> str:
    """Load a damaged student."""
    model = Net(4).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_student(model, io.BytesIO(data))
    except CheckpointError:
        untouched = same(model.state_dict(), before)
        untouched &= not any(module._forward_hooks for module in model.modules())
        return "refused" if untouched else "silently wrong"
    except Exception:
        return "raw errors"
    (state, output, layers), (state2, output2, layers2) = seen(model), expected(name)
    equal = same(state, state2) and torch.equal(output, output2) and layers == layers2
    return "loaded unchanged" if equal else "silently wrong"


def contents(kd) -> dict[str, Tensor]:
    """All tensors of a handle, by loss and key."""
    return {
        f"{name}/{key}": value
        for name, state in kd.state_dict()["losses"].items()
        for key, value in state.items()
    }


@cache
def fitted():
    """A handle, and its state, to load into; other values than in the file."""
    torch.manual_seed(1)
    kd = handle()
    kd.step = 3
    return kd, kd.state_dict()


def try_handle(data: bytes) -> str:
    """Load a damaged state of a handle, as users do: with torch.load, and kd.load_state_dict."""
    kd, whole = fitted()
    try:
        state = torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # torch.load has no one exception for damage
        return "refused"
    before = contents(kd)
    try:
        kd.load_state_dict(state)
    except CheckpointError:
        untouched = same(contents(kd), before) and kd.step == 3
        return "refused" if untouched else "silently wrong"
    except Exception:
        return "raw errors"
    saved = torch.load(io.BytesIO(files()["handle"]), weights_only=True)
    theirs = {f"{n}/{k}": v for n, state in saved["losses"].items() for k, v in state.items()}
    equal = same(contents(kd), theirs) and kd.step == saved["step"]
    kd.load_state_dict(whole)
    return "loaded unchanged" if equal else "silently wrong"
