"""Puts whole model zoos through attach_kd and writes docs/compatibility.md.

Run ``python -m tests.zoo`` for everything (an hour or two on two cores), or with parts of names
for some models; results are kept in docs/compatibility.json, so that a run can be continued.
``pytest -m zoo`` does the same as a test. zoo_timm.json names the model tried of each timm family.
"""

import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers import (
    CodebookTargets,
    KDPoint,
    attach_kd,
    bake,
    find_points,
    load_student,
    save_student,
)
from kdlayers._trace import trace
from kdlayers.errors import AttachError
from tests.nets import Net

STAGES = ("points", "attach", "train", "copy", "save, load", "bake", "export")
CLASSES = 4
ROOT = Path(__file__).parent.parent


def torchvision_models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Every classification model of torchvision, with the image size it is tried at."""
    from torchvision import models

    def factory(name: str) -> Callable[[], nn.Module]:
        extra = {"image_size": 64} if name.startswith("vit_") else {}
        if name == "vit_h_14":
            extra = {"image_size": 56}
        if name in ("googlenet", "inception_v3"):
            extra["init_weights"] = False
        return lambda: models.get_model(name, weights=None, num_classes=CLASSES, **extra)

    sizes = {"inception_v3": 299, "vit_h_14": 56}
    names = models.list_models(module=models)
    return {n: (factory(n), 224 if "maxvit" in n else sizes.get(n, 64)) for n in names}


def timm_models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """A small model of every module of timm, with the image size it is tried at."""
    import timm

    found = {}
    for family, name in json.loads((ROOT / "tests" / "zoo_timm.json").read_text()).items():
        config = timm.get_pretrained_cfg(name)
        size = config.input_size[-1] if config else 224
        make = lambda name=name: timm.create_model(name, num_classes=CLASSES)  # noqa: E731
        found[f"timm {family}: {name}"] = (make, size)
    return found


def first(output: object) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


class Check:
    """One model, one stage after the other; a stage that fails ends it with its sentence."""

    def __init__(self, make: Callable[[], nn.Module], size: int) -> None:
        torch.manual_seed(0)
        self.make = make
        self.student = make()
        self.images = torch.randn(4, 3, size, size)
        self.labels = torch.arange(4) % CLASSES
        self.layout = ""
        self.point = ""

    def stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        methods = (
            self.points,
            self.attach,
            self.train,
            self.copied,
            self.saved,
            self.baked,
            self.exported,
        )
        return zip(STAGES, methods, strict=True)

    def points(self) -> None:
        found = find_points(self.student, self.images[:2])
        if not found:
            traced = trace(self.student, (self.images[:2],), "model")
            traced.layout([name for name in traced.names if "block" in name][-1])

    def attach(self) -> None:
        teacher = Net(4, classes=CLASSES)
        # Some heads do not read the last candidate, which attach_kd says; then the one before it.
        for candidate in reversed(find_points(self.student, self.images[:2])):
            self.point, self.layout = candidate.name, candidate.layout
            point = KDPoint(self.point, "last", targets=CodebookTargets(4))
            try:
                self.kd = attach_kd(self.student, teacher, [point], example=self.images[:2])
            except AttachError as error:
                if "does not reach the model's output" not in str(error):
                    raise
            else:
                break
        self.kd.fit([(self.images, self.labels)], progress=False)

    def train(self) -> None:
        self.student.train()
        logits = first(self.student(self.images))
        loss = F.cross_entropy(logits, self.labels) + self.kd.loss(self.labels)
        loss.backward()
        grads = [p.grad for n, p in self.student.named_parameters() if ".kd." in f".{n}"]
        if len(grads) != 6 or any(g is None or not torch.isfinite(g).all() for g in grads):
            raise RuntimeError("a KD parameter got no finite gradient")
        self.student.zero_grad()
        self.kd.detach()
        self.student.eval()
        self.expected = self.run(self.student)

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        return first(model(self.images[:2]))

    def same(self, model: nn.Module, tolerance: float = 0.0) -> None:
        difference = (self.run(model) - self.expected).abs().max().item()
        if not difference <= tolerance:
            raise RuntimeError(f"outputs differ by {difference:.2g}")

    def copied(self) -> None:
        self.same(copy.deepcopy(self.student))

    def saved(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_student(self.student, f"{folder}/student.pt")
            self.same(load_student(self.make().eval(), f"{folder}/student.pt"))

    def baked(self) -> None:
        self.same(bake(self.student), 1e-6)

    def exported(self) -> None:
        self.same(torch.export.export(self.student, (self.images[:2],)).module(), 1e-4)


def check(make: Callable[[], nn.Module], size: int) -> dict[str, object]:
    """Layout, point, seconds, and for every stage "pass" or the reason."""
    start = time.monotonic()
    result: dict[str, object] = dict.fromkeys(STAGES, "-")
    try:
        model = Check(make, size)
    except Exception as error:
        return {**result, "points": sentence(error), "layout": "", "point": "", "seconds": 0}
    for stage, run in model.stages():
        try:
            run()
            result[stage] = "pass"
        except Exception as error:
            result[stage] = sentence(error)
            if stage in STAGES[:3]:
                break
    seconds = round(time.monotonic() - start, 1)
    return {**result, "layout": model.layout, "point": model.point, "seconds": seconds}


def sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:240]


def everything() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    return {**torchvision_models(), **timm_models()}


def write_table(results: dict[str, dict[str, object]]) -> None:
    """docs/compatibility.md out of the results: failures first, then all models."""
    passed = [name for name, r in results.items() if all(r[stage] == "pass" for stage in STAGES)]
    head = ["model", "point", "layout", *STAGES]
    lines = [
        "# Compatibility",
        "",
        "Written by `python -m tests.zoo`: every classification model of torchvision and a small",
        "model of every timm family, with the last candidate of `find_points` as its point (an",
        "earlier one where the model's head does not read it), random weights, float32, on CPU.",
        "",
        f"{len(passed)} of {len(results)} models pass every stage.",
        "",
        "## What fails",
        "",
    ]
    failures = [
        f"- `{name}`, {stage}: {str(r[stage]).replace('|', '/')}"
        for name, r in results.items()
        for stage in STAGES
        if r[stage] not in ("pass", "-")
    ]
    lines += [*(failures or ["Nothing."]), "", "## All models", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, r in results.items():
        cells = [name, f"`{r['point']}`", str(r["layout"])]
        marks = {"pass": "pass", "-": "-"}
        cells += [marks.get(str(r[stage]), "fails") for stage in STAGES]
        lines.append("| " + " | ".join(cells) + " |")
    (ROOT / "docs" / "compatibility.md").write_text("\n".join(lines) + "\n")


def main(wanted: list[str], store: Path) -> None:
    """Check what is wanted and not yet in ``store``, then write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1 if "--one-thread" in wanted else 2)
    wanted = [name for name in wanted if not name.startswith("--")]
    results = json.loads(store.read_text()) if store.exists() else {}
    for name, (make, size) in everything().items():
        if (not wanted and name not in results) or any(w in name for w in wanted):
            results[name] = check(make, size)
            store.write_text(json.dumps(results, indent=1))
            write_table(results)
            bad = {k: v for k, v in results[name].items() if k in STAGES and v != "pass"}
            print(name, results[name]["seconds"], bad or "pass", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:], ROOT / "docs" / "compatibility.json")
