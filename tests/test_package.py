"""The installed package: three requirements, types, a light import, and nothing else."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import kdlayers

LIGHT = """
import sys
import torch
before = set(sys.modules)
import kdlayers
heavy = {"torchvision", "timm", "sklearn", "scipy", "matplotlib", "tqdm", "onnx", "numpy"}
heavy |= {"torch._dynamo", "torch.distributed.tensor"}
print(sorted(heavy & (set(sys.modules) - before)))
"""


@pytest.fixture
def installed():
    try:
        return metadata.distribution("kdlayers")
    except metadata.PackageNotFoundError:
        assert "KDLAYERS_WHEEL" not in os.environ
        pytest.skip("kdlayers is imported without being installed: pip install '.[dev]'")


def test_only_three_requirements_at_run_time(installed):
    found = installed.requires
    plain = [re.split(r"[<>=!~ ;\[]", text)[0] for text in found if "extra ==" not in text]
    assert sorted(plain) == ["torch", "torchvision", "typing-extensions"]


def test_extras(installed):
    extras = installed.metadata.get_all("Provides-Extra")
    assert {"dev", "docs", "examples"} <= set(extras)


def test_version_is_the_installed_one(installed):
    assert installed.version == kdlayers.__version__


def test_ships_its_types():
    assert (Path(kdlayers.__file__).parent / "py.typed").exists()


def test_ships_its_licence(installed):
    assert installed.metadata["License-Expression"] == "Apache-2.0"
    text = next(file for file in installed.files if file.name == "LICENSE")
    assert "Apache License" in text.read_text()


def test_import_is_light(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIGHT],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif("KDLAYERS_WHEEL" not in os.environ, reason="only where a wheel was installed")
def test_it_is_the_wheel_that_is_tested(installed):
    assert "site-packages" in kdlayers.__file__
    assert ".whl" in installed.read_text("direct_url.json")


def test_every_error_is_also_one_of_pythons():
    kinds = [getattr(kdlayers.errors, name) for name in kdlayers.errors.__all__]
    kinds = [kind for kind in kinds if kind is not kdlayers.errors.KDLayersError]
    for kind in kinds:
        if not issubclass(kind, Warning):
            assert issubclass(kind, kdlayers.errors.KDLayersError)
            assert issubclass(kind, (ValueError, RuntimeError, TypeError)), kind
