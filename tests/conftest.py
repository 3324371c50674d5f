# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What holds for every test: no network, one thread, no progress bars; and the choices that most tests repeat."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402


# Models this small gain nothing from a second thread, and wait for it whenever the machine is busy.
torch.set_num_threads(1)
logging.disable_progress_bar()

# Random inputs: the same few in every run of the suite; with `--hypothesis-profile=thorough` many, new ones each time.
hypothesis.settings.register_profile("suite", max_examples=60, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", max_examples=500, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

# Rooms whose files share what takes longest to make: runs in two and four processes.
TOGETHER = {"distributed"}


def pytest_collection_modifyitems(config, items):
    """With `--dist loadgroup` a file stays with one worker, so that its fixtures are made once."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            room = item.path.parent.name
            item.add_marker(pytest.mark.xdist_group(room if room in TOGETHER else f"{room}/{item.path.stem}"))


@pytest.fixture(autouse=True)
def seeded():
    """No test sees how many random numbers the one before it drew."""
    torch.manual_seed(0)


@pytest.fixture(params=["gpt2", "bert"])
def family(request):
    return request.param


@pytest.fixture(params=["replace", "add"])
def combine(request):
    return request.param


@pytest.fixture(params=["discriminant", "sequence"])
def routing(request):
    return request.param


@pytest.fixture(params=[["ffn"], ["attention"], ["attention", "ffn"]], ids="+".join)
def modules(request):
    return request.param
