"""Values computed beforehand, in float64, by an independent script."""

import pytest
import torch

from kdlayers import functional as kdf

T = 4.0
Y = torch.tensor([0, 1, 2])
STUDENT = [[2.0, -1.0, 0.5, 0.0], [0.3, 1.2, -0.7, 2.0], [-1.0, 0.0, 4.0, 1.0]]
TEACHER = [[6.0, 1.0, -2.0, 0.0], [-1.0, 5.0, 2.0, 3.0], [3.0, 0.0, 1.0, -4.0]]

PER_SAMPLE = {
    "kd": [0.1633260836, 0.0942436012, 0.3380323519],
    "tckd": [0.1247699283, 0.0585044390, 0.0848780235],
    "nckd": [0.0983358983, 0.0631880184, 0.3464306085],
    "chi2": [0.1679504689, 0.0930094929, 0.0858812290],
    "is": [0.1618553964, 0.1233096081, 0.1301479878],
    "ratio": [1.6816027570, 1.5819985795, 0.5726266600],
}
MEAN_TIMES_T2 = {
    "kd": 3.1765441958,
    "tckd": 1.4301460845,
    "nckd": 2.7090908009,
    "chi2": 1.8498196848,
}
TARGET_SLOPE = {
    "chi2": [-0.1054725478, -0.0748316612, 0.0418569650],
    "ratio_sq": [-0.1631775757, -0.1246291522, -0.0204210375],
    "ratio": [-0.2684222559, -0.2868997199, -0.0758442814],
    "is": [-0.1087993873, -0.1055470160, 0.0566055095],
}
# The values above have ten decimals, so they are exact to half of the last one.
CLOSE = {"rtol": 0, "atol": 1e-10}


def logits(requires_grad=False):
    student = torch.tensor(STUDENT, dtype=torch.float64, requires_grad=requires_grad)
    return student, torch.tensor(TEACHER, dtype=torch.float64)


def term(name, student, teacher, **options):
    if name == "kd":
        return kdf.kd(student, teacher, **options)
    if name in ("tckd", "nckd"):
        return getattr(kdf, name)(student, teacher, Y, **options)
    return kdf.aekt(student, teacher, Y, form=name, **options)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_per_sample_values_without_the_squared_temperature(name):
    values = term(name, *logits(), temperature=T, reduction="none") / T**2
    expected = torch.tensor(PER_SAMPLE[name], dtype=torch.float64)
    torch.testing.assert_close(values, expected, **CLOSE)


@pytest.mark.parametrize("name", MEAN_TIMES_T2)
def test_batch_means_with_the_squared_temperature(name):
    assert term(name, *logits()).item() == pytest.approx(MEAN_TIMES_T2[name], rel=0, abs=1e-9)


@pytest.mark.parametrize("name", TARGET_SLOPE)
def test_slope_of_the_adaptive_term_in_the_target_logit(name):
    student, teacher = logits(requires_grad=True)
    (term(name, student, teacher, reduction="none") / T**2).sum().backward()
    expected = torch.tensor(TARGET_SLOPE[name], dtype=torch.float64)
    torch.testing.assert_close(student.grad[range(3), Y], expected, **CLOSE)


def test_decoupled_terms_add_up_with_their_weights():
    expected = 0.5 * MEAN_TIMES_T2["tckd"] + 3.0 * MEAN_TIMES_T2["nckd"]
    value = kdf.dkd(*logits(), Y, alpha=0.5, beta=3.0)
    assert value.item() == pytest.approx(expected, abs=1e-9)


def test_saturated_target_term_where_a_naive_one_is_infinite():
    student = torch.tensor([[150.0, 0.0, 0.0, 0.0, 0.0]])
    teacher = torch.zeros(1, 5)
    value = kdf.tckd(student, teacher, torch.tensor([0]), temperature=1.0)
    # log(1 - s) = log 4 - 150 = -148.61...; the teacher's target probability is 1/5.
    log_rest = torch.tensor(4.0).log().item() - 150
    expected = 0.2 * (torch.tensor(0.2).log().item() - 0.0) + 0.8 * (
        torch.tensor(0.8).log().item() - log_rest
    )
    assert value.item() == pytest.approx(expected, rel=1e-6)
