"""All of torchvision's models and every family of timm; run with ``pytest -m zoo``."""

import pytest

from tests.zoo import STAGES, check, everything

REFUSED = {"timm hiera": "not in raster order"}


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", everything())
def test_model(name):
    result = check(*everything()[name])
    refused = next((why for start, why in REFUSED.items() if name.startswith(start)), None)
    if refused is None:
        assert {stage: result[stage] for stage in STAGES} == dict.fromkeys(STAGES, "pass")
    else:
        assert refused in str(result)
