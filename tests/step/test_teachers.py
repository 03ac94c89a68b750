"""Several teachers, and students that teach each other."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdlayers import (
    CodebookTargets,
    DistillLoss,
    FeatureLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    MutualLoss,
    attach_kd,
    attach_mutual,
)
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    AttachError,
    KDLayersWarning,
    StaleCaptureError,
)
from tests.attach_tester import Frozen
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class InPlace(Net):
    """Changes the features of ``last`` in place; a subclass does so under inference mode."""

    def __init__(self):
        super().__init__(6)

    def forward(self, x):
        return self.head(self.last(self.first(self.stem(x))).sub_(0.5).mean((2, 3)))


class Inference(InPlace):
    forward = torch.inference_mode()(InPlace.forward)


def divergence(student, teacher_logits, temperature=4.0):
    """Plain KL with the temperature's square, from already run logits."""
    return temperature**2 * F.kl_div(
        F.log_softmax(student / temperature, 1),
        F.softmax(teacher_logits / temperature, 1),
        reduction="batchmean",
    )


def eval_logits(model):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(IMAGES)


def test_logits_are_a_weighted_mean_or_those_of_one_teacher():
    student, teachers = Net(4), [Net(5), Net(6)]
    second = KDLoss(name="second", teacher_index=1)
    kd = attach_kd(
        student, teachers, losses=[KDLoss(), second], teacher_weights=[3.0, 1.0], example=IMAGES
    )
    logits = student.train()(IMAGES)
    kd.loss(LABELS)
    a, b = map(eval_logits, teachers)
    torch.testing.assert_close(kd.terms["KDLoss"], divergence(logits, 0.75 * a + 0.25 * b))
    torch.testing.assert_close(kd.terms["second"], divergence(logits, b))


def test_the_mean_of_half_precision_logits_is_not_rounded_to_half():
    student, teachers = Net(4), [Net(5).bfloat16(), Net(6).bfloat16()]
    for teacher in teachers:
        torch.nn.init.uniform_(teacher.head.bias, 8, 24)  # bfloat16 has steps of 1/16 there
    kd = attach_kd(student, teachers, losses=[KDLoss()], teacher_weights=[3, 1], example=IMAGES)
    logits = student.train()(IMAGES)
    kd.loss(LABELS)
    with torch.no_grad():
        a, b = (teacher.eval()(IMAGES.bfloat16()).float() for teacher in teachers)
    torch.testing.assert_close(kd.terms["KDLoss"], divergence(logits, 0.75 * a + 0.25 * b))


class Gap(DistillLoss):
    def forward(self, student, teacher, targets=None):
        return (student.mean(1) - teacher.mean(1)).square().mean()


def test_features_are_read_from_the_named_teacher():
    student, teachers = Net(4), [Net(5), Net(6)]
    gap = Gap(at="last", teacher_index=1)
    kd = attach_kd(
        student,
        teachers,
        [KDPoint("first", targets=CodebookTargets(4))],
        losses=[gap],
        example=IMAGES,
    )
    kd.fit([(IMAGES, LABELS)])
    frozen = [Frozen(teacher) for teacher in teachers]
    student.train()
    student(IMAGES)
    kd.loss(LABELS).backward()
    student.eval()
    features = {}
    student.last.register_forward_hook(lambda m, a, out: features.update(student=out))
    with torch.no_grad():
        twin = copy.deepcopy(teachers[1]).eval()
        theirs = twin.last(twin.first(twin.stem(IMAGES)))
    assert theirs.shape[1] == 7
    assert kd.terms["Gap.last"].item() > 0
    assert all(f.unchanged(t) for f, t in zip(frozen, teachers, strict=True))


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"teacher_weights": [1.0]}, "positive number for each of the 2 teachers"),
        ({"teacher_weights": [1.0, 0.0]}, "positive number for each"),
        ({"teacher_weights": [1.0, float("inf")]}, "positive number for each"),
        ({"teacher_weights": 2.0}, "positive number for each of the 2 teachers, got 2.0"),
        ({"teacher_weights": ["a", "b"]}, r"positive number for each .* got \['a', 'b'\]"),
        ({"teacher_transform": 3}, 'a function of the images or "auto", got 3'),
        ({"losses": [KDLoss()], "teacher_transform": "Auto"}, "\"auto\", got 'Auto'"),
        ({"losses": [KDLoss(teacher_index=2)]}, "reads teacher 2, but there are 2"),
    ],
)
def test_refusals(kwargs, sentence):
    losses = kwargs.pop("losses", [KDLoss()])
    with pytest.raises(ArgumentError, match=sentence):
        attach_kd(Net(4), [Net(5), Net(6)], losses=losses, example=IMAGES, **kwargs)


def test_a_transform_without_a_teacher_is_refused():
    with pytest.raises(ArgumentError, match="teacher_transform was given without a teacher"):
        attach_kd(
            Net(4), at=[KDPoint("last", num_templates=4)], example=IMAGES, teacher_transform="auto"
        )


@pytest.mark.parametrize("kind", [list, np.float32, torch.tensor])
def test_shares_are_numbers_of_python(kind):
    weights = [3.0, 1.0] if kind is list else kind([3.0, 1.0])
    kd = attach_kd(
        Net(4), [Net(5), Net(6)], losses=[KDLoss()], teacher_weights=weights, example=IMAGES
    )
    shares = [teacher.weight for teacher in kd._teachers]
    assert shares == [0.75, 0.25]
    assert all(type(share) is float for share in shares)


def test_a_teacher_that_is_no_module_is_named():
    with pytest.raises(ArgumentTypeError, match=r"must be a torch\.nn\.Module, got type"):
        attach_kd(Net(4), Net, losses=[KDLoss()], example=IMAGES)


def test_teachers_of_other_classes_are_refused():
    sentence = "KDLoss reads the mean of the teachers' logits, but .* teachers of the same classes"
    with pytest.raises(ArgumentError, match=sentence):
        attach_kd(Net(4), [Net(5), Net(6, classes=4)], losses=[KDLoss()], example=IMAGES)


def test_teachers_of_other_classes_serve_losses_that_read_one_of_them():
    student, teachers = Net(4), [Net(5), Net(6, classes=4), Net(4, classes=7)]
    features = [
        FeatureLoss(at="last", teacher_index=index, name=f"of {index}") for index in range(3)
    ]
    kd = attach_kd(student, teachers, losses=[*features, KDLoss(teacher_index=0)], example=IMAGES)
    logits = student(IMAGES)
    kd.loss(LABELS).backward()
    expected = KDLoss()(logits, teachers[0].eval()(IMAGES)).item()
    assert kd.terms["KDLoss"].item() == pytest.approx(expected, abs=1e-6)
    assert all(kd.terms[loss.name].item() > 0 for loss in features)


def mutual_reference(a, b, steps, lr, sequential):
    """Two networks and the loop written out; each forward in train mode, as the code does."""
    optimisers = [torch.optim.SGD(m.parameters(), lr=lr) for m in (a, b)]

    def loss(model, peer):
        logits = model(IMAGES)
        with torch.no_grad():
            peer_logits = peer(IMAGES)
        return F.cross_entropy(logits, LABELS) + divergence(logits, peer_logits, 1.0)

    for _ in range(steps):
        if sequential:
            for (model, peer), optimiser in zip(((a, b), (b, a)), optimisers, strict=True):
                optimiser.zero_grad()
                loss(model, peer).backward()
                optimiser.step()
        else:
            losses = loss(a, b), loss(b, a)
            for value, optimiser in zip(losses, optimisers, strict=True):
                optimiser.zero_grad()
                value.backward()
            for optimiser in optimisers:
                optimiser.step()


@pytest.mark.parametrize("sequential", [True, False])
def test_mutual_learning_equals_a_manual_loop(sequential):
    a, b = Net(4).train(), Net(5).train()
    plain = copy.deepcopy(a), copy.deepcopy(b)
    mutual_reference(*plain, 4, 0.1, sequential)
    kds = attach_mutual(a, b, example=IMAGES)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (a, b)]
    for _ in range(4):
        losses = []
        for model, kd, optimiser in zip((a, b), kds, optimisers, strict=True):
            losses.append(F.cross_entropy(model(IMAGES), LABELS) + kd.loss(LABELS))
            if sequential:
                optimiser.zero_grad()
                losses[-1].backward()
                optimiser.step()
        if not sequential:
            for value, optimiser in zip(losses, optimisers, strict=True):
                optimiser.zero_grad()
                value.backward()
            for optimiser in optimisers:
                optimiser.step()
    for model, other in zip((a, b), plain, strict=True):
        for (name, mine), theirs in zip(
            model.state_dict().items(), other.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(mine, theirs, msg=lambda m, n=name: f"{n}: {m}")


def test_mutual_pairs_and_unchanged_students_after_errors():
    a, b = Net(4), Net(4)
    kd_a, kd_b = attach_mutual(
        a, b, losses=[Gap(at=("first", "stem")), MutualLoss()], example=IMAGES
    )
    assert kd_a._terms[0].point == kd_b._terms[0].tap == "first"
    kd_a.remove()
    kd_b.remove()
    with pytest.raises(AttachError):
        attach_mutual(a, a, example=IMAGES)
    for model in (a, b):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_transform_changes_the_teachers_images():
    student, teacher = Net(4), Net(6)
    twice = torch.nn.Upsample(scale_factor=2)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("last", targets=CodebookTargets(4))],
        losses=[KDLoss()],
        example=IMAGES,
        teacher_transform=twice,
    )
    kd.fit([(IMAGES, LABELS)])
    logits = student.train()(IMAGES)
    kd.loss(LABELS).backward()
    with torch.no_grad():
        theirs = copy.deepcopy(teacher).eval()(twice(IMAGES))
    torch.testing.assert_close(kd.terms["KDLoss"], divergence(logits, theirs))


def test_the_teacher_can_run_before_the_student():
    student, teacher = Net(4), Net(6)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("last", targets=CodebookTargets(4))],
        losses=[KDLoss()],
        example=IMAGES,
    )
    kd.fit([(IMAGES, LABELS)])
    student.train()(IMAGES)
    after = kd.loss(LABELS)
    runs = []
    teacher.register_forward_hook(lambda *_: runs.append(1))
    kd.teach(IMAGES)
    student(IMAGES)
    before = kd.loss(LABELS)
    assert len(runs) == 1
    torch.testing.assert_close(before, after)
    kd.teach(IMAGES)
    student(IMAGES.clone())
    with pytest.raises(StaleCaptureError, match="got different batches"):
        kd.loss(LABELS)
    student(IMAGES)
    kd.loss(LABELS)


def test_inherit_and_explore_between_peers_trains_the_peers_coder():
    a, b = Net(4), Net(6)
    losses = [MutualLoss(), InheritExploreLoss(factor_channels=2, at="last", coder="online")]
    kd_a, kd_b = attach_mutual(a, b, losses=losses, example=IMAGES)
    loss = kd_a._terms[1].loss
    twin = copy.deepcopy(loss)
    mine = a.train()(IMAGES)
    features = {}
    hooks = [
        net.last.register_forward_hook(lambda m, i, out, k=k: features.update({k: out}))
        for k, net in {"a": a, "b": b}.items()
    ]
    (F.cross_entropy(mine, LABELS) + kd_a.loss(LABELS)).backward()
    assert all(p.grad is None for p in b.parameters())
    assert set(kd_a.terms) >= {
        f"InheritExploreLoss.last.{name}"
        for name in ("inheritance", "exploration", "reconstruction")
    }
    # The peer's coder is trained by its reconstruction alone, written out here.
    maps = features["b"].detach()
    (twin.auto_encoder.decoder(twin.auto_encoder.encoder(maps)) - maps).abs().mean().backward()
    for p, q in zip(loss.auto_encoder.parameters(), twin.auto_encoder.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert all(p.grad is not None for p in loss.inherit_encoder.parameters())
    for hook in hooks:
        hook.remove()
    optimisers = [
        torch.optim.SGD([*net.parameters(), *kd.parameters()], lr=0.01)
        for net, kd in ((a, kd_a), (b, kd_b))
    ]
    for _ in range(8):
        for net, kd, optimiser in zip((a, b), (kd_a, kd_b), optimisers, strict=True):
            optimiser.zero_grad()
            (F.cross_entropy(net.train()(IMAGES), LABELS) + kd.loss(LABELS)).backward()
            optimiser.step()
        errors = [float(kd.terms["InheritExploreLoss.last.reconstruction"]) for kd in (kd_a, kd_b)]
        assert all(e == e and e < 10 for e in errors)


class Deep(Net):
    """Counts the runs of what comes after the last tap."""

    def forward(self, x):
        features = self.last(self.first(self.stem(x)))
        self.ends = getattr(self, "ends", 0) + 1
        return self.head(features.mean((2, 3)))


@pytest.mark.parametrize(("losses", "ends"), [([], 0), ([KDLoss()], 1)])
def test_the_teacher_stops_after_the_last_module_that_is_read(losses, ends):
    student, teacher = Net(), Deep()
    kd = attach_kd(student, teacher, [KDPoint("last", targets=CodebookTargets(4))], losses=losses)
    images, labels = torch.randn(4, 3, 12, 12), torch.arange(4) % 3
    teacher.ends = 0
    kd.fit([(images, labels)], progress=False)
    assert teacher.ends == 0
    student(images)
    value = kd.loss(labels)
    assert teacher.ends == ends
    assert not teacher.last._forward_hooks
    assert not any(module._forward_hooks for module in teacher.modules())
    with torch.no_grad():  # the features are those of a whole forward
        whole = teacher.last(teacher.first(teacher.stem(images))).movedim(1, -1)
    targets = next(t.loss.template_targets for t in kd._terms if t.point)
    again = student.last[1].kd
    assert value > 0
    assert targets.soft_assignment(whole).shape[-1] == again.head.num_templates


def test_compiled_teachers_and_peers_run_completely():
    teacher = Deep()
    compiled = torch.compile(teacher, backend="eager")
    kd = attach_kd(Net(), compiled, [KDPoint("last", targets=CodebookTargets(4))])
    teacher.ends = 0
    kd.fit([(torch.randn(4, 3, 12, 12), None)], progress=False)
    assert teacher.ends == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_teacher_under_inference_mode_gives_the_same_losses(ahead):
    """Its forward itself, or ``kd.teach``; features that a later module changes are copied."""
    plain, found = InPlace(), []
    teacher = plain if ahead else Inference()
    teacher.load_state_dict(plain.state_dict())
    codebook = CodebookTargets(4)
    for model in (plain, teacher):
        torch.manual_seed(0)
        student = Net(4)
        points = [KDPoint("last", targets=codebook)]
        losses = [KDLoss(), FeatureLoss(at="last"), FeatureLoss(at="first", name="first")]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KDLayersWarning)  # the codebook is reused
            kd = attach_kd(student, model, points, losses=losses, example=IMAGES)
            kd.fit([(IMAGES, LABELS)], progress=False)
        if ahead and found:
            with torch.inference_mode():
                kd.teach(IMAGES)
        student.train()(IMAGES)
        found.append(kd.loss(LABELS))
        found[-1].backward()
    assert torch.equal(*found)


def test_attaching_under_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ArgumentError, match="call attach_kd and find_poi"):
        attach_kd(Net(4), Net(6), losses=[KDLoss()], example=IMAGES)
