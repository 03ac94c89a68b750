"""Losses and KD layers in one handle: pairs, shared points and fits, schedules, resume."""

import copy
import math
from functools import cache
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from kdlayers import (
    AEKTLoss,
    AttentionTransferLoss,
    BinaryKDLoss,
    ChannelWiseLoss,
    CodebookTargets,
    DecisionTargets,
    DISTLoss,
    DKDLoss,
    FeatureLoss,
    FitNetLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    MutualLoss,
    RKDLoss,
    SimilarityPreservingLoss,
    StudentFriendlyKDLoss,
    attach_kd,
    bake,
)
from kdlayers.schedules import Cosine, LinearWarmup, Step
from tests.nets import Net, batch

IMAGES, LABELS = batch(12, pixels=16)
LOADER = [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]
LETKD = "letKD-2"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def vit():
    """A transformer whose tokens are on the grid of `Net`'s features, with one class token."""
    return VisionTransformer(16, 4, num_classes=3, embed_dim=12, depth=2, num_heads=2, mlp_ratio=2)


@cache
def trained():
    """A teacher with distinct logits; with equal logits, some gradients would be too small."""
    torch.manual_seed(9)
    teacher = Net(12, stride=2)
    optimiser = torch.optim.Adam(teacher.parameters(), lr=0.003)
    for _ in range(25):
        optimiser.zero_grad()
        loss = F.cross_entropy(teacher(IMAGES), LABELS)
        loss.backward()
        optimiser.step()
    assert loss < 0.7
    return teacher


# Student, its earlier and its later point; the teacher is always a wider `Net`.
ARCHITECTURES = {
    "cnn": (lambda: Net(8, stride=2), "first", "last"),
    "transformer": (vit, "blocks.0", "blocks.1"),
}

LOSSES = {
    "KD": lambda _: KDLoss(weight=0.5),
    "DKD": lambda _: DKDLoss(beta=1.0, weight=0.5),
    "AEKT": lambda _: AEKTLoss(beta=1.0, weight=0.5),
    "SKD": lambda _: StudentFriendlyKDLoss(weight=0.5),
    "Mutual": lambda _: MutualLoss(),
    "FitNet": lambda at: FitNetLoss(at=at),
    "AT": lambda at: AttentionTransferLoss(at=at, weight=10.0),
    "IE": lambda at: InheritExploreLoss(at=at, epochs=2),
    "Feature": lambda at: FeatureLoss(at=at, tokens="pooled", normalize_teacher=True),
    "DIST": lambda _: DISTLoss(weight=0.5),
    "Binary": lambda _: BinaryKDLoss(temperature=2.0),
    "RKD": lambda at: RKDLoss(at=at, weight=0.1),
    "SP": lambda at: SimilarityPreservingLoss(at=at, weight=10.0),
    "CWD": lambda at: ChannelWiseLoss(at=at, temperature=1.0),
}
NAMES = {
    "KD": "KDLoss",
    "DKD": "DKDLoss",
    "AEKT": "AEKTLoss",
    "SKD": "StudentFriendlyKDLoss",
    "Mutual": "MutualLoss",
    "FitNet": "FitNetLoss.{last}",
    "AT": "AttentionTransferLoss.{last}",
    "IE": "InheritExploreLoss.{last}",
    "Feature": "FeatureLoss.{last}",
    "DIST": "DISTLoss",
    "Binary": "BinaryKDLoss",
    "RKD": "RKDLoss.{last}",
    "SP": "SimilarityPreservingLoss.{last}",
    "CWD": "ChannelWiseLoss.{last}",
}
METRICS = {
    "AEKT": {"target", "others", "adaptive", "ratio"},
    "SKD": {"entropy", "agreement", "teacher_kl"},
    "IE": {"inheritance", "exploration"},
}


def points(first, last):
    return [
        KDPoint(first, "first", targets=DecisionTargets(1, components=2)),
        KDPoint(last, "last", targets=CodebookTargets(4)),
    ]


def attached(architecture, methods, seed=0):
    """A student, and a handle with the losses and layers that ``methods`` names."""
    torch.manual_seed(seed)
    make, first, last = ARCHITECTURES[architecture]
    student, teacher = make(), copy.deepcopy(trained())
    at = points(first, last) if LETKD in methods else ()
    losses = [LOSSES[name]((last, "last")) for name in methods if name != LETKD]
    return student, attach_kd(student, teacher, at, losses=losses, example=IMAGES)


def optimiser_of(student, kd):
    return torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.02, momentum=0.9)


def train(student, kd, optimiser, steps):
    """The user's loop; the terms of every step."""
    student.train()
    logged = []
    for index in range(steps):
        x, y = LOADER[index % len(LOADER)]
        loss = F.cross_entropy(student(x), y) + kd.loss(y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        logged.append(kd.terms)
    return logged


def snapshot(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def term_names(methods, architecture):
    """All names in ``kd.terms``."""
    _, first, last = ARCHITECTURES[architecture]
    terms = [NAMES[m].format(last=last) for m in methods if m != LETKD]
    names = {f"{NAMES[m].format(last=last)}.{x}" for m in methods for x in METRICS.get(m, ())}
    if LETKD in methods:
        terms += [f"TemplateLoss.{first}", f"TemplateLoss.{last}"]
    return {*terms, *(f"{term}.weighted" for term in terms), *names, "total"}


@pytest.mark.parametrize("pair", list(combinations([*LOSSES, LETKD], 2)), ids="+".join)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_pair_trains_together(architecture, pair):
    student, kd = attached(architecture, pair)
    plain = ARCHITECTURES[architecture][0]().state_dict()
    kd.fit(LOADER, progress=False)
    own, added = list(student.parameters()), list(kd.parameters())
    before = snapshot(added)
    logged = train(student, kd, optimiser_of(student, kd), 20)

    for terms in logged:
        assert set(terms) == term_names(pair, architecture)
        assert all(value.isfinite().all() and not value.requires_grad for value in terms.values())
        weighted = sum(value for name, value in terms.items() if name.endswith(".weighted"))
        torch.testing.assert_close(terms["total"], weighted)
    still = [i for i, (a, b) in enumerate(zip(added, before, strict=True)) if torch.equal(a, b)]
    assert still == []
    assert bool(added) == bool({"AEKT", "SKD", "FitNet", "IE", "CWD", "Feature"} & set(pair))
    assert not {id(p) for p in own} & {id(p) for p in added}
    check_exported(student, kd, plain, pair)


def check_exported(student, kd, plain, methods):
    """Only KD layers remain in the student; without layers nothing remains."""
    train_only = {p.data_ptr() for p in kd.parameters()}
    kd.detach()
    state = student.state_dict()
    extra = set(state) - set(plain)
    assert set(plain) <= set(state)
    assert all(".kd." in name for name in extra)
    assert bool(extra) == (LETKD in methods)
    assert not train_only & {value.data_ptr() for value in state.values()}
    if LETKD in methods:
        student.eval()
        baked = bake(student)
        torch.testing.assert_close(baked(IMAGES), student(IMAGES))
        shapes = [value.shape for value in baked.state_dict().values()]
        assert sorted(shapes) == sorted(value.shape for value in state.values())
    kd.remove()
    assert list(student.state_dict()) == list(plain)


def test_all_of_them_train_together():
    everything = [*LOSSES, LETKD]
    student, kd = attached("cnn", everything)
    kd.fit(LOADER, progress=False)
    before = snapshot(kd.parameters())
    logged = train(student, kd, optimiser_of(student, kd), 20)
    assert set(logged[-1]) == term_names(everything, "cnn")
    assert all(value.isfinite() for terms in logged for value in terms.values())
    assert not any(map(torch.equal, kd.parameters(), before))


class Tap:
    """The output of a module, and how often it ran."""

    def __init__(self, module):
        self.outputs = []
        self.handle = module.register_forward_hook(lambda m, args, out: self.outputs.append(out))


@pytest.mark.parametrize("with_layer", [False, True])
def test_one_point_read_by_several_losses(with_layer):
    student, teacher = Net(8, stride=2), copy.deepcopy(trained())
    losses = [
        FitNetLoss(at="last"),
        FitNetLoss(at="last", name="second hint", weight=0.0),
        AttentionTransferLoss(at="last"),
        InheritExploreLoss(at="last", epochs=1),
        KDLoss(),
    ]
    at = [KDPoint("last", targets=CodebookTargets(4))] if with_layer else ()
    kd = attach_kd(student, teacher, at, losses=losses, example=IMAGES)
    kd.fit(LOADER, progress=False)
    alone = copy.deepcopy(losses)
    ours, theirs = Tap(student.last), Tap(teacher.last)
    student.train()
    logits = student(IMAGES)
    kd.loss(LABELS)
    assert len(ours.outputs) == len(theirs.outputs) == 1
    with torch.no_grad():
        teacher_logits = teacher.eval()(IMAGES)
    for loss in alone:
        name = loss.name or type(loss).__name__ + (".last" if loss.at else "")
        pair = (ours.outputs[0], theirs.outputs[0]) if loss.at else (logits, teacher_logits)
        torch.testing.assert_close(kd.terms[name], loss(*pair).detach())
    assert kd.terms["second hint"] > 0
    assert kd.terms["second hint.weighted"] == 0


def fitted(methods, seed=3):
    """The handle's state after a fit, and the batches that the teacher ran over."""
    torch.manual_seed(1)
    student, teacher = Net(8, stride=2), copy.deepcopy(trained())
    at = points("first", "last") if LETKD in methods else ()
    losses = [InheritExploreLoss(at="last", epochs=6)] if "IE" in methods else []
    kd = attach_kd(student, teacher, at, losses=losses, example=IMAGES)
    runs = Tap(teacher.stem)  # the forward ends after the last tap
    kd.fit(LOADER, seed=seed, progress=False)
    return kd.state_dict()["losses"], len(runs.outputs)


def test_fits_that_share_passes_equal_separate_fits():
    layers, for_layers = fitted([LETKD])
    coder, for_coder = fitted(["IE"])
    both, for_both = fitted([LETKD, "IE"])
    assert for_coder == 6 * len(LOADER)
    assert for_both == max(for_layers, for_coder)
    learnt = {k: v for k, v in coder["InheritExploreLoss.last"].items() if "auto_encoder" in k}
    assert learnt
    for name, value in learnt.items():
        assert torch.equal(both["InheritExploreLoss.last"][name], value), name
    for name, state in layers.items():
        assert all(torch.equal(both[name][key], value) for key, value in state.items()), name


def test_schedules_are_weights():
    schedules = {
        "KDLoss": Cosine(6) * 0.9,
        "AEKTLoss": LinearWarmup(4),
        "AttentionTransferLoss.last": Step(2, 10.0, gamma=0.5),
        "MutualLoss": lambda step: 0.1 * step,
    }
    losses = [
        KDLoss(weight=schedules["KDLoss"]),
        AEKTLoss(beta=1.0, weight=schedules["AEKTLoss"]),
        AttentionTransferLoss(at="last", weight=schedules["AttentionTransferLoss.last"]),
        MutualLoss(weight=schedules["MutualLoss"]),
    ]
    student = Net(8, stride=2)
    kd = attach_kd(student, copy.deepcopy(trained()), losses=losses, example=IMAGES)
    # AEKT's weight of 0 in the first step is no optimiser that misses parameters: no warning.
    logged = train(student, kd, optimiser_of(student, kd), 8)
    for step, terms in enumerate(logged):
        for name, schedule in schedules.items():
            torch.testing.assert_close(terms[f"{name}.weighted"], schedule(step) * terms[name])
    cosine = [0.45 * (1 + math.cos(math.pi * min(step, 6) / 6)) for step in range(8)]
    found = [(terms["KDLoss.weighted"] / terms["KDLoss"]).item() for terms in logged]
    assert found == pytest.approx(cosine, abs=1e-6)


def everything_scheduled(seed):
    torch.manual_seed(seed)
    student, teacher = Net(8, stride=2), copy.deepcopy(trained())
    losses = [
        AEKTLoss(beta=1.0, weight=LinearWarmup(4)),
        StudentFriendlyKDLoss(base=DKDLoss(beta=1.0), weight=Cosine(10)),
        FitNetLoss(at="last"),
        InheritExploreLoss(at="last", epochs=2, split="random", seed=seed),
    ]
    at = points("first", "last")
    return student, attach_kd(student, teacher, at, losses=losses, example=IMAGES)


def flat(state, prefix=""):
    """All tensors and numbers of nested states, by path."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    found = {}
    for key, value in items:
        nested = isinstance(value, dict | list | tuple)
        found |= flat(value, f"{prefix}{key}/") if nested else {f"{prefix}{key}": value}
    return found


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_three_steps_and_three_after_resuming_equal_six(tmp_path, kind):
    def optimiser(student, kd):
        momentum = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {}
        return kind([*student.parameters(), *kd.parameters()], lr=0.01, **momentum)

    student, kd = everything_scheduled(seed=0)
    kd.fit(LOADER, progress=False)
    steps = optimiser(student, kd)
    train(student, kd, steps, 3)
    states = [student.state_dict(), kd.state_dict(), steps.state_dict()]
    torch.save(states, tmp_path / "resume.pt")
    logged = train(student, kd, steps, 3)

    again, kd_again = everything_scheduled(seed=5)
    steps_again = optimiser(again, kd_again)
    saved = torch.load(tmp_path / "resume.pt", weights_only=True)
    for target, state in zip((again, kd_again, steps_again), saved, strict=True):
        target.load_state_dict(state)
    logged_again = train(again, kd_again, steps_again, 3)

    assert flat(logged_again) == flat(logged)
    whole, resumed = (
        flat([model.state_dict(), handle.state_dict(), optim.state_dict()])
        for model, handle, optim in ((student, kd, steps), (again, kd_again, steps_again))
    )
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not same(whole[name], resumed[name])] == []
    # The optimiser has state for every train-only parameter too.
    count = len(list(student.parameters())) + len(list(kd.parameters()))
    assert len(steps_again.state_dict()["state"]) == count
