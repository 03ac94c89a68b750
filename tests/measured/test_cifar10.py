"""What the pages say of a teacher whose classes the student does not have."""

import json
from statistics import mean

from tests.measured.committed import (
    RESULTS,
    accuracies,
    check_pairs,
    difference,
    interval,
    lines,
    text_of,
    verdict,
)


def test_what_the_pages_say_of_a_teacher_of_other_classes():
    runs = accuracies("cifar10-500")
    pairs = {
        ("letKD-2", "labels only"): (1, "letkd.md", "README.md"),
        ("FitNet", "labels only"): (1, "README.md"),
        ("FeatureLoss", "labels only"): (1, "README.md"),
        ("letKD-1", "labels only"): (1,),
        ("AT", "labels only"): (1,),
        ("IE-KD", "labels only"): (0,),
        ("layers only (2)", "labels only"): (0,),
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


def test_what_the_validation_images_of_the_same_kinds_say():
    test, same = (accuracies("cifar10-500", images) for images in ("test", "validation"))
    gaps = [mean(same[name].values()) - mean(test[name].values()) for name in test]
    page = text_of("results-cifar10-500.md")
    assert f"is {min(gaps):.1f} to {max(gaps):.1f} points below that on the validation" in page
    letkd = same["letKD-2"]
    assert f"gains {interval(difference(letkd, same['labels only']))} over labels only" in page
    assert f"and {interval(difference(letkd, same['FitNet']))} over FitNet" in page
    assert [verdict(letkd, same[name]) for name in ("labels only", "FitNet", "AT")] == [1, 1, 0]
    middle, low, high = (f"{x:.1f}" for x in difference(letkd, same["AT"]))
    assert f"not significant ({middle} points, {low} to {high})" in page


def test_what_the_pages_say_of_templates_and_sharpness():
    def tried(stem, method):
        """Validation accuracies of seed 0, weight 10, by templates and sharpness."""
        runs = lines(f"results/{stem}.tuning.jsonl")
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
    teacher = json.loads((RESULTS / "cifar10-500.teacher.json").read_text("utf-8"))
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
    runs = lines("results/cifar10-500.tuning.jsonl")
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


def test_what_the_pages_say_of_5000_images():
    page = "results-cifar10-5000.md"
    test, same = (accuracies("cifar10-5000", images) for images in ("test", "validation"))
    assert all(set(seeds) == {0, 1, 2} for seeds in test.values())
    pairs = {
        ("FitNet", "labels only"): (1, "README.md"),
        ("FeatureLoss", "labels only"): (1, "README.md"),
        ("AT", "labels only"): (1,),
        ("letKD-2", "labels only"): (1, "letkd.md", "README.md"),
        ("letKD-1", "labels only"): (1,),
        ("IE-KD", "labels only"): (0,),
        ("layers only (2)", "labels only"): (0,),
        ("letKD-2", "layers only (2)"): (1, "letkd.md"),
        ("letKD-2", "letKD-1"): (0, "letkd.md"),
        ("FitNet", "letKD-2"): (1, "letkd.md"),
        ("FitNet", "letKD-1"): (1,),
        ("AT", "letKD-1"): (1,),
        ("letKD-2", "FeatureLoss"): (0,),
        ("letKD-2", "AT"): (0,),
        ("letKD-2 + FitNet", "FitNet"): (0, "letkd.md"),
    }
    check_pairs(test, pairs, page, r"{}( points)?,? \(?{} to {}")
    fewer = accuracies("cifar10-500")
    middle, low, _ = difference(fewer["letKD-2"], fewer["FitNet"])
    assert f"letKD-2 was better than FitNet, by {middle:.1f} points" in text_of(page)
    assert low > 0
    unstable = ", ".join(f"{test['IE-KD'][seed]:.1f}" for seed in (0, 1))
    assert f"with {unstable} and {test['IE-KD'][2]:.1f} %" in text_of(page)
    gaps = [mean(same[name].values()) - mean(test[name].values()) for name in test]
    assert f"is {min(gaps):.1f} to {max(gaps):.1f} points below that on" in text_of(page)
    gain = interval(difference(same["letKD-2"], same["labels only"]))
    assert f"letKD-2 gains {gain} over labels only" in text_of(page)
    pair = same["letKD-2"], same["FitNet"]
    middle, low, high = (f"{x:.1f}" for x in difference(*pair))
    assert f"not separated from FitNet ({middle} points, {low} to {high})" in text_of(page)
    assert verdict(*pair) == 0


def test_what_the_search_with_5000_images_found():
    found, many = {"letKD-2": {}, "FitNet": {}}, {}
    runs = lines("results/cifar10-5000.tuning.jsonl")
    for run in runs:
        recipe, accuracy = run["recipe"], run["validation_accuracy"]
        if run["method"] == "FitNet":
            found["FitNet"][recipe["losses"][0]["weight"]] = accuracy
        elif recipe["layers"][1]["templates"] == 128:
            found["letKD-2"][recipe["layer_weight"]] = accuracy
        else:
            assert recipe["layers"][1]["templates"] == 512
            many[recipe["layer_weight"], recipe["layers"][1]["temperature"]] = accuracy
    assert len(runs) == 6 + 4
    best = {method: max(values, key=values.get) for method, values in found.items()}
    assert best == {"letKD-2": 1.0, "FitNet": 3.0}
    assert "was 10 for 500 images, and 1 for [5,000]" in text_of("letkd.md")
    shown = [sorted(found[name].items(), reverse=True) for name in ("letKD-2", "FitNet")]
    page = text_of("results-cifar10-5000.md")
    for (*first, last), method in zip(shown, ("letKD-2 has", "give"), strict=True):
        values = ", ".join(f"{accuracy}" for _, accuracy in first)
        assert f"{method} {values} and {last[1]} %" in page
    assert f"512 templates with sharpness 1 give {many[10.0, 1.0]} %" in page
    assert f"512 templates with sharpness 0.1 give {many[1.0, 0.1]} %" in page
    assert many[1.0, 0.1] < found["letKD-2"][1.0]
    assert "six settings of letKD-2 and four of FitNet were compared" in page
    for accuracy in (*found["letKD-2"].values(), *found["FitNet"].values()):
        assert 1.2 < (accuracy * (100 - accuracy) / 1000) ** 0.5 < 1.4
