"""What kdlayers.viz computes: against loops, planted templates, and wrong input."""

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kdlayers import (
    DecisionTargets,
    KDLayer,
    KDPoint,
    attach_kd,
    bake,
    fold,
    load_student,
    prune_templates,
    save_student,
    viz,
)
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    AttachError,
    FitError,
    LayoutError,
    NoMatchError,
    ShapeError,
)
from tests.nets import Net, batch


class Colors(nn.Module):
    """Its features are the image's colours, in each of the layouts."""

    def __init__(self, layout="NCHW", prefix=0):
        super().__init__()
        self.layout, self.num_prefix_tokens = layout, prefix
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.mix = Mix(layout, prefix)
        self.head = nn.Linear(3, 2)
        nn.init.eye_(self.conv.weight.data.view(3, 3))

    def forward(self, x):
        x = self.mix(self.conv(x))
        x = x.movedim(1, -1) if self.layout == "NCHW" else x
        return self.head(x.flatten(1, -2).mean(1))


class Mix(nn.Module):
    def __init__(self, layout, prefix):
        super().__init__()
        self.layout, self.prefix = layout, prefix
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        x = x * self.weight
        if self.layout == "NHWC":
            return x.movedim(1, -1)
        if self.layout == "tokens":
            tokens = x.flatten(2).movedim(1, -1)
            return torch.cat([torch.full_like(tokens[:, : self.prefix], 0.5), tokens], 1)
        return x


def planted(layout="NCHW", prefix=0, height=4, width=6):
    """A student whose templates are red, green, blue and their sum, and images of pure colours."""
    model = Colors(layout, prefix).eval()
    example = torch.rand(2, 3, *((height, width) if layout == "tokens" else (6, 6)))
    kd = attach_kd(model, at=[KDPoint("mix", num_templates=4)], example=example)
    kd.detach()
    _, layer = viz._watch.find_layer(model, "mix")
    with torch.no_grad():
        layer.head.weight.copy_(torch.cat([torch.eye(3), torch.ones(1, 3)]))
        layer.norm.bias.fill_(-1.5)  # fires where the cosine times 3 is above 1.5
    known = torch.randint(-1, 4, (2, height, width))
    colors = torch.cat([torch.eye(3), torch.ones(1, 3), torch.zeros(1, 3)])
    return model, colors[known].movedim(-1, 1), known


@pytest.fixture(scope="module")
def net():
    """A small student with layers at two points and settled batch norms."""
    torch.manual_seed(0)
    student = Net(4)
    points = [KDPoint("first", num_templates=7), KDPoint("last", num_templates=9)]
    kd = attach_kd(student, at=points, example=batch()[0])
    for seed in range(3):
        student.train()(batch(seed=seed)[0])
    kd.detach()
    return student.eval()


def view_of(scores, assignment, features=None):
    x = torch.randn(*scores.shape[:3], 5) if features is None else features
    return viz.LayerView("last", x, x + 1, scores, assignment)


# --- what a layer did -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "prefix"), [("NCHW", 0), ("NHWC", 0), ("tokens", 0), ("tokens", 2)]
)
def test_planted_templates_give_the_known_map(layout, prefix):
    model, images, known = planted(layout, prefix)
    view = viz.layer_view(model, images)
    assert torch.equal(view.before, images.movedim(1, -1))
    assert torch.equal(viz.match_map(view), known)
    scores = viz.match_map(view, by="scores")
    assert torch.equal(scores[known >= 0], known[known >= 0])
    assert scores.min() >= 0


@pytest.mark.parametrize(("layout", "prefix"), [("NCHW", 0), ("tokens", 1)])
def test_usage_is_the_known_map_counted(layout, prefix):
    model, images, known = planted(layout, prefix)
    usage = viz.template_usage(model, [(images[:1], torch.zeros(1)), (images[1:], torch.zeros(1))])
    assert usage.positions == known.numel()
    assert usage.best.tolist() == [(known == k).sum().item() for k in range(4)]


def test_usage_counts_regions_and_pruning_all_positions():
    model, images, _ = planted("tokens", 2)
    images.zero_()[:, 0, ::2] = 1  # red regions and black ones, beside grey prefix tokens
    _, layer = viz._watch.find_layer(model, "mix")
    layer.norm.bias.data.fill_(-2)  # the sum of the colours fires at grey, the colours do not
    assert viz.template_usage(model, [images]).silent.tolist() == [1, 2, 3]
    before = model(images)
    (pruned,) = prune_templates(model, [images])
    assert pruned.after == 3  # red, the sum, and one that stays in the place of green and blue
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("at", ["first", "last"])
def test_view_follows_the_equations(net, at):
    images, _ = batch(seed=7)
    view = viz.layer_view(net, images, at)
    _, layer = viz._watch.find_layer(net, at)
    w, v = layer.head.weight.double(), layer.value.weight.double()
    norm, tested = layer.norm, 0
    for b, i, j in product(*map(range, view.before.shape[:3])):
        x = view.before[b, i, j].double()
        scores = layer.head.scale.double() * torch.stack(
            [row @ x / (row.norm() * x.norm()).clamp_min(1e-12) for row in w]
        )
        gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        p = (gain * (scores - norm.running_mean.double()) + norm.bias.double()).clamp_min(0)
        torch.testing.assert_close(view.scores[b, i, j].double(), scores, rtol=0, atol=1e-5)
        torch.testing.assert_close(view.assignment[b, i, j].double(), p, rtol=0, atol=1e-4)
        if p.norm() > 1e-3:
            tested += 1
            value = [row @ p / (row.norm() * p.norm()) for row in v]
            after = x + layer.alpha * layer.value.scale.double() * torch.stack(value)
            torch.testing.assert_close(view.after[b, i, j].double(), after, rtol=0, atol=1e-4)
    assert tested > 5


def test_usage_counts_what_a_loop_counts(net, monkeypatch):
    loader = [batch(seed=1), batch(seed=2, size=3)]
    monkeypatch.setitem(viz._usage.chunks.__globals__["_ENTRIES"], "cpu", 7 * 10)  # ten rows
    usage = viz.template_usage(net, loader, "first")
    fires, best, positions = [0] * 7, [0] * 7, 0
    for images, _ in loader:
        for p in viz.layer_view(net, images, "first").assignment.flatten(0, -2).tolist():
            positions += 1
            for k, value in enumerate(p):
                fires[k] += value > 0
            if max(p) > 0:
                best[p.index(max(p))] += 1
    assert (usage.name, usage.positions) == ("first", positions)
    assert (usage.fires.tolist(), usage.best.tolist()) == (fires, best)
    assert usage.silent.tolist() == [k for k in range(7) if not fires[k]]


def test_the_student_is_unchanged(net):
    images, _ = batch()
    net.train()
    net.head.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.random.get_rng_state()
    hooks = [len(m._forward_hooks) for m in net.modules()]
    viz.layer_view(net, images, "last")
    viz.template_usage(net, [images], "last")
    assert net.training
    assert not net.head.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(m._forward_hooks) for m in net.modules()] == hooks
    net.eval()


def test_an_attached_student_can_be_looked_at_between_steps():
    student, (images, labels) = Net(4), batch()
    targets = DecisionTargets(subclasses=1, components=2)
    kd = attach_kd(student, Net(6), at=[KDPoint("last", targets=targets)], example=images)
    kd.fit([(images, labels)])
    logits = student(images)
    viz.layer_view(student, images)
    loss = kd.loss(labels)
    (logits.sum() + loss).backward()
    assert math.isfinite(loss.item())


def test_loaded_and_baked_students_show_the_same(net, tmp_path):
    images, _ = batch(seed=3)
    save_student(net, tmp_path / "student.pt")
    loaded = load_student(Net(4), tmp_path / "student.pt")
    baked = bake(net)
    ours = viz.layer_view(net, images, "last")
    names = [name for name, m in baked.named_modules() if isinstance(m, KDLayer)]
    assert len(names) == 2
    for model, name in ((loaded, "last"), (baked, names[1])):
        theirs = viz.layer_view(model, images, name)
        torch.testing.assert_close(theirs.after, ours.after)
        torch.testing.assert_close(theirs.assignment, ours.assignment)


@pytest.mark.parametrize("layout", ["NCHW", "tokens"])
def test_a_moving_average_is_looked_through(layout):
    model, images, known = planted(layout)
    averaged = AveragedModel(model)
    assert torch.equal(viz.match_map(viz.layer_view(averaged, images)), known)
    assert viz.template_usage(averaged, [images]).positions == known.numel()


def test_features_changed_in_place_later_are_those_of_the_layer():
    student = Net(4)
    student.last.append(nn.Identity())
    student.first[0] = nn.ReLU(inplace=True)  # works on what the layer at stem gives
    attach_kd(student, at=[KDPoint("stem", num_templates=5)], example=batch()[0]).detach()
    view = viz.layer_view(student, batch()[0])
    assert (view.before < 0).any()
    assert (view.after < 0).any()


class Strips(nn.Module):
    """Tokens of patches of 8 x 2 pixels, after a class token."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, (8, 2), (8, 2))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        nn.init.eye_(self.mix.weight)
        nn.init.zeros_(self.mix.bias)

    def forward(self, x):
        tokens = self.conv(x).flatten(2).mT
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        return self.head(self.mix(tokens).mean(1))


@pytest.mark.parametrize("outer", [lambda student: student, nn.Sequential])
@pytest.mark.parametrize("make", [lambda student: student, bake])
def test_tokens_are_on_the_grid_of_the_models_patches(make, outer):
    student, images = Strips(), torch.rand(3, 3, 16, 16)
    attach_kd(student, at=[KDPoint("mix", num_templates=5)], example=images).detach()
    found = make(student)
    view = viz.layer_view(outer(found), images)
    assert view.before.shape == (3, 2, 8, 4)
    torch.testing.assert_close(view.before, student.conv(images).movedim(1, -1))
    assert viz.template_usage(found, [images]).positions == 3 * 2 * 8


@pytest.mark.parametrize("width", [4, 2])
def test_vectors_are_a_grid_of_one_position(width):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, width), KDLayer(width, 6))
    view = viz.layer_view(model, torch.randn(3, 3, 2, 2))
    assert view.before.shape == (3, 1, 1, width)
    assert viz.match_map(view).shape == (3, 1, 1)
    assert [side.shape for side in viz.feature_colors(view)] == [(3, 3, 1, 1)] * 2


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 999))
def test_match_map_is_the_first_largest(batch_size, side, templates, seed):
    generator = torch.Generator().manual_seed(seed)
    p = torch.randint(0, 3, (batch_size, side, side + 1, templates), generator=generator).float()
    found = viz.match_map(view_of(p - 1, p)).flatten().tolist()
    for row, k in zip(p.flatten(0, -2).tolist(), found, strict=True):
        assert (k == -1) == (max(row) == 0)
        assert k == -1 or row[k] == max(row)


def test_norms_are_those_of_a_loop(net):
    view = viz.layer_view(net, batch()[0], "last")
    before, added = viz.norm_maps(view)
    for b, i, j in product(*map(range, before.shape)):
        x, y = view.before[b, i, j].tolist(), view.after[b, i, j].tolist()
        assert before[b, i, j].item() == pytest.approx(math.hypot(*x), abs=1e-5)
        difference = [v - u for u, v in zip(x, y, strict=True)]
        assert added[b, i, j].item() == pytest.approx(math.hypot(*difference), abs=1e-4)


def test_feature_colors_follow_scikit_learn(net):
    from sklearn.decomposition import PCA

    view = viz.layer_view(net, batch()[0], "last")
    sides = [x.flatten(0, -2).double().numpy() for x in (view.before, view.after)]
    centred = [side - side.mean(0) for side in sides]
    rows = torch.tensor([row.tolist() for side in centred for row in side]).numpy()
    theirs = PCA(3).fit_transform(rows)
    colors = torch.cat([c.movedim(1, -1).reshape(-1, 3) for c in viz.feature_colors(view)])
    for axis in range(3):
        inside = (colors[:, axis] > 0) & (colors[:, axis] < 1)
        pair = torch.stack([colors[inside, axis].double(), torch.tensor(theirs)[inside, axis]])
        assert abs(torch.corrcoef(pair)[0, 1]) > 0.9999
    assert colors.min() == 0
    assert colors.max() == 1


def test_features_that_do_not_vary_are_grey():
    x, p = torch.ones(2, 3, 3, 8), torch.ones(2, 3, 3, 2)
    before, after = viz.feature_colors(viz.LayerView("last", x, x + 1, p, p))
    assert torch.equal(before, torch.full_like(before, 0.5))
    assert torch.equal(before, after)


# --- wrong input ------------------------------------------------------------------------------


def test_wrong_layers_are_refused(net):
    images, _ = batch()
    with pytest.raises(AttachError, match="this Net has no KD layers; call attach_kd"):
        viz.layer_view(Net(4), images)
    with pytest.raises(AttachError, match="of a folded copy pass the student"):
        viz.template_usage(fold(net), [images])
    with pytest.raises(ArgumentError, match="KD layers at 'first', 'last'; choose one with at="):
        viz.layer_view(net, images)
    with pytest.raises(NoMatchError, match="no KD layer at 'stem'; this student has them at 'fi"):
        viz.template_usage(net, [images], "stem")


def test_a_layer_that_runs_twice_is_refused():
    layer = KDLayer(3, 4)
    with pytest.raises(AttachError, match="at '0' ran 2 times in one forward"):
        viz.layer_view(nn.Sequential(layer, nn.ReLU(), layer), torch.rand(2, 3, 4, 4))


def test_wrong_images_are_refused(net):
    with pytest.raises(
        ShapeError, match=r"must be \[B, channels, height, width\], got \(3, 8, 8\)"
    ):
        viz.layer_view(net, torch.rand(3, 8, 8), "last")
    with pytest.raises(ArgumentTypeError, match="images must be a tensor, got list"):
        viz.layer_view(net, [1, 2], "last")
    with pytest.raises(ArgumentError, match=r"^template_usage\(\) expects .* \[batch\['x'\] for"):
        viz.template_usage(net, [{"x": torch.zeros(2, 3, 8, 8)}], "last")
    with pytest.raises(ArgumentTypeError, match=r"template_usage\(loader\) takes"):
        viz.template_usage(net, 3, "last")
    with pytest.raises(FitError, match="template_usage\\(\\) was given an empty loader"):
        viz.template_usage(net, [], "last")


def test_features_that_form_no_grid_are_refused():
    tokens = nn.Sequential(nn.Flatten(2), KDLayer(3, 4))
    with pytest.raises(LayoutError, match=r"shape \(2, 3, 16\) with channels on axis 1; maps"):
        viz.layer_view(tokens, torch.rand(2, 3, 4, 4))
    windows = nn.Sequential(nn.Unflatten(0, (1, -1)), nn.Flatten(0, 1), Halves(), KDLayer(3, 4))
    with pytest.raises(LayoutError, match="there are 2 images: the first axis is not the batch"):
        viz.layer_view(windows, torch.rand(2, 3, 4, 4))


class Halves(nn.Module):
    def forward(self, x):
        return torch.cat(x.chunk(2, -1))


def test_an_invalid_matching_mode_is_an_error():
    with pytest.raises(ArgumentError, match=r"by must be .* got 'best'"):
        viz.match_map(view_of(*torch.ones(2, 1, 2, 2, 3)), by="best")
