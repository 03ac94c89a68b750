"""Hugging Face's call, ``model(pixel_values=x, labels=y)``, with teachers of every origin."""

import pytest
import torch
from torch import nn

from kdlayers import CodebookTargets, DecisionTargets, KDLoss, KDPoint, attach_kd
from kdlayers._step.call import for_teacher
from kdlayers.errors import FitError
from kdlayers.functional import kd as kd_of
from tests.nets import Net

hf = pytest.importorskip("transformers")

SIZES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])


def hugging_face(width=16):
    sizes = {**SIZES, "hidden_sizes": [8, width], "num_labels": 3}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))


TEACHERS = {
    "Hugging Face": (lambda: hugging_face(32), "resnet.encoder.stages.1"),
    "a plain module": (lambda: Net(6), "last"),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_call_of_its_scripts_works(kind):
    make, tap = TEACHERS[kind]
    student, teacher = hugging_face(), make()
    point = KDPoint("resnet.encoder.stages.1", tap, targets=CodebookTargets(4))
    kd = attach_kd(student, teacher, [point], losses=[KDLoss()], example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    seen = []
    teacher.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    student.train()
    outputs = student(pixel_values=IMAGES, labels=LABELS)
    value = kd.loss(LABELS)
    (outputs.loss + value).backward()
    assert len(seen) == 1
    args, kwargs = seen[0]
    assert set(kwargs) <= {"pixel_values"}
    assert sum(1 for item in (*args, *kwargs.values()) if torch.equal(item, IMAGES)) == 1
    with torch.no_grad():
        taught = teacher.eval()(IMAGES)
    taught = taught if isinstance(taught, torch.Tensor) else taught.logits
    torch.testing.assert_close(kd.terms["KDLoss"], kd_of(outputs.logits, taught).detach())
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


def test_fit_leaves_the_boxes_of_a_detection_loader_out():
    kd = attach_kd(Net(4), Net(6), [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    boxes = [{"class_labels": torch.tensor([0]), "boxes": torch.rand(1, 4)}] * 4
    mask = torch.ones(4, 32, 32)
    kd.fit([{"pixel_values": IMAGES, "pixel_mask": mask, "labels": boxes}], progress=False)
    kd.student(IMAGES)
    assert kd.loss().isfinite()
    kd = attach_kd(Net(4), Net(6), [KDPoint("last", targets=DecisionTargets(1))], example=IMAGES)
    with pytest.raises(FitError, match="DecisionTargets learns from labels"):
        kd.fit([{"pixel_values": IMAGES, "labels": boxes}], progress=False)


class Named(nn.Module):
    def forward(self, images, mask=None):
        return images


class Open(nn.Module):
    def forward(self, pixel_values=None, **options):
        return pixel_values


def test_what_a_teacher_is_called_with():
    switches = {"output_hidden_states": True, "labels": LABELS, "mask_labels": [LABELS]}
    args, kwargs = for_teacher(Named(), (), {"pixel_values": IMAGES, **switches})
    assert args[0] is IMAGES
    assert kwargs == {}
    mask = torch.ones(4)
    args, kwargs = for_teacher(Named(), (), {"images": IMAGES, "mask": mask})
    assert args == ()
    assert kwargs["images"] is IMAGES
    assert kwargs["mask"] is mask
    args, kwargs = for_teacher(Named(), (), {"input_ids": LABELS, "pixel_values": IMAGES})
    assert args[0] is IMAGES
    assert kwargs == {"input_ids": LABELS}  # the teacher's error names it
    args, kwargs = for_teacher(Open(), (), {"pixel_values": IMAGES, **switches})
    assert args == ()
    assert set(kwargs) == {"pixel_values", "output_hidden_states"}
    assert for_teacher(Named(), (IMAGES,), {}) == ((IMAGES,), {})
    args, kwargs = for_teacher(Named(), (IMAGES,), {"other": mask})  # its own error names it
    assert set(kwargs) == {"other"}


def test_the_documented_trainer_keeps_label_smoothing(tmp_path):
    pytest.importorskip("accelerate")
    from kdlayers.integrations.transformers import KDTrainer

    student = hugging_face().train()
    kd = attach_kd(student, Net(6), losses=[KDLoss()], example=IMAGES)
    options = {"report_to": "none", "use_cpu": True, "label_smoothing_factor": 0.2}
    trainer = KDTrainer(student, hf.TrainingArguments(str(tmp_path), **options), kd=kd)
    batch = {"pixel_values": IMAGES, "labels": LABELS}
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    smoothed = nn.functional.cross_entropy(outputs.logits, LABELS, label_smoothing=0.2)
    torch.testing.assert_close(loss, smoothed + kd.terms["total"])
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    smoothed = nn.functional.cross_entropy(outputs.logits, LABELS, label_smoothing=0.2)
    torch.testing.assert_close(loss, smoothed)
