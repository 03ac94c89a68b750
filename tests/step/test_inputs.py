"""Images passed as keywords or inside containers, and in-place changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd, attach_mutual
from kdlayers.errors import CaptureError, StaleCaptureError
from kdlayers.functional import kd as kd_formula
from tests.nets import Net, batch

# torch.compile itself reads .grad of the tensors in a frame, with the warning hidden from users.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
IMAGES, LABELS = batch()


class Named(Net):
    """Takes its images by name, as models of Hugging Face do, and perhaps in a dict."""

    def forward(self, pixel_values=None, given=None):
        return super().forward(pixel_values if given is None else given["images"])


def attached(student=None, teacher=None, losses=None, at=(), **options):
    student, teacher = student or Named(4), teacher or Named(6)
    losses = [KDLoss()] if losses is None else losses
    kd = attach_kd(student, teacher, at, losses=losses, example=IMAGES, **options)
    return student.train(), teacher, kd


def call(student, images, way):
    if way == "positional":
        return student(images)
    return student(pixel_values=images) if way == "keyword" else student(given={"images": images})


WAYS = pytest.mark.parametrize("way", ["positional", "keyword", "nested"])


@WAYS
def test_a_changed_batch_is_noticed(way):
    student, _, kd = attached()
    images = IMAGES.clone()
    call(student, images, way)
    images.mul_(2)
    with pytest.raises(StaleCaptureError, match="changed in place after the student's forward"):
        kd.loss(LABELS)


@WAYS
def test_teach_with_other_images_is_noticed(way):
    student, teacher, kd = attached()

    def teach(images):
        kwargs = {"keyword": {"pixel_values": images}, "nested": {"given": {"images": images}}}
        return kd.teach(images) if way == "positional" else kd.teach(**kwargs[way])

    teach(IMAGES)
    call(student, IMAGES.clone(), way)
    with pytest.raises(StaleCaptureError, match="got different batches"):
        kd.loss(LABELS)
    images = IMAGES.clone()
    teach(images)
    images.add_(1)
    call(student, images, way)
    with pytest.raises(StaleCaptureError, match="got different batches"):
        kd.loss(LABELS)
    teach(IMAGES)
    logits = call(student, IMAGES, way)
    taught = kd.loss(LABELS)
    torch.testing.assert_close(taught, plain_kd(logits, teacher, IMAGES))


def plain_kd(logits, teacher, images):
    with torch.no_grad():
        theirs = copy.deepcopy(teacher).eval()(images)
    return 16 * F.kl_div(
        F.log_softmax(logits / 4, 1), F.softmax(theirs / 4, 1), reduction="batchmean"
    )


class Scaling(Net):
    """Changes its input in place."""

    def forward(self, x):
        return super().forward(x.mul_(2).sub_(1))


@pytest.mark.parametrize("inside_batch", [False, True])
def test_a_student_may_change_its_input_in_place(inside_batch):
    student, teacher, kd = attached(Scaling(), Net(6))
    images = IMAGES.clone()
    if inside_batch:
        with kd.batch(images):
            logits = student.forward(images)
        found = kd.loss(LABELS, logits=logits)
    else:
        logits = student(images)
        found = kd.loss(LABELS)
    torch.testing.assert_close(found, plain_kd(logits, teacher, IMAGES))


@pytest.mark.parametrize("way", ["positional", "keyword"])
def test_the_transform_finds_the_images_in_any_argument(way):
    twice = nn.Upsample(scale_factor=2)
    student, teacher, kd = attached(teacher_transform=twice)
    logits = call(student, IMAGES, way)
    torch.testing.assert_close(kd.loss(LABELS), plain_kd(logits, teacher, twice(IMAGES)))


def test_a_transform_without_images_is_refused():
    student, _, kd = attached(teacher_transform=nn.Upsample(scale_factor=2))
    call(student, IMAGES, "nested")
    with pytest.raises(CaptureError, match="teacher_transform found no images"):
        kd.loss(LABELS)


@WAYS
def test_the_teacher_gets_its_own_dtype(way):
    """A dtype is used instead of a device, because the same call converts both."""
    student, teacher, kd = attached(teacher=Named(6).double())
    logits = call(student, IMAGES, way)
    expected = plain_kd(logits.double(), teacher, IMAGES.double())
    torch.testing.assert_close(kd.loss(LABELS).double(), expected, rtol=1e-5, atol=1e-6)


class InPlace(Net):
    """In training only, ``between`` changes what ``last`` has returned, as inplace dropout does."""

    def __init__(self, channels=4, factor=3.0):
        super().__init__(channels)
        self.factor = factor

    def forward(self, x):
        x = self.last(self.first(self.stem(x)))
        if self.training:
            x = x.mul_(self.factor)
        return self.head(x.mean((2, 3)))


class Pooled(InPlace):
    """As `InPlace`, with a last module whose backward pass does not need its output."""

    def __init__(self, channels=4, factor=3.0):
        super().__init__(channels, factor)
        self.last = nn.Sequential(nn.Conv2d(channels, channels + 1, 3, 1, 1), nn.AvgPool2d(1))


def hint(student, teacher, loss, images):
    """FitNet by hand: from the features before the change in place."""
    features = student.last(student.first(student.stem(images)))
    with torch.no_grad():
        theirs = teacher.last(teacher.first(teacher.stem(images)))
    return (F.conv2d(features, loss.regressor.weight, loss.regressor.bias) - theirs).square().mean()


def frozen_norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def test_features_that_are_changed_in_training_only_are_recorded_before_the_change():
    loss = FitNetLoss(at="last")
    student, teacher, kd = attached(Pooled(), Net(6).eval(), [loss])
    for _ in range(3):
        student.train()
        frozen_norms(student)
        student(IMAGES)
        found = kd.loss(LABELS)
        expected = hint(student, teacher, loss, IMAGES)
        torch.testing.assert_close(found, expected)
        ours = torch.autograd.grad(found, student.stem[0].weight)
        theirs = torch.autograd.grad(expected, student.stem[0].weight)
        torch.testing.assert_close(ours, theirs)
        kd.clear()  # `hint` called modules, not the student


def test_a_later_in_place_change_is_an_error_once():
    student, _, kd = attached(Pooled(), Net(6), [FitNetLoss(at="last")])
    student.factor = 1.0
    student.eval()
    student.training = True  # only the model's own flag: modules run as in eval mode
    plain = Pooled.forward

    def unchanged(x):
        return student.head(student.last(student.first(student.stem(x))).mean((2, 3)))

    student.forward = unchanged
    student(IMAGES)
    expected = kd.loss(LABELS)
    student(IMAGES)
    kd.loss(LABELS)
    student.forward = lambda x: plain(student, x)
    student.factor = 2.0
    student(IMAGES)
    with pytest.raises(
        StaleCaptureError, match=r"last: a later module changed .* run student\(x\)"
    ):
        kd.loss(LABELS)
    for forward in (student.forward, unchanged, student.forward):  # also if some do not change them
        student.forward = forward
        student(IMAGES)
        torch.testing.assert_close(kd.loss(LABELS), expected)


def test_a_compiled_student_records_before_the_change():
    torch._dynamo.reset()
    torch.manual_seed(3)
    loss = FitNetLoss(at="last")
    student, teacher, kd = attached(Pooled(), Net(6).eval(), [loss])
    frozen_norms(student)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(IMAGES)
        torch.testing.assert_close(kd.loss(LABELS), hint(student, teacher, loss, IMAGES))
    torch._dynamo.reset()


def test_a_peer_that_changes_features_in_training_is_read_before_the_change():
    a, b = Net(4), Pooled()
    frozen_norms(b)
    kd_a, _ = attach_mutual(a, b, losses=[FitNetLoss(at="last")], example=IMAGES)
    loss = kd_a._terms[0].loss
    a.train()
    frozen_norms(a)
    a(IMAGES)
    torch.testing.assert_close(kd_a.loss(LABELS), hint(a, b, loss, IMAGES))


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_logits_that_were_changed_are_refused(backend):
    torch._dynamo.reset()
    student, teacher, kd = attached()
    called = student if backend is None else torch.compile(student, backend=backend, fullgraph=True)
    for _ in range(2):
        logits = called(IMAGES)
        logits.div_(100)
        with pytest.raises(StaleCaptureError, match=r"logits were changed in place .*logits / 100"):
            kd.loss(LABELS)
    logits = called(IMAGES)
    loss = kd.loss(LABELS)
    torch.testing.assert_close(loss, plain_kd(logits, teacher, IMAGES))
    logits.div_(100)  # after the loss they are the user's
    torch._dynamo.reset()


def test_inplace_dropout_of_efficientnet():
    """timm's and torchvision's efficientnets drop in place what their pooling returns."""
    from torchvision.models import efficientnet_b0

    student, teacher = efficientnet_b0(num_classes=3), efficientnet_b0(num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    loss = FitNetLoss(at="avgpool")
    kd = attach_kd(student, teacher, losses=[loss], example=images)
    student.train()
    seen = []
    student.avgpool.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    student(images)
    found = kd.loss(LABELS[:2])
    regressor = loss.regressor
    with torch.no_grad():
        theirs = teacher.eval().avgpool(teacher.features(images))
        ours = F.conv2d(seen[0], regressor.weight, regressor.bias)
    torch.testing.assert_close(found.detach(), (ours - theirs).square().mean())


def test_the_loss_under_no_grad_is_an_error_that_keeps_the_forward():
    point = KDPoint("last", targets=CodebookTargets(num_templates=4))
    student, _, kd = attached(at=[point])
    kd.fit([(IMAGES, LABELS)], progress=False)
    student(IMAGES)
    for context in (torch.no_grad, torch.inference_mode):
        with context(), pytest.raises(CaptureError, match=r"under torch\.no_grad\(\)"):
            kd.loss(LABELS)
    assert kd.loss(LABELS).requires_grad


def test_logits_without_a_gradient_are_refused():
    student, _, kd = attached()
    with kd.batch(IMAGES):
        logits = student.forward(IMAGES)
    with pytest.raises(CaptureError, match=r"logits do not require grad"):
        kd.loss(LABELS, logits=logits.detach())


@pytest.mark.parametrize("losses", [[KDLoss()], [FitNetLoss(at="last")]])
def test_an_empty_batch_is_refused(losses):
    from kdlayers.errors import ShapeError

    student, _, kd = attached(Net(4), Net(6), losses)
    student.eval()
    student.training = True  # batch norm in training refuses empty batches itself
    student(IMAGES[:0])
    with pytest.raises(ShapeError, match="batch was empty"):
        kd.loss(LABELS[:0])
    student.train()(IMAGES)
    kd.loss(LABELS).backward()


class TakesDict(Net):
    def forward(self, inputs):
        return super().forward(inputs["images"][0])


def test_an_example_in_a_dict_gets_the_models_precision():
    student, teacher = TakesDict(4).double().train(), TakesDict(6).double()
    example = {"images": [torch.zeros(2, 3, 8, 8)]}
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=(example,))
    student({"images": [IMAGES.double()]})
    assert kd.loss(LABELS).dtype == torch.float64


class OfDicts(Net):
    """Takes images, or a batch in a dict as its first argument."""

    def forward(self, x):
        return super().forward(x["images"] if isinstance(x, dict) else x)


def test_a_teacher_transform_gets_the_images_of_a_dict_by_kd_batch():
    student, teacher, kd = attached(OfDicts(4), Net(6), teacher_transform=lambda images: images / 2)
    student({"images": IMAGES, "boxes": LABELS})
    with pytest.raises(CaptureError, match=r"with the keys \['images', 'boxes'\]: .*kd\.batch"):
        kd.loss(LABELS)
    with kd.batch(IMAGES):
        logits = student({"images": IMAGES, "boxes": LABELS})
    kd.loss(LABELS, logits=logits)
    expected = kd_formula(logits, teacher.eval()(IMAGES / 2)).detach()
    torch.testing.assert_close(kd.terms["KDLoss"], expected)
