"""The documentation covers all public names and no others, and its code runs."""

import ast
import inspect
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchvision
from torch.torch_version import TorchVersion

import kdlayers
import kdlayers.schedules
import kdlayers.viz
from tests.docs_blocks import python_blocks, run_page, small_codebooks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
API = (DOCS / "api.md").read_text("utf-8")
MODULES = (
    kdlayers,
    kdlayers.errors,
    kdlayers.functional,
    kdlayers.losses,
    kdlayers.schedules,
    kdlayers.viz,
)
PAGES = sorted(page for page in DOCS.glob("*.md") if python_blocks(page.read_text("utf-8")))


def public(module):
    """The public names of a module, and what they stand for."""
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return {
        f"{module.__name__}.{name}": value
        for name in names
        if not inspect.ismodule(value := getattr(module, name))
        and value.__module__.startswith("kdlayers")
    }


def resolve(name):
    """The object of a dotted name."""
    if name.startswith("kdlayers.integrations."):  # imported by module, which needs its framework
        module, _, member = name.rpartition(".")
        return getattr(pytest.importorskip(module, exc_type=ImportError), member)
    found = kdlayers
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def documented():
    """Dotted names with an entry on the API page; a module with members stands for them all."""
    names = re.findall(r"\.\. auto(?:function|class|exception|data):: (\S+)", API)
    for module in re.findall(r"\.\. automodule:: (\S+)\n +:members:", API):
        names += public(resolve(module))
    return names


def test_every_documented_name_exists_once():
    names = documented()
    assert len(set(names)) == len(names)
    assert [name for name in names if resolve(name) is None] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_is_documented(module):
    entries = [resolve(name) for name in documented()]
    missing = [n for n, v in public(module).items() if not any(v is entry for entry in entries)]
    assert missing == []


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_has_a_docstring(module):
    assert [name for name, value in public(module).items() if not inspect.getdoc(value)] == []


def _page(page):
    marks = [pytest.mark.slow] if page.name in NEEDS_A_COMPILER else []
    return pytest.param(page, id=page.name, marks=marks)


NEEDS_A_COMPILER = ("compile.md", "export.md")


@pytest.mark.parametrize("page", [_page(page) for page in PAGES])
@pytest.mark.filterwarnings("ignore:the optimiser changed the student")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
# torch.ao, in export.md, warns of itself.
@pytest.mark.filterwarnings("ignore:(Please use quant_min|torch.quantize_per_tensor)")
def test_code_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_codebooks(monkeypatch)
    for package in NEEDS.get(page.name, ()):
        pytest.importorskip(package)
    if page.name in NEEDS_A_COMPILER and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("Inductor needs a C++ compiler")
    if page.name == "compile.md" and torch.__version__ < TorchVersion("2.10"):
        pytest.skip("Inductor of torch 2.9 fails on the losses' sizes, as the page says")
    if page.name == "accelerate.md":  # other tests of this process have set its precision
        pytest.importorskip("accelerate").state.AcceleratorState._reset_state(True)
    if page.name == "own-loop.md":
        images_and_teacher()
    text = page.read_text("utf-8")
    if page.name == "export.md" and torch.__version__ < TorchVersion("2.10"):
        text = re.sub(r"## AOTInductor\n.*?(?=\n## )", "", text, flags=re.S)  # as the page says
    if page.name in NEEDS_BEFORE:
        text = f"```python\n{NEEDS_BEFORE[page.name]}\n```\n{text}"
    run_page(text, str(page))


HANDLE = """
from kdlayers import KDLoss, attach_kd
kd = attach_kd(student, teacher, losses=[KDLoss()])
"""
AVERAGED = """
from kdlayers import KDPoint, attach_kd
trained = make_student()
attach_kd(trained, at=[KDPoint("layer4", num_templates=64)]).detach()
averaged = trained.state_dict()
"""
NEEDS_BEFORE = {"troubleshooting.md": HANDLE, "timm-train.md": AVERAGED}
NEEDS = {
    "accelerate.md": ["accelerate"],
    "hf-trainer.md": ["safetensors.torch"],
    "export.md": ["onnx", "onnxscript"],
    "label-free.md": ["timm"],
    "own-loop.md": ["timm"],
    "peft.md": ["peft"],
    "points.md": ["timm"],
}


FAMILIES = {
    "ResNet": ["resnet18"],
    "ConvNeXt": ["convnext_atto"],
    "RegNet": ["regnetx_002"],
    "MobileNetV2": ["mobilenetv2_050", "mobilenetv3_large_075", "efficientnet_b0"],
    "MobileNetV3-Small": ["mobilenetv3_small_050"],
    "Swin": ["swin_tiny_patch4_window7_224"],
    "ViT": ["vit_tiny_patch16_224"],
}


def rows_of_families():
    """Family, last point and the one before: what the page on points recommends."""
    page = (DOCS / "points.md").read_text("utf-8")
    return re.findall(r"^\| ([\w-]+)[^|]* \| `(.+?)` \| `(.+?)`", page, re.MULTILINE)


def test_every_family_has_a_row():
    assert [family for family, _, _ in rows_of_families()] == list(FAMILIES)


@pytest.mark.parametrize(("family", "last", "first"), rows_of_families())
def test_points_of_families(family, last, first):
    timm = pytest.importorskip("timm")
    for name in FAMILIES[family]:
        model = timm.create_model(name, num_classes=3)
        points = kdlayers.find_points(model)
        shapes = {point.name: point.shape for point in points}
        assert shapes[last] == points[-1].shape
        kdlayers.attach_kd(
            model, at=[kdlayers.KDPoint(point, num_templates=2) for point in (first, last)]
        )


def images_and_teacher():
    """The files that a user of the page has: a folder of images a class, and a teacher's state."""
    for name in ("cats", "dogs"):
        folder = Path("images", "train", name)
        folder.mkdir(parents=True)
        for index in range(40):
            noise = torch.randint(256, (3, 72, 72), dtype=torch.uint8)
            torchvision.io.write_png(noise, str(folder / f"{index}.png"))
    teacher = pytest.importorskip("timm").create_model("convnext_atto", num_classes=2)
    torch.save(teacher.state_dict(), "teacher.pt")


def sentences():
    """Every string in the library's code, with … in the place of values."""
    strings = []
    for file in Path(kdlayers.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "…" for p in node.values]
                strings.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return "\n".join(re.sub("['\"]?…['\"]?", "…", string) for string in strings)


def test_troubleshooting_quotes_real_messages():
    headings = re.findall(
        r"^### `(.*)`$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE
    )
    said = sentences()
    assert len(headings) > 15
    assert [heading for heading in headings if heading not in said] == []


def test_no_trailing_notes():
    words = re.compile(r"\b(TODO|FIXME|XXX)\b")
    assert [page.name for page in DOCS.glob("*.md") if words.search(page.read_text("utf-8"))] == []


def test_architecture_names_every_room_and_only_existing_files():
    text = (DOCS / "architecture.md").read_text("utf-8")
    package = Path(kdlayers.__file__).parent
    rooms = [folder.name for folder in package.iterdir() if (folder / "__init__.py").exists()]
    table = re.findall(r"^\| `([\w./]+)` \|", text, re.MULTILINE)
    assert sorted(set(table) - {"errors.py", "schedules.py"}) == sorted(f"{r}/" for r in rooms)
    files = {file.name for file in package.rglob("*.py")}
    rows = "".join(line for line in text.splitlines(keepends=True) if line.startswith("| `"))
    assert set(re.findall(r"`(\w+\.py)`", rows)) <= files
    places = re.findall(r"`(\w+/\w+\.py)`", text)
    roots = (package.parent, package, ROOT)  # the installed package lies beside no tests
    assert [p for p in places if not any((root / p).exists() for root in roots)] == []


def test_contributing_is_short():
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) < 60
