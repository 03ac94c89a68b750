"""LoRA of the peft library around a student with KD layers."""

import warnings

import pytest
import torch

from kdlayers import CodebookTargets, KDLoss, KDPoint, attach_kd, load_student, save_student
from kdlayers.errors import KDLayersWarning
from tests.nets import Net, batch

peft = pytest.importorskip("peft")
IMAGES, LABELS = batch()


def attached():
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6)
    kd = attach_kd(student, teacher, [KDPoint("last", targets=CodebookTargets(8))])
    kd.fit([(IMAGES, LABELS)], progress=False)
    return student, kd


def gradients(model, kd):
    loss = model(IMAGES).square().mean() + kd.loss(LABELS)
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and ".kd." in name:
            found[name.rpartition(".kd.")[2].replace("modules_to_save.default.", "")] = parameter
    return {name: parameter.grad for name, parameter in found.items()}


def test_frozen_kd_layers_are_named():
    student, kd = attached()
    model = peft.get_peft_model(student, peft.LoraConfig(target_modules=["first.1"])).train()
    with pytest.warns(KDLayersWarning, match=r'pass modules_to_save=\["kd"\] to peft'):
        gradients(model, kd)


def test_kd_layers_among_the_modules_to_save_learn_as_without_peft():
    student, kd = attached()
    expected = gradients(student.train(), kd)
    student, kd = attached()
    config = peft.LoraConfig(target_modules=["first.1"], modules_to_save=["kd"])
    model = peft.get_peft_model(student, config).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(model, kd)  # a new LoRA adds zero
    assert found.keys() == expected.keys()
    assert len(found) == 6
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_a_student_that_peft_has_wrapped_is_named():
    for wrapped in (True, False):
        student = Net(4)
        model = peft.get_peft_model(student, peft.LoraConfig(target_modules=["first.1"]))
        model, prefix = (model, "base_model.model.") if wrapped else (student, "")
        part = "PeftModel" if wrapped else "Conv2d"
        with pytest.warns(KDLayersWarning, match=rf"peft \(a {part}\).*attach_kd first"):
            attach_kd(model, at=[KDPoint(f"{prefix}last", num_templates=4)], example=IMAGES)


def test_losses_alone_need_no_order():
    model = peft.get_peft_model(Net(4), peft.LoraConfig(target_modules=["first.1"]))
    attach_kd(model, Net(6), losses=[KDLoss()], example=IMAGES)


@pytest.mark.parametrize("names", [["head"], ["head", "norm"], ["value"]])
def test_kd_layers_of_which_peft_trains_a_part_are_named(names):
    student, kd = attached()
    config = peft.LoraConfig(target_modules=["first.1"], modules_to_save=names)
    model = peft.get_peft_model(student, config).train()
    frozen = ", ".join(part for part in ("head", "norm", "value") if part not in names)
    with pytest.warns(KDLayersWarning, match=f"at 'last' is frozen in part: {frozen} cannot"):
        gradients(model, kd)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, kd)


def trained(base):
    """The student after a step with adapters; peft keeps them and the KD layers in one file."""
    kd = attach_kd(base, Net(6), [KDPoint("last", targets=CodebookTargets(8))], example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    config = peft.LoraConfig(target_modules=["first.1"], modules_to_save=["kd"])
    model = peft.get_peft_model(base, config).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (model(IMAGES).square().mean() + kd.loss(LABELS)).backward()
    optimiser.step()
    return model.eval()


def test_adapters_are_saved_with_their_kd_layers(tmp_path):
    base = Net(4)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = trained(base)
    expected = model(IMAGES)
    model.save_pretrained(tmp_path)
    fresh = Net(4)
    attach_kd(fresh, at=[KDPoint("last", num_templates=8)], example=IMAGES).detach()
    fresh.load_state_dict(weights)
    fresh.stem[1].load_state_dict(base.stem[1].state_dict())  # statistics; peft saves none
    assert torch.equal(peft.PeftModel.from_pretrained(fresh, tmp_path).eval()(IMAGES), expected)
    merged = model.merge_and_unload()
    save_student(merged, tmp_path / "student.pt")
    loaded = load_student(Net(4), tmp_path / "student.pt").eval()
    torch.testing.assert_close(loaded(IMAGES), expected)
