"""`kd.fit` reads the loader several times; each pass sees the same data for any random source."""

import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from kdlayers import CodebookTargets, InheritExploreLoss, KDPoint, attach_kd
from kdlayers._targets import codebook_fit, reservoir
from kdlayers._targets.passes import Passes
from kdlayers.errors import ArgumentError, KDLayersWarning
from tests.nets import Net

IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 3
PLAIN = TensorDataset(IMAGES, LABELS)


class Augmented(Dataset):
    """Adds a number drawn from ``source`` to every image."""

    def __init__(self, draw, source=None):
        self.draw, self.transforms = draw, [{"source": source}]

    def __len__(self):
        return len(IMAGES)

    def __getitem__(self, index):
        return IMAGES[index] + self.draw(self.transforms[0]["source"]), LABELS[index]


def hidden(_, generator=torch.Generator()):  # noqa: B008  # where nobody finds it
    return torch.rand((), generator=generator)


def of_python(source):
    return (source or random).random()


def of_numpy(source):
    return float((source or np.random).random())


def of_torch(source):
    return torch.rand((), generator=source)


def loader_of(kind):
    """A loader that draws from the random source ``kind``."""
    mine = torch.Generator().manual_seed(random.randrange(2**32))
    size = {"batch_size": 8}
    return {
        "global torch": lambda: DataLoader(PLAIN, shuffle=True, **size),
        "generator": lambda: DataLoader(PLAIN, shuffle=True, generator=mine, **size),
        "sampler": lambda: DataLoader(PLAIN, sampler=RandomSampler(PLAIN, generator=mine), **size),
        "weighted": lambda: DataLoader(
            PLAIN, sampler=WeightedRandomSampler(torch.ones(48), 48, generator=mine), **size
        ),
        "python": lambda: DataLoader(Augmented(of_python), **size),
        "numpy": lambda: DataLoader(Augmented(of_numpy), **size),
        "own torch": lambda: DataLoader(Augmented(of_torch, mine), **size),
        "own python": lambda: DataLoader(Augmented(of_python, random.Random()), **size),
        "own numpy": lambda: DataLoader(Augmented(of_numpy, np.random.default_rng()), **size),
        "own old numpy": lambda: DataLoader(Augmented(of_numpy, np.random.RandomState()), **size),
        "workers": lambda: DataLoader(
            Augmented(of_python), shuffle=True, generator=mine, num_workers=2, **size
        ),
        "persistent": lambda: DataLoader(
            Augmented(of_torch), shuffle=True, num_workers=2, persistent_workers=True, **size
        ),
    }[kind]()


KINDS = (
    "global torch", "generator", "sampler", "weighted", "python", "numpy", "own torch",
    "own python", "own numpy", "own old numpy", "workers", "persistent",
)  # fmt: skip


def states(loader):
    found = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    held = [loader.generator, getattr(loader.sampler, "generator", None)]
    source = loader.dataset.transforms[0]["source"] if loader.dataset is not PLAIN else None
    if isinstance(source, np.random.Generator):
        found.append(str(source.bit_generator.state))
    elif isinstance(source, random.Random):
        found.append(source.getstate())
    elif isinstance(source, torch.Generator):
        held.append(source)
    return found + [generator.get_state() for generator in held if generator is not None]


def same(first, second):
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_sees_the_same_data_and_states_are_restored(kind):
    loader = loader_of(kind)
    before = states(loader)
    with Passes(loader, ()) as passes:
        first, second, other = (list(passes.batches(s, "", progress=False)) for s in (3, 3, 4))
    assert same(before, states(loader))
    assert len(first) == 6
    for one, two in zip(first, second, strict=True):
        assert same(one, two)
    assert not torch.equal(first[0][0], other[0][0])


@pytest.fixture
def two_passes(monkeypatch):
    monkeypatch.setattr(codebook_fit, "ROWS_PER_CENTER", 1)
    monkeypatch.setattr(codebook_fit, "SMALL_SAMPLE", 0)
    monkeypatch.setattr(reservoir, "LARGEST_SAMPLE", 1)


def learnt(loader, seed=0):
    torch.manual_seed(0)
    student, teacher = Net(4), Net(4)
    kd = attach_kd(student, teacher, [KDPoint("last", targets=CodebookTargets(8))], example=IMAGES)
    kd.fit(loader, seed=seed, progress=False)
    return kd.state_dict()["losses"]["TemplateLoss.last"]["template_targets.centers"]


@pytest.mark.parametrize("kind", ["generator", "python", "own numpy", "persistent"])
def test_fit_is_the_same_for_the_same_seed(kind, two_passes):
    first, second = learnt(loader_of(kind), seed=5), learnt(loader_of(kind), seed=5)
    assert torch.equal(first, second)
    assert not torch.equal(first, learnt(loader_of(kind), seed=6))


def test_warns_when_passes_see_different_data(two_passes):
    loader = DataLoader(Augmented(hidden), batch_size=8)
    with pytest.warns(KDLayersWarning, match="got different data"):
        learnt(loader)


def test_passes_of_an_auto_encoder_may_differ():
    loss = InheritExploreLoss(at="last", epochs=3)
    kd = attach_kd(Net(4), Net(4), losses=[loss], example=IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.fit(loader_of("generator"), progress=False)
    assert loss.fitted


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(4)

    def forward(self, image, mask):
        return self.net(image * mask)


@pytest.mark.parametrize("kind", [tuple, list])
def test_models_of_two_inputs_are_fitted(kind):
    torch.manual_seed(0)
    mask = (torch.rand(48, 1, 8, 8) > 0.5).float()
    student, teacher = TwoInputs(), TwoInputs()
    points = [KDPoint("net.last", targets=CodebookTargets(8))]
    kd = attach_kd(student, teacher, points, example=(IMAGES, mask))
    kd.fit([(kind((IMAGES, mask)), LABELS)], progress=False)
    plain = attach_kd(Net(4), teacher.net, [KDPoint("last", targets=CodebookTargets(8))])
    plain.fit([(IMAGES * mask, LABELS)], progress=False)
    key = "template_targets.centers"
    found, wanted = (
        h.state_dict()["losses"][n][key]
        for h, n in ((kd, "TemplateLoss.net.last"), (plain, "TemplateLoss.last"))
    )
    assert torch.equal(found, wanted)
    student(IMAGES, mask)
    assert kd.loss(LABELS).isfinite()


def test_a_second_input_is_not_taken_for_the_labels():
    kd = attach_kd(Net(4), Net(4), [KDPoint("last", targets=CodebookTargets(8))], example=IMAGES)
    with pytest.raises(
        ArgumentError, match=r"like images: .* \(\(first, second\), labels\).* masks"
    ):
        kd.fit([(IMAGES, IMAGES, LABELS)], progress=False)


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [
        ({"label": LABELS}, r"\(batch\['image'\], batch\['label'\]\)"),
        ({"seg": IMAGES[:, :1].long()}, r"\(batch\['image'\], batch\['seg'\]\)"),
        ({"box_of": LABELS.repeat(2), "boxes": IMAGES[:, 0, 0]}, r"\(batch\['image'\], None\)"),
    ],
)
def test_the_advice_for_dicts_names_labels_of_the_images(labels, wanted):
    kd = attach_kd(Net(4), Net(4), [KDPoint("last", targets=CodebookTargets(8))], example=IMAGES)
    with pytest.raises(ArgumentError, match=wanted):
        kd.fit([{"image": IMAGES, **labels}], progress=False)


def test_fit_under_inference_mode_learns_for_training():
    torch.manual_seed(0)
    student, teacher = Net(4), Net(4)
    loss = InheritExploreLoss(at="first", epochs=1, fit_lr=0.01)
    points = [KDPoint("last", targets=CodebookTargets(8))]
    kd = attach_kd(student, teacher, points, losses=[loss], example=IMAGES)
    with torch.inference_mode():
        kd.fit([(IMAGES.clone(), LABELS)], progress=False)
        assert torch.is_inference_mode_enabled()
    assert not any(b.is_inference() for term in kd._terms for b in term.loss.buffers())
    student(IMAGES)
    kd.loss(LABELS).backward()
    assert student.stem[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("shown", [True, False])
def test_a_bar_is_shown_on_a_terminal_only(tty, shown, monkeypatch):
    titles = []

    def tqdm(batches, desc, leave):
        titles.append(desc)
        return batches

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=tqdm, __spec__=object()))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty, raising=False)
    with Passes([1, 2], ()) as passes:
        assert list(passes.batches(0, "fit, pass 1", progress=shown)) == [1, 2]
    assert titles == ["fit, pass 1"] * (tty and shown)
