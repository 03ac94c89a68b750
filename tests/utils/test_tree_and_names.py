"""Trees of tensors, and names of modules."""

from collections import OrderedDict, namedtuple

import pytest
import torch

from kdlayers._models.names import match
from kdlayers._utils.tree import first_tensor, leaves, main_tensor, pick, put
from kdlayers.errors import NoMatchError
from tests.nets import Net

Out = namedtuple("Out", ["logits", "aux"])


def test_trees_keep_their_types_and_their_other_branches():
    a, b, c = torch.zeros(2, 1), torch.ones(2, 5), torch.ones(2, 3, dtype=torch.long)
    tree = Out({"x": [a, (b, c)]}, OrderedDict(y=None))
    assert [path for path, _ in leaves(tree)] == [(0, "x", 0), (0, "x", 1, 0), (0, "x", 1, 1)]
    path, tensor = main_tensor(tree)
    assert tensor is b
    assert pick(tree, path) is b
    changed = put(tree, path, a)
    assert isinstance(changed, Out)
    assert isinstance(changed.aux, OrderedDict)
    assert pick(changed, path) is a
    assert pick(tree, path) is b
    assert first_tensor(tree) is a
    assert first_tensor({"n": 3}) is None
    assert main_tensor([c]) is None


def test_names_are_matched_part_by_part():
    names = ["layer1", "layer1.0", "layer1.1", "layer2", "layer2.0", "head"]
    assert match("layer*", names, Net(), "student") == ["layer1", "layer2"]
    assert match("layer?.0", names, Net(), "student") == ["layer1.0", "layer2.0"]
    assert match("*", names, Net(), "student") == ["layer1", "layer2", "head"]
    with pytest.raises(NoMatchError, match=r"nearest names: 'layer2'"):
        match("layer3", ["layer2", "head"], Net(), "student")
    with pytest.raises(NoMatchError, match=r"names: 'stem', 'head'; find_points\(teacher\)"):
        match("stage*", ["stem", "stem.norm", "head"], Net(), "teacher")


def test_without_a_near_name_stages_are_listed():
    few = [f"{top}{rest}" for top in ("a", "b", "c") for rest in ("", ".0", ".0.conv", ".1")]
    one = ["stem", "stem.act", "x", "x.0", "x.0.0", "x.0.0.conv", "x.1", "x.1.0", "x.1.0.conv"]
    for names, listed in ((few, "'a', 'b', 'c'"), (one, "'x', 'x.0', 'x.1'")):
        with pytest.raises(NoMatchError, match=f"nearest names: {listed}; find"):
            match("stage*", names, Net(), "student")
