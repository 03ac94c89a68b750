"""What the pages say of CIFAR-100."""

import pytest

from tests.measured.committed import (
    accuracies,
    check_pairs,
    difference,
    interval,
    lines,
    text_of,
    verdict,
)


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
    assert "without it, only the first difference is significant" in readme


def test_what_the_pages_say_of_letkd_alone_and_of_controls_on_cifar100():
    runs = accuracies("cifar100-10000")
    wider, free = "wider, same MACs + KD", "layers only (2) + KD"
    assert set(runs["letKD-2"]) == {0, 1, 2, 3, 4}
    assert set(runs[free]) == set(runs["QuEST"]) == {0, 1, 2, 3, 4}
    three = ("letKD-1", "layers only (2)", "FitNet", "labels only", "DKD")
    three += ("SKD + KD", "wider, same MACs", "wider, same parameters", "FitNet + KD")
    five = ("AT", "IE-KD", "AEKT chi2", "wider, same parameters + KD")
    assert all(set(runs[name]) == {0, 1, 2, 3, 4} for name in five)
    assert all(set(runs[name]) == {0, 1, 2} for name in three)
    pairs = {
        ("FitNet", "labels only"): (1,),
        ("FitNet", "KD"): (1, "letkd.md", "README.md"),
        ("FitNet", "letKD-2 + KD"): (1, "letkd.md", "README.md"),
        ("FitNet", "letKD-2"): (1,),
        ("letKD-2", "layers only (2)"): (1, "letkd.md"),
        ("layers only (2)", "labels only"): (0,),
        ("letKD-2", "KD"): (1, "letkd.md"),
        ("letKD-1", "KD"): (1, "letkd.md"),
        ("letKD-2", wider): (1,),
        ("letKD-2", "letKD-1"): (0, "letkd.md"),
        ("letKD-2 + KD", "letKD-2"): (1,),
        (free, "KD"): (1, "letkd.md"),
        ("letKD-2 + KD", "labels only"): (1,),
        ("letKD-1", "labels only"): (1,),
        ("letKD-2", "labels only"): (1,),
        ("KD", "labels only"): (1,),
        ("DKD", "KD"): (1, "README.md"),
        ("letKD-2 + KD", "DKD"): (0,),
        ("letKD-1", "DKD"): (0,),
        ("FitNet", "DKD"): (1,),
        ("FitNet", "FitNet + KD"): (0,),
        ("FitNet + KD", "KD"): (1,),
        ("FitNet + KD", "letKD-2 + KD"): (1,),
        ("AT", "KD"): (0,),
        ("DKD", "labels only"): (1,),
        ("AT", "labels only"): (1,),
        ("letKD-2 + KD", "AT"): (1,),
        ("letKD-1", "AT"): (1,),
        ("IE-KD", "labels only"): (1,),
        ("KD", "IE-KD"): (1,),
        ("letKD-1", "IE-KD"): (1,),
        ("KD", "SKD + KD"): (1,),
        ("letKD-1", "QuEST"): (0, "letkd.md"),
        ("QuEST", "labels only"): (1,),
        ("QuEST", "KD"): (1,),
        ("AEKT chi2", "KD"): (0,),
        ("DKD", "AEKT chi2"): (1,),
        ("wider, same parameters + KD", "KD"): (0,),
        ("letKD-2 + KD", "wider, same parameters + KD"): (1, "letkd.md"),
        ("letKD-2", "wider, same parameters + KD"): (0,),
        ("wider, same parameters", "labels only"): (0,),
        ("wider, same MACs", "labels only"): (1,),
        ("letKD-2", "wider, same parameters"): (1,),
        ("letKD-2", "wider, same MACs"): (1,),
    }
    check_pairs(runs, pairs, "results-cifar100-10000.md", r"{} points,? \(?{} to {}")
    for name in runs.keys() - {"FitNet", "FitNet + KD"}:  # better than those without it
        assert len(runs[name]) < 3 or verdict(runs["FitNet"], runs[name]) == 1, name
    page = text_of("results-cifar100-10000.md")
    gain = interval(difference(runs["letKD-2"], runs["KD"], without=[0]))
    assert f"the first gain is {gain}" in page
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
    found = lines("results/cifar100-10000.tuning.jsonl")
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
    sentence = f"letKD-2 alone has {ten:.1f} % with weight 10 and {one:.1f} % with weight 1"
    assert sentence in text


def test_what_aekts_gamma_does_on_cifar100():
    accuracy = {}
    for name in ("earlier", "tuning"):
        for run in lines(f"results/cifar100-10000.{name}.jsonl"):
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


def test_what_the_pages_say_of_recorded_views():
    runs = {4: accuracies("cifar100-10000")["KD"]}
    for line in lines("results/cifar100-10000.views.jsonl"):
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


def test_what_the_page_says_of_all_images():
    runs, page = accuracies("cifar100-all"), text_of("results-cifar100-all.md")
    seeds = {name: set(found) for name, found in runs.items()}
    # Write the page anew when there are more.
    two, one = ("labels only", "KD", "DKD"), ("letKD-1", "letKD-2", "layers only (2)")
    assert seeds == {name: {0, 1} for name in two} | {name: {0} for name in one}
    for name, other, sentence in (
        ("KD", "labels only", "KD is {} points above labels only"),
        ("DKD", "KD", "DKD is {} points above KD"),
        ("letKD-2", "KD", "letKD-2 is {} points above KD, and"),
        ("letKD-2", "labels only", "letKD-2 is {} points above labels only: the same layers"),
        ("layers only (2)", "labels only", "without supervision are {} points above it, and"),
        ("letKD-2", "layers only (2)", "letKD-2 is {} points above these"),
        ("KD", "letKD-1", "letKD-1 is {} points below it"),
    ):
        assert sentence.format(f"{runs[name][0] - runs[other][0]:.1f}") in page
    for name in two:
        assert "{} {:.2f} and {:.2f} %".format(name, *runs[name].values()) in page
    for name, other, where in (("KD", "labels only", "above"), ("DKD", "KD", "below")):
        gain = abs(runs[name][1] - runs[other][1])
        assert f"With seed 1 it is {gain:.1f} points {where} it" in page
    gain, lost = (abs(runs[name][0] - runs["KD"][0]) for name in ("letKD-2", "letKD-1"))
    tried = {
        run["recipe"]["layer_weight"]: run["validation_accuracy"]
        for run in lines("results/cifar100-all.tuning.jsonl")
    }
    assert tried.keys() == {1, 10}
    found, below = text_of("letkd.md"), f"{tried[10] - tried[1]:.1f} points below letKD-1 with"
    assert f"letKD-1 with a weight of 1 was {below} 10" in found
    assert f"letKD-1 with a weight of 1 is {below} a weight of 10" in page
    assert f"is {gain:.1f} points above KD, and letKD-1 is {lost:.1f} points below it" in found
    assert f"letKD-2 is only {gain:.1f} points above KD" in text_of("README.md")
    above = runs["letKD-2"][0] - runs["layers only (2)"][0]
    assert f"letKD-2 is {above:.1f} points above the same layers without supervision" in found
    few = accuracies("cifar100-10000")
    gains = (difference(few[name], few["KD"])[0] for name in ("letKD-2", "letKD-1"))
    assert "they are {:.1f} and {:.1f} points better than KD".format(*gains) in page
    trained = {
        run["method"]: run["training_accuracy"]
        for run in lines("results/cifar100-all.jsonl")
        if run["seed"] == 0
    }
    assert max(trained["letKD-1"], trained["letKD-2"]) < trained["labels only"]
    three = ("letKD-2", "KD", "labels only")
    early = "is {} with letKD-2, {} with KD and {} with labels only"
    assert early.format(*cross_entropies("cifar100-all", three, 12)) in page
    for stem, epoch in (("cifar100-all", 30), ("cifar100-10000", 20)):
        late = cross_entropies(stem, three, epoch)
        assert "in the last epoch it is {}, {} and {}.".format(*late) in page.replace("In", "in")


def cross_entropies(stem, methods, epoch):
    """The mean cross-entropy of the training images in an epoch, with the seed 0."""
    curves = {r["method"]: r["curve"] for r in lines(f"results/{stem}.jsonl") if r["seed"] == 0}
    assert all(len(curves[name]) >= epoch for name in methods)
    return [f"{curves[name][epoch - 1]['cross-entropy']:.2f}" for name in methods]


@pytest.mark.parametrize(
    ("stem", "name", "expected", "sentence"),
    [
        ("cifar100-10000", "DKD", 1, "{0} points ({1} to {2}) worse (see earlier recipes)"),
        ("cifar100-10000", "AEKT chi2", 0, "forms are not separated ({0} points, {1} to {2})"),
        ("fashion-mnist-6000-resnet20", "DKD", 0, "the two kinds of runs are not separated"),
        ("fashion-mnist-all-8", "DKD", 0, "and are not separated from the new ones"),
        ("fashion-mnist-all", "DKD", 0, "rose from 0 in the first of the three epochs"),
    ],
)
def test_what_a_weight_that_began_with_0_changed(stem, name, expected, sentence):
    now, before = accuracies(stem)[name], {}
    gamma = {"AEKT chi2": 0.1}.get(name)  # another gamma is an earlier recipe too
    for run in lines(f"results/{stem}.earlier.jsonl"):
        if run["method"] == name and run["recipe"]["losses"][0].get("gamma") == gamma:
            before[run["seed"]] = run["test_accuracy"]
            loss = run["recipe"]["losses"][0]
            assert "warmup" in loss  # the name of the ramp that begins with 0
            first = run.get("curve", [None])[0]
            assert not first or loss["warmup"] == 1 or first[f"{loss['loss']}.weighted"] == 0
    assert before.keys() == {0, 1, 2} <= now.keys()
    assert verdict(now, before) == expected
    numbers = (f"{number:.1f}" for number in difference(now, before))
    page = text_of(f"results-{stem}.md").replace("](#earlier-recipes)", "").replace("[", "")
    assert sentence.format(*numbers) in page
