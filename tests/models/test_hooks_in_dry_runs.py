"""Hooks that a model registers in its first forward do not outlast a dry run."""

import copy

import pytest
import torch
from torch import nn

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd, find_points
from kdlayers._models.undisturbed import undisturbed
from tests.nets import Net, batch

IMAGES, LABELS = batch()
TABLES = [
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
]


class Lazy(Net):
    """Registers hooks in its first forward, and adds what they collect to its output."""

    def forward(self, x):
        if not hasattr(self, "installed"):
            self.installed = True
            self.first.register_forward_hook(self.collect)
            self.first.register_forward_hook(
                lambda _m, _a, _k, out: None, with_kwargs=True, always_call=True
            )
            self.last.register_forward_pre_hook(lambda _m, a, k: (a, k), with_kwargs=True)
        self.collected = []
        return super().forward(x) + len(self.collected)

    def collect(self, _module, _args, output):
        self.collected.append(output.mean())


class Late(Lazy):
    """Counts what was collected after the forward of the parts."""

    def forward(self, x):
        output = super().forward(x)
        return output + len(self.collected)


def tables(model):
    return [[list(getattr(m, name).items()) for name in TABLES] for m in model.modules()]


@pytest.mark.parametrize("ran", [False, True])
def test_hooks_and_the_attribute_go_back_together(ran):
    model = Late().eval()
    model.first.register_forward_hook(lambda _m, _a, out: out * 2, prepend=True)
    model.first.register_forward_hook(lambda _m, _a, out: out + 1)
    if ran:
        model(IMAGES)
    before = tables(model)
    with undisturbed(model):
        model(IMAGES)
    assert tables(model) == before
    assert hasattr(model, "installed") == ran


def test_every_table_was_used():
    model = Late()
    model(IMAGES)
    used = [name for name in TABLES if any(getattr(m, name) for m in model.modules())]
    assert used == TABLES


def test_a_model_that_removes_a_hook_does_not_get_it_back():
    model = Net(4)
    handle = model.first.register_forward_hook(lambda *_: handle.remove())
    with undisturbed(model):
        model(IMAGES)
    assert not model.first._forward_hooks


def test_losses_are_those_of_models_that_ran_before():
    def values(ran):
        torch.manual_seed(0)
        student, teacher = Late(4), Late(6)
        for model in (student, teacher) if ran else ():
            copied = copy.deepcopy(model)
            model(IMAGES)
            model.load_state_dict(copied.state_dict())
        assert find_points(student, IMAGES)
        points = [KDPoint("first", "first", targets=CodebookTargets(4))]
        losses = [KDLoss(), FitNetLoss(at="last")]
        kd = attach_kd(student, teacher, points, losses=losses, example=IMAGES)
        kd.fit([(IMAGES, LABELS)], progress=False)
        outputs, found = [], []
        for _ in range(2):
            outputs.append(student(IMAGES))
            found.append(kd.loss(LABELS))
        return [*found, *outputs, teacher.eval()(IMAGES)]

    for ours, theirs in zip(values(False), values(True), strict=True):
        torch.testing.assert_close(ours, theirs)


def dpt(hf, seed):
    """A small model that collects the hidden states of its backbone by hooks."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    neck = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    config = hf.DPTConfig(
        **sizes, **neck, backbone_out_indices=[0, 1, 2, 3], num_labels=3, use_auxiliary_head=False
    )
    model = hf.DPTForSemanticSegmentation(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter)
    return model.eval()


def test_hidden_states_of_hugging_face_are_collected_once():
    hf = pytest.importorskip("transformers")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = [dpt(hf, seed)(images).logits for seed in (0, 1)]
    student, teacher = dpt(hf, 0), dpt(hf, 1)
    before = [tables(student), tables(teacher)]
    find_points(student, images)
    point = KDPoint("neck.fusion_stage.layers.3", num_templates=4)
    kd = attach_kd(student, teacher, [point], losses=[KDLoss()], example=images)
    kd.remove()
    assert [tables(student), tables(teacher)] == before
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=images)
    with torch.no_grad():
        found = [model(images).logits for model in (student, teacher)]
    torch.testing.assert_close(found, wanted)
    student.train()(images)
    assert kd.loss().isfinite()
    with torch.no_grad():
        torch.testing.assert_close(teacher(images).logits, wanted[1])
