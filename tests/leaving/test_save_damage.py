"""Damaged and foreign files raise errors and leave the model unchanged, so another file loads."""

import io
import zipfile

import pytest
import torch

from kdlayers import KDPoint, attach_kd, load_student, save_student
from kdlayers._leaving.student_file import seal
from kdlayers._step.sites import slots
from kdlayers._utils.checksums import checksum
from kdlayers._utils.undo import all_or_nothing
from kdlayers.errors import CheckpointError
from tests.nets import Net, batch

pytestmark = pytest.mark.filterwarnings("ignore:.*quantized tensor creation:UserWarning")
IMAGES, _ = batch()


def saved(model=None):
    """The content of a file, and a file object that holds it."""
    student = Net(4) if model is None else model
    points = [KDPoint(name, num_templates=5) for name in ("first", "last")]
    attach_kd(student, at=points, example=IMAGES)
    file = io.BytesIO()
    save_student(student, file)
    file.seek(0)
    return torch.load(file, weights_only=True), file


def written(content):
    file = io.BytesIO()
    torch.save(seal(content), file)
    return file


def values_of(table):
    return [(k, id(t), t.detach().clone()) for k, t in table.items() if t is not None]


def picture(model):
    """Everything that loading could change: objects, values, hooks."""
    return [
        (
            module,
            list(module._modules.items()),
            list(module._forward_hooks.items()),
            [
                (k, id(t), t.detach().clone())
                for k, t in module._parameters.items()
                if t is not None
            ],
            [(k, id(t), t.clone()) for k, t in module._buffers.items() if t is not None],
            module.training,
        )
        for module in model.modules()
    ]


def same(before, after):
    if len(before) != len(after):
        return False
    for (a, *tables, weights, buffers, flag), (b, *others, weights2, buffers2, flag2) in zip(
        before, after, strict=True
    ):
        for (k, i, t), (k2, i2, t2) in zip(weights + buffers, weights2 + buffers2, strict=True):
            if (k, i) != (k2, i2) or not torch.equal(t, t2):
                return False
        if a is not b or tables != others or flag != flag2:
            return False
    return True


def refused(model, file, sentence):
    before = picture(model)
    with pytest.raises(CheckpointError, match=sentence):
        load_student(model, file)
    assert same(before, picture(model))
    load_student(model, saved()[1])  # nothing is in the way of a good file
    assert list(slots(model)) == ["first", "last"]


# Not one of these can be copied into an ordinary weight; the key comes late in the state.
STRANGE = {
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "dict": lambda t: {"weight": t},
    "not a tensor": lambda t: t.tolist(),
    "of another shape": lambda t: t[:1],
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("key", ["head.weight", "last.1.kd.head.weight", "last.1.kd.value.weight"])
def test_invalid_tensors_leave_the_model_unchanged(kind, key):
    content, _ = saved()
    content["state"][key] = STRANGE[kind](content["state"][key])
    # torch can write some of them and then not read them without code: refused too.
    refused(Net(4), written(content), "do not fit this Net|is damaged|could not be read")


def test_a_small_file_takes_no_more_memory_than_it_holds():
    content, _ = saved()
    templates, channels = 300_000, 300_000  # 360 GB
    content["layers"][1] |= {"num_templates": templates, "in_channels": channels}
    wide = {
        "head.weight": (templates, channels),
        "value.weight": (channels, templates),
        **dict.fromkeys(
            ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"), (templates,)
        ),
    }
    for key, shape in wide.items():
        content["state"][f"last.1.kd.{key}"] = torch.zeros(1).expand(shape)
    file = io.BytesIO()
    sums = {
        k: "?" if k.startswith("last.1.kd") else checksum(v) for k, v in content["state"].items()
    }
    torch.save({**content, "checksums": sums, "version": 1}, file)
    assert len(file.getvalue()) < 50_000
    refused(Net(4), file, "declares 360000000000 bytes but holds 4")
    torch.save({**content, "checksums": sums}, file)
    refused(Net(4), file, "is damaged")


def test_compressed_files_are_refused():
    # Such a file of 1 MB can hold zeros for 1 GB.
    file, packed = saved()[1], io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    refused(Net(4), packed, "entries are compressed")


def test_a_flipped_bit_in_a_weight_is_named():
    data = bytearray(saved()[1].getvalue())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        entry = max(entries, key=lambda entry: entry.file_size)
    at = data.index(archive_bytes(data, entry))
    data[at + 3] ^= 0x40
    refused(Net(4), io.BytesIO(data), "checksum of its entry 'archive/data/")


def archive_bytes(data, entry):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.read(entry)


def test_checksums_that_fit_an_archive_do_not_hide_other_values():
    content, _ = saved()
    content["state"]["head.weight"][0, 0] = -4.9e35
    file = io.BytesIO()
    torch.save(content, file)
    refused(Net(4), file, "checksum of 'head.weight' is wrong")
    content, _ = saved()
    content["layers"][0]["alpha"] = 0.5
    torch.save(content, file := io.BytesIO())
    refused(Net(4), file, "checksum of its description is wrong")
    content, _ = saved()
    del content["checksums"]
    torch.save(content, file := io.BytesIO())
    refused(Net(4), file, "has no checksums")


class Stubborn(Net):
    """Fails to load after most of its weights have been loaded."""

    def __init__(self, channels=4):
        super().__init__(channels)
        self.end = Refusing()


class Refusing(torch.nn.Module):
    refuses = False

    def _load_from_state_dict(self, *args):
        if Refusing.refuses:
            raise KeyError("not today")
        super()._load_from_state_dict(*args)


def test_a_model_that_fails_to_load_is_unchanged(monkeypatch):
    _, file = saved(Stubborn())
    model = Stubborn()
    before = picture(model)
    monkeypatch.setattr(Refusing, "refuses", True)
    with pytest.raises(CheckpointError, match="failed to load the file's weights: 'not today'"):
        load_student(model, file)
    assert same(before, picture(model))
    monkeypatch.setattr(Refusing, "refuses", False)
    load_student(model, file)


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = Net(4)
    with pytest.raises(CheckpointError, match=r"on the meta device.*model.to_empty"):
        load_student(model, saved()[1])


def test_two_layers_at_one_module_are_refused():
    content, _ = saved()
    content["layers"].append({**content["layers"][1], "name": "last.1"})
    content["layers"][1]["name"] = "last"
    refused(Net(4), written(content), "two of its KD layers are at the same module|is damaged")


def test_undo_restores_attributes_tables_and_values():
    model = Net(4)
    before = picture(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(RuntimeError, match="stop"), all_or_nothing(model), torch.no_grad():  # noqa: PT012
        model.head.weight.fill_(3)
        model.head = torch.nn.Linear(1, 1)
        model.stem[1].running_mean.add_(1)
        model.stem[1].num_batches_tracked = None
        model.note = 1
        model.eval()
        model.first.register_forward_hook(print)
        raise RuntimeError("stop")
    assert same(before, picture(model))
    assert [list(a) for a in attributes] == [list(vars(module)) for module in model.modules()]


def test_checksums_differ_for_different_states():
    base = torch.arange(6.0)
    trees = [
        base,
        base.reshape(2, 3),
        base.double(),
        base.int(),
        base + 1e-6,
        [base],
        {"a": base},
        {"b": base},
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": None},
        torch.quantize_per_tensor(base, 0.1, 0, torch.qint8),
        torch.quantize_per_tensor(base, 0.1, 1, torch.qint8),
        torch.zeros(0),
        torch.zeros(0, 3),
    ]
    assert len({checksum(tree) for tree in trees}) == len(trees)
    assert checksum({"a": 1, "b": base}) == checksum({"b": base.clone(), "a": 1})
    assert checksum(base.reshape(2, 3).T) == checksum(base.reshape(2, 3).T.contiguous())
    loop = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="nested too deeply"):
        checksum(loop)
    wide = [0]
    for _ in range(30):
        wide = [wide, wide]
    with pytest.raises(CheckpointError, match="too many entries"):
        checksum(wide)
