"""What every test relies on: shapes checked at run time, its share of the cores, the same random cases each time.

`make test` runs two processes (pytest-xdist), which share the cores of a small machine: one thread each. A test that
is marked `alone` waits until nothing else runs, and has both. A file's tests stay in one process, and so do all tests
that look at pages: they share one browser.
"""

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

BROWSER = ["test_pages", "test_explorables", "test_pdf"]
LONGEST = [*BROWSER, "test_project", "test_faults", "test_pretrained", "test_hub", "test_training", "test_distributed",
           "test_commands", "test_files", "test_annotations", "test_exercises", "test_strangers", "test_values"]
SHARED = "PYTEST_XDIST_WORKER" in os.environ
if SHARED:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start; read when torch is imported

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from browser import CHROMIUM, Browser  # noqa: E402
from built import HTML, need  # noqa: E402
from inputs import FED  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

assert not any(name.startswith("detr_nb.") for name in sys.modules), "detr_nb was imported before the type checker"
install_import_hook("detr_nb", "beartype.beartype")

torch.set_num_threads(1 if SHARED else 2)

hypothesis.settings.register_profile("book", derandomize=True, deadline=None, max_examples=50, database=None)
hypothesis.settings.load_profile("book")


@contextmanager
def held(path: Path, how: int) -> Iterator[None]:
    """A lock on a file or folder, until the end of the block."""
    handle = os.open(path, os.O_RDONLY)
    fcntl.flock(handle, how)
    try:
        yield
    finally:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing alone would leave it to processes that were forked meanwhile
        os.close(handle)


@contextmanager
def turn(alone: bool) -> Iterator[None]:
    """A test's time in the room: beside others, or with nobody beside it.

    Who waits to be alone stands in the door, so that nobody else comes in before.
    """
    with ExitStack() as door:
        door.enter_context(held(Path(__file__), fcntl.LOCK_EX))
        with held(Path(__file__).parent, fcntl.LOCK_EX if alone else fcntl.LOCK_SH):
            if not alone:
                door.close()
            yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Wait for the turn of a test, fixtures included."""
    if not SHARED:
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with turn(alone):
        torch.set_num_threads(2 if alone else 1)
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that both processes end at nearly the same time.

    What every file feeds is noted before `-k` and `-m` choose among the tests.
    """
    fed: dict[str, set[str]] = {item.path.name: set() for item in items}
    for item in items:
        fed[item.path.name] |= {mark.args[0] for mark in item.iter_markers("fault")}
    config.stash[FED] = fed
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", help="a file for the outcome of every bad input that tests are marked with")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Note how the library took each bad input, one line of JSON for each mark and phase."""
    report = yield
    if (file := item.config.getoption("--faults")) and (report.when == "call" or report.outcome != "passed"):
        with Path(file).open("a") as notes:
            for mark in item.iter_markers("fault"):
                notes.write(json.dumps({"input": mark.args[0], "test": item.nodeid, "outcome": report.outcome}) + "\n")
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Hand out whole files, and all that start a browser as one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            stem = Path(nodeid.partition("::")[0]).stem
            return "browser" if stem in BROWSER else stem

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Browser]:
    """One Chromium for all tests that look at pages."""
    need(HTML.exists(), "the book is not built: `make book`")
    need(CHROMIUM, "no chromium to look at the pages with")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()
