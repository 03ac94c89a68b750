"""Students whose modules or outputs are unusual in training, and students with several handles."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import (
    AttentionTransferLoss,
    CodebookTargets,
    DecisionTargets,
    FeatureLoss,
    FitNetLoss,
    KDLoss,
    KDPoint,
    RKDLoss,
    attach_kd,
    attach_mutual,
    find_points,
)
from kdlayers import functional as kdf
from kdlayers.errors import (
    AttachError,
    CaptureError,
    LayoutError,
    NoMatchError,
    ShapeError,
    StaleCaptureError,
)
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def point(name="last", theirs="last"):
    return KDPoint(name, theirs, targets=CodebookTargets(4))


# ------------------------------------------------------------------------------ several handles


def test_an_earlier_handle_reads_what_a_later_handle_inserts():
    student, teacher, seen = Net(4), Net(6), []
    first = attach_kd(student, teacher, losses=[FitNetLoss(at="last")], example=IMAGES)
    second = attach_kd(student, teacher, [point()], example=IMAGES)
    student.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    student(IMAGES)
    features = first._tape.forward.features["last"]
    torch.testing.assert_close(features.mean((2, 3)), seen[0], rtol=0, atol=0)
    second.remove()
    student(IMAGES)
    assert not torch.equal(first._tape.forward.features["last"], features)


class Backwards(nn.Module):
    """Its modules are registered in the reverse of the order in which they run."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 3)
        self.last = nn.Sequential(nn.Conv2d(4, 5, 3, 1, 1), nn.ReLU())
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())

    def forward(self, x):
        return self.head(self.last(self.first(x)).mean((2, 3)))


def test_layers_are_in_forward_order():
    kd = attach_kd(Backwards(), Net(6), [point(), point("first", "first")], example=IMAGES)
    assert list(kd.layers) == ["first", "last"]


# ------------------------------------------------------------ a student that returns its loss


class OwnLoss(Net):
    """Returns the value of its loss if it gets labels, as some training code does."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return logits if labels is None else F.cross_entropy(logits, labels)


def test_losses_on_features_take_labels_for_a_student_that_returns_its_loss():
    student = OwnLoss()
    kd = attach_kd(student, Net(6), losses=[FitNetLoss(at="last")], example=IMAGES)
    student(IMAGES)
    expected = kd.loss(LABELS)
    (student(IMAGES, labels=LABELS) + kd.loss(LABELS)).backward()
    torch.testing.assert_close(kd.terms["total"], expected.detach())
    student(IMAGES, labels=LABELS)
    with pytest.raises(StaleCaptureError, match="they belong to another batch"):
        kd.loss(LABELS[1:])


def test_losses_on_logits_refuse_a_student_that_returns_its_loss():
    student = OwnLoss()
    kd = attach_kd(student, Net(6), losses=[KDLoss()], example=IMAGES)
    student(IMAGES, labels=LABELS)
    with pytest.raises(CaptureError, match="returned a single number, such as its loss"):
        kd.loss(LABELS)


def test_more_arguments_than_images_lead_to_kd_batch():
    student = OwnLoss()
    kd = attach_kd(student, Net(6), losses=[FitNetLoss(at="last")], example=IMAGES)
    loss = student(IMAGES, LABELS)
    with pytest.raises(CaptureError, match=r"run it in `with kd.batch\(images\):`"):
        kd.loss(LABELS)
    with kd.batch(IMAGES):
        loss = student(IMAGES, LABELS)
    (loss + kd.loss(LABELS)).backward()


# ------------------------------------------------- modules that return other things in training


class Changing(nn.Module):
    """Returns a tensor in one mode, and a tuple in the other."""

    def __init__(self, tuple_in_training):
        super().__init__()
        self.conv = nn.Conv2d(5, 5, 1)
        self.tuple_in_training = tuple_in_training

    def forward(self, x):
        x = self.conv(x)
        return (x, x.mean()) if self.training == self.tuple_in_training else x


class Forked(Net):
    def __init__(self, tuple_in_training):
        super().__init__()
        self.fork = Changing(tuple_in_training)

    def forward(self, x):
        x = self.fork(self.last(self.first(self.stem(x))))
        return self.head((x[0] if isinstance(x, tuple) else x).mean((2, 3)))


@pytest.mark.parametrize(("tuple_in_training", "kind"), [(True, "tuple"), (False, "Tensor")])
@pytest.mark.parametrize("what", ["layer", "loss", "peer"])
def test_a_module_whose_output_has_another_form_in_training(tuple_in_training, kind, what):
    student = Forked(tuple_in_training)
    if what == "peer":
        losses = [AttentionTransferLoss(at=("last", "fork"))]
        kd, _ = attach_mutual(student, Forked(tuple_in_training), losses=losses, example=IMAGES)
    elif what == "layer":
        kd = attach_kd(student, Net(6), [point("fork")], example=IMAGES)
        kd.fit([(IMAGES, LABELS)])
    else:
        kd = attach_kd(student, Net(6), losses=[FitNetLoss(at=("fork", "last"))], example=IMAGES)
    with pytest.raises(AttachError, match=f"'fork' returned a {kind} in this forward"):
        student(IMAGES), kd.loss(LABELS)


def test_another_name_of_a_module_leads_to_its_usual_name():
    student = Net()
    student.tail = student.last
    with pytest.raises(NoMatchError, match=r"'tail' of the student is another name .* use 'last'"):
        attach_kd(student, Net(6), {"tail": "last"}, example=IMAGES)


class OfVolumes(nn.Module):
    """A classifier of volumes that has 4 x 2 x 1 tokens."""

    def __init__(self, channels=5):
        super().__init__()
        self.maps = nn.Conv3d(1, channels, 4, 4)
        self.tokens = nn.Sequential(nn.Linear(channels, channels), nn.ReLU())
        self.mean = nn.Linear(channels, channels)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        tokens = self.tokens(self.maps(x).flatten(2).transpose(1, 2))
        return self.head(self.mean(tokens.mean(1)))


def test_volumes_have_vectors_and_logits_but_no_grid():
    student, teacher = OfVolumes(), OfVolumes(7)
    volumes, labels = torch.randn(4, 1, 16, 8, 4), torch.arange(4) % 3
    points = find_points(student, volumes)
    assert not points
    assert "takes inputs of five axes, such as volumes" in points.left_out["tokens"]
    for name in ("maps", "tokens"):
        with pytest.raises(LayoutError, match=f"output of '{name}' .* five axes.* returns vectors"):
            attach_kd(student, teacher, losses=[FeatureLoss(at=name)], example=volumes)
        with pytest.raises(LayoutError, match=f"output of '{name}' .* five axes.* returns vectors"):
            attach_kd(student, at=[KDPoint(name, num_templates=4)], example=volumes)
    decisions = [KDPoint("mean", targets=DecisionTargets(1))]
    losses = [KDLoss(), RKDLoss(at="mean"), FeatureLoss(at="mean")]
    kd = attach_kd(student, teacher, decisions, losses=losses, example=volumes)
    kd.fit([(volumes, labels)], progress=False)
    logits = student(volumes)
    kd.loss(labels).backward()
    expected = kdf.kd(logits, teacher(volumes)).detach()
    torch.testing.assert_close(kd.terms["KDLoss"], expected)


class PartsOfLoss(Net):
    """In training it takes a batch with labels, and returns the parts of its loss, not logits."""

    def forward(self, batch):
        if not isinstance(batch, dict):
            return super().forward(batch)
        value = F.cross_entropy(super().forward(batch["img"]), batch["cls"])
        return torch.stack([value, value, value]), {"ce": value.detach()}


def test_a_vector_of_losses_is_not_one_loss_for_each_image():
    student, teacher = PartsOfLoss(4), PartsOfLoss(6)
    decisions = [KDPoint("last", targets=DecisionTargets(2))]
    losses = [FitNetLoss(at="first")]
    kd = attach_kd(student, teacher, decisions, losses=losses, example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    parts, _ = student({"img": IMAGES, "cls": LABELS})
    (parts.sum() + kd.loss(LABELS)).backward()
    in_dict = kd.terms
    student(IMAGES)
    kd.loss(LABELS)
    assert kd.terms == in_dict
    student({"img": IMAGES, "cls": LABELS})
    with pytest.raises(StaleCaptureError, match=f"for a forward of {len(IMAGES)} images"):
        kd.loss(LABELS[:3])


class Stacked(Net):
    """Class maps; in training stacked with those of deeper features."""

    def forward(self, x):
        maps = self.last(self.first(self.stem(x)))
        return torch.stack([maps, -maps], 1) if self.training else maps


def test_stacked_maps_are_refused_and_one_of_them_is_compared():
    student, teacher = Stacked(4), Stacked(4)
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)
    student(IMAGES)
    with pytest.raises(ShapeError, match=r"deep supervision.* kd\.loss\(y, logits=maps\[:, 0\]\)"):
        kd.loss()
    maps = student(IMAGES)
    loss = kd.loss(logits=maps[:, 0])
    torch.testing.assert_close(loss, kdf.kd(maps[:, 0], teacher.eval()(IMAGES)))
