"""transformers' Trainer script with the lines of its page: smoothed, resumed, the best model."""

import argparse

import pytest
import torch
import torch.nn.functional as F

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    KDLoss,
    KDPoint,
    attach_kd,
    load_student,
    save_student,
)
from tests.docs_blocks import small_codebooks
from tests.integrations.data import Images, hf_model, image_rows
from tests.integrations.pages import diffs, loop

hf = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from kdlayers.integrations.transformers import KDTrainer  # noqa: E402

DIFF = diffs("hf-trainer.md")["hf_trainer"]
POINT = "resnet.encoder.stages.3"
IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])


class AutoModel:
    @staticmethod
    def from_pretrained(name):
        torch.manual_seed(len(name))
        return hf_model(hf, 16 if name == "student" else 32)


def arguments(folder, **options):
    shared = {"report_to": "none", "use_cpu": True, "num_train_epochs": 2, "save_strategy": "epoch"}
    shared |= {"per_device_train_batch_size": 4, "label_smoothing_factor": 0.1, "seed": 0}
    shared |= {"remove_unused_columns": False, "logging_strategy": "no", "disable_tqdm": True}
    return hf.TrainingArguments(str(folder), **{**shared, **options})


def run(folder, **options):
    training = arguments(folder, **options)
    dataset = {"train": Images(8), "validation": Images(4)}
    transforms = {"augment": image_rows(True), "plain": image_rows(False)}
    args = argparse.Namespace(training_args=training, dataset=dataset, **transforms)
    args.model_name_or_path = "student"
    return loop("hf_trainer", DIFF, AutoModelForImageClassification=AutoModel)(args)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_codebooks(monkeypatch, 4)


def test_the_script_goes_on_exactly(tmp_path):
    whole = run(tmp_path / "whole", eval_strategy="epoch")
    state = whole.model.state_dict()
    assert len([key for key in state if ".kd." in key]) >= 6
    folder = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run(tmp_path / "again", eval_strategy="epoch", resume_from_checkpoint=folder)
    assert resumed.kd.step == whole.kd.step == 4
    for key, value in resumed.model.state_dict().items():
        assert torch.equal(value, state[key]), key


def vit(width):
    sizes = {"hidden_size": width, "intermediate_size": width, "num_attention_heads": 2}
    config = hf.ViTConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8, num_labels=3)
    return hf.ViTForImageClassification(config)


def test_a_model_whose_published_names_differ_goes_on_exactly(tmp_path):
    rows = [{"pixel_values": IMAGES[i], "labels": LABELS[i]} for i in range(4)]
    teacher = vit(32)

    def trained(folder, start=None):
        torch.manual_seed(0)
        student = vit(16)
        point = KDPoint("vit.layers.0", targets=CodebookTargets(4))
        kd = attach_kd(student, teacher, [point], example=IMAGES)
        kd.fit([(IMAGES, LABELS)], progress=False)
        trainer = KDTrainer(student, arguments(folder), kd=kd, train_dataset=rows)
        trainer.train(resume_from_checkpoint=start)
        return student.state_dict()

    whole = trained(tmp_path / "whole")
    resumed = trained(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-1"))
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


def test_the_best_model_becomes_a_student(tmp_path):
    whole = run(tmp_path / "best", eval_strategy="epoch", load_best_model_at_end=True)
    assert whole.state.best_model_checkpoint
    save_student(whole.model, tmp_path / "student.pt")
    student = load_student(hf_model(hf, 16), tmp_path / "student.pt").eval()
    assert torch.equal(student(IMAGES).logits, whole.model.eval()(IMAGES).logits)


def test_a_checkpoints_weights_become_a_student(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    trainer = run(tmp_path)
    student = hf_model(hf, 16)
    attach_kd(student, at=[KDPoint(POINT, num_templates=4)], example=IMAGES).detach()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    student.load_state_dict(safetensors.load_file(file))
    assert torch.equal(student.eval()(IMAGES).logits, trainer.model.eval()(IMAGES).logits)


def attached(tmp_path, losses, **options):
    student, teacher = hf_model(hf, 16), hf_model(hf, 32)
    kd = attach_kd(student, teacher, losses=losses, example=IMAGES)
    return student, teacher, kd, KDTrainer(student, arguments(tmp_path, **options), kd=kd)


def test_label_smoothing_stays_and_evaluation_is_plain(tmp_path):
    student, _, kd, trainer = attached(tmp_path, [KDLoss()], label_smoothing_factor=0.2)
    for training in (True, False):
        student.train(training)
        inputs = {"pixel_values": IMAGES, "labels": LABELS}
        loss, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
        own = F.cross_entropy(outputs.logits, LABELS, label_smoothing=0.2)
        torch.testing.assert_close(loss, own + kd.terms["total"] if training else own)


def test_the_terms_are_in_the_training_logs(tmp_path):
    trainer = run(tmp_path, eval_strategy="epoch", logging_strategy="steps", logging_steps=1)
    training = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(training) == 4
    terms = {f"kd_{name}": float(value) for name, value in trainer.kd.terms.items()}
    assert {"kd_total", "kd_KDLoss", f"kd_TemplateLoss.{POINT}"} <= set(terms)
    assert terms.items() <= training[-1].items()
    assert all(entry["loss"] > entry["kd_total"] > 0 for entry in training)
    others = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert others
    assert not any(key.startswith("kd_") for entry in others for key in entry)


def test_train_only_parameters_are_a_group_of_the_optimiser(tmp_path):
    _, _, kd, trainer = attached(tmp_path, [AEKTLoss()])
    groups = trainer.create_optimizer().param_groups
    assert len(groups) == 3
    assert [id(p) for p in groups[-1]["params"]] == [id(p) for p in kd.parameters()]


def test_the_teacher_runs_in_trainers_precision(tmp_path):
    student, teacher, _, trainer = attached(tmp_path, [KDLoss()], bf16=True)
    found = []
    teacher.register_forward_hook(lambda _m, _a, output: found.append(output.logits.dtype))
    trainer.compute_loss(student.train(), {"pixel_values": IMAGES, "labels": LABELS})
    assert found == [torch.bfloat16]


def mean_over_the_step(outputs, labels, num_items_in_batch):
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("own", [None, mean_over_the_step])
def test_accumulated_steps_take_the_mean_of_both_losses(tmp_path, monkeypatch, own):
    options = {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.0, "max_steps": 1}
    options |= {"per_device_train_batch_size": 2, "save_strategy": "no"}
    student, _, kd, _ = attached(tmp_path, [KDLoss()])
    rows = [{"pixel_values": IMAGES[i], "labels": LABELS[i]} for i in range(4)]
    trainer = KDTrainer(
        student, arguments(tmp_path, **options), kd=kd, train_dataset=rows, compute_loss_func=own
    )
    seen, found, expected = [], [], []

    def backward(loss):
        outputs, labels = seen.pop()
        task = F.cross_entropy(outputs.logits, labels)
        found.append(loss.detach())
        expected.append((task + kd.terms["total"]).detach() / 2)
        loss.backward()

    def labelled(_model, _args, inputs, outputs):
        rows = [int((x == IMAGES).flatten(1).all(1).nonzero()) for x in inputs["pixel_values"]]
        seen.append((outputs, LABELS[rows]))  # Trainer has removed the labels from the inputs

    student.register_forward_hook(labelled, with_kwargs=True)
    monkeypatch.setattr(trainer.accelerator, "backward", backward)
    trainer.train()
    torch.testing.assert_close(torch.stack(found), torch.stack(expected))


def test_without_a_handle_it_is_trainer(tmp_path):
    trainer = KDTrainer(hf_model(hf, 16).train(), arguments(tmp_path))
    plain = hf.Trainer(trainer.model, arguments(tmp_path))
    inputs = {"pixel_values": IMAGES, "labels": LABELS}
    ours, theirs = (t.compute_loss(t.model.eval(), dict(inputs)) for t in (trainer, plain))
    assert torch.equal(ours, theirs)
    assert trainer.model_accepts_loss_kwargs == plain.model_accepts_loss_kwargs
