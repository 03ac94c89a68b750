"""Wrong calls of attach_kd raise errors and leave both models unchanged."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    DecisionTargets,
    DKDLoss,
    FitNetLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    RKDLoss,
    attach_kd,
    attach_mutual,
    bake,
    find_points,
    fold,
    functional,
    load_student,
    prune_templates,
    save_student,
)
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    AttachError,
    CheckpointError,
    KDLayersError,
    KDLayersWarning,
    LayoutError,
    NoMatchError,
    ShapeError,
)
from kdlayers.losses import TemplateLoss
from tests.attach_tester import Frozen
from tests.nets import Awkward, Net, batch

IMAGES, LABELS = batch()
FIVE_CLASSES = Net(6, classes=5)


def attach(at, **kwargs):
    return lambda s, t: attach_kd(s, t, at, **{"example": IMAGES, **kwargs})


def point(**kwargs):
    return attach([KDPoint("last", **kwargs)])


def shared(s, t):
    t = copy.deepcopy(t)
    t.stem[0].weight = s.stem[0].weight
    attach_kd(s, t, "last", example=IMAGES)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    SCRIPTED = torch.jit.script(Net(4))

ATTACHING = [
    (attach(["lats"]), NoMatchError, "no module 'lats' runs .* nearest names: 'last'"),
    (attach(["layer*"]), NoMatchError, "no module 'layer\\*' runs in the student"),
    (attach({"last": "lost"}), NoMatchError, "no module 'lost' runs in the teacher .*'last'"),
    (
        attach(["side"]),
        NoMatchError,
        r"in the teacher .*at=\{'side': 'name in the teacher'\} or KDP",
    ),
    (attach({"idle": "last"}), NoMatchError, "'idle' exists, but it does not run in forward, ret"),
    (attach({"again": "last"}), AttachError, "runs 2 times in one forward"),
    (attach({"side": "last"}), AttachError, "does not reach the model's output"),
    (attach({"norm": "last"}), AttachError, "is a BatchNorm2d, which convert_sync_batchnorm"),
    (attach({"wide": "last"}), LayoutError, "its first axis is not the batch"),
    (attach({"first": "first", "side": "last"}), AttachError, r"output of \['side'\]"),
    (attach(["last", "last"]), ArgumentError, r"\['last'\] more than once"),
    (attach(["last", "last.1"]), AttachError, "two points refer to the same module"),
    (attach([]), ArgumentError, r"nothing to attach: give at=\[module names\]"),
    (attach(()), ArgumentError, "nothing to attach"),
    (attach(3), ArgumentTypeError, "at must be names, a dict .* got int"),
    (attach([3]), ArgumentTypeError, "at holds a int"),
    (attach(["last", None]), ArgumentTypeError, "at holds a NoneType"),
    (attach({"*st": "last"}), ArgumentError, "give a KDPoint for each"),
    (attach({"last": "*st"}), ArgumentError, "must be one name"),
    (attach([KDPoint("first", num_templates=5), "last"]), ArgumentError, "divided evenly"),
    (
        attach([KDPoint("last", targets=CodebookTargets(3), num_templates=5)]),
        ArgumentError,
        "num_templates=5, but its targets have 3",
    ),
    (lambda s, t: point(targets=3), ArgumentTypeError, "targets must be CodebookTargets"),
    (lambda s, t: KDPoint(None), ArgumentTypeError, "student must be a module's name"),
    (lambda s, t: KDPoint("last", 3), ArgumentTypeError, "teacher must be a module's name"),
    (lambda s, t: point(num_templates=0), ArgumentError, "num_templates must be 1 or more, got 0"),
    (lambda s, t: point(num_templates=2.0), ArgumentTypeError, "num_templates must be an int"),
    (lambda s, t: point(alpha=-1.0), ArgumentError, "alpha must be 0 or more"),
    (lambda s, t: point(alpha=float("nan")), ArgumentError, "alpha must be 0 or more and finite"),
    (lambda s, t: CodebookTargets(0), ArgumentError, "num_templates"),
    (lambda s, t: CodebookTargets(sharpness=0.0), ArgumentError, "sharpness must be above 0"),
    (lambda s, t: DecisionTargets(0), ArgumentError, "subclasses"),
    (lambda s, t: DecisionTargets(components=0), ArgumentError, "components"),
    (
        lambda s, t: attach_kd(s, at="last", example=IMAGES),
        ArgumentError,
        r"pass KDPoint\('last', num_templates=\.\.\.\)",
    ),
    (
        lambda s, t: attach_kd(s, losses=[KDLoss()], example=IMAGES),
        ArgumentError,
        "compare the student with a teacher, but no teacher was given",
    ),
    (attach("last", losses=[nn.MSELoss()]), ArgumentTypeError, "DistillLoss objects .* MSELoss"),
    (attach("last", losses=[KDLoss]), ArgumentTypeError, r"the class KDLoss: write KDLoss\(\)$"),
    (attach("last", losses=KDLoss), ArgumentTypeError, r"the class KDLoss: write KDLoss\(\)$"),
    (attach("last", losses=None), ArgumentTypeError, r"got None: leave losses out, or pass .*\[\]"),
    (attach("last", losses=3), ArgumentTypeError, "DistillLoss objects .* got int$"),
    (attach("last", losses=[TemplateLoss()]), ArgumentError, "TemplateLoss needs a KD layer"),
    (attach("last", losses=[KDLoss(), KDLoss()]), ArgumentError, "two losses are called 'KDLoss'"),
    (attach((), losses=[FitNetLoss(at="lats")]), NoMatchError, "no module 'lats' runs"),
    (attach((), losses=[FitNetLoss(at="side")]), NoMatchError, r"both: at=\('side', 'its name'\)"),
    (attach((), losses=[FitNetLoss(at="*st")]), ArgumentError, "a loss reads one point"),
    (attach((), losses=[FitNetLoss()]), ShapeError, "^FitNetLoss: student must be feature maps"),
    (
        lambda s, t: attach_kd(s, FIVE_CLASSES, losses=[KDLoss()], example=IMAGES),
        ShapeError,
        r"student's are \[6, 3\] and the teacher's \[6, 5\]: .* KD layers \(at=\.\.\.\) or losses",
    ),
    (
        attach((), losses=[KDLoss(teacher_index=1)]),
        ArgumentError,
        "reads teacher 1, but there are 1",
    ),
    (lambda s, t: KDLoss(weight=-1.0), ArgumentError, "weight must be 0 or more"),
    (lambda s, t: KDLoss(weight="1"), ArgumentTypeError, "weight must be a number or a function"),
    (lambda s, t: KDLoss(temperature=0.0), ArgumentError, "temperature"),
    (lambda s, t: KDLoss(at=("a", "b", "c")), ArgumentError, r"a \(student, teacher\) pair"),
    (
        lambda s, t: attach_kd(s, [t, t], "last", example=IMAGES, teacher_weights=[1]),
        ArgumentError,
        "for each of the 2 teachers",
    ),
    (lambda s, t: attach_kd("net", t, "last"), ArgumentTypeError, "student must be a torch.nn.Mod"),
    (
        lambda s, t: attach_kd(s, "net", "last", example=IMAGES),
        ArgumentTypeError,
        "must be a torch",
    ),
    (lambda s, t: attach_kd(s, s, "last", example=IMAGES), AttachError, "are the same model"),
    (shared, AttachError, "share 1 parameters, such as the teacher's 'stem.0.weight'"),
    (
        lambda s, t: attach_kd(nn.DataParallel(s), t, "last", example=IMAGES),
        AttachError,
        "wrapped in DataParallel.*use DistributedDataParallel",
    ),
    (attach("last", example=3), ArgumentError, "example must be a tensor or a tuple"),
    (attach("last", example=IMAGES[:, :2]), ArgumentError, "could not run on an example of shape"),
    (
        lambda s, t: attach_kd(s, nn.BatchNorm2d(1), "last", example=IMAGES),
        ArgumentError,
        r"the teacher \(BatchNorm2d\) could not run .* convert them with teacher_transform=",
    ),
    (
        lambda s, t: attach_kd(SCRIPTED, t, losses=[KDLoss()], example=IMAGES),
        AttachError,
        r"TorchScript module, .* and script bake\(student\)",
    ),
    (lambda s, t: find_points(s, IMAGES[:, :1]), ArgumentError, "pass example= with a small batch"),
    (lambda s, t: find_points("resnet18"), ArgumentTypeError, "a torch.nn.Module, got str"),
    (lambda s, t: attach_mutual(s, s, example=IMAGES), AttachError, "are the same model"),
    (lambda s, t: attach_mutual(s, t, losses=[3]), ArgumentTypeError, "such as KDLoss.., got int"),
    (lambda s, t: attach_mutual(s, t, losses=3), ArgumentTypeError, "DistillLoss .*, got int"),
    (
        lambda s, t: attach_kd(s, t, losses=[FitNetLoss()], example=IMAGES),
        ShapeError,
        "without at=, attach_kd passes logits: give the loss a point",
    ),
    (
        lambda s, t: bake(s),
        AttachError,
        "has no KD layers, so there is nothing to bake",
    ),
    (lambda s, t: fold(s), AttachError, "has no KD layers, so there is nothing to fold"),
    (lambda s, t: prune_templates(s, [IMAGES]), AttachError, "has no KD layers to prune"),
    (
        lambda s, t: save_student(s, "/nowhere/student.pt"),
        AttachError,
        "has no KD layers, so save_student is not needed",
    ),
    (
        lambda s, t: load_student(s, __file__),
        CheckpointError,
        "could not be read: it is damaged",
    ),
]


@pytest.mark.parametrize(("misuse", "error", "sentence"), ATTACHING)
def test_before_training(misuse, error, sentence):
    student, teacher = Awkward(), Net(6)
    student.first.eval()
    teacher.last.eval()
    before = Frozen(student), Frozen(teacher)
    keys, random = list(student.state_dict()), torch.get_rng_state()
    with pytest.raises(error, match=sentence) as caught:
        misuse(student, teacher)
    assert isinstance(caught.value, KDLayersError)
    assert torch.equal(random, torch.get_rng_state())
    assert list(student.state_dict()) == keys
    assert before[0].unchanged(student)
    assert before[1].unchanged(teacher)
    for model in (student, teacher):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_attaching_over_kd_layers_of_an_earlier_handle():
    student, teacher = Net(), Net(6)
    earlier = attach_kd(student, teacher, "first", example=IMAGES)
    with pytest.warns(
        KDLayersWarning, match=r"layers at \['first'\] of an earlier attach_kd"
    ) as seen:
        later = attach_kd(student, teacher, "last", example=IMAGES)
    assert seen[0].filename == __file__
    later.remove()
    earlier.detach()
    attach_kd(student, teacher, "last", example=IMAGES)


def test_numbers_of_numpy_are_numbers():
    student, teacher = Net(), Net(6)
    losses = [KDLoss(temperature=np.float32(4), weight=np.float32(0.5))]
    losses += [DKDLoss(alpha=np.float16(1), beta=np.int64(2), temperature=np.float32(4))]
    losses += [AEKTLoss(beta=np.float32(1)), RKDLoss(distance=np.float32(25))]
    losses += [KDLoss(ignore_index=np.int64(255), teacher_index=np.int64(0), name="first")]
    whole = InheritExploreLoss(split="random", seed=np.int64(1), factor_channels=2, epochs=1)
    whole.build(torch.rand(2, 4, 3, 3), torch.rand(2, 4, 3, 3))
    assert DecisionTargets(num_classes=np.int64(3), ignore_index=np.int64(255)).ignore_index == 255
    targets = CodebookTargets(np.int64(4), sharpness=np.float32(1))
    points = [KDPoint("last", targets=targets, alpha=np.float32(1), num_templates=np.int32(4))]
    kd = attach_kd(student.train(), teacher, points, losses=losses, example=IMAGES)
    kd.fit([(IMAGES, LABELS)], seed=np.int64(2), progress=False)
    centers = targets.centers
    kd.fit([(IMAGES, LABELS)], seed=2, progress=False, refit=True)
    assert torch.equal(targets.centers, centers)
    student(IMAGES)
    kd.loss(LABELS).backward()
    assert type(losses[0].temperature) is float
    assert type(targets.num_templates) is int
    assert type(losses[-1].teacher_index) is int
    for wrong in (np.float32(-1), np.float32("nan")):
        with pytest.raises(ArgumentError, match="temperature must be above 0"):
            KDLoss(temperature=wrong)
    with pytest.raises(ArgumentTypeError, match="must be an integer, got float32"):
        CodebookTargets(np.float32(4))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: KDLoss(ignore_index=None), "ignore_index"),
        (lambda: DecisionTargets(ignore_index=True), "ignore_index"),
        (lambda: CodebookTargets(2).fit([(torch.rand(9, 3), None)], seed=0.5), "seed"),
        (lambda: InheritExploreLoss(seed="0"), "seed"),
        (lambda: InheritExploreLoss(factor_channels=2).fit([], seed=None), "seed"),
    ],
)
def test_options_that_are_no_integers_are_named(call, name):
    with pytest.raises(ArgumentTypeError, match=f"{name} must be an integer, got"):
        call()


@pytest.mark.parametrize("name", ["kd", "dkd", "aekt", "dist"])
def test_functions_take_numbers_of_numpy(name):
    function = getattr(functional, name)
    student = torch.randn(6, 3, requires_grad=True)
    given = (student, torch.randn(6, 3), *([LABELS] if name in ("dkd", "aekt") else []))
    found = function(*given, temperature=np.float32(4))
    torch.testing.assert_close(found, function(*given, temperature=4.0))


class Extra(Net):
    def __init__(self):
        super().__init__(4)
        self.extra = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return super().forward(self.extra(x))


def test_a_single_name_that_only_the_teacher_has():
    both = r"in the student .*the teacher has 'extra'.*at=\{'name in the student': 'extra'\}"
    with pytest.raises(NoMatchError, match=both):
        attach_kd(Net(4), Extra(), ["extra"], example=IMAGES)
    both = r"in the student .*give both: at=\('its name', 'extra'\)"
    with pytest.raises(NoMatchError, match=both):
        attach_kd(Net(4), Extra(), losses=[FitNetLoss(at="extra")], example=IMAGES)
