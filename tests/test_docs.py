"""The documentation is true: its code runs, its pictures are what the code draws, the tests it names are there."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
from pages import DOCS, ROOT, blocks, run

PAGES = sorted(DOCS.rglob("*.md"))
PROGRAMS = [page for page in PAGES if blocks(page) and page.name != "trl.md"]  # that one: test_trl_guide.py
PICTURES = runpy.run_path(str(DOCS / "pictures.py"))["PICTURES"]
CELLS = re.findall(r"`([^`]*)`", (DOCS / "supported.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.stem)
def test_the_code_of_the_page_runs(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for library in ("torch", "jax", "array_api_strict"):
        if library in text:
            pytest.importorskip(library)
    if "import pcr_jax.tunix" in text:  # in an environment of its own: make tunix
        pytest.importorskip("tunix")
    scope = run(page, {})
    if "rewards" in scope:  # a page that trains
        assert scope["rewards"][-1] > scope["rewards"][0] + 0.3


def test_pages_are_read() -> None:
    assert {"index", "rules", "pytorch", "jax", "adapter", "numerics"} <= {page.stem for page in PROGRAMS}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numbers that are not finite
def test_the_adapter_of_the_page_obeys_the_laws() -> None:
    pytest.importorskip("torch")
    from pcr_conformance.verdict import judge_all

    verdicts = list(judge_all([run(DOCS / "adapter.md", {})["Mine"]()], 10, 0))
    assert not [v for v in verdicts if v.bad]
    assert sum(v.outcome == "passed" for v in verdicts) > 10


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_what_the_code_draws(name: str) -> None:
    assert (DOCS / name).read_text(encoding="utf-8") == PICTURES[name](), "run python docs/pictures.py"


@pytest.mark.parametrize("package", ["pcr_core", "pcr_torch", "pcr_jax"])
def test_the_reference_has_everything_public(package: str) -> None:
    module = pytest.importorskip(package)
    page = (DOCS / "api" / f"{package}.md").read_text(encoding="utf-8")
    named = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", page, flags=re.MULTILINE)}
    assert named - {"PCRTrainer", "PCRConfig"} == set(module.__all__)


def named_in_the_table() -> list[tuple[str, str]]:
    """(file, test) pairs; `::test` alone belongs to the file before it."""
    found, file = [], ""
    for cell in CELLS:
        if match := re.fullmatch(r"(?:tests/train/)?(test_\w+\.py)?(?:::(test_\w+))?", cell):
            file = match[1] or file
            found.append((f"*/{file}", match[2] or ""))
    return [pair for pair in found if pair[0] != "*/"]


def named_by_path() -> list[tuple[str, str]]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    return re.findall(r"`tests/([\w/]+\.py)(?:::(test_\w+))?`", text)


@pytest.mark.parametrize(("file", "test"), sorted({*named_in_the_table(), *named_by_path()}))
def test_the_evidence_exists(file: str, test: str) -> None:
    (path,) = [*ROOT.glob(f"tests/{file}")]
    assert not test or f"def {test}(" in path.read_text(encoding="utf-8")


def test_the_table_is_read() -> None:
    assert len(named_in_the_table()) > 30
    assert len(named_by_path()) > 10


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    """Of the pages in docs/ that is checked when the site is built."""
    file = ROOT / page
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", file.read_text(encoding="utf-8"))
    assert [link for link in links if not (file.parent / link).exists()] == []


def test_commands_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for page in (*PAGES, ROOT / "README.md", ROOT / "benchmarks" / "README.md"):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"(?:^    |`)make (\w+)", text, flags=re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name}: make {target}"
        for script in re.findall(r"python ((?:benchmarks|docs)/\S+\.py)", text):
            assert (ROOT / script).exists(), f"{page.name}: python {script}"
        for module in re.findall(r"python -m (benchmarks[\w.]*)", text):
            assert importlib.util.find_spec(module), f"{page.name}: python -m {module}"
