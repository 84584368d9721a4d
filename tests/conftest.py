"""Settings, and fixtures that tests share. The one place besides the package that touches sys.path: see below."""

import logging
import os
import sys
from pathlib import Path

# `python -m pytest` puts the working directory first on sys.path. In a checkout our kernels/ would then answer to the
# name of Hugging Face's `kernels`, which transformers looks for. Nothing is lost: the tests use the installed package.
_ROOT = Path(__file__).parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]

# Read when torch and huggingface_hub are imported, hence up here.
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a network
if "PYTEST_XDIST_WORKER" in os.environ:  # the workers fill the cores; more threads would only spin against each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest
import torch

from dmoe_compile.context import current

hypothesis.settings.register_profile("every change", deadline=None, derandomize=True)  # a first example may compile
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1000, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nightly", action="store_true", help="also run the tests marked nightly")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("nightly" if config.getoption("--nightly") else "every change")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "rewrite":
            item.add_marker("rewrite")
    if config.getoption("--nightly"):
        return
    for item in items:
        if item.get_closest_marker("nightly"):
            item.add_marker(pytest.mark.skip(reason="runs only with --nightly"))


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """One seed, no decoding context, and no compiled code from the test before: Dynamo counts it as a recompile."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    assert current() is None
    yield
    assert current() is None


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def uncached():
    """What a pass or a hook saw is under test: a cached result would show nothing."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config as inductor_config

    with inductor_config.patch(fx_graph_cache=False), functorch_config.patch(enable_autograd_cache=False):
        yield


@pytest.fixture(scope="module")
def aten():
    """Inductor calls ATen and generates no C++: for files whose point is not its code, which takes most of the time."""
    from torch._inductor import config as inductor_config

    with inductor_config.patch(fallback_by_default=True):
        yield


@pytest.fixture
def nan_memory():
    """Memory that nobody wrote is NaN: torch.empty fills it while only deterministic algorithms may be used."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def warnings(caplog):
    """What the package warned of so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "dmoe" in r.name]


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a checkpoint like the demonstration model, which has learned nothing, with its tokenizer."""
    from transformers import Qwen3MoeForCausalLM

    from dmoe_compile import training

    folder, words = tmp_path_factory.mktemp("untrained"), training.tokenizer()
    torch.manual_seed(0)
    training.save(Qwen3MoeForCausalLM(training.model_config(words)), words, folder)
    return str(folder)
