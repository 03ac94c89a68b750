"""A LightningModule with the lines of the page: resumed, loaded, averaged, without its teacher."""

import argparse
import logging

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdlayers import InheritExploreLoss, MutualLoss, attach_mutual, load_student, save_student
from kdlayers.errors import CheckpointError
from tests.docs_blocks import small_codebooks
from tests.integrations.pages import diffs, loop
from tests.nets import Net

pl = pytest.importorskip("lightning.pytorch")
KDCallback = pytest.importorskip("kdlayers.integrations.lightning").KDCallback

DIFF = diffs("lightning.md")["lightning_module"]
IMAGES, LABELS = torch.randn(8, 3, 32, 32), torch.arange(8) % 3
TEACHERS = []

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    small_codebooks(monkeypatch, 4)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    get = torchvision.models.get_model

    def get_model(name, weights=None, **options):
        model = get("resnet18", **(options or {"num_classes": 3}))
        if weights == "DEFAULT":
            TEACHERS.append(model)
        return model

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


def loader():
    return DataLoader(TensorDataset(IMAGES, LABELS), 4)


def run(tmp_path, epochs, resume=None, callbacks=()):
    options = {"max_epochs": epochs, "logger": False, "accelerator": "cpu", "devices": 1}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    options |= {"default_root_dir": tmp_path, "enable_checkpointing": False}
    args = argparse.Namespace(
        train_loader=loader(), val_loader=loader(), callbacks=list(callbacks),
        options=options, resume=resume,
    )  # fmt: skip
    torch.manual_seed(0)
    main = loop("lightning_module", DIFF, plain_loader=loader())
    module, trainer = main(args)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return module


@pytest.mark.slow
def test_a_resumed_run_goes_on_exactly(tmp_path):
    whole = run(tmp_path, 2)
    run(tmp_path, 1)
    resumed = run(tmp_path, 2, resume=tmp_path / "last.ckpt")
    assert whole.kd.step == resumed.kd.step == 4
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert len([key for key in ours if ".kd." in key]) >= 6
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert all(key.startswith("model.") for key in ours)  # no teacher
    loaded = type(whole).load_from_checkpoint(tmp_path / "last.ckpt").eval()
    assert torch.equal(loaded.model(IMAGES), resumed.eval().model(IMAGES))


class Two(pl.LightningModule):
    """Two students that teach each other, so that their handles have the same terms."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.models = nn.ModuleList([Net(4), Net(4)])
        points = InheritExploreLoss(at="last", coder="online", factor_channels=2)
        self.handles = attach_mutual(*self.models, losses=[MutualLoss(), points], example=IMAGES)

    def training_step(self, batch, _):
        x, y = batch
        pairs = zip(self.models, self.handles, strict=True)
        return sum(F.cross_entropy(model(x), y) + kd.loss(y) for model, kd in pairs)

    def configure_optimizers(self):
        own = [parameter for kd in self.handles for parameter in kd.parameters()]
        return torch.optim.SGD([*self.parameters(), *own], 0.01)


def run_two(tmp_path, epochs, resume=None, callbacks=2):
    module = Two()
    kept = [KDCallback(kd) for kd in module.handles[:callbacks]]
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, logger=False, callbacks=kept,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader(), ckpt_path=resume)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    return module


def test_each_of_two_handles_gets_its_own_state(tmp_path):
    whole = run_two(tmp_path, 2)
    run_two(tmp_path, 1)
    resumed = run_two(tmp_path, 2, resume=tmp_path / "two.ckpt")
    states = [kd.state_dict() for module in (whole, resumed) for kd in module.handles]
    first, second, *again = [state["checksum"] for state in states]
    assert first != second
    assert again == [first, second]
    with pytest.raises(CheckpointError, match="states of 2 KDCallbacks, but the trainer has 1"):
        run_two(tmp_path, 2, resume=tmp_path / "two.ckpt", callbacks=1)


@pytest.mark.slow
def test_averaging_leaves_the_teacher_alone(tmp_path):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks")
    if not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")

    class Look(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            module = averaging._average_model.module
            self.shared = module.kd._teachers[0].model is pl_module.kd._teachers[0].model
            self.own = module.kd.student is module.model

    averaging, look = callbacks.EMAWeightAveraging(decay=0.5), Look()
    module = run(tmp_path, 2, callbacks=[look, averaging])
    assert look.shared
    assert look.own
    assert module.kd._teachers[0].model is TEACHERS[-1]
    plain = run(tmp_path, 2)
    save_student(module.model, tmp_path / "student.pt")
    student = load_student(torchvision.models.get_model("", num_classes=3), tmp_path / "student.pt")
    assert torch.equal(student.eval()(IMAGES), module.model.eval()(IMAGES))
    assert not torch.equal(plain.model.eval()(IMAGES), module.model(IMAGES))  # averaged weights
