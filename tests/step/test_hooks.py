"""The layer runs under copies, compilation, checkpointing and autocast."""

import copy
import io
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle
from torchvision.models import resnet18

from kdlayers import CodebookTargets, KDLoss, KDPoint, attach_kd, load_student, save_student
from kdlayers._step.sites import slots
from kdlayers.errors import CaptureError
from tests.nets import Net, batch

# torch.compile itself reads .grad of the tensors in a frame, with the warning hidden from users.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

IMAGES, LABELS = batch()


def attached(student=None, at="last", losses=()):
    student = student or Net(4)
    teacher = Net(6)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint(at, "last", targets=CodebookTargets(4))],
        losses=losses,
        example=IMAGES,
    )
    kd.fit([(IMAGES, LABELS)])
    return student.train(), kd


def ema(student):
    averaged = AveragedModel(student)
    averaged.update_parameters(student)
    return averaged


def pickled(student):
    return pickle.loads(pickle.dumps(student))


def saved_whole(student):
    file = io.BytesIO()
    torch.save(student, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def timm_ema(student):
    averaged = timm.utils.ModelEmaV3(student)
    averaged.update(student)
    return averaged


@pytest.mark.parametrize("copied", [copy.deepcopy, ema, timm_ema, pickled, saved_whole])
def test_copies_run_their_own_layers_without_recording(copied):
    student, kd = attached()
    logits = student(IMAGES)  # captures are live while the copy is made
    twin = copied(student)
    assert torch.equal(twin.eval()(IMAGES), student.eval()(IMAGES))
    twin.train()(IMAGES)
    student.train()
    (F.cross_entropy(logits, LABELS) + kd.loss(LABELS)).backward()
    with torch.no_grad():
        for layer in slots(student).values():
            layer.value.weight.normal_()
    assert not torch.equal(twin.eval()(IMAGES), student.eval()(IMAGES))


def test_hooks_of_another_process_replace_none_of_an_unpickled_student(monkeypatch):
    student, kd = attached(losses=[KDLoss()])
    expected = student.eval()(IMAGES)
    content = pickle.dumps((student.train(), kd))
    keys = [key for m in student.modules() for key in (*m._forward_hooks, *m._forward_pre_hooks)]
    for key in keys:  # a new process counts its hooks from 0 and reaches this number some time
        monkeypatch.setattr(RemovableHandle, "next_id", key)
        twin, handle = pickle.loads(content)
        for module in [m for m in twin.modules() if m._forward_hooks or m._forward_pre_hooks]:
            module.register_forward_hook(lambda *_: None)
        assert torch.equal(twin.eval()(IMAGES), expected)
        twin.train()(IMAGES)
        handle.loss(LABELS).backward()


def test_removing_empties_torchs_tables_of_hooks():
    student, kd = attached(losses=[KDLoss()])
    kd.remove()
    tables = [n for n in vars(nn.Module()) if n.startswith(("_forward_hooks", "_forward_pre"))]
    assert len(tables) == 5
    assert not any(vars(module)[name] for module in student.modules() for name in tables)


def test_a_pickled_student_takes_no_teacher_with_it():
    student, _ = attached()
    plain = len(pickle.dumps(Net(4)))
    layer = sum(p.numel() * 4 for p in slots(student)["last"].parameters())
    assert len(pickle.dumps(student)) < plain + layer + 6000


def test_functional_call_and_vmap():
    student, _ = attached()
    student.eval()
    parameters = dict(student.named_parameters())
    other = {k: torch.zeros_like(v) if "head.scale" in k else v for k, v in parameters.items()}
    assert torch.equal(torch.func.functional_call(student, parameters, (IMAGES,)), student(IMAGES))
    assert not torch.equal(torch.func.functional_call(student, other, (IMAGES,)), student(IMAGES))
    stacked, buffers = torch.func.stack_module_state([student, copy.deepcopy(student)])
    both = torch.vmap(lambda p, b: torch.func.functional_call(student, (p, b), (IMAGES,)))(
        stacked, buffers
    )
    torch.testing.assert_close(both[1], student(IMAGES))


def test_iterating_over_a_sequential_still_runs_the_layer():
    student, _ = attached(resnet18(num_classes=3), "layer4")
    student.eval()
    x = torch.randn(2, 512, 4, 4)[:, :256]
    walked = x
    for block in student.layer4:
        walked = block(walked)
    assert torch.equal(walked, student.layer4(x))
    assert len(student.layer4) == 2
    trunk = nn.Sequential(*list(student.children())[:-1])
    assert torch.equal(student.fc(trunk(IMAGES).flatten(1)), student(IMAGES))
    assert sum(".kd." in name for name, _ in trunk.named_parameters()) == 6


def test_a_plain_checkpoint_loads_strictly_and_keeps_the_layers():
    student, _ = attached()
    plain = Net(4).state_dict()
    before = {k: v.clone() for k, v in student.state_dict().items() if ".kd." in k}
    student.load_state_dict(plain)
    after = student.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(torch.equal(after[k], v) for k, v in plain.items())
    assert not any(".kd." in key for key in plain)
    broken = {k: v for k, v in after.items() if not k.endswith("kd.value.weight")}
    with pytest.raises(RuntimeError, match=r"kd\.value\.weight"):
        student.load_state_dict(broken)


def gradients(student, kd):
    student.zero_grad()
    (F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)).backward()
    return [p.grad.clone() for p in student.parameters()]


class Checkpointed(Net):
    reentrant = None

    def forward(self, x):
        x = self.first(self.stem(x))
        if self.reentrant is None:
            x = self.last(x)
        else:
            x = checkpoint(self.last, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def test_non_reentrant_checkpointing_gives_the_same_gradients():
    student, kd = attached(Checkpointed(4))
    plain = gradients(student, kd)
    student.reentrant = False
    for a, b in zip(plain, gradients(student, kd), strict=True):
        torch.testing.assert_close(a, b)


def test_checkpointing_the_whole_student():
    student, kd = attached()
    plain = gradients(student, kd)
    student.zero_grad()
    logits = checkpoint(student, IMAGES, use_reentrant=False)
    (F.cross_entropy(logits, LABELS) + kd.loss(LABELS)).backward()
    for a, p in zip(plain, student.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)
    gradients(student, kd)


def test_reentrant_checkpointing_is_refused():
    student, kd = attached(Checkpointed(4))
    student.reentrant = True
    student(IMAGES)
    with pytest.raises(CaptureError, match="use_reentrant=False"):
        kd.loss(LABELS)


@pytest.mark.parametrize("order", ["attach, compile", "compile, attach", "compile, run, attach"])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_students_run_the_layer_and_train_alike(order, inplace):
    torch._dynamo.reset()
    student = Net(4)
    state = copy.deepcopy(student.state_dict())

    def compiled(model):
        if inplace:
            model.compile(backend="eager", fullgraph=True)
            return model
        return torch.compile(model, backend="eager", fullgraph=True)

    called = student if order.startswith("attach") else compiled(student)
    if "run" in order:
        called.train()
        called(IMAGES).sum().backward()
        student.load_state_dict(state)
        student.zero_grad()
    torch.manual_seed(5)
    teacher = Net(6)
    kd = attach_kd(called, teacher, [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    kd.fit([(IMAGES, LABELS)])
    if order.startswith("attach"):
        called = compiled(student)
    twin = Net(4)
    twin_kd = attach_kd(
        twin, teacher, [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES
    )
    twin.load_state_dict(student.state_dict())
    twin_kd.load_state_dict(kd.state_dict())
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (student, twin)]
    for _ in range(3):
        for model, handle, optimiser in zip((called, twin), (kd, twin_kd), optimisers, strict=True):
            model.train()
            optimiser.zero_grad()
            loss = F.cross_entropy(model(IMAGES), LABELS) + handle.loss(LABELS)
            loss.backward()
            optimiser.step()
        torch.testing.assert_close(kd.terms["total"], twin_kd.terms["total"])
    torch.testing.assert_close(called.eval()(IMAGES), twin.eval()(IMAGES))


def test_compiled_student_has_one_graph_and_does_not_recompile():
    torch._dynamo.reset()
    student, kd = attached()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(student, backend=counter, fullgraph=True)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    counts = []
    for _ in range(4):
        optimiser.zero_grad()
        (F.cross_entropy(compiled(IMAGES), LABELS) + kd.loss(LABELS)).backward()
        optimiser.step()
        counts.append(counter.frame_count)
    assert counts[1:] == [counts[1]] * 3


def test_autocast_gives_the_teacher_the_same_precision_inside_and_outside():
    student, kd = attached(losses=[KDLoss()])
    student(IMAGES)
    exact = kd.loss(LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(IMAGES)
        inside = kd.loss(LABELS)
        student(IMAGES)
    outside = kd.loss(LABELS)
    assert inside.dtype == outside.dtype == torch.float32
    torch.testing.assert_close(inside, outside)
    torch.testing.assert_close(inside, exact, rtol=0.05, atol=0.05)
    outside.backward()


def test_teacher_in_another_precision_gets_its_inputs_cast():
    student, teacher = Net(4), Net(6).to(torch.bfloat16)
    kd = attach_kd(student, teacher, [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    kd.fit([(IMAGES, LABELS)])
    student.train()(IMAGES)
    loss = kd.loss(LABELS)
    assert loss.dtype == torch.float32
    loss.backward()


def test_exports_carry_the_layer():
    student, _ = attached()
    student.eval()
    expected = student(IMAGES)
    exported = torch.export.export(student, (IMAGES,), strict=False)
    torch.testing.assert_close(exported.module()(IMAGES), expected)
    student.train()
    torch.export.export(student, (IMAGES,), strict=False)
    student.eval()
    traced = torch.fx.symbolic_trace(student)
    torch.testing.assert_close(traced(IMAGES), expected)


@pytest.mark.parametrize("training", [False, True])
def test_compiled_after_a_plain_instance_of_the_class_the_layer_still_runs(training):
    torch.compiler.reset()
    plain = Net()
    student = copy.deepcopy(plain)
    kd = attach_kd(student, Net(), [KDPoint("last", targets=CodebookTargets(4))])
    kd.fit([(torch.randn(4, 3, 12, 12), None)], progress=False)
    images = torch.randn(4, 3, 12, 12)
    first, second = (torch.compile(m.train(training), backend="eager") for m in (plain, student))
    with torch.set_grad_enabled(training):
        first(images)
        compiled = second(images)
        if training:
            assert kd.loss() > 0
        torch.testing.assert_close(compiled, student(images))
        assert not torch.allclose(compiled, plain(images))


def test_a_loaded_student_compiled_after_a_plain_instance_keeps_its_layer(tmp_path):
    student = Net().eval()
    attach_kd(student, at=[KDPoint("last", num_templates=4)]).detach()
    save_student(student, tmp_path / "student.pt")
    torch.compiler.reset()
    with unguarded():
        loaded, plain = load_student(Net(), tmp_path / "student.pt").eval(), Net().eval()
        images = torch.randn(4, 3, 12, 12)
        with torch.no_grad():
            torch.compile(plain, backend="eager")(images)
            compiled = torch.compile(loaded, backend="eager")(images)
            torch.testing.assert_close(compiled, student(images))


def unguarded():
    """As in a process in which nothing was attached yet."""
    from torch import _dynamo

    return _dynamo.config.patch(skip_nnmodule_hook_guards=True)


def test_an_unpickled_student_does_not_share_graphs_with_plain_models():
    from torch import _dynamo

    student = Net()
    attach_kd(student, at=[KDPoint("last", num_templates=4)]).detach()
    saved = pickle.dumps(student)
    with unguarded():
        pickle.loads(saved)
        assert _dynamo.config.skip_nnmodule_hook_guards is False


def test_a_layer_behind_an_empty_container():
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(), nn.ReLU())
    attach_kd(student, at=[KDPoint("1", num_templates=4)])
    assert student(torch.randn(2, 3, 5, 5)).shape == (2, 4, 5, 5)
