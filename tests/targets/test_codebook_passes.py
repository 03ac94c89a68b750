"""How often the data are read: once if the sample is large, and the centres are as good."""

import pytest
import torch
from sklearn.cluster import KMeans

from kdlayers import CodebookTargets
from kdlayers._targets import codebook_fit
from kdlayers._targets.fitter import fit_rows


@pytest.mark.parametrize(("rows_a_centre", "passes"), [(255, 2), (256, 1)])
def test_a_large_sample_needs_no_second_pass(rows_a_centre, passes, monkeypatch):
    monkeypatch.setattr(codebook_fit, "ROWS_PER_CENTER", rows_a_centre)
    monkeypatch.setattr(codebook_fit, "SMALL_SAMPLE", 0)
    features = torch.randn(20000, 6)
    targets = CodebookTargets(40)
    parts = [(part, None) for part in features.split(1000)]
    assert fit_rows(targets.fitter(), parts) == passes
    inertia = torch.cdist(features, targets.centers).square().amin(1).mean()
    full = KMeans(40, n_init=1, random_state=0).fit(features.numpy()).inertia_ / len(features)
    assert inertia < 1.02 * full
    assert targets.inertia == pytest.approx(float(inertia), rel=0.04)
    assert targets.counts.sum() == (20000 if passes == 2 else 40 * rows_a_centre)
