"""Every page whose examples run, run: from a clean clone, with an empty home, in order."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import doc_pages
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if doc_pages.steps(page.read_text())
]


@pytest.fixture
def session(small_model: Path) -> Iterator[doc_pages.Session]:
    home = Path(tempfile.mkdtemp(prefix="trd-", dir="/tmp"))
    found = doc_pages.Session(home, cache=small_model.parent.parent)
    yield found
    found.close()
    shutil.rmtree(home)


def test_readme_and_guides_are_pages_that_run() -> None:
    guides = "quickstart writing-jobs workers nightly tuning troubleshooting api".split()
    assert {"README.md", *(f"docs/{name}.md" for name in guides)} <= set(PAGES)


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_its_commands_print(page: str, session: doc_pages.Session) -> None:
    wrong = doc_pages.disagreements(ROOT / page, session)
    assert not wrong, "\n\n".join(wrong)
