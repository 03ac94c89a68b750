"""The numbers on the pages are those of the committed runs."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from scipy import stats

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "data" / "recipes"


def lines(name):
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def text_of(page):
    """A page of docs, or README.md, on one line."""
    path = DOCS.parent / page if page == "README.md" else DOCS / page
    return " ".join(path.read_text("utf-8").split())


def shown(values):
    """Mean and standard deviation as the pages write them."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def cells(page, start):
    """Rows of the table whose header begins so, by their first cell."""
    text = (DOCS / page).read_text("utf-8")
    found = re.search(rf"^\| {re.escape(start)}.*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.M)
    assert found, start
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("start", "task", "models"),
    [
        ("mean IoU, %", "segmentation", ["lraspp", "deeplab"]),
        ("AP at IoU 0.5, %", "detection", ["Faster R-CNN"]),
    ],
)
def test_the_tables_of_dense_prediction(start, task, models):
    found = [line for line in lines("dense-shapes.jsonl") if line["task"] == task]
    students = [line for line in found if line["method"] != "teacher"]
    assert {line["seed"] for line in students} == {0, 1, 2}
    table = cells("dense.md", start)
    for method in dict.fromkeys(line["method"] for line in students):
        scores = [
            [x["score"] for x in students if x["method"] == method and x["model"] == model]
            for model in models
        ]
        assert [len(values) for values in scores] == [3] * len(models)
        assert table[method] == [shown(values) for values in scores]
    (teacher,) = (line for line in found if line["method"] == "teacher")
    assert table["the teacher"][-1] == shown([teacher["score"]])


def test_the_table_of_label_free_distillation():
    found, table = lines("label-free.jsonl"), cells("label-free.md", "accuracy, %")
    for model in ("untrained", "distilled"):
        runs = [line for line in found if line["model"] == model]
        assert {line["seed"] for line in runs} == {0, 1, 2}
        measures = ("k-NN", "linear", "fine-tuned")
        expected = [shown([run[measure] for run in runs]) for measure in measures]
        assert table[f"student, {model}"] == expected
    (teacher,) = (line for line in found if line["model"] == "teacher")
    assert table["teacher"][:2] == [shown([teacher[m]]) for m in ("k-NN", "linear")]


def test_the_table_of_the_quickstart():
    printed = (DATA / "quickstart.txt").read_text("utf-8")
    rows = cells("quickstart.md", "| test accuracy %")
    assert list(rows) == ["labels only", "KD", "letKD-2", "letKD-2 + KD"]
    for method, (accuracy, gain, size) in rows.items():
        (line,) = re.findall(rf"^{re.escape(method)} {{2,}}(.*)$", printed, re.M)
        shown_gain = gain or "+0.00 (+0.00 to +0.00)"
        assert line.split() == [*accuracy.split(), *shown_gain.split(), size]


def test_what_a_record_of_few_logits_loses():
    rows = cells("recorded.md", "| all logits")
    printed = [line.strip("| ") for line in (DATA / "topk.txt").read_text("utf-8").splitlines()[2:]]
    name = {"DKDLoss": "DKDLoss, temperature 4"}
    for line, (shown_name, shown_cells) in zip(printed, rows.items(), strict=True):
        measured, *values = (cell.strip() for cell in line.split("|"))
        assert name.get(measured, measured) == shown_name.replace("`", "")
        assert values == shown_cells


def accuracies(stem):
    """Test accuracies by method and seed."""
    found = {}
    for line in (DOCS / "data" / "results" / f"{stem}.jsonl").read_text("utf-8").splitlines():
        run = json.loads(line)
        found.setdefault(run["method"], {})[run["seed"]] = run["test_accuracy"]
    return found


def difference(ours, theirs, without=()):
    """The paired difference with its 95 % interval: mean, low and high."""
    seeds = sorted(ours.keys() & theirs.keys() - set(without))
    test = stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds])
    low, high = test.confidence_interval()
    return mean(ours[s] - theirs[s] for s in seeds), low, high


def verdict(ours, theirs):
    """The sign of the paired difference if its 95 % interval excludes 0; 0 if it does not."""
    _, low, high = difference(ours, theirs)
    return 1 if low > 0 else -1 if high < 0 else 0


def check_pairs(runs, pairs, page, said):
    """Each pair has its expected verdict; the page and others give its difference and interval.

    ``pairs`` maps two methods to the verdict and the other pages; ``said`` is a pattern for the
    mean, low and high.
    """
    for (ours, theirs), (expected, *others) in pairs.items():
        assert verdict(runs[ours], runs[theirs]) == expected, (ours, theirs)
        pattern = said.format(*(f"{x:.1f}" for x in difference(runs[ours], runs[theirs])))
        for name in (page, *others):
            assert re.search(pattern, text_of(name)), (name, ours, theirs)


def test_what_the_front_page_says_of_fashion_mnist():
    few = ("fashion-mnist-6000", "fashion-mnist-6000-resnet20", "fashion-mnist-6000-vgg")
    better = set()
    for stem in (*few, "fashion-mnist-all", "fashion-mnist-all-8"):
        runs = accuracies(stem)
        if stem in few:
            assert verdict(runs["letKD-2"], runs["layers only (2)"]) == 1
        same = [name for name in runs if name != "KD" and "wider" not in name]
        better |= {(stem, name) for name in same if verdict(runs[name], runs["KD"]) == 1}
    assert better == {("fashion-mnist-6000-resnet20", "DKD")}
    text = text_of("README.md")
    assert "no method beats KD with the same student, except DKD with one of two" in text


def interval(numbers):
    """As the pages write it, such as 4.6 points (2.5 to 6.7)."""
    middle, low, high = (f"{number:.1f}" for number in numbers)
    return f"{middle} points ({low} to {high})"


def test_what_the_front_page_says_of_cifar100():
    runs = accuracies("cifar100-10000")
    both, kd, wider = (runs[name] for name in ("letKD-2 + KD", "KD", "wider, same MACs + KD"))
    assert set(both) == set(kd) == set(wider) == {0, 1, 2, 3, 4}
    assert [verdict(both, kd), verdict(both, wider), verdict(wider, kd)] == [1, 1, 0]
    readme = text_of("README.md")
    assert f"{interval(difference(both, kd))} better than KD" in readme
    assert f"{interval(difference(both, wider))} better than a wider student with KD" in readme
    # The weight was chosen with seed 0, so the page also says what the other seeds show.
    page = text_of("results-cifar100-10000.md")
    for other in (kd, wider):
        middle, low, high = difference(both, other, without=[0])
        assert f"{middle:.1f} points" in page
        assert f"({low:.1f} to {high:.1f})" in page
    assert difference(both, kd, without=[0])[1] > 0 > difference(both, wider, without=[0])[1]


def test_what_the_pages_say_of_letkd_alone_and_of_controls_on_cifar100():
    runs = accuracies("cifar100-10000")
    wider, free = "wider, same MACs + KD", "layers only (2) + KD"
    assert set(runs["letKD-2"]) == {0, 1, 2, 3, 4}
    assert set(runs[free]) == {0, 1, 2, 3, 4}
    three = ("letKD-1", "layers only (2)", "FitNet", "labels only", "DKD", "AT", "IE-KD")
    three += ("SKD + KD", "QuEST", "AEKT chi2")
    assert all(set(runs[name]) == {0, 1, 2} for name in three)
    pairs = {
        ("FitNet", "labels only"): (1,),
        ("FitNet", "KD"): (1, "letkd.md", "README.md"),
        ("FitNet", "letKD-2 + KD"): (1, "letkd.md", "README.md"),
        ("FitNet", "letKD-2"): (1,),
        ("letKD-2", "layers only (2)"): (1, "letkd.md"),
        ("layers only (2)", "labels only"): (0,),
        ("letKD-2", "KD"): (1, "letkd.md", "README.md"),
        ("letKD-1", "KD"): (1, "letkd.md"),
        ("letKD-2", wider): (1,),
        ("letKD-2", "letKD-1"): (0, "letkd.md"),
        ("letKD-2 + KD", "letKD-2"): (1,),
        (free, "KD"): (1, "letkd.md"),
        ("letKD-2 + KD", "labels only"): (1,),
        ("letKD-1", "labels only"): (1,),
        ("letKD-2", "labels only"): (1,),
        ("KD", "labels only"): (1,),
        ("DKD", "KD"): (0,),
        ("AT", "KD"): (0,),
        ("DKD", "labels only"): (1,),
        ("AT", "labels only"): (1,),
        ("letKD-2 + KD", "AT"): (1,),
        ("letKD-1", "AT"): (1,),
        ("IE-KD", "labels only"): (1,),
        ("IE-KD", "KD"): (0,),
        ("letKD-1", "IE-KD"): (1,),
        ("KD", "SKD + KD"): (1,),
        ("letKD-1", "QuEST"): (0, "letkd.md"),
        ("QuEST", "labels only"): (1,),
        ("QuEST", "KD"): (0,),
        ("AEKT chi2", "KD"): (0,),
        ("DKD", "AEKT chi2"): (1,),
    }
    check_pairs(runs, pairs, "results-cifar100-10000.md", r"{} points,? \(?{} to {}")
    for name in runs.keys() - {"FitNet"}:  # the best method of those with a verdict
        assert len(runs[name]) < 3 or verdict(runs["FitNet"], runs[name]) == 1, name
    page = text_of("results-cifar100-10000.md")
    readme = text_of("README.md")
    gain = interval(difference(runs["letKD-2"], runs["KD"], without=[0]))
    assert f"the first gain is {gain}" in page
    assert gain in readme
    middle, low, high = (f"{x:.1f}" for x in difference(runs["letKD-2"], runs[wider], without=[0]))
    assert f"not significant ({middle} points, {low} to {high})" in page
    middle, low, high = (f"{x:.1f}" for x in difference(runs["letKD-2 + KD"], runs[free]))
    assert verdict(runs["letKD-2 + KD"], runs[free]) == 0
    for text in (page, text_of("letkd.md")):
        assert f"{middle} points, which are not significant ({low} to {high})" in text
    assert interval(difference(runs["letKD-2 + KD"], runs[free], without=[0])) in page
    one = accuracies("cifar100-10000.earlier")["letKD-1"]
    ten = runs["letKD-1"]
    assert f"has {ten[0]:.1f} % with weight 10 and {one[0]:.1f} % with weight 1" in page


def test_what_the_weight_of_the_layers_does_on_cifar100():
    file = DOCS / "data" / "results" / "cifar100-10000.tuning.jsonl"
    found = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    accuracy = {
        run["recipe"]["layer_weight"]: run["validation_accuracy"]
        for run in found
        if run["method"] == "letKD-2 + KD"
        and run["recipe"]["head_scale"] == 3.0
        and run["recipe"]["layers"][1]["templates"] == 512
        and run["recipe"]["layers"][1]["temperature"] == 1.0
    }
    first, second, third = (f"{accuracy[weight]:.1f}" for weight in (1.0, 3.0, 10.0))
    for page in ("letkd.md", "results-cifar100-10000.md"):
        text = text_of(page)
        assert f"{first}, {second} and {third} %" in text
    one, ten = (
        run["validation_accuracy"]
        for weight in (1.0, 10.0)
        for run in found
        if run["method"] == "letKD-2" and run["recipe"]["layer_weight"] == weight
    )
    sentence = f"letKD-2 alone has {ten:.1f} % with weight 10, with weight 1 {one:.1f} %"
    assert sentence in text


def test_what_aekts_gamma_does_on_cifar100():
    accuracy = {}
    for name in ("earlier", "tuning"):
        file = DOCS / "data" / "results" / f"cifar100-10000.{name}.jsonl"
        for run in map(json.loads, file.read_text("utf-8").splitlines()):
            if run["method"] == "AEKT chi2":
                (loss,) = run["recipe"]["losses"]
                accuracy[loss["gamma"], loss["weight"]] = run["validation_accuracy"]
    assert max(accuracy, key=accuracy.get) == (0.1, 0.2)
    tried = ((1.0, 0.2), (0.1, 0.2), (0.02, 1.0))
    first, second, third = (f"{accuracy[gamma, weight]:.1f} %" for gamma, weight in tried)
    page = text_of("results-cifar100-10000.md")
    assert f"has {first} with Fashion-MNIST's gamma of 1, {second}" in page
    assert f"and {third} with 0.02 and a weight of 1 instead of 0.2" in page
    said = f"had {first} on validation images with `gamma=1`, and {second} with `gamma=0.1`"
    assert said in text_of("aekt.md")


def test_what_a_recorded_step_takes():
    file = DOCS / "data" / "performance" / "recorded_step.json"
    found = json.loads(file.read_text("utf-8"))["comparisons"]
    text = text_of("recorded.md")
    sentences = {
        "live teacher": "{} to {} of the time of the same step with the live teacher",
        "in memory": "{} to {} of the time of the step whose teacher's tensors are in memory",
    }
    for other, sentence in sentences.items():
        medians = [c["ratio"]["middle"] for c in found if c["alternative"] == other]
        assert len(medians) == 6
        assert sentence.format(f"{min(medians):.2f}", f"{max(medians):.2f}") in text


def test_what_the_pages_say_of_recorded_views():
    runs = {4: accuracies("cifar100-10000")["KD"]}
    path = DOCS / "data" / "results" / "cifar100-10000.views.jsonl"
    for line in map(json.loads, path.read_text("utf-8").splitlines()):
        runs.setdefault(line["recipe"].get("views"), {})[line["seed"]] = line["test_accuracy"]
    live = runs[None]
    assert runs[1].keys() == runs[16].keys() == live.keys() == {0, 1, 2} <= runs[4].keys()
    assert verdict(runs[1], live) == -1
    lost = -difference(runs[1], live)[0]
    assert verdict(runs[4], live) == verdict(runs[16], live) == 0
    page = text_of("recorded.md")
    assert f"was {lost:.1f} points worse than with a live teacher (three seeds)" in page
    found = text_of("results-cifar100-10000.md")
    assert f"with one view KD is {lost:.1f} points below a live teacher (three seeds)" in found
    for views, before in ((4, "a live teacher"), (16, "nor with 16 views")):
        middle, low, high = (f"{number:.1f}" for number in difference(runs[views], live))
        assert f"{before} ({middle} points, {low} to {high}, three seeds)" in found


def test_what_the_pages_say_of_a_teacher_of_other_classes():
    runs = accuracies("cifar10-500")
    pairs = {
        ("letKD-2", "labels only"): (1, "letkd.md", "README.md"),
        ("FitNet", "labels only"): (1, "README.md"),
        ("FeatureLoss", "labels only"): (1, "README.md"),
        ("letKD-1", "labels only"): (1,),
        ("AT", "labels only"): (1,),
        ("IE-KD", "labels only"): (0,),
        ("layers only (2)", "labels only"): (0, "README.md"),
        ("letKD-2", "layers only (2)"): (1, "letkd.md"),
        ("letKD-2", "letKD-1"): (0, "letkd.md"),
        ("letKD-2", "FitNet"): (1, "letkd.md"),
        ("letKD-2", "FeatureLoss"): (0, "letkd.md"),
        ("letKD-2", "AT"): (1,),
        ("letKD-2 + FitNet", "FitNet"): (0, "letkd.md"),
    }
    more = ("labels only", "letKD-2", "FitNet", "FeatureLoss")
    assert all(set(runs[name]) == set(range(5 if name in more else 3)) for name in runs)
    check_pairs(runs, pairs, "results-cifar10-500.md", r"{}( points)?,? \(?{} to {}")
    middle, low, high = difference(runs["letKD-2"], runs["FitNet"], without=[0])
    page = text_of("results-cifar10-500.md")
    assert f"better than FitNet by {middle:.1f} points ({low:.1f} to {high:.1f})" in page
    assert low > 0
    earlier = accuracies("cifar10-500.earlier")
    assert verdict(runs["letKD-2"], earlier["letKD-2"]) == 1
    assert verdict(runs["letKD-1"], earlier["letKD-1"]) == 0


def test_what_the_pages_say_of_templates_and_sharpness():
    def tried(stem, method):
        """Validation accuracies of seed 0, weight 10, by templates and sharpness."""
        path = DOCS / "data" / "results" / f"{stem}.tuning.jsonl"
        runs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {
            (
                run["recipe"]["layers"][-1]["templates"],
                run["recipe"]["layers"][-1]["temperature"],
            ): (f"{run['validation_accuracy']:.1f} %")
            for run in runs
            if run["method"] == method
            and (run["recipe"]["layer_weight"], run["recipe"]["head_scale"]) == (10.0, 3.0)
        }

    few = text_of("results-cifar10-500.md")
    two = tried("cifar10-500", "letKD-2")
    assert f"letKD-2 reaches {two[512, 1.0]} with 512 templates and sharpness 1" in few
    assert (
        f"With 128 templates it is again {two[128, 1.0]}, with sharpness 0.1 {two[512, 0.1]}" in few
    )
    assert f"but with both {two[128, 0.1]}. 64 templates give {two[64, 0.1]}" in few
    assert f"a sharpness of 0.03 {two[128, 0.03]}" in few
    teacher = json.loads(
        (DOCS / "data" / "results" / "cifar10-500.teacher.json").read_text("utf-8")
    )
    spread = teacher["codebook"]["students' images"]
    assert teacher["options"]["templates"] == 128
    soft, hard = (spread[f"perplexity, sharpness {value}"] for value in ("0.1", "1"))
    assert f"{soft:.1f} templates share the probability of a position" in few
    assert f"almost one-hot ({hard:.2f})" in few
    letkd = text_of("letkd.md")
    assert f"was about {soft:.0f}. With the default sharpness it was {hard:.2f}" in letkd
    one = tried("cifar10-500", "letKD-1")
    assert f"from {one[512, 1.0].removesuffix(' %')} to {one[128, 0.1]}" in few
    page = text_of("letkd.md")
    assert (
        f"1 gave {two[512, 1.0]}, and 128 templates with a sharpness of 0.1 gave {two[128, 0.1]}"
        in page
    )
    both = tried("cifar100-10000", "letKD-2 + KD")
    assert f"(sharpness 0.1) gave {both[512, 0.1]}, and {both[128, 0.1]} with 128 templates" in page
    many = text_of("results-cifar100-10000.md")
    assert f"has {both[512, 0.1]} with sharpness 0.1 instead of 1, and {both[128, 0.1]}" in many


def test_what_the_pages_say_of_weights_with_a_teacher_of_other_classes():
    path = DOCS / "data" / "results" / "cifar10-500.tuning.jsonl"
    runs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    found = {
        method: {
            line["recipe"]["losses"][0]["weight"]: line["validation_accuracy"]
            for line in runs
            if line["method"] == method and line["seed"] == 0
        }
        for method in ("FeatureLoss", "FitNet")
    }
    values = [found["FeatureLoss"][weight] for weight in (1, 10, 100, 300)]
    page = text_of("more-losses.md")
    said = f"{', '.join(map(str, values[:3]))} and {values[3]} % on the validation images"
    assert f"weights of 1, 10, 100 and 300 gave {said} (one seed)" in page
    assert max(found["FitNet"], key=found["FitNet"].get) == 10
    assert found["FitNet"][100] < 15  # ten classes
    assert "its best weight was 10, and training failed with 100" in page
