"""Streaming discriminant analysis against scikit-learn's on all rows at once."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from kdlayers._targets.lda import Scatter, check_range, discriminants
from kdlayers.errors import FitError


def stream(features, labels, batch, classes=None):
    scatter = Scatter(classes)
    for x, y in zip(features.split(batch), labels.split(batch), strict=True):
        scatter.add(x, y)
    scatter.reduce()
    return discriminants(scatter)


def within(z, labels):
    """Covariance within classes with divisor N - C, of numpy rows."""
    classes = np.unique(labels)
    centred = np.concatenate([z[labels == c] - z[labels == c].mean(0) for c in classes])
    return centred.T @ centred / (len(z) - len(classes))


def expected(features, labels):
    """scikit-learn's transform, scaled to a covariance within classes of 1.

    Its releases differ in the divisor of that covariance: N - C in some, N in others.
    """
    x, y = features.double().numpy(), labels.numpy()
    z = LinearDiscriminantAnalysis(solver="svd").fit(x, y).transform(x)
    factor = np.sqrt(np.trace(within(z, y)) / z.shape[1])
    n, c = len(x), len(np.unique(y))
    assert (
        np.isclose(factor, 1)
        or np.isclose(factor, np.sqrt((n - c) / n))
        or np.isclose(factor, np.sqrt(n / (n - c)))
    )
    return z / factor


def agree(features, labels, batch=64, tolerance=1e-6):
    directions, offsets = stream(features, labels, batch)
    z = (features.double() @ directions.T + offsets).numpy()
    reference = expected(features, labels)
    assert z.shape == reference.shape
    signs = np.sign((z * reference).sum(0))
    np.testing.assert_allclose(z * signs, reference, rtol=tolerance, atol=tolerance)
    return directions, z


def data(n=300, width=10, classes=4, dtype=torch.float64):
    labels = torch.arange(n) % classes
    means = torch.randn(classes, width, dtype=dtype)
    mixing = torch.randn(width, width, dtype=dtype)
    return means[labels] + torch.randn(n, width, dtype=dtype) @ mixing, labels


@pytest.mark.parametrize("batch", [300, 64, 7, 1])
def test_random_features_in_batches_of_any_size(batch):
    features, labels = data()
    _, z = agree(features, labels, batch)
    np.testing.assert_allclose(within(z, labels.numpy()), np.eye(3), atol=1e-8)


def test_float32_features():
    features, labels = data(dtype=torch.float32)
    agree(features, labels)


def test_unbalanced_classes_in_order():
    features, labels = data()
    labels = torch.cat([torch.zeros(250), torch.ones(30), torch.full((20,), 2)]).long()
    agree(features + labels.unsqueeze(1), labels)


def test_more_classes_than_channels():
    features, labels = data(n=600, width=5, classes=12)
    directions, _ = agree(features, labels)
    assert len(directions) == 5


def test_two_classes():
    features, labels = data(classes=2)
    directions, _ = agree(features, labels)
    assert len(directions) == 1


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_rank_deficient_features(rank):
    features, labels = data(width=rank)
    features = features @ torch.randn(rank, 10, dtype=torch.float64)
    directions, _ = agree(features, labels, tolerance=1e-5)
    assert len(directions) == min(rank, 3)


@pytest.mark.parametrize("n", [44, 48, 53])
def test_about_as_many_rows_as_channels(n):
    features, labels = data(n=n, width=45)
    agree(features, labels, tolerance=1e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 12345.678])
def test_constant_columns(value):
    features, labels = data()
    constant = features.clone()
    constant[:, [2, 5]] = value
    directions, offsets = stream(constant, labels, 64)
    assert (directions[:, [2, 5]] == 0).all()
    # scikit-learn takes the rounding error of a mean such as that of 0.1s for data; zeros are safe.
    safe = constant.clone()
    safe[:, [2, 5]] = 0.0
    z = (constant @ directions.T + offsets).numpy()
    reference = expected(safe, labels)
    signs = np.sign((z * reference).sum(0))
    np.testing.assert_allclose(z * signs, reference, atol=1e-6)


def test_column_constant_within_each_class_is_left_out():
    features, labels = data()
    features[:, 4] = labels * 3.0 + 1
    directions, _ = agree(features, labels)
    assert (directions[:, 4] == 0).all()


def test_large_offsets_and_scales_cancel():
    features, labels = data()
    scale = 10.0 ** torch.arange(-4, 6, dtype=torch.float64)
    agree((features + 1000.0) * scale, labels, tolerance=1e-5)


def test_an_outlier_in_the_first_row_is_harmless():
    features, labels = data()
    features[0] += 1e6
    agree(features, labels, tolerance=1e-5)


def test_largest_entry_of_a_direction_is_positive():
    features, labels = data()
    directions, _ = stream(features, labels, 64)
    mirrored, _ = stream(-features, labels, 64)
    for direction in directions:
        assert direction[direction.abs().argmax()] > 0
    torch.testing.assert_close(mirrored, directions)


def test_classes_that_appear_late_are_counted():
    features, labels = data()
    order = labels.argsort(stable=True)
    torch.testing.assert_close(
        stream(features[order], labels[order], 16), stream(features, labels, 300)
    )


def test_equal_class_means_are_an_error():
    features = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    with pytest.raises(FitError, match="no direction separates the classes"):
        stream(features, torch.tensor([0, 0, 1, 1]), 4)


def test_features_that_do_not_vary_are_an_error():
    with pytest.raises(FitError, match="do not vary within any class"):
        stream(torch.ones(6, 2), torch.tensor([0, 0, 0, 1, 1, 1]), 4)


@pytest.mark.parametrize(("labels", "classes"), [([0, 5], 5), ([-1, 2], 5), ([-1, 2], None)])
def test_labels_out_of_range_are_an_error(labels, classes):
    with pytest.raises(FitError, match=r"labels must be .* got labels from -?\d to \d"):
        check_range(torch.tensor(labels), classes)
