"""Make the README into the page of a package index, where links relative to the repository lead nowhere.

    python docs/package_page.py README.md https://github.com/OWNER/NAME/blob/v0.1.0

With the address of a release, links become absolute, and images come from its `raw` files. Without one, links are left as their
text and images are left out. `make dist` does this in a copy of the tree.
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


if __name__ == "__main__":
    file, *given = sys.argv[1:]
    Path(file).write_text(page(Path(file).read_text(encoding="utf-8"), *given), encoding="utf-8")
