"""A small data set of the micro world and the shipped backbone, made once for all tests."""

import os
from importlib.util import find_spec
from pathlib import Path

# Weights are compared to the bit, here and in processes that tests start: sums in one order.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
from transformers import AutoProcessor

from storm_vlm.data.row import Row, read_rows
from storm_vlm.lab.checkpoints import shipped
from storm_vlm.lab.world.clips import build_world

# `make test-vllm` runs them, where vLLM is.
collect_ignore = [] if find_spec("vllm") else ["test_vllm_engine.py", "test_vllm_server.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "MODULE:FUNCTION that saves a tiny backbone of yours to a folder; test_backbones.py tries that one alone"
    parser.addoption("--backbone", help=text)


@pytest.fixture(scope="session")
def reasoning_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"), "reasoning", "train", 12)


@pytest.fixture(scope="session")
def reasoning_rows(reasoning_file: Path) -> list[Row]:
    return read_rows(reasoning_file)


@pytest.fixture(scope="session")
def backbone() -> str:
    return str(shipped("backbone"))


@pytest.fixture(scope="module")
def processor(backbone: str):
    return AutoProcessor.from_pretrained(backbone)
