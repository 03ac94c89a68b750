"""Both stages of IE-KD against a direct implementation, on tiny networks in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kdlayers.losses import InheritExploreLoss

CLASSES, STUDENT, TEACHER, FACTOR = 3, 6, 5, 3


def network(channels, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = nn.Sequential(nn.Conv2d(2, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU())
        return nn.ModuleList([trunk, nn.Linear(channels, CLASSES)]).double()


def data(batches=4):
    draw = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(6, 2, 8, 8, generator=draw, dtype=torch.float64),
            torch.randint(CLASSES, (6,), generator=draw),
        )
        for _ in range(batches)
    ]


def plain_coder(cin, cout, draw=None):
    layers = [nn.LeakyReLU(0.1)]
    for a, b in ((cin, cin), (cin, cout), (cout, cout)):
        conv = nn.Conv2d(a, b, 3, padding=1, bias=False)
        if draw is not None:
            conv.weight.data = torch.randn(b, a, 3, 3, generator=draw) * (2 / (9 * b)) ** 0.5
        layers += [conv, nn.BatchNorm2d(b), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers).double()


def plain_sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4, nesterov=True)


def plain_auto_encoder(maps, epochs, power, seed):
    draw = torch.Generator().manual_seed(seed)
    encoder, decoder = plain_coder(TEACHER, FACTOR, draw), plain_coder(FACTOR, TEACHER, draw)
    optimiser = plain_sgd([*encoder.parameters(), *decoder.parameters()], 0.1)
    for _ in range(epochs):
        for f in maps:
            optimiser.zero_grad()
            error = (decoder(encoder(f)) - f).abs() ** power
            error.mean().backward()
            optimiser.step()
    return encoder, decoder


def plain_distance(x, y):
    x, y = (z / z.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for z in (x, y))
    return (x - y).abs().sum() / x.numel()


@pytest.mark.parametrize(("reconstruction", "power"), [("l1", 1), ("l2", 2)])
def test_the_auto_encoder_is_trained_like_the_reference(reconstruction, power):
    teacher = network(TEACHER, seed=0).eval()
    with torch.no_grad():
        maps = [teacher[0](x) for x, _ in data()]
    loss = InheritExploreLoss(factor_channels=FACTOR, epochs=3, reconstruction=reconstruction)
    loss.fit([(f, None) for f in maps], seed=11)
    encoder, decoder = plain_auto_encoder(maps, 3, power, seed=11)
    for ours, plain in ((loss.auto_encoder.encoder, encoder), (loss.auto_encoder.decoder, decoder)):
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-9)


def test_the_student_trains_like_the_reference_over_several_steps():
    teacher, student = network(TEACHER, seed=0).eval(), network(STUDENT, seed=1)
    with torch.no_grad():
        maps = [teacher[0](x) for x, _ in data()]
    loss = InheritExploreLoss(epochs=2)
    loss.build(student[0](data()[0][0]).detach(), maps[0])
    loss.fit([(f, None) for f in maps])
    encoder = plain_auto_encoder(maps, 2, 1, seed=0)[0].eval()
    twin, inherit, explore = (plain_coder(STUDENT // 2, FACTOR) for _ in range(3))
    twin = copy.deepcopy(student)
    inherit.load_state_dict(loss.inherit_encoder.state_dict())
    explore.load_state_dict(loss.explore_encoder.state_dict())

    ours = plain_sgd([*student.parameters(), *loss.parameters()], 0.1)
    plain = plain_sgd([*twin.parameters(), *inherit.parameters(), *explore.parameters()], 0.1)
    for x, y in data(6):
        ours.zero_grad()
        f = student[0](x)
        total = F.cross_entropy(student[1](f.mean((2, 3))), y) + loss(f, teacher[0](x), y)
        total.backward()
        ours.step()

        plain.zero_grad()
        g, target = twin[0](x), encoder(teacher[0](x))
        near = plain_distance(inherit(g[:, : STUDENT // 2]), target)
        far = plain_distance(explore(g[:, STUDENT // 2 :]), target)
        wanted = F.cross_entropy(twin[1](g.mean((2, 3))), y) + 50 * near - 50 * far
        wanted.backward()
        plain.step()
        torch.testing.assert_close(total, wanted, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss.metrics()["inheritance"], near.detach())
        torch.testing.assert_close(loss.metrics()["exploration"], -far.detach())
    for (name, p), q in zip(student.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8, msg=name)


def test_training_brings_one_part_closer_and_the_other_farther():
    teacher, student = network(TEACHER, seed=0).eval(), network(STUDENT, seed=1)
    with torch.no_grad():
        maps = [teacher[0](x) for x, _ in data()]
    loss = InheritExploreLoss(epochs=5)
    loss.build(student[0](data()[0][0]).detach(), maps[0])
    loss.fit([(f, None) for f in maps])
    optimiser = plain_sgd([*student.parameters(), *loss.parameters()], 0.02)
    seen = []
    for _ in range(15):
        for (x, _), f in zip(data(), maps, strict=True):
            optimiser.zero_grad()
            loss(student[0](x), f).backward()
            optimiser.step()
        seen.append(loss.metrics())
    assert seen[-1]["inheritance"] < 0.8 * seen[0]["inheritance"]
    assert seen[-1]["exploration"] < seen[0]["exploration"]
