"""torch.compile of the losses, of kd.loss and of the student; exports that AOTInductor compiles."""

import copy
import shutil
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.torch_version import TorchVersion

from kdlayers import (
    AEKTLoss,
    AttentionTransferLoss,
    BinaryKDLoss,
    ChannelWiseLoss,
    CodebookTargets,
    DecisionTargets,
    DistillLoss,
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
from kdlayers.errors import ArgumentTypeError
from kdlayers.losses import TemplateLoss
from kdlayers.schedules import Cosine, LinearWarmup
from tests.nets import Net, batch

# torch.compile itself reads .grad of the tensors in a frame, with the warning hidden from users.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
IMAGES, LABELS = batch()
SIZE, CLASSES = 6, 5
compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler"
)


@pytest.fixture(autouse=True)
def _no_old_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def logits(step):
    return random(SIZE, CLASSES, seed=step), random(SIZE, CLASSES, seed=step + 50)


def maps(step):
    return random(SIZE, 4, 4, 4, seed=step), random(SIZE, 6, 4, 4, seed=step + 50)


def scores(step):
    return random(SIZE, 4, 4, 8, seed=step), random(SIZE, 4, 4, 8, seed=step + 50).softmax(-1)


def positions(step):
    return random(SIZE, 4, 4, 8, seed=step), random(SIZE, 4, 4, 3, seed=step + 50)


def fitted(targets):
    labels = torch.arange(SIZE) % 4
    return TemplateLoss(
        template_targets=targets.fit([(positions(step)[1], labels) for step in range(9)])
    )


def coder():
    loss = InheritExploreLoss(factor_channels=2, epochs=1)
    loss.build(*maps(0))
    return loss.fit([(maps(0)[1], None)])


CASES = {
    "KDLoss": (KDLoss, logits),
    "DKDLoss": (DKDLoss, logits),
    "MutualLoss": (MutualLoss, logits),
    "StudentFriendlyKDLoss": (StudentFriendlyKDLoss, logits),
    "SKD and DKD": (lambda: StudentFriendlyKDLoss(base=DKDLoss(beta=1.0)), logits),
    "SKD and AEKT": (lambda: StudentFriendlyKDLoss(base=AEKTLoss(), anchor=0.1), logits),
    **{
        f"AEKT {form}": (lambda form=form: AEKTLoss(form=form, ratio_clip=5.0), logits)
        for form in ("chi2", "ratio_sq", "ratio", "is")
    },
    "AEKT, factor dropped": (lambda: AEKTLoss(drop_one_minus_s=True, beta=0.0), logits),
    "FitNetLoss": (FitNetLoss, maps),
    "FeatureLoss": (lambda: FeatureLoss(projector="mlp", normalize_teacher=True), maps),
    "AttentionTransferLoss": (AttentionTransferLoss, maps),
    "KDLoss, standardised": (lambda: KDLoss(standardize=True), logits),
    "DISTLoss": (DISTLoss, logits),
    "BinaryKDLoss": (BinaryKDLoss, logits),
    "RKDLoss": (RKDLoss, maps),
    "SimilarityPreservingLoss": (SimilarityPreservingLoss, maps),
    "ChannelWiseLoss": (ChannelWiseLoss, maps),
    "IE, attention": (lambda: InheritExploreLoss(factor_channels=2, host="attention"), maps),
    "IE, attention, cosine": (
        lambda: InheritExploreLoss(factor_channels=2, host="attention", measure="cosine"),
        maps,
    ),
    "IE, online": (lambda: InheritExploreLoss(factor_channels=2, coder="online"), maps),
    "IE, fitted": (coder, maps),
    "TemplateLoss": (TemplateLoss, scores),
    "CodebookTargets": (lambda: fitted(CodebookTargets(8)), positions),
    "one-hot CodebookTargets": (lambda: fitted(CodebookTargets(8, sharpness=None)), positions),
    "DecisionTargets": (lambda: fitted(DecisionTargets(2, components=2)), positions),
}


@pytest.mark.parametrize(("make", "data"), CASES.values(), ids=CASES.keys())
def test_compiled_losses_equal_eager_ones_in_one_graph(make, data):
    loss = make()
    loss.build(*data(0))
    plain = copy.deepcopy(loss)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    labels = torch.arange(SIZE) % 4
    for step in range(4):
        student, teacher = data(step)
        results = []
        for function, module in ((compiled, loss), (plain, plain)):
            module.zero_grad()
            leaf = student.clone().requires_grad_()
            value = function(leaf, teacher, labels)
            value.backward()
            grads = [p.grad for p in module.parameters() if p.grad is not None]
            results.append((value.detach(), leaf.grad, grads, module.metrics()))
        torch.testing.assert_close(*results)
        assert counter.frame_count == 1


def test_a_custom_loss_inside_a_compiled_function():
    losses = [KDLoss(), DKDLoss(beta=1.0)]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t, y: F.cross_entropy(s, y) + sum(loss(s, t, y) for loss in losses),
        backend=counter,
        fullgraph=True,
    )
    labels = torch.arange(SIZE) % CLASSES
    for step in range(3):
        student, teacher = logits(step)
        expected = F.cross_entropy(student, labels)
        expected = expected + sum(loss(student, teacher, labels) for loss in losses)
        torch.testing.assert_close(compiled(student, teacher, labels), expected)
    assert counter.frame_count == 1


def attached(weight=1.0, net=Net, at="last", images=IMAGES, **kwargs):
    torch.manual_seed(0)
    student, teacher = net().to(images.dtype), Net(6).to(images.dtype)
    points = [KDPoint(at, "last", targets=CodebookTargets(4))]
    if net is Net:
        points.append(KDPoint("first", targets=DecisionTargets(1, components=2)))
        kwargs["losses"] = [AEKTLoss(beta=1.0), FitNetLoss(at="first"), KDLoss(weight=weight)]
    kd = attach_kd(student, teacher, points, example=images, **kwargs)
    kd.fit([(images, LABELS)])
    optimiser = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.05)
    return student.train(), kd, optimiser


def table(step):
    """A schedule of which nothing can be computed symbolically."""
    return [0.0, 0.3, 0.1, 0.7, 0.2, 0.9, 0.5, 0.4, 1.0, 0.6, 0.8, 0.05][step]


def whole_step(student, kd, images=IMAGES):
    return F.cross_entropy(student(images), LABELS) + kd.loss(LABELS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "weight"),
    [
        pytest.param("kd.loss", 1.0, marks=pytest.mark.release),
        pytest.param("kd.loss", Cosine(10), marks=pytest.mark.release),
        ("kd.loss", LinearWarmup(3)),
        ("student and kd.loss", table),
        ("step", table),
    ],
    ids=["number", "cosine", "warm-up", "student too", "step"],
)
def test_compiled_kd_loss_equals_eager_and_never_compiles_again(part, weight):
    # In float64, because training multiplies rounding errors a thousandfold in these steps. The
    # graphs of torch 2.9 round AEKT differently in the first step.
    images = IMAGES.double()
    student, kd, optimiser = attached(weight, images=images)
    twin, twin_kd, twin_optimiser = attached(weight, images=images)
    counter = CompileCounterWithBackend("aot_eager")
    if part == "step":
        run = torch.compile(lambda: whole_step(student, kd, images), backend=counter)
    else:
        loss = torch.compile(kd.loss, backend=counter)
        called = student if part == "kd.loss" else torch.compile(student, backend=counter)
        run = lambda: F.cross_entropy(called(images), LABELS) + loss(LABELS)  # noqa: E731
    plain = partial(whole_step, twin, twin_kd, images)
    graphs = []
    for step in range(11):
        for function, steps in ((run, optimiser), (plain, twin_optimiser)):
            steps.zero_grad()
            function().backward()
            steps.step()
        graphs.append(counter.frame_count)
        assert kd.step == step + 1
        assert list(kd.terms) == list(twin_kd.terms)
        for key, value in kd.terms.items():
            torch.testing.assert_close(value, twin_kd.terms[key])
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert graphs == [graphs[0]] * 11
    # Torch 2.9 makes three graphs more of the same calls, once as well.
    more = 3 if torch.__version__ < TorchVersion("2.15") else 0
    assert graphs[0] <= (2 if part == "kd.loss" else 4) + more


def test_a_compiled_kd_loss_raises_the_usual_errors():
    from kdlayers.errors import CaptureError

    student, kd, _ = attached()
    loss = torch.compile(kd.loss, backend="eager")
    with pytest.raises(CaptureError, match="no training forward of the student"):
        loss(LABELS)
    student(IMAGES)
    loss(LABELS).backward()
    assert kd.step == 1


def test_a_compiled_teacher_stays_compiled_inside_kd_loss():
    counter = CompileCounter()
    student, teacher = Net(4).train(), torch.compile(Net(6), backend=counter)
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)
    for _ in range(3):
        student(IMAGES)
        kd.loss(LABELS).backward()
    assert counter.frame_count == 1


def test_float64_weights_are_exact():
    class Half(DistillLoss):
        def forward(self, student, teacher, targets=None):
            return student.sum() * 0 + torch.tensor(3.0, dtype=torch.float64)

    student, teacher = Net(4).double().train(), Net(6).double()
    kd = attach_kd(student, teacher, losses=[Half(weight=0.1)], example=IMAGES.double())
    student(IMAGES.double())
    assert kd.loss().item() == 3.0 * 0.1


def small_vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_classes=3
    )


@compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("net", "at", "pixels"),
    [
        pytest.param(lambda: Net(4), "last", 8, id="conv"),
        pytest.param(small_vit, "blocks.1", 32, id="vit", marks=pytest.mark.release),
    ],
)
def test_inductor_trains_and_evaluates_as_eager(net, at, pixels):
    images = batch(pixels=pixels)[0]
    student, kd, optimiser = attached(net=net, at=at, images=images)
    twin, twin_kd, twin_optimiser = attached(net=net, at=at, images=images)
    compiled = torch.compile(student)
    for _ in range(3):
        for model, handle, steps in ((compiled, kd, optimiser), (twin, twin_kd, twin_optimiser)):
            steps.zero_grad()
            whole_step(model, handle, images).backward()
            steps.step()
        for key, value in kd.terms.items():
            torch.testing.assert_close(value, twin_kd.terms[key], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        found, expected = compiled.eval()(images), twin.eval()(images)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=5e-5)


def trained(net=lambda: Net(4), at="last", images=IMAGES):
    student, kd, optimiser = attached(net=net, at=at, images=images)
    for _ in range(2):
        whole_step(student, kd, images).backward()
        optimiser.step()
    kd.detach()
    return student.eval()


@compiler
@pytest.mark.slow
@pytest.mark.release  # the test of docs/export.md packages a student too
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "make",
    [pytest.param(bake, id="baked"), pytest.param(lambda student: student, id="with hooks")],
)
def test_aot_inductor(make, tmp_path):
    student = trained()
    exported = torch.export.export(make(student), (IMAGES,))
    package = str(tmp_path / "student.pt2")
    torch._inductor.aoti_compile_and_package(exported, package_path=package)
    loaded = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(IMAGES), student(IMAGES).detach(), rtol=1e-5, atol=1e-5)


class Detached(DistillLoss):
    def forward(self, student, teacher, targets=None):
        return (student.detach() - teacher).square().mean()


def test_a_loss_without_gradient_is_an_error():
    student = Net(4).train()
    kd = attach_kd(student, Net(6), losses=[Detached(), KDLoss()], example=IMAGES)
    student(IMAGES)
    with pytest.raises(ArgumentTypeError, match="Detached returned a value that does not depend"):
        torch.compile(kd.loss, backend="eager")(LABELS)
