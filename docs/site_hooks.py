"""Hooks of MkDocs: files of the repository outside of docs/ become part of the site where a page links to them.

The pages link to each other as they lie in the repository (``../README.md``, ``../benchmarks/results/flops.csv``), so that
they also read well there. The site holds what they link to under ``project/``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\()([^)#\s:]+)([^)\s]*\))")
ROLE = re.compile(r":(?:attr|class|func|meth|mod):\s*<code>~?(?:[\w.]*\.)?(\w+)</code>")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the project, and every file outside of docs/ that some page links to."""
    waiting = [ROOT / page for page in PAGES] + sorted((ROOT / "docs").rglob("*.md"))
    added: set[Path] = set()
    while waiting:
        source = waiting.pop(0)
        if not source.is_relative_to(ROOT / "docs") and source not in added:
            added.add(source)
            files.append(File.generated(config, _place(source), abs_src_path=str(source)))
        if source.suffix == ".md":
            targets = (_target(source, match[2]) for match in LINK.finditer(source.read_text()))
            waiting += [t for t in targets if t.is_file() and t not in added and not t.is_relative_to(ROOT / "docs")]
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where the site holds their files; a folder of the repository has no page, so its name stays."""
    source = _source(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = _target(source, match[2])
        if target.is_dir():
            return f"{match[1]}{os.path.relpath('index.md', Path(page.file.src_uri).parent)})"
        place = os.path.relpath(_place(target), Path(page.file.src_uri).parent)
        return f"{match[1]}{place}{match[3]}"

    return LINK.sub(rewritten, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """In docstrings ``:meth:`given``` becomes the name as code, and types lose the backticks that they are written in."""
    html = ROLE.sub(r"<code>\1</code>", html)
    return re.sub(r"<code>`(.*?)`</code>", r"<code>\1</code>", html)


def _target(source: Path, link: str) -> Path:
    return (source.parent / link).resolve()


def _place(path: Path) -> str:
    """Where the site holds a file of the repository."""
    within = path.relative_to(ROOT)
    return str(within.relative_to("docs") if within.parts[0] == "docs" else Path("project") / within)


def _source(place: str) -> Path:
    """The file of the repository that a page of the site was made of."""
    return ROOT / place.removeprefix("project/") if place.startswith("project/") else ROOT / "docs" / place
