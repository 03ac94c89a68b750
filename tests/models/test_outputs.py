"""Which tensor of a model's output the losses use as the logits."""

import re
from collections import OrderedDict, namedtuple
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kdlayers import (
    ChannelWiseLoss,
    CodebookTargets,
    DecisionTargets,
    FitNetLoss,
    KDLoss,
    KDPoint,
    attach_kd,
)
from kdlayers._models.outputs import features_of, main_output, why_unclear
from kdlayers.errors import ArgumentError, AttachError, CaptureError, KDLayersWarning, LayoutError
from kdlayers.functional import kd as kd_formula
from tests.nets import Net, batch

IMAGES, LABELS = batch()
LOGITS, AUXILIARY = torch.randn(4, 3), torch.randn(4, 3)
FEATURES, MAPS, LOSS = torch.randn(4, 7), torch.randn(4, 7, 2, 2), torch.tensor(1.0)
Outputs = namedtuple("Outputs", ["aux", "logits"])


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS,),
        [LOGITS, AUXILIARY],
        (LOSS, LOGITS),
        (MAPS, LOGITS),
        (LOGITS, MAPS),
        {"features": FEATURES, "logits": LOGITS},
        OrderedDict(loss=LOSS, features=MAPS, logits=LOGITS, hidden=(MAPS, MAPS)),
        OrderedDict(aux=AUXILIARY, out=LOGITS),
        {"features": FEATURES, "prediction": LOGITS},
        {"loss": LOSS, "scores": LOGITS},
        {"maps": MAPS, "scores": LOGITS},
        Outputs(AUXILIARY, LOGITS),
        {"logits": (LOGITS, AUXILIARY)},
        {"count": torch.tensor([3]), "scores": LOGITS},
        {"scores": LOGITS, "mask": torch.ones(4, 16)},
        OrderedDict(hidden=(MAPS, MAPS), scores=LOGITS, bool_mask=torch.ones(4, 16)),
    ],
)
def test_by_name_then_by_shape(output):
    assert main_output(output) is LOGITS
    assert why_unclear(output) is None


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ((FEATURES, LOGITS), r"\(0 \[4, 7\], 1 \[4, 3\]\).* with the key 'logits'; .*at=\("),
        ({"a": LOGITS, "b": AUXILIARY}, r"a \[4, 3\], b \[4, 3\]"),
        ({"0": MAPS, "1": MAPS}, "several tensors"),
        ([{"boxes": torch.zeros(300, 4), "scores": torch.zeros(300)}], "returns detections"),
    ],
)
def test_ambiguous_outputs(output, sentence):
    assert re.search(sentence, why_unclear(output))


class Talkative(Net):
    """Returns more than its logits; ``form`` builds the output from features and logits."""

    def __init__(self, form, channels=4, classes=3):
        super().__init__(channels, classes)
        self.form = form

    def forward(self, x):
        features = self.last(self.first(self.stem(x))).mean((2, 3))
        return self.form(features, self.head(features))


FORMS = {
    "features first": lambda f, z: {"features": f, "logits": z},
    "loss first": lambda f, z: (z.square().mean(), z),
    "loss first, named": lambda f, z: OrderedDict(loss=z.mean(), logits=z, hidden_states=(f, f)),
    "maps first": lambda f, z: (f[:, :, None, None], z),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_compares_logits(form):
    student, teacher = Talkative(FORMS[form]), Talkative(FORMS[form], 6)
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)
    loss, plain = (student(IMAGES), kd.loss(LABELS))[1], Net.forward
    expected = kd_formula(plain(student, IMAGES), plain(teacher.eval(), IMAGES))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("classes", [2, 3])
def test_probabilities_before_their_logits_as_in_eval_mode_only(classes):
    student, teacher = Net(4, classes), Talkative(lambda f, z: (z.softmax(1), z), 6, classes)
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)
    loss = (student(IMAGES), kd.loss(LABELS))[1]
    expected = kd_formula(student(IMAGES), Net.forward(teacher.eval(), IMAGES))
    torch.testing.assert_close(loss, expected)


def test_tensors_without_numbers_are_read_by_their_order():
    for device in ("meta", "cpu"):
        with FakeTensorMode() if device == "cpu" else nullcontext():
            first, second = (torch.zeros(2, 3, device=device) for _ in range(2))
            assert main_output((first, second)) is first
    read = torch.func.vmap(lambda first, second: main_output((first, second)) - first)
    assert not read(LOGITS[:, None], AUXILIARY[:, None]).any()


@pytest.mark.parametrize("loss", [KDLoss(), ChannelWiseLoss()])
def test_a_teacher_with_a_softmax_gives_a_warning(loss):
    maps = isinstance(loss, ChannelWiseLoss)
    form = (lambda f, z: f[:, :, None, None].expand(-1, -1, 2, 2)) if maps else (lambda f, z: z)
    student, plain = Talkative(form), Talkative(form)
    teacher = Talkative(lambda f, z: form(f, z).softmax(1))
    with pytest.warns(KDLayersWarning, match=f"{type(loss).__name__} reads .* after a softmax"):
        attach_kd(student, teacher, losses=[loss], example=IMAGES).remove()
    attach_kd(student, plain, losses=[loss], example=IMAGES).remove()
    features = FitNetLoss(at="last")
    attach_kd(Net(4), Talkative(lambda f, z: z.softmax(1)), losses=[features], example=IMAGES)


class MapsAndClasses(Net):
    """Class maps of the images' size, and the classes of the images from another head."""

    def forward(self, x):
        x = self.last(self.first(self.stem(x)))
        maps = self.pixels(x)
        return maps, self.head(x.mean((2, 3)))

    def __init__(self, channels=4):
        super().__init__(channels)
        self.pixels = nn.Sequential(nn.Conv2d(channels + 1, 5, 1), nn.Upsample(scale_factor=2))


def test_class_maps_of_pixels_beside_classes_of_images_are_ambiguous():
    student, teacher = MapsAndClasses(), MapsAndClasses(6)
    with pytest.raises(ArgumentError, match=r"0 \[6, 5, 8, 8\], 1 \[6, 3\].*at=\(student's, "):
        attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)
    kd = attach_kd(student, teacher, losses=[KDLoss(at="pixels")], example=IMAGES)
    loss = (student(IMAGES), kd.loss())[1]
    expected = kd_formula(student(IMAGES)[0], teacher.eval()(IMAGES)[0])
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ArgumentError, match="number of classes"):
        attach_kd(MapsAndClasses(), teacher, ["first", "last"], example=IMAGES)
    # A reconstruction after the logits leaves no doubt.
    assert why_unclear((LOGITS, MAPS), (2, 2)) is None


def test_the_loss_asks_for_logits_if_they_are_ambiguous():
    form = lambda f, z: (f, z)  # noqa: E731
    for student, teacher, label in (
        (Talkative(form), Net(), "student"),
        (Net(), Talkative(form), "teacher"),
    ):
        with pytest.raises(ArgumentError, match=f"logits of the {label} .Talkative.*key 'logits'"):
            attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)
        # Whoever reads features alone need not know.
        kd = attach_kd(student, teacher, losses=[FitNetLoss(at="last")], example=IMAGES)
        student(IMAGES)
        assert kd.loss(LABELS).isfinite()
    points = [KDPoint("first", targets=DecisionTargets(2)), "last"]
    with pytest.raises(ArgumentError, match="number of classes"):
        attach_kd(Talkative(form), Talkative(form), points, example=IMAGES)
    kd = attach_kd(Net(), Talkative(form), points, example=IMAGES)
    assert len(kd.layers["first"].head.weight) == 6  # the student's classes are clear


def test_an_output_that_is_ambiguous_only_in_training():
    student = Talkative(lambda f, z: z)
    kd = attach_kd(student, Net(6), losses=[KDLoss()], example=IMAGES)
    student.form = lambda f, z: (f, z)
    student(IMAGES)
    with pytest.raises(CaptureError, match="a loss reads the student's logits"):
        kd.loss(LABELS)
    _, logits = student(IMAGES)
    with kd.batch(IMAGES):
        _, logits = student.forward(IMAGES)
    assert kd.loss(LABELS, logits=logits).isfinite()


def test_a_mask_alone_beside_the_tokens_is_not_taken():
    tokens = torch.randn(4, 5, 7)
    assert main_output(OrderedDict(last_hidden_state=tokens, mask=torch.ones(4, 16))) is tokens


@pytest.mark.parametrize("other", [(MAPS,), {"maps": MAPS}, MAPS, ()])
def test_features_of_another_form_are_an_error(other):
    assert features_of({"last": MAPS}, ("last",), "block") is MAPS
    with pytest.raises(AttachError, match=r"'block' returned a \w+ in this .*return_dict=False"):
        features_of(other, ("last",), "block")


class Detector(nn.Module):
    """As torchvision's: a backbone, and boxes of every image in eval mode."""

    def __init__(self):
        super().__init__()
        self.backbone = Net(4)

    def forward(self, images):
        scores = self.backbone(images)
        return [{"boxes": torch.zeros(300, 4), "scores": row} for row in scores]


def test_a_whole_detector_raises_an_error_that_names_the_backbone():
    point = KDPoint("backbone.last", "last", targets=CodebookTargets(4))
    with pytest.raises(LayoutError, match=r"is a detector: .*attach_kd\(student\.backbone"):
        attach_kd(Detector(), Net(6), [point], example=IMAGES)
    with pytest.raises(ArgumentError, match=r"KDLoss reads logits.*student\.backbone"):
        attach_kd(Detector(), Net(6), losses=[KDLoss()], example=IMAGES)
    detector = Detector()
    point = KDPoint("last", targets=CodebookTargets(4))
    attach_kd(detector.backbone, Net(6), [point], example=IMAGES)


def test_a_scalar_output_is_an_error():
    with pytest.raises(Exception, match="returns a single number, such as a loss"):
        attach_kd(Talkative(lambda f, z: z.mean()), Net(), ["last"], example=IMAGES)
