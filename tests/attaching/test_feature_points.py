"""FeatureLoss in attach_kd: all pairs of maps, tokens, vectors and class tokens."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from kdlayers import CodebookTargets, FeatureLoss, FitNetLoss, KDPoint, attach_kd
from kdlayers.errors import ArgumentError, ShapeError
from tests.nets import Net, batch

IMAGES, LABELS = batch(6, pixels=16)


def vit(width=12, **options):
    return VisionTransformer(
        16, 4, num_classes=3, embed_dim=width, depth=2, num_heads=2, mlp_ratio=2, **options
    )


# A model, and a point of every kind that it has.
MODELS = {
    "maps": (lambda: Net(8, stride=2), "last"),
    "tokens": (vit, "blocks.1"),
    "registers": (partial(vit, reg_tokens=4), "blocks.1"),
    "patches only": (partial(vit, class_token=False, global_pool="avg"), "blocks.1"),
    "vectors": (vit, "fc_norm"),
}


def steps(kd, student, count=12):
    optimiser = torch.optim.Adam([*student.parameters(), *kd.parameters()], lr=0.01)
    values = []
    for _ in range(count):
        student.train()(IMAGES)
        loss = kd.loss()  # no labels
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    return values


@pytest.mark.parametrize("tokens", ["patch", "pooled"])
@pytest.mark.parametrize("theirs", MODELS)
@pytest.mark.parametrize("ours", MODELS)
def test_any_features_learn_from_any_features(ours, theirs, tokens):
    torch.manual_seed(0)
    (make, point), (make_teacher, tap) = MODELS[ours], MODELS[theirs]
    student, teacher = make(), make_teacher()
    loss = FeatureLoss(at=(point, tap), tokens=tokens, distance="mse")
    kd = attach_kd(student, teacher, losses=[loss], example=IMAGES)
    before = [p.detach().clone() for p in kd.parameters()]
    assert len(before) == 2
    values = steps(kd, student)
    assert values[-1] < values[0]
    assert not any(map(torch.equal, before, kd.parameters()))
    kd.remove()
    assert list(student.state_dict()) == list(make().state_dict())


def captured(model, name):
    found = []
    hook = model.get_submodule(name).register_forward_hook(lambda _m, _a, out: found.append(out))
    with torch.no_grad():
        model.eval()(IMAGES)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("theirs", ["tokens", "registers"])
def test_class_tokens_are_not_thrown_away(theirs):
    torch.manual_seed(0)
    (make, tap), student = MODELS[theirs], Net(8, stride=2)
    teacher = make()
    loss = FeatureLoss(at=("last", tap), tokens="cls", normalize_teacher=True)
    alone = copy.deepcopy(loss)
    kd = attach_kd(student, teacher, losses=[loss], example=IMAGES)
    alone.load_state_dict(loss.state_dict())
    student.train()
    maps = []
    student.last.register_forward_hook(lambda _m, _a, out: maps.append(out))
    student(IMAGES)
    value = kd.loss()
    expected = alone(maps[0].mean((2, 3)), captured(teacher, tap)[:, 0])
    torch.testing.assert_close(value, expected)


def test_class_token_to_class_token():
    torch.manual_seed(0)
    student, teacher = vit(8), vit(8, reg_tokens=4)
    loss = FeatureLoss(at="blocks.1", tokens="cls", projector=None)
    kd = attach_kd(student, teacher, losses=[loss], example=IMAGES)
    tokens = []
    student.blocks[1].register_forward_hook(lambda _m, _a, out: tokens.append(out))
    student.train()(IMAGES)
    goal = captured(teacher, "blocks.1")[:, 0]
    expected = 1 - F.cosine_similarity(tokens[0][:, 0], goal).mean()
    torch.testing.assert_close(kd.loss(), expected)


@pytest.mark.parametrize("theirs", ["maps", "patches only", "vectors"])
def test_missing_class_tokens_are_an_error(theirs):
    make, tap = MODELS[theirs]
    loss = FeatureLoss(at=("last", tap), tokens="cls")
    with pytest.raises(ArgumentError, match=r"but neither 'last' of the student \(NCHW\) nor .*po"):
        attach_kd(Net(8, stride=2), make(), losses=[loss], example=IMAGES)


@pytest.mark.parametrize("wrapper", ["", "0."])
def test_registers_are_not_used_as_a_class_token(wrapper):
    teacher = vit(class_token=False, reg_tokens=4, global_pool="avg")
    teacher = nn.Sequential(teacher) if wrapper else teacher
    loss = FeatureLoss(at=("last", f"{wrapper}blocks.1"), tokens="cls")
    with pytest.raises(ArgumentError, match='use tokens="pooled"'):
        attach_kd(Net(8, stride=2), teacher, losses=[loss], example=IMAGES)


def test_attach_raises_for_widths_that_need_a_projector():
    loss = FeatureLoss(at="last", projector=None)
    with pytest.raises(ShapeError, match=r'teacher\'s shape .* pass projector="linear"'):
        attach_kd(Net(4), Net(6), losses=[loss], example=IMAGES)


def test_embeddings_of_models_without_a_classifier():
    torch.manual_seed(0)
    student, teacher = vit(8), vit(12)
    student.reset_classifier(0)
    teacher.reset_classifier(0)
    losses = [FeatureLoss(projector="mlp"), FeatureLoss(at="blocks.1", name="patches")]
    kd = attach_kd(student, teacher, losses=losses, example=IMAGES)
    values = steps(kd, student, 30)
    assert values[-1] < 0.7 * values[0]


def test_two_teachers_weigh_alike_when_standardised():
    torch.manual_seed(0)
    student, teachers = Net(4), [Net(6), Net(6)]
    with torch.no_grad():
        for parameter in teachers[1].last.parameters():
            parameter.mul_(30)
    losses = [
        FeatureLoss(
            at="last", distance="mse", normalize_teacher=True, teacher_index=i, name=f"t{i}"
        )
        for i in range(2)
    ]
    plain = [
        FeatureLoss(at="last", distance="mse", teacher_index=i, name=f"p{i}") for i in range(2)
    ]
    kd = attach_kd(student, teachers, losses=[*losses, *plain], example=IMAGES)
    student.train()(IMAGES)
    kd.loss()
    assert 0.5 < kd.terms["t0"] / kd.terms["t1"] < 2
    assert kd.terms["p1"] > 20 * kd.terms["p0"]


def test_a_resumed_handle_continues_exactly():
    def made():
        torch.manual_seed(0)
        student, teacher = Net(4), vit()
        losses = [FeatureLoss(at=("last", "blocks.1"), tokens="cls", normalize_teacher=True)]
        return student, attach_kd(student, teacher, losses=losses, example=IMAGES)

    student, kd = made()
    steps(kd, student, 3)
    state = copy.deepcopy([student.state_dict(), kd.state_dict()])
    again, kd_again = made()
    again.load_state_dict(state[0])
    kd_again.load_state_dict(state[1])
    assert steps(kd_again, again, 1) == steps(kd, student, 1)


def test_fitnet_by_attach_reads_maps_of_tokens():
    student = Net(8, stride=2)
    kd = attach_kd(student, vit(), losses=[FitNetLoss(at=("last", "blocks.1"))], example=IMAGES)
    assert [type(m) for m in kd._terms[0].loss.children()] == [nn.Conv2d]


@pytest.mark.parametrize("at", [[], [KDPoint("blocks.1", targets=CodebookTargets(4))]])
def test_a_student_that_drops_patches_is_refused(at):
    student, teacher = vit(patch_drop_rate=0.75), vit(8)
    losses = [] if at else [FeatureLoss(at="blocks.1")]
    kd = attach_kd(student, teacher, at, losses=losses, example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    student.train()(IMAGES)
    with pytest.raises(
        ShapeError, match=r"gave 4 tokens, .* 4 x 4 = 16: the model drops or merges"
    ):
        kd.loss(LABELS)
    student.patch_drop.eval()  # all patches, in raster order
    student(IMAGES)
    assert torch.isfinite(kd.loss(LABELS))
