"""Wrong calls in training raise errors and change nothing, and the next step works."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    DecisionTargets,
    DKDLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    attach_kd,
    load_student,
    prune_templates,
)
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    AttachError,
    CaptureError,
    CheckpointError,
    FitError,
    KDLayersError,
    NotFittedError,
    ShapeError,
    StaleCaptureError,
)
from tests.attach_tester import Frozen
from tests.nets import Awkward, Net, batch

IMAGES, LABELS = batch()


def no_forward(s, t, kd):
    kd.loss(LABELS)


def loss_twice(s, t, kd):
    s(IMAGES)
    kd.loss(LABELS)
    kd.loss(LABELS)


def two_forwards(s, t, kd):
    s(IMAGES)
    s(IMAGES)
    kd.loss(LABELS)


def in_eval_mode(s, t, kd):
    s.eval()(IMAGES)
    kd.loss(LABELS)


def without_gradient(s, t, kd):
    with torch.no_grad():
        s(IMAGES)
    kd.loss(LABELS)


def forward_directly(s, t, kd):
    s.forward(IMAGES)
    kd.loss(LABELS)


def after_backward(s, t, kd):
    F.cross_entropy(s(IMAGES), LABELS).backward()
    kd.loss(LABELS)


def batch_changed(s, t, kd):
    images = IMAGES.clone()
    s(images)
    images.mul_(2)
    kd.loss(LABELS)


def other_labels(s, t, kd):
    s(IMAGES)
    kd.loss(LABELS[:4])


def labels_as_list(s, t, kd):
    s(IMAGES)
    kd.loss(LABELS.tolist())


def no_labels(s, t, kd):
    s(IMAGES)
    kd.loss()


def mixed_labels_of_other_classes(s, t, kd):
    s(IMAGES)
    kd.loss(F.one_hot(LABELS, 4).float())


def labels_out_of_range(s, t, kd):
    s(IMAGES)
    kd.loss(LABELS + 1)


def reentrant_checkpoint(s, t, kd):
    s.checkpointed = True
    s(IMAGES)
    kd.loss(LABELS)


def other_batch_taught(s, t, kd):
    kd.teach(IMAGES)
    s(IMAGES.clone())
    kd.loss(LABELS)


def logits_not_given(s, t, kd):
    with kd.batch(IMAGES):
        s.forward(IMAGES)
    kd.loss(LABELS)


def hook_gone(s, t, kd):
    s.last[1]._forward_hooks.clear()
    s(IMAGES)
    kd.loss(LABELS)


def layer_dropped(s, t, kd):
    s.last, last = torch.nn.Conv2d(4, 5, 1), s.last
    try:
        s(IMAGES)
        kd.loss(LABELS)
    finally:
        s.last = last


def attached_again(s, t, kd):
    attach_kd(s, t, "last", example=IMAGES)


def pruned_while_attached(s, t, kd):
    prune_templates(s, [IMAGES])


def loaded_into_an_attached_one(s, t, kd):
    load_student(s, __file__)


def state_of_something_else(s, t, kd):
    kd.load_state_dict(s.state_dict())


def empty_loader(s, t, kd):
    kd.fit([], refit=True)


def closed_loader(s, t, kd):
    loader = (pair for pair in [(IMAGES, LABELS)])
    list(loader)
    kd.fit(loader, refit=True)


def one_shot_loader(s, t, kd):
    kd.fit((pair for pair in [(IMAGES, LABELS)]), refit=True)


def dict_loader(s, t, kd):
    kd.fit([{"images": IMAGES}], refit=True)


def data_set(s, t, kd):
    kd.fit([(IMAGES[0], 0)], refit=True)


def data_set_of_tensors(s, t, kd):
    kd.fit(torch.utils.data.TensorDataset(IMAGES, LABELS), refit=True)


def strings(s, t, kd):
    kd.fit([(IMAGES, ["cat"])], refit=True)


def model_to_fit(s, t, kd):
    kd.fit(torch.nn.Sequential(t), refit=True)


def images_to_fit(s, t, kd):
    kd.fit(IMAGES, refit=True)


def grey_images(s, t, kd):
    kd.fit([(IMAGES[:, :1], LABELS)], refit=True)


def logits_as_labels(s, t, kd):
    kd.loss(s(IMAGES))


def unlabelled_loader(s, t, kd):
    kd.fit([IMAGES], refit=True)


def nan_images(s, t, kd):
    kd.fit([(IMAGES * float("nan"), LABELS)], refit=True)


def class_without_images(s, t, kd):
    kd.fit([(IMAGES, LABELS.clamp(max=1))], refit=True)


def detached(s, t, kd):
    twin = copy.deepcopy(s)
    assert torch.equal(twin.stem[0].weight, s.stem[0].weight)
    kd.detach()
    s(IMAGES)
    kd.loss(LABELS)


def fit_detached(s, t, kd):
    kd.detach()
    kd.fit([(IMAGES, LABELS)])


TRAINING = [
    (no_forward, CaptureError, "no training forward of the student since the last"),
    (loss_twice, CaptureError, "no training forward"),
    (two_forwards, StaleCaptureError, r"2 training forwards since .* kd\.clear\(\)"),
    (in_eval_mode, CaptureError, r"eval mode now: call student\.train\(\)"),
    (without_gradient, CaptureError, "in train mode with gradients"),
    (forward_directly, CaptureError, r"not student\.forward\(x\)"),
    (after_backward, CaptureError, r"or backward\(\)"),
    (batch_changed, StaleCaptureError, "changed in place after the student's forward"),
    (other_labels, StaleCaptureError, "they belong to another batch"),
    (labels_as_list, ArgumentTypeError, "labels as a tensor, got list"),
    (no_labels, ArgumentError, r"call kd\.loss\(labels\)"),
    (mixed_labels_of_other_classes, ShapeError, r"read as probabilities \[batch, 3\]"),
    (labels_out_of_range, ArgumentError, "labels"),
    (reentrant_checkpoint, CaptureError, "use_reentrant=False"),
    (other_batch_taught, StaleCaptureError, "got different batches"),
    (logits_not_given, CaptureError, r"call kd\.loss\(y, logits=\.\.\.\)"),
    (hook_gone, CaptureError, "its hooks did not run"),
    (layer_dropped, CaptureError, "or the model skipped this module in this forward, as layer dr"),
    (attached_again, AttachError, r"call kd\.remove\(\) on the earlier handle"),
    (pruned_while_attached, AttachError, r"call kd\.detach\(\) before pruning"),
    (loaded_into_an_attached_one, AttachError, "has KD layers already"),
    (state_of_something_else, CheckpointError, "expected the state of a KDHandle"),
    (empty_loader, FitError, "empty loader"),
    (closed_loader, FitError, "empty loader"),
    (one_shot_loader, FitError, "pass a DataLoader or a list of batches"),
    (
        dict_loader,
        ArgumentError,
        r"a dict with the keys \['images'\]; pass a function .*\(loader, prepare=",
    ),
    (data_set, ArgumentError, r"a tuple \(Tensor, int\), one .*DataLoader\(dataset, batch_size=64"),
    (
        data_set_of_tensors,
        ArgumentError,
        r"\(Tensor, Tensor\), one sample of a data set: pass D",
    ),
    (
        strings,
        ArgumentError,
        r"\(images, labels\) of tensors, got a tuple \(Tensor, list\)$",
    ),
    (
        model_to_fit,
        ArgumentTypeError,
        "a DataLoader or a list yields them, got Sequential; the mod",
    ),
    (images_to_fit, ArgumentTypeError, r"in batches \(images, labels\), as .* got Tensor"),
    (
        grey_images,
        CaptureError,
        r"the teacher \(Net\) could not run on a batch of torch.float32 \[6, 1, 8, 8\]: .*"
        r"expected input.* to have 3 channels.*attach_kd\(\.\.\., teacher_transform=\.\.\.\)",
    ),
    (
        logits_as_labels,
        ArgumentTypeError,
        r"takes the labels, .* shape \[6, 3\] that requires grad",
    ),
    (unlabelled_loader, FitError, "learns from labels"),
    (nan_images, FitError, "NaN or infinite"),
    (class_without_images, FitError, "no sample of class 2"),
    (detached, AttachError, "this handle was detached"),
    (fit_detached, AttachError, "this handle was detached"),
]


@pytest.mark.parametrize(("misuse", "error", "sentence"), TRAINING)
def test_in_training(misuse, error, sentence):
    student, teacher = Awkward(), Net(6)
    points = [
        KDPoint("first", targets=DecisionTargets(1, components=2)),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    kd = attach_kd(student, teacher, points, losses=[DKDLoss(beta=1.0)], example=IMAGES)
    kd.fit([(IMAGES, LABELS)])
    student.train()
    weights = {name: p.detach().clone() for name, p in student.named_parameters()}
    targets = copy.deepcopy(kd.state_dict())
    frozen = Frozen(teacher)
    with pytest.raises(error, match=sentence) as caught:
        misuse(student, teacher, kd)
    assert isinstance(caught.value, KDLayersError)
    assert frozen.unchanged(teacher)
    assert all(torch.equal(p, weights[name]) for name, p in student.named_parameters())
    if misuse not in (detached, fit_detached):
        for name, state in kd.state_dict()["losses"].items():
            assert all(torch.equal(v, targets["losses"][name][k]) for k, v in state.items())
    if misuse not in (detached, fit_detached, hook_gone):
        student.train().checkpointed = False
        kd.clear()
        student(IMAGES)
        kd.loss(LABELS).backward()


@pytest.mark.parametrize(
    "loss",
    [InheritExploreLoss(factor_channels=2, at="last", epochs=1), CodebookTargets, DecisionTargets],
)
def test_before_fit(loss):
    student, teacher = Awkward(), Net(6)
    if isinstance(loss, InheritExploreLoss):
        kd = attach_kd(student, teacher, losses=[loss, AEKTLoss()], example=IMAGES)
    else:
        kd = attach_kd(student, teacher, [KDPoint("last", targets=loss(2))], example=IMAGES)
    student(IMAGES)
    with pytest.raises(NotFittedError, match=r"call kd\.fit\(loader\) once before training"):
        kd.loss(LABELS)


def test_the_teachers_own_error_is_kept():
    kd = attach_kd(Net(), Net(6), losses=[KDLoss()], example=IMAGES)
    with pytest.raises(CaptureError, match="could not run on a batch") as caught:
        kd.teach(IMAGES[:, :2])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_out_of_memory_in_the_teacher_keeps_its_error():
    """Tools that search the largest batch size catch this error by its class."""
    student, teacher = Net().train(), Net(6)
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)

    def full(*_):
        raise torch.OutOfMemoryError("no memory left")

    hook = teacher.last.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        kd.teach(IMAGES)
    hook.remove()
    student(IMAGES)
    kd.loss(LABELS).backward()


def fitted_from(keys):
    values = {"image": IMAGES, "pixel_values": IMAGES, "id": ["a"], "label": LABELS}
    values["labels"] = LABELS
    points = [KDPoint("last", targets=DecisionTargets(1, components=2))]
    kd = attach_kd(Net(), Net(6), points, example=IMAGES)
    return kd, [{key: values[key] for key in keys}]


@pytest.mark.parametrize("keys", [("image", "label"), ("id", "image", "label")])
def test_the_call_that_the_error_shows_for_dicts_works(keys):
    kd, loader = fitted_from(keys)
    with pytest.raises(ArgumentError, match="expects batches") as caught:
        kd.fit(loader)
    exec(str(caught.value).partition("returns a pair: ")[2], {"kd": kd, "loader": loader})
    assert "not fitted" not in kd.summary()


def test_the_dicts_of_hugging_face_need_nothing():
    kd, loader = fitted_from(("labels", "pixel_values"))
    kd.fit(loader)
    pairs, _ = fitted_from(("image", "label"))
    pairs.fit([(IMAGES, LABELS)])
    ours, theirs = (k.state_dict()["losses"]["TemplateLoss.last"] for k in (kd, pairs))
    assert list(ours) == list(theirs)


def test_soft_labels_are_allowed_if_no_loss_reads_them():
    student, teacher = Net().train(), Net(6)
    points = [KDPoint("last", targets=CodebookTargets(4))]
    kd = attach_kd(student, teacher, points, losses=[KDLoss()], example=IMAGES)
    kd.fit([(IMAGES, None)])
    student(IMAGES)
    mixed = kd.loss(F.one_hot(LABELS, 3).float())
    student(IMAGES)
    torch.testing.assert_close(mixed, kd.loss())
