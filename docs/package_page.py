"""Make the README into the page of a package index, where links relative to the repository lead nowhere.

    python docs/package_page.py README.md https://github.com/OWNER/NAME/blob/v0.1.0

With the address of a release, links become absolute, images come from its `raw` files, and the setup.cfg beside the README gets
the project's URLs. Without one, links are left as their text and images are left out. `make dist` does this in a copy of the tree.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?://)([^)\s]+)\)")


def page(readme: str, address: str = "") -> str:
    """`readme` for a package index.

    Args:
        readme: markdown with links relative to the repository.
        address: where files of this release can be read, such as `https://github.com/OWNER/NAME/blob/v0.1.0`.
    """

    def rewritten(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        if not address:
            return "" if image else text
        base = address.replace("/blob/", "/raw/") if image else address
        return f"{image}[{text}]({base.rstrip('/')}/{target})"

    return re.sub(r"\n{3,}", "\n\n", LINK.sub(rewritten, readme))


def with_project_urls(config: str, address: str) -> str:
    """`config`, the text of a setup.cfg, with the project's URLs for a package index.

    Args:
        config: the text; it has a section `[metadata]`.
        address: as for `page`.

    Raises:
        ValueError: the address has no `/blob/`, so the address of the repository is unknown.
    """
    address = address.rstrip("/")
    repository, blob, _ = address.partition("/blob/")
    if not blob:
        raise ValueError(f"{address} has no /blob/: give an address such as https://github.com/OWNER/NAME/blob/v0.1.0")
    urls = {
        "Source": repository,
        "Documentation": f"{address}/docs/index.md",
        "Changelog": f"{address}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    lines = "".join(f"    {name} = {url}\n" for name, url in urls.items())
    return config.replace("[metadata]\n", f"[metadata]\nproject_urls =\n{lines}", 1)


if __name__ == "__main__":
    file, *given = sys.argv[1:]
    if given:
        settings = Path(file).with_name("setup.cfg")
        settings.write_text(with_project_urls(settings.read_text(encoding="utf-8"), *given), encoding="utf-8")
    Path(file).write_text(page(Path(file).read_text(encoding="utf-8"), *given), encoding="utf-8")
