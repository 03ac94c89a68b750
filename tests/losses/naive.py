"""The formulas as loops over Python numbers."""

from math import exp, log


def softmax(logits, temperature=1.0):
    top = max(logits)
    powers = [exp((z - top) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def divergence(p, q):
    return sum(a * log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def rows(student, teacher, targets, temperature):
    """For each sample: both class distributions and the label."""
    for zs, zt, y in zip(student.tolist(), teacher.tolist(), targets.tolist(), strict=True):
        yield softmax(zs, temperature), softmax(zt, temperature), y


def kd(student, teacher, targets, temperature=4.0):
    return temperature**2 * mean(
        divergence(pt, ps) for ps, pt, _ in rows(student, teacher, targets, temperature)
    )


def tckd(student, teacher, targets, temperature=4.0):
    return temperature**2 * mean(
        divergence([pt[y], 1 - pt[y]], [ps[y], 1 - ps[y]])
        for ps, pt, y in rows(student, teacher, targets, temperature)
    )


def nckd(student, teacher, targets, temperature=4.0):
    def without(p, y):
        return [value / (1 - p[y]) for index, value in enumerate(p) if index != y]

    return temperature**2 * mean(
        divergence(without(pt, y), without(ps, y))
        for ps, pt, y in rows(student, teacher, targets, temperature)
    )


ADAPTIVE = {
    "chi2": lambda s, a: (s - a) ** 2 / s,
    "ratio_sq": lambda s, a: a**2 / s,
    "ratio": lambda s, a: a / s,
    "is": lambda s, a: a / s - log(a / s) - 1,
}


def aekt(student, teacher, targets, form="chi2", temperature=4.0):
    return temperature**2 * mean(
        ADAPTIVE[form](ps[y], pt[y]) for ps, pt, y in rows(student, teacher, targets, temperature)
    )


def unit(values):
    length = sum(value**2 for value in values) ** 0.5
    return [value / max(length, 1e-12) for value in values]


def distance(ours, theirs, p):
    """Mean over batch and elements, one root for all."""
    differences = [
        abs(a - b) ** p
        for x, y in zip(ours, theirs, strict=True)
        for a, b in zip(unit(x), unit(y), strict=True)
    ]
    return mean(differences) ** (1 / p)


def cosines(ours, theirs):
    return [
        sum(a * b for a, b in zip(unit(x), unit(y), strict=True))
        for x, y in zip(ours, theirs, strict=True)
    ]


def energy(maps):
    """[B, C, H, W] to B rows of H * W: the mean over channels of the squares."""
    return [
        [mean(channel[h][w] ** 2 for channel in sample) for h in range(len(sample[0]))
         for w in range(len(sample[0][0]))]
        for sample in maps.tolist()
    ]  # fmt: skip
