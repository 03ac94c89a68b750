"""The page of the accuracy benchmark: its statistics, its parts, the committed lines."""

import dataclasses
import json
import re

import pytest
from scipy import stats

from tests.accuracy_bench import TINY
from tests.benchmark_modules import load

report = load("report")  # the first, as it puts the folder of the models on the path
sweeps, words = load("sweeps"), load("_accuracy_words")
overview, forest, published = (
    load(f"_accuracy_{name}") for name in ("overview", "forest", "published")
)
digest = load("_accuracy_train").digest
held_out = load("_accuracy_setting").held_out
SWEEPS, groups = load("_accuracy_sweeps").SWEEPS, load("_accuracy_sweeps").groups
earlier_table = load("_accuracy_earlier").earlier_table


def lines(method, accuracies, recipe_hash="a"):
    return [
        {"method": method, "seed": seed, "test_accuracy": value, "recipe_hash": recipe_hash}
        for seed, value in enumerate(accuracies)
    ]


OURS, THEIRS = [90.1, 90.4, 90.2, 90.9, 90.3], [89.7, 90.0, 90.1, 90.2, 89.6]


def test_intervals_are_those_of_scipy():
    text, verdict = words.difference(lines("x", OURS), lines("y", THEIRS))
    test = stats.ttest_rel(OURS, THEIRS)
    low, high = test.confidence_interval(0.95)
    mean = sum(OURS) / 5 - sum(THEIRS) / 5
    assert text == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    assert verdict == "better"
    half = stats.sem(OURS) * stats.t.ppf(0.975, 4)
    assert words.plus_minus(OURS) == f"{sum(OURS) / 5:.2f} ± {half:.2f}"


@pytest.mark.parametrize("shift", [-2.0, -0.5, -0.4, -0.1, 0.0, 0.3])
def test_a_verdict_only_where_the_interval_excludes_zero(shift):
    ours = [value + shift for value in OURS]
    low, high = stats.ttest_rel(ours, THEIRS).confidence_interval(0.95)
    expected = "better" if low > 0 else "worse" if high < 0 else "not separated"
    assert words.difference(lines("x", ours), lines("y", THEIRS))[1] == expected


def test_two_seeds_that_agree_decide_nothing():
    ours, theirs = lines("x", [90.0, 90.01]), lines("y", [89.0, 89.01])
    assert words.difference(ours, theirs) == ("+1.00", "too few seeds (2)")
    assert words.plus_minus([90.0, 91.0]) == "90.50"


def test_pairs_are_of_one_seed():
    ours, theirs = lines("x", [1.0, 2.0, 3.0])[1:], lines("y", [5.0, 6.0, 7.0, 8.0])[::-1]
    assert words.paired(ours, theirs) == ([2.0, 3.0], [6.0, 7.0])
    assert words.difference(ours[:1], theirs) == ("-4.00", "too few seeds (1)")
    assert words.difference(ours[:1], theirs[-1:])[1] == "not run"


@pytest.mark.parametrize("validation", [0, 5000])
@pytest.mark.parametrize("tuned", [False, True])
def test_it_says_where_the_validation_images_are_from(validation, tuned):
    shorter = [{"recipe": {"epochs": 10, "validation": 3000}}] if tuned else []
    text = held_out({"validation": validation}, shorter)
    if validation:
        assert text == "5,000 training images that no student trains on"
    else:
        assert ("10 epochs that kept 3,000 training images" in text) == tuned
        assert ("a regime with fewer images" in text) != tuned


def test_recipes_and_seeds_are_not_mixed():
    with pytest.raises(SystemExit, match="several recipes"):
        report.by_method(lines("KD", [1.0]) + lines("KD", [2.0, 3.0], "b")[1:])
    tuned = [line | {"test_accuracy": None} for line in lines("KD", [1.0])]
    with pytest.raises(SystemExit, match=r"'KD' has a run of --tuning: put it into a file \*"):
        report.by_method(tuned)
    noted, others = (
        [line | {"images_hash": value} for line in lines(method, [1.0, 2.0])]
        for method, value in (("KD", "a"), ("DKD", "b"))
    )
    with pytest.raises(SystemExit, match="runs of seed 0 have other images: use the same --root"):
        report.by_method(noted + others)
    assert set(report.by_method(noted + lines("DKD", [1.0]))) == {"KD", "DKD"}
    other = [line | {"device": "cuda"} for line in lines("DKD", [1.0])]
    with pytest.raises(SystemExit, match="several devices"):
        report.by_method(lines("KD", [1.0]) + other)
    with pytest.raises(SystemExit, match="two runs of one seed"):
        report.by_method(lines("KD", [1.0]) + lines("KD", [2.0]))
    short, long = (
        [line | {"recipe": {"epochs": epochs}} for line in lines(method, [1.0])]
        for method, epochs in (("KD", 20), ("DKD", 30))
    )
    with pytest.raises(SystemExit, match="runs with epochs 20 and 30, which cannot be compared"):
        report.by_method(short + long)


def entry(runs, short="some data"):
    """A regime on the first page."""
    for own in runs.values():
        for line in own:
            line["recipe"] = {"data": "fashion-mnist", "student": "resnet8"}
            line["teacher"] = {"recipe": {"network": "resnet14"}}
    return overview.Entry("stem", short, short, runs, ["labels only", "KD", "letKD-2"])


def test_the_first_page_says_what_the_intervals_say():
    weak = [value - 1.5 for value in THEIRS]
    runs = {
        "KD": lines("KD", THEIRS),
        "letKD-2": lines("letKD-2", OURS),
        "labels only": lines("labels only", weak),
        "DKD": lines("DKD", THEIRS[::-1]),
        "letKD-1": lines("letKD-1", OURS[:2]),
    }
    found = overview.finding(entry(runs))
    assert found == (
        "- **some data**: better than KD: *letKD-2*; worse than KD: *labels only*; not separated "
        "from KD: *DKD*; too few seeds for a verdict: 1 method."
    )
    rows = overview.overview_table([entry(runs), entry({"KD": runs["KD"]})]).splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in rows[2:]}
    text, _ = words.difference(runs["letKD-2"], runs["KD"])
    assert cells["letKD-2"] == [f"{text} **better**", "not run yet |"]
    assert cells["DKD"][1] == "left out |"  # not a method of that regime
    assert cells["letKD-1"][0] == f"{sum(OURS[:2]) / 2 - sum(THEIRS[:2]) / 2:+.2f} (2 seeds)"
    assert cells["KD"] == [words.plus_minus(THEIRS), f"{words.plus_minus(THEIRS)} |"]


def test_the_first_page_counts_the_seeds_of_both():
    """A difference has as many seeds as the method and its reference have in common."""
    runs = {"KD": lines("KD", THEIRS[:1]), "letKD-2": lines("letKD-2", OURS)}
    assert overview.cell("letKD-2", entry(runs)) == f"{OURS[0] - THEIRS[0]:+.2f} (1 seed)"


def test_the_figure_has_panels_of_regimes_with_intervals():
    begun = {"KD": lines("KD", THEIRS), "letKD-2": lines("letKD-2", OURS[:1])}
    whole = begun | {"letKD-2": lines("letKD-2", OURS)}
    one, other = entry(begun, "begun"), entry(whole, "whole")
    assert [title for title, _ in report.panels_of([one, other])] == ["whole"]
    assert [title for title, _ in report.panels_of([one])] == ["begun"]


def test_without_logits_differences_are_to_labels_only():
    runs = {"labels only": lines("labels only", THEIRS), "AT": lines("AT", OURS)}
    assert overview.finding(entry(runs)) == "- **some data**: better than labels only: *AT*."


def test_the_forest_has_the_intervals_and_is_drawn_the_same_again(tmp_path):
    runs = {
        "KD": lines("KD", THEIRS),
        "letKD-2": lines("letKD-2", OURS),
        "DKD": lines("DKD", OURS[:1]),
    }
    rows = forest.rows_of(runs, ("labels only", "KD", "DKD", "letKD-2"))
    low, high = stats.ttest_rel(OURS, THEIRS).confidence_interval(0.95)
    assert rows[0] == ("DKD", pytest.approx(OURS[0] - THEIRS[0]), None, None)
    assert rows[1] == ("letKD-2", *(pytest.approx(x, abs=1e-3) for x in (rows[1][1], low, high)))
    paths = [tmp_path / f"figures{number}" / "forest.svg" for number in (1, 2)]
    assert all(forest.draw_forest([("a", runs), ("b", runs)], list(runs), path) for path in paths)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    width = re.search(r'width="([\d.]+)pt"', paths[0].read_text("utf-8"))[1]
    assert float(width) <= 0.75 * 480  # points to pixels: a phone shows it unscaled
    assert not forest.draw_forest([("a", {"KD": runs["KD"]})], ["KD"], tmp_path / "no.svg")


def test_published_numbers_stand_beside_the_same_pair_only():
    runs = {"KD": lines("KD", [45.0, 46.0, 47.0])}
    line = {
        "recipe": {"data": "cifar100", "student": "resnet20", "images": 10000, "epochs": 20},
        "teacher": {"recipe": {"network": "resnet56", "data": "cifar100"}, "test_accuracy": 72.63},
    }
    runs = {"KD": [one | line for one in runs["KD"]]}
    rows = published.published_table(runs).splitlines()
    assert "| letKD-2 | 73.27 | +2.61 | not run yet |" in rows
    assert f"| KD | 70.66 |  | {words.plus_minus([45.0, 46.0, 47.0])} |" in rows
    for change in ({"data": "cifar10"}, {"student": "resnet32"}):
        other = [one | {"recipe": one["recipe"] | change} for one in runs["KD"]]
        assert published.published_table({"KD": other}) == ""


def test_budgets_that_only_some_runs_have():
    runs = lines("letKD-1", OURS)
    for line, budgets in zip(runs, [(0.3, 0.05), *[(0.05,)] * 4], strict=True):
        cut = {"templates": {"last": 7}, "parameters": 90, "macs": 10**6, "accuracy": 80.0}
        line["pruned"] = [{"budget": budget} | cut for budget in budgets]
    rows = words.pruned_table({"letKD-1": runs}).splitlines()[-2:]
    assert rows[0].startswith("| letKD-1 | 5 | 5% | 7 at last | 90 | 1.00&nbsp;M | -10.38 [")
    assert rows[1].endswith("| 1 | 30% | 7 at last | 90 | 1.00&nbsp;M | -10.10 too few seeds (1) |")


def test_the_page_says_what_was_run_and_what_was_not(bench, tmp_path):
    methods = ("--methods", "KD", "labels only", "letKD-1")
    out = tmp_path / "tiny.jsonl"
    runs = bench(out, *methods, "--seeds", "0", "1")
    bench(tmp_path / "tiny.tuning.jsonl", *methods[:2], "--tuning", "--seeds", "8")
    options = ("--tuning", "--seeds", "8", "--alpha-last", "0.5")
    bench(tmp_path / "tiny.tuning.jsonl", "--methods", "letKD-1", *options)
    (tmp_path / "tiny.txt").write_text("## Found\n\nNothing.\n", "utf-8")
    report.main(["--data", str(tmp_path), "--out", str(tmp_path / "results.md")])
    first = (tmp_path / "results.md").read_text("utf-8")
    page = (tmp_path / "results-tiny.md").read_text("utf-8")
    title = f"Fashion-MNIST, resnet8 to resnet8, 40 images, {runs[0]['recipe']['epochs']} epochs"
    assert f"\n# {title}\n" in page
    assert "- **CIFAR-100, all images**: not run yet.\n" in first
    assert f"[{title}](results-tiny.md): 3 of 31 methods, 2 seeds" in first
    assert re.findall(r"^\| letKD-1 \| \S+ \(2 seeds\) \|$", first, re.M)
    assert (tmp_path / "figures" / "results.svg").stat().st_size > 1000
    assert f"**{runs[0]['teacher']['test_accuracy']:.2f} %** of the test" in page
    assert "Not run yet: *letKD-2*, *letKD-2, falling*, *QuEST*" in page
    assert "## Found\n\nNothing.\n" in page
    rows = [line for line in page.splitlines() if line.startswith("| KD |")]
    mean = sum(line["test_accuracy"] for line in runs if line["method"] == "KD") / 2
    assert rows[0].startswith(f"| KD | 2 | {mean:.2f} | ")
    assert "letKD-2 minus" not in page


def test_a_regime_without_runs_may_have_a_page(tmp_path):
    assert report.waiting(tmp_path / "cifar100-all.jsonl", "CIFAR-100, all images") == ""
    part = {"students' images": {"perplexity": 1.25}, "test images": {"perplexity": 1.5}}
    known = {"logits": part, "codebook": part, "decisions": part, "options": {"templates": 8}}
    (tmp_path / "cifar100-all.teacher.json").write_text(json.dumps(known), "utf-8")
    (tmp_path / "tiny.jsonl").write_text(
        (report.DATA / "fashion-mnist-all.jsonl").read_text("utf-8"), "utf-8"
    )
    found = report.pages(tmp_path)
    assert set(found) == {"results.md", "results-tiny.md", "results-cifar100-all.md"}
    page = found["results-cifar100-all.md"]
    assert "**No run has finished yet.**" in page
    assert "| codebook: perplexity | 1.25 | 1.5 |" in page
    bullet = "- **CIFAR-100, all images**: not run yet; [its teacher](results-cifar100-all.md)."
    assert bullet in found["results.md"]
    assert "\nresults-tiny\nresults-cifar100-all\n```" in found["results.md"]


def test_a_sweep_is_compared_with_the_unchanged_recipe(bench, image_root, tmp_path, monkeypatch):
    monkeypatch.setitem(
        SWEEPS, "templates", dataclasses.replace(SWEEPS["templates"], values=(4, 12))
    )
    seeds, out = ("--seeds", "0", "1", "2"), tmp_path / "tiny.jsonl"
    runs = bench(out, "--methods", "labels only", "letKD-1", *seeds)
    cache = tmp_path.parent / "sweep-teachers"
    swept = tmp_path / "tiny.sweeps.jsonl"
    paths = ["--root", str(image_root), "--cache", str(cache), "--out", str(swept)]
    sweeps.main(["--sweeps", "templates", *seeds, *paths, *TINY])
    lines = report.read(swept)
    assert [(x["seed"], x["recipe"]["layers"][0]["templates"]) for x in lines] == [
        (seed, k) for seed in range(3) for k in (4, 12)
    ]
    report.main(["--data", str(tmp_path), "--out", str(tmp_path / "page.md")])
    page = (tmp_path / "results-tiny.md").read_text("utf-8")
    rows = [row for row in page.splitlines() if re.match(r"\| (4|8|12) \| 3 ", row)]
    assert len(rows) == 3
    by_k = {k: [x["test_accuracy"] for x in lines[i::2]] for i, k in enumerate((4, 12))}
    usual = [x["test_accuracy"] for x in runs if x["method"] == "letKD-1"]
    assert words.bold(*words.gap(by_k[4], usual)) in rows[0]
    assert f"| {sum(usual) / 3:.2f} ± " in rows[1]
    assert (tmp_path / "figures" / "tiny-sweeps.png").stat().st_size > 1000
    # A line that differs in more than the swept value is no point of the curve.
    other = lines[0] | {"recipe": lines[0]["recipe"] | {"lr": 0.5}}
    unchanged = [x for x in runs if x["method"] == "letKD-1"]
    assert groups(SWEEPS["templates"], [other], unchanged) == {}


def test_a_weight_of_the_whole_recipe_is_swept_too():
    layers = [{"at": "last", "templates": 8}]

    def line(seed, weight, layers=layers):
        recipe = {"layers": layers, "layer_weight": weight}
        return {"method": "letKD-2 + KD", "seed": seed, "recipe": recipe}

    unchanged = [line(seed, 3.0) for seed in range(3)]
    tried = [line(0, 1.0), line(1, 10.0), line(0, 1.0, [{"at": "last", "templates": 4}])]
    found = groups(SWEEPS["layer weight"], tried, unchanged)
    assert found == {1.0: tried[:1], 3.0: unchanged[:2], 10.0: tried[1:2]}


def test_a_replaced_recipe_is_compared_with_the_present_one():
    def runs(accuracies, recipe, recipe_hash):
        return [line | {"recipe": recipe} for line in lines("x", accuracies, recipe_hash)]

    now = runs(OURS, {"lr": 0.1, "layers": [{"templates": 8}]}, "a")
    old = runs(THEIRS[:3], {"lr": 0.1, "layers": [{"templates": 4}], "heads": 2}, "b")
    assert earlier_table(old, {"y": now}) == ""
    row = earlier_table(old, {"x": now}).splitlines()[-1]
    text, verdict = words.gap(OURS[:3], THEIRS[:3])
    expected = ["x", "layers.0.templates 4, heads 2", "3", words.plus_minus(THEIRS[:3])]
    assert row == f"| {' | '.join([*expected, words.bold(text, verdict)])} |"


def test_a_teacher_of_other_classes_has_no_row_for_logits(tmp_path):
    parts = {name: {"test images": {"perplexity": 1.5}} for name in ("codebook", "decisions")}
    path = tmp_path / "tiny.teacher.json"
    path.write_text(json.dumps(parts | {"options": {"templates": 8}}), "utf-8")
    head, _, *rows = words.supervision_table(path).splitlines()[2:]
    assert head == "|  | test images |"
    assert rows == ["| codebook: perplexity | 1.5 |", "| decisions: perplexity | 1.5 |"]


def test_the_committed_pages_are_made_from_the_committed_lines():
    folder = report.PAGE.parent
    made = report.pages(report.DATA)
    assert {path.name for path in folder.glob("results*.md")} == set(made)
    for name, text in made.items():
        assert text == (folder / name).read_text("utf-8")


def test_committed_lines_are_whole():
    """Hashes are those of their recipes, all methods of a file share teacher and circumstances."""
    files = list(report.DATA.glob("*.jsonl"))
    assert files
    for path in files:
        read = report.read(path)
        assert all(digest(line["recipe"]) == line["recipe_hash"] for line in read)
        assert len({line["recipe"]["teacher"] for line in read}) == 1
        tuning = ".tuning" in path.name
        assert all((line["test_accuracy"] is None) == tuning for line in read)
