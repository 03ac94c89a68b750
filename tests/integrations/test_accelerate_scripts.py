"""Scripts on Accelerate with the lines of their page, in mixed precision, accumulated, resumed."""

import argparse

import pytest
import torch
import torch.nn.functional as F

from kdlayers import KDLoss, attach_kd
from tests.docs_blocks import small_codebooks
from tests.integrations.data import Images, hf_model, image_rows
from tests.integrations.pages import diffs, loop
from tests.nets import Net, batch

accelerate = pytest.importorskip("accelerate")

DIFFS = diffs("accelerate.md")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_codebooks(monkeypatch, 4)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_cv_example(precision, monkeypatch):
    timm = pytest.importorskip("timm")

    def create_model(name, pretrained=False, **options):
        small = {"resnet50d": "test_resnet", "convnext_tiny": "test_convnext"}
        return timm.create_model(small[name], **options)

    args = argparse.Namespace(cpu=True, mixed_precision=precision)
    diff = DIFFS["cv_example"]
    student, names = loop("cv_example", diff, create_model=create_model)(args)
    kd = names["kd"]
    assert kd.step == 4
    assert set(kd.terms) >= {"KDLoss", "TemplateLoss.layer4", "total"}
    trained = {n for n, p in student.named_parameters() if p.requires_grad}
    assert len([n for n in trained if ".kd." in n]) == 6
    assert all(".kd." in n or n.startswith("fc.") for n in trained)  # the base stays frozen
    in_optimizer = {id(p) for g in names["optimizer"].param_groups for p in g["params"]}
    assert all(id(p) in in_optimizer for p in kd.added_parameters())


def no_trainer(tmp_path, **options):
    transformers = pytest.importorskip("transformers")

    class AutoModel:
        @staticmethod
        def from_pretrained(name):
            torch.manual_seed(len(name))
            return hf_model(transformers, 16 if name == "student" else 32)

    values = {"dataset": {"train": Images(8)}, "augment": image_rows(True)}
    values |= {"plain": image_rows(False), "model_name_or_path": "student", "learning_rate": 1e-3}
    values |= {"mixed_precision": "no", "gradient_accumulation_steps": 1, "num_train_epochs": 1}
    values |= {"resume_from_checkpoint": "", "output_dir": str(tmp_path)}
    args = argparse.Namespace(**{**values, **options})
    main = loop("hf_no_trainer", DIFFS["hf_no_trainer"], AutoModelForImageClassification=AutoModel)
    torch.manual_seed(0)
    return main(args)


def test_the_script_without_trainer_goes_on_exactly(tmp_path):
    whole, losses, _ = no_trainer(tmp_path / "whole", num_train_epochs=2)
    no_trainer(tmp_path / "parts")
    folder = str(tmp_path / "parts" / "epoch_0")
    resumed, rest, names = no_trainer(
        tmp_path / "parts", num_train_epochs=2, resume_from_checkpoint=folder
    )
    assert rest == losses[2:]
    assert names["kd"].step == 4
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert len([key for key in ours if ".kd." in key]) >= 6
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_the_script_without_trainer_with_accumulation_in_bfloat16(tmp_path):
    options = {"mixed_precision": "bf16", "gradient_accumulation_steps": 2}
    student, losses, names = no_trainer(tmp_path, **options)
    assert names["kd"].step == len(losses) == 2
    assert all(p.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("inside", [False, True])
def test_the_precision_of_the_teacher_with_losses_on_logits_alone(inside):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    images, labels = batch()
    student, teacher = Net(4), Net(6)
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=images)
    found = []
    teacher.register_forward_hook(lambda _m, _a, output: found.append(output.dtype))
    model = accelerator.prepare(student).train()
    loss = F.cross_entropy(model(images), labels)
    if inside:
        with accelerator.autocast():
            loss = loss + kd.loss(labels)
    else:
        loss = loss + kd.loss(labels)
    accelerator.backward(loss)
    assert found == [torch.bfloat16 if inside else torch.float32]
