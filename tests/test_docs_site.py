"""The documentation builds into a site without a warning: links, anchors and the API reference are resolved."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module", autouse=True)
def _needs_mkdocs() -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")


def test_the_site_builds_without_a_warning_and_holds_what_pages_link_to(tmp_path):
    result = build(ROOT / "mkdocs.yml", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in ("index.html", "api/index.html", "project/index.html", "project/CONTRIBUTING/index.html"):
        assert (tmp_path / page).is_file()
    assert (
        'id="prefix_grouper_plugins.attention.api.shared_prefix_attention"' in (tmp_path / "api/index.html").read_text()
    )
    reference = (tmp_path / "api/index.html").read_text()
    assert ":meth:" not in reference and "<code>`" not in reference, "marks of docstrings that a reader should not see"
    assert 'class="language-text highlight"' in (tmp_path / "logs/index.html").read_text(), (
        "messages that style.css wraps"
    )
    assert (tmp_path / "project/benchmarks/results/flops.csv").read_bytes() == (
        ROOT / "benchmarks/results/flops.csv"
    ).read_bytes()


def test_a_link_to_nothing_stops_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[gone](nowhere.md)")
    config = tmp_path / "mkdocs.yml"
    config.write_text("site_name: broken\nstrict: true\nvalidation: {unrecognized_links: warn}\n")
    assert build(config, tmp_path / "site").returncode != 0
