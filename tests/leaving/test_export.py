"""Exports of trained students: torch.export, ONNX and TorchScript, plain, baked and folded."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from kdlayers import CodebookTargets, KDPoint, attach_kd, bake, fold
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


def test_export_with_a_dynamic_batch():
    student = trained()
    dynamic = {0: torch.export.Dim("batch", min=2, max=64)}
    for model in (student, bake(student), fold(student)):
        exported = torch.export.export(model, (IMAGES,), dynamic_shapes=(dynamic,)).module()
        torch.testing.assert_close(exported(IMAGES), student(IMAGES))
        torch.testing.assert_close(exported(IMAGES[:3]), student(IMAGES[:3]))


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
