"""timm's train script with the lines of its page: every feature on, resumed, averaged."""

import argparse
import copy
from functools import partial

import pytest
import torch
from PIL import Image
from torch import nn

from kdlayers import AEKTLoss, KDLoss, KDPoint, attach_kd, load_student, save_student
from kdlayers.errors import KDLayersError
from tests.docs_blocks import small_codebooks
from tests.integrations.pages import diffs, loop

timm = pytest.importorskip("timm")
task_of = pytest.importorskip("timm.task")
if not hasattr(task_of, "resume_task_checkpoint"):
    pytest.skip("timm's tasks have no checkpoints yet", allow_module_level=True)

from timm.optim import create_optimizer_v2  # noqa: E402

from kdlayers.integrations.timm import KDTask  # noqa: E402

# timm opens every image without closing it.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:The .grad attribute of a Tensor",  # torch.compile
)
DIFF = diffs("timm-train.md")["timm_train"]
SIZE, CLASSES = 64, 3


def create_model(name, pretrained=False, **options):
    """Small models, and no weights from the network."""
    return timm.create_model({"convnext_tiny": "test_convnext"}.get(name, name), **options)


@pytest.fixture
def args(tmp_path, monkeypatch):
    small_codebooks(monkeypatch, 4)
    for index in range(12):
        folder = tmp_path / "train" / str(index % CLASSES)
        folder.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (80, 80, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(folder / f"{index}.png")
    options = {"model": "test_resnet", "num_classes": CLASSES, "input_size": (3, SIZE, SIZE)}
    options |= {"dataset": "", "data_dir": str(tmp_path), "train_split": "train", "batch_size": 4}
    options |= {"opt": "sgd", "layer_decay": None, "resume": "", "torchcompile": "", "amp": False}
    options |= {"grad_checkpointing": False, "grad_accum_steps": 1, "seed": 0, "epochs": 1}
    return argparse.Namespace(**options, output=str(tmp_path))


def run(args, diff=DIFF, **changes):
    torch.manual_seed(0)
    args = argparse.Namespace(**{**vars(args), **changes})
    return loop("timm_train", diff, create_model=create_model)(args)


FEATURES = {
    "plain": {},
    "amp, accumulation": {"amp": True, "grad_accum_steps": 2},
    "checkpointing, layer decay": {"grad_checkpointing": True, "layer_decay": 0.7, "opt": "adamw"},
    "compiled": {"torchcompile": "eager"},
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_the_script_trains_the_new_layers(args, features):
    task, losses = run(args, **features)
    _, plain = run(args, diff=None, **features)
    assert len(losses) == len(plain) == 3 // features.get("grad_accum_steps", 1)
    assert losses[0] > plain[0] or features  # one more term
    state = timm.utils.unwrap_model(task.get_trainable_module()).state_dict()
    averaged = task.get_checkpoint_state(ema=True)["state_dict_ema"]
    layer = [key for key in state if ".kd." in key]
    assert len(layer) >= 6
    assert all(key in averaged for key in layer)
    assert task.kd.step == 3
    assert not any("teacher" in key for key in state)


def test_a_resumed_run_goes_on_exactly(args, tmp_path):
    whole, losses = run(args, epochs=2)
    (tmp_path / "again").mkdir()
    run(args, epochs=1, output=str(tmp_path / "again"))
    resumed, rest = run(
        args, epochs=2, resume=str(tmp_path / "again" / "last.pth.tar"), output=str(tmp_path)
    )
    assert rest == losses[3:]
    assert resumed.kd.step == whole.kd.step == 6
    for ema in (False, True):
        key = "state_dict_ema" if ema else "state_dict"
        ours, theirs = (t.get_checkpoint_state(ema=ema)[key] for t in (whole, resumed))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_best_checkpoint_becomes_a_student(args, tmp_path):
    task, _ = run(args)
    student = create_model("test_resnet", num_classes=CLASSES)
    attach_kd(student, create_model("test_convnext", num_classes=CLASSES), {"layer4": "stages"})
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    student.load_state_dict(checkpoint["state_dict_ema"])
    save_student(student, tmp_path / "student.pt")
    fresh = create_model("test_resnet", num_classes=CLASSES)
    deployed = load_student(fresh, tmp_path / "student.pt").eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    assert torch.equal(deployed(images), task.get_eval_model(ema=True).eval()(images))


def models():
    make = partial(timm.create_model, num_classes=CLASSES)
    return make("test_resnet"), make("test_convnext")


def batch():
    return torch.randn(4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kdloss_is_timms_own_distillation(temperature):
    student, teacher = models()
    images, labels = batch()
    teacher.pretrained_cfg = {**teacher.pretrained_cfg, "mean": (0.3,) * 3, "std": (0.2,) * 3}
    twin = copy.deepcopy(student)
    own = task_of.LogitDistillationTask(
        twin, teacher, nn.CrossEntropyLoss(), temperature=temperature, verbose=False
    )
    kd = attach_kd(
        student, teacher, losses=[KDLoss(temperature=temperature)], teacher_transform="auto",
        example=images,
    )  # fmt: skip
    ours = KDTask(task_of.ClassificationTask(student, nn.CrossEntropyLoss(), verbose=False), kd)
    found = ours(images, labels)
    expected = own.train()(images, labels)
    torch.testing.assert_close(found["kd_loss"], expected["kd_loss"])
    torch.testing.assert_close(found["loss"], expected["loss"])
    found["loss"].backward()
    expected["loss"].backward()
    for p, q in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_train_only_parameters_are_clipped_and_saved():
    student, teacher = models()
    images, labels = batch()
    kd = attach_kd(student, teacher, losses=[AEKTLoss()], example=images)
    task = KDTask(task_of.ClassificationTask(student, nn.CrossEntropyLoss(), verbose=False), kd)
    ids = [id(p) for p in task.get_clip_parameters()]
    assert all(id(p) in ids for p in [*student.parameters(), *kd.parameters()])
    state = task.get_checkpoint_state()
    with torch.no_grad():
        for p in kd.parameters():
            p.add_(1.0)
    task.load_checkpoint_state(state["state_dict"], state["task_state"])
    assert torch.equal(next(kd.parameters()), torch.eye(CLASSES))
    task.load_checkpoint_state(state["state_dict"])  # of a run without kdlayers
    with pytest.raises(AttributeError, match="nothing_like_this"):
        task.nothing_like_this()
    assert copy.copy(task).kd is kd


def test_a_task_of_two_handles_adds_and_saves_both():
    student, teacher = models()
    images, labels = batch()
    task = task_of.ClassificationTask(student, nn.CrossEntropyLoss(), verbose=False)
    first = attach_kd(student, teacher, losses=[AEKTLoss()], example=images)
    second = attach_kd(student, models()[1], losses=[AEKTLoss(weight=0.5)], example=images)
    both = KDTask(KDTask(task, first), second)
    found = both(images, labels)
    added = first.terms["total"] + second.terms["total"]
    torch.testing.assert_close(found["kd_loss"].detach(), added)
    own = nn.functional.cross_entropy(found["output"], labels)
    torch.testing.assert_close(found["loss"], own + found["kd_loss"])
    both(images, labels)
    with torch.no_grad():
        next(second.parameters()).add_(1.0)
    saved = [first.state_dict(), second.state_dict()]
    state = both.get_checkpoint_state()
    both(images, labels)
    with torch.no_grad():
        next(first.parameters()).zero_()
        next(second.parameters()).zero_()
    both.load_checkpoint_state(state["state_dict"], state["task_state"])
    for kd, expected in zip((first, second), saved, strict=True):
        assert kd.state_dict()["checksum"] == expected["checksum"]


@pytest.mark.parametrize("call", [("to", "cpu"), ("train",), ("float",)])
def test_methods_that_return_the_task_keep_every_handle(call):
    student, teacher = models()
    kds = [attach_kd(student, teacher, losses=[KDLoss(name=name)]) for name in ("a", "b")]
    task = task_of.ClassificationTask(student, nn.CrossEntropyLoss(), verbose=False)
    for kd in kds:
        task = KDTask(task, kd)
        name, *given = call
        assert getattr(task, name)(*given) is task


def test_in_eval_mode_it_is_the_task():
    student, teacher = models()
    images, labels = batch()
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=images)
    task = KDTask(task_of.ClassificationTask(student, nn.CrossEntropyLoss(), verbose=False), kd)
    student.eval()
    assert "kd_loss" not in task(images, labels)
    with pytest.raises(KDLayersError):
        kd.loss(labels)


def test_layer_decay_gives_a_kd_layer_the_rate_of_its_block():
    student, _ = models()
    kd = attach_kd(student, at=[KDPoint("layer2", num_templates=4)])
    optimizer = create_optimizer_v2(student, opt="sgd", lr=0.1, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): name for name, p in student.named_parameters()}
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            rates[names[id(p)]], decays[names[id(p)]] = group["lr_scale"], group["weight_decay"]
    layer = [name for name in rates if ".kd." in name]
    block = layer[0].split(".kd.")[0]
    own = {rates[name] for name in rates if name.startswith(block) and ".kd." not in name}
    assert len(layer) == len(kd.added_parameters())
    assert {rates[name] for name in layer} == own
    assert max(own) < 1
    parameters = dict(student.named_parameters())
    assert all((decays[name] > 0) == (parameters[name].dim() > 1) for name in layer)
