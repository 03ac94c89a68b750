"""Trees of tensors, and names of modules."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass

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
    path, tensor = main_tensor(tree[0])
    assert tensor is b
    assert pick(tree[0], path) is b
    changed = put(tree, (0, *path), a)
    assert isinstance(changed, Out)
    assert isinstance(changed.aux, OrderedDict)
    assert pick(changed, (0, *path)) is a
    assert pick(tree, (0, *path)) is b
    assert first_tensor(tree) is a
    assert first_tensor({"n": 3}) is None
    assert main_tensor([c]) is None


@dataclass
class Fields(OrderedDict):
    """As the outputs of Hugging Face's models."""


def test_the_features_are_the_first_value_or_the_largest_of_a_dict():
    tokens, attention, vector = torch.zeros(2, 9, 4), torch.zeros(2, 3, 9, 9), torch.zeros(2, 400)
    for several in ((tokens, attention), [vector, tokens, attention], Out(tokens, (attention,))):
        assert main_tensor(several)[1] is tokens
    assert main_tensor((vector, vector.long(), torch.zeros(2, 999)))[1] is vector
    maps = OrderedDict(aux=tokens, out=attention, pooled=vector)
    assert main_tensor(maps) == (("out",), attention)
    assert main_tensor((9, 3)) is None
    fields = Fields()
    fields.update(last_hidden_state=tokens, pooler_output=vector, attentions=(attention,))
    assert main_tensor(fields)[1] is tokens


def test_the_features_have_the_batch_where_any_value_has_it():
    pixels, patches = torch.zeros(18, 16, 4), torch.zeros(2, 10, 4)
    assert main_tensor((pixels, patches), 2)[1] is patches
    assert main_tensor((pixels, patches))[1] is pixels
    assert main_tensor((pixels,), 2)[1] is pixels
    sequence_first, attention = torch.zeros(9, 2, 4), torch.zeros(2, 9, 9)
    assert main_tensor((sequence_first, attention), 2)[1] is sequence_first


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
