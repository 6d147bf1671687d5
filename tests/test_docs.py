"""What the documentation shows is what the repository holds."""

from __future__ import annotations

import re
from pathlib import Path

from common import subjects

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_the_nats_client_that_is_tested() -> None:
    readme = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"<!-- nats_client.py -->\n```python\n(.*?)```\n<!-- end -->", readme, re.DOTALL)
    assert shown == (ROOT / "docs" / "examples" / "nats_client.py").read_text()


def test_the_architecture_page_names_every_subject_and_is_one_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert len(page.splitlines()) <= 85
    names = [subjects.INFER, subjects.GENERATE, subjects.CLAIM, subjects.stream("<request>"), subjects.cancel("<request>")]
    names += [subjects.executor_admit("<id>"), subjects.executor_trees("<id>"), subjects.executor_slices("<id>")]
    names += [subjects.planner_report("<id>"), subjects.job_progress("<id>"), subjects.finetune("<verb>")]
    names += [subjects.beat("<role>", "<id>")]
    for name in names:
        assert f"`{name.removeprefix(subjects.PREFIX)}`" in page, name


def test_every_make_target_that_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert {"up", "test"} <= named <= targets


def test_relative_links_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
