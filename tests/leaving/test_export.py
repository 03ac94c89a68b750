"""Exports of trained students: torch.export, ONNX and TorchScript, plain, baked and folded."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F

from kdlayers import CodebookTargets, KDPoint, attach_kd, bake, fold
from tests.leaving.test_save_and_resume import Outer
from tests.nets import Net, batch

IMAGES, LABELS = batch(8)


def trained():
    student = Net(4)
    kd = attach_kd(student, Net(6), [KDPoint("last", targets=CodebookTargets(4))])
    kd.fit([(IMAGES, LABELS)], progress=False)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)).backward()
        optimiser.step()
    kd.detach()
    return student.eval()


def with_two_arguments():
    student = Outer()  # its point takes two arguments and returns a dict
    attach_kd(student, at=[KDPoint("pair", num_templates=4)], example=IMAGES).detach()
    student.train()(IMAGES)
    return student.eval()


def test_export_with_a_dynamic_batch():
    student = trained()
    dynamic = {0: torch.export.Dim("batch", min=2, max=64)}
    for model in (student, bake(student), fold(student)):
        exported = torch.export.export(model, (IMAGES,), dynamic_shapes=(dynamic,)).module()
        torch.testing.assert_close(exported(IMAGES), student(IMAGES))
        torch.testing.assert_close(exported(IMAGES[:3]), student(IMAGES[:3]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("make", [bake, fold])
@pytest.mark.parametrize("path", ["last", "pair"])
def test_one_graph(make, path):
    # In float64: in training, the batch norm of scores that are nearly equal magnifies rounding.
    student = (trained() if path == "last" else with_two_arguments()).double()
    model, images = make(student), IMAGES.double()
    torch._dynamo.reset()
    for training in (False, True):
        student.train(training)
        model.train(training and make is bake)
        with torch.set_grad_enabled(training):
            expected = copy.deepcopy(model)(images)
            if make is bake:
                assert torch.equal(expected, copy.deepcopy(student)(images))
            strict = torch.export.export(copy.deepcopy(model), (images,), strict=True).module()
            compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
            for found in (strict, compiled):
                torch.testing.assert_close(found(images), expected)


@pytest.mark.parametrize("make", [lambda s: s, bake, fold])
def test_onnx(make, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    student = trained()
    file = tmp_path / "student.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own, about its dependencies
        torch.onnx.export(make(student), (IMAGES,), file, dynamo=True, verbose=False)
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), student(IMAGES).detach(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_of_baked_and_traced_students(tmp_path):
    student = trained()
    for scripted in (
        torch.jit.script(bake(student)),
        torch.jit.script(fold(student)),
        torch.jit.trace(student, IMAGES),
    ):
        file = str(tmp_path / "student.ts")
        scripted.save(file)
        torch.testing.assert_close(torch.jit.load(file)(IMAGES), student(IMAGES))
