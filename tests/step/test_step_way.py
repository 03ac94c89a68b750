"""The number of files and functions that a training step enters, counted by the profiler."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet18

import kdlayers
from kdlayers import CodebookTargets, DecisionTargets, KDLoss, KDPoint, attach_kd
from kdlayers._step import balance
from kdlayers._utils import chunks

PACKAGE = str(Path(kdlayers.__file__).parent)
INNER = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>", "<lambda>")  # parts of functions


def entered(call):
    """What ``call`` returns, the files of kdlayers that it enters, and its number of functions."""
    functions = set()

    def note(frame, event, _):
        code = frame.f_code
        inside = event == "call" and code.co_filename.startswith(PACKAGE)
        if inside and code.co_name not in INNER:
            functions.add((code.co_filename, code.co_firstlineno))

    sys.setprofile(note)
    try:
        returned = call()
    finally:
        sys.setprofile(None)
    files = {str(Path(file).relative_to(PACKAGE)) for file, _ in functions}
    return returned, files, len(functions)


@pytest.fixture
def profiled(monkeypatch):
    """Files and functions that `student(x)` and `kd.loss(y)` enter in a usual training step."""
    monkeypatch.setattr(chunks, "LEAST_SCORES", 2**19)  # elsewhere tests take the fused path
    monkeypatch.setattr(chunks, "LEAST_RATIO", 4)
    monkeypatch.setattr(balance, "STEPS", 2)
    student, teacher = resnet18(num_classes=4), resnet18(num_classes=4)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 4
    points = [
        KDPoint("layer3", targets=DecisionTargets(2)),
        KDPoint("layer4", targets=CodebookTargets(num_templates=4)),
    ]
    kd = attach_kd(student.train(), teacher, points, losses=[KDLoss()], example=images[:2])
    kd.fit([(images, labels)] * 3, progress=False)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.01)
    for _ in range(3):  # parameters and the size of terms are looked at in the first steps only
        logits, *of_student = entered(lambda: student(images))
        loss, *of_loss = entered(lambda: kd.loss(labels))
        optimiser.zero_grad()
        (F.cross_entropy(logits, labels) + loss).backward()
        optimiser.step()
    return of_student, of_loss


def test_a_step_enters_few_files_and_functions(profiled):
    (student_files, student_functions), (loss_files, loss_functions) = profiled
    # kd.loss entered 30 files and 109 functions at first, and 25 and 78 before rare cases left.
    assert len(loss_files) <= 14
    assert loss_functions <= 55
    assert len(student_files) <= 5
    assert student_functions <= 30


def test_the_architecture_page_names_every_file_of_a_step(profiled):
    page = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text("utf-8")
    way = page.split("## The folders")[0]
    (student_files, _), (loss_files, _) = profiled
    assert [file for file in sorted(student_files | loss_files) if f"`{file}`" not in way] == []
