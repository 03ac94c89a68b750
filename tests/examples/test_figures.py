"""The page of visualize.py, and the figures of a student of the accuracy benchmark."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from kdlayers import KDPoint, attach_kd, save_student
from tests.accuracy_bench import TINY
from tests.benchmark_modules import load
from tests.examples.test_examples import run
from tests.measured.committed import DOCS


def test_the_page_shows_every_figure(tmp_path):
    run("visualize", tmp_path)
    page = tmp_path / "runs" / "visualize-quick"
    text = (page / "index.html").read_text("utf-8")
    figures = sorted(file.name for file in page.glob("*.png"))
    assert len(figures) == 8
    assert all(f'src="{name}"' in text for name in figures)
    assert {"decisions.png", "relations.png", "usage-trunk_output-block2.png"} <= set(figures)


def test_figures_of_a_student_of_the_benchmark(tmp_path, image_root):
    figures = load("figures")
    student = figures.make("resnet8", num_classes=10, in_channels=1, width=4)
    example = torch.zeros(2, 1, 28, 28)
    attach_kd(student, at=[KDPoint("layer3.0", num_templates=6)], example=example).detach()
    save_student(student, tmp_path / "student.pt")
    options = ["--root", str(image_root), "--width", "4", "--at", "layer3.0"]
    figures.main([str(tmp_path / "student.pt"), *options, "--out", str(tmp_path / "out")])
    found = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert found == ["matches-layer3-0.png", "usage-layer3-0.png"]


def test_the_gallery_shows_what_two_runs_have_learnt(tmp_path, tmp_path_factory, bench, image_root):
    students = ["--save", str(tmp_path / "students"), "--seeds", "1"]
    out = tmp_path / "runs.jsonl"
    bench(out, *students, "--methods", "letKD-2 + KD", "AEKT chi2")
    saved = sorted(file.name for file in (tmp_path / "students").iterdir())
    layers = ["letKD-2-KD-seed-1.kd.pt", "letKD-2-KD-seed-1.pt"]
    assert saved == ["AEKT-chi2-seed-1.kd.pt", *layers]
    cache = tmp_path_factory.getbasetemp() / "teachers"  # where `bench` has them
    given = ["--root", str(image_root), "--cache", str(cache), "--out", str(out)]
    usual = {"decisions", "relations", "curves", "usage-last", "usage-layer3-0"}
    with_images = {"matches-last", "matches-layer3-0"}
    for folder, also, expected in (("all", [], with_images), ("few", ["--without-images"], set())):
        figures = ["--figures", str(tmp_path / folder), *also]
        load("gallery").main([*given, *TINY, *students, *figures])
        found = {file.stem.removeprefix("gallery-") for file in (tmp_path / folder).iterdir()}
        assert found == usual | expected


def test_the_gallerys_curves_are_those_of_the_committed_lines(tmp_path):
    gallery, drawn = load("gallery"), tmp_path / "curves.png"
    lines = gallery.read(DOCS / "data" / "results" / "cifar100-10000.jsonl")
    gallery.save_png(gallery.curves(lines, 0), drawn)
    ours, theirs = (
        pil_to_tensor(Image.open(file).convert("L")).float() / 255
        for file in (drawn, DOCS / "figures" / "gallery-curves.png")
    )
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().mean() < 0.002  # other versions of matplotlib draw text otherwise
    weights = {
        line["method"]: line["recipe"]["layer_weight"]
        for line in lines
        if line["seed"] == 0 and line["method"] in gallery.CURVES[2:]
    }
    assert weights == dict.fromkeys(("letKD-1", "letKD-2", "letKD-2 + KD"), 10.0)
    page = " ".join((DOCS / "gallery.md").read_text("utf-8").split())
    assert "methods of letKD have their layers' losses multiplied by 10" in page


@pytest.mark.parametrize(("name", "own"), [("supervision", "--out OUT"), ("gallery", "--figures")])
def test_scripts_with_the_benchmarks_options_explain_themselves(name, own, capsys):
    script = load(name)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    printed = capsys.readouterr().out
    assert " ".join(script.__doc__.split()) in " ".join(printed.split())
    assert own in printed
    # Both read the options of accuracy.py, but only the gallery reads its file of runs.
    assert ("runs/accuracy.jsonl" in printed) == (name == "gallery")
