"""The formulas of relations, correlations and channels as loops over Python numbers."""

from .naive import divergence, mean, softmax, unit


def standardized(logits):
    middle = mean(logits)
    spread = (sum((z - middle) ** 2 for z in logits) / (len(logits) - 1)) ** 0.5
    return [(z - middle) / (spread + 1e-7) for z in logits]


def correlation(x, y):
    x, y = ([v - mean(z) for v in z] for z in (x, y))
    lengths = [sum(v * v for v in z) ** 0.5 for z in (x, y)]
    return sum(a * b for a, b in zip(x, y, strict=True)) / (lengths[0] * lengths[1] + 1e-8)


def dist(student, teacher, beta=1.0, gamma=1.0, temperature=1.0):
    ours, theirs = (
        [softmax(row, temperature) for row in logits.tolist()] for logits in (student, teacher)
    )
    inter = mean(correlation(a, b) for a, b in zip(ours, theirs, strict=True))
    columns = [list(zip(*rows, strict=True)) for rows in (ours, theirs)]
    intra = mean(correlation(a, b) for a, b in zip(*columns, strict=True))
    return temperature**2 * (beta * (1 - inter) + gamma * (1 - intra))


def huber(x):
    return x * x / 2 if abs(x) < 1 else abs(x) - 0.5


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def inner(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def rkd_distance(student, teacher):
    def relations(features):
        rows = features.flatten(1).tolist()
        table = [[inner(minus(a, b), minus(a, b)) ** 0.5 for b in rows] for a in rows]
        size = len(rows)
        middle = sum(map(sum, table)) / (size * (size - 1))
        return [value / middle for line in table for value in line]

    return mean(huber(a - b) for a, b in zip(relations(student), relations(teacher), strict=True))


def rkd_angle(student, teacher):
    def cosines(features):
        rows = features.flatten(1).tolist()
        return [
            inner(unit(minus(a, corner)), unit(minus(b, corner)))
            for corner in rows
            for a in rows
            for b in rows
        ]

    return mean(huber(a - b) for a, b in zip(cosines(student), cosines(teacher), strict=True))


def similarity_preserving(student, teacher):
    def similarities(features):
        rows = features.flatten(1).tolist()
        return [unit([inner(a, b) for b in rows]) for a in rows]

    ours, theirs = similarities(student), similarities(teacher)
    return mean(
        (a - b) ** 2 for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def channelwise(student, teacher, temperature=4.0):
    ours, theirs = (maps.flatten(0, 1).flatten(1).tolist() for maps in (student, teacher))
    return temperature**2 * mean(
        divergence(softmax(t, temperature), softmax(s, temperature))
        for s, t in zip(ours, theirs, strict=True)
    )


def pixels(student, teacher, temperature=4.0):
    """The divergence at every pixel of class maps, in the order image, row, column."""
    ours, theirs = (maps.movedim(1, -1).flatten(0, 2).tolist() for maps in (student, teacher))
    return [
        temperature**2 * divergence(softmax(t, temperature), softmax(s, temperature))
        for s, t in zip(ours, theirs, strict=True)
    ]
