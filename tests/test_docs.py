"""What the documents name exists."""

import re
from pathlib import Path

import pytest

from videogru.settings import known_keys


@pytest.mark.parametrize(
    "name", ["README.md", "docs/article.md", "docs/video.md", "docs/training.md", "docs/deploy.md", "docs/export.md"]
)
def test_settings_and_tests_that_are_named_exist(repository: Path, name: str) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    keys = set(re.findall(r"\b(?:data|model|train)\.[a-z_]+(?:\.[a-z_]+)?(?==)", text))
    assert keys <= set(known_keys())
    code = "\n".join(path.read_text(encoding="utf-8") for path in (repository / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"\btest_\w+\b(?!\.\w)", text)) - {"test_fraction"}
    assert not [test for test in tests if f"def {test}(" not in code]
    files = set(re.findall(r"\btest_\w+\.py\b", text))
    assert files <= {path.name for path in (repository / "tests").rglob("test_*.py")}
    if name == "docs/article.md":
        assert len(tests) > 20 and len(keys) > 15


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "docs/article.md", "docs/video.md", "docs/training.md", "docs/deploy.md", "docs/export.md"),
        "docs/log.md",
        "CHANGELOG.md",
    ],
)
def test_links_and_tools_that_are_named_exist(repository: Path, name: str) -> None:
    place = repository / name
    text = place.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert not [link for link in links if not (place.parent / link).exists()]
    tools = set(re.findall(r"(?<!tests/)\btools/[\w/]+\.py\b", text))
    tools |= {name.replace(".", "/") + ".py" for name in re.findall(r"python -m (tools[.\w]+)", text)}
    assert not [tool for tool in tools if not (repository / tool).is_file()]
