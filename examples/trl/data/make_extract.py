"""Write the prose of the Python language reference, one paragraph a line, to `python_reference.txt`.

The text is the one behind `help()` in every Python install (`pydoc_data.topics`). Grammar, code and headings are left
out, paragraphs that several topics repeat are kept once. The file in this folder was made with Python 3.11.7; another
Python version has a slightly different text.

    python examples/trl/data/make_extract.py
"""

import re
from pathlib import Path
from pydoc_data import topics

HERE = Path(__file__).parent
PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "..."})


def is_prose(block: str) -> bool:
    """Tell a paragraph of prose from a heading, a grammar rule, a table or a piece of code."""
    if "::=" in block or ">>>" in block or re.search(r"[*=\-~^+]{4,}", block):
        return False
    letters = sum(c.isalpha() or c in " ,.'" for c in block)
    return len(block) > 80 and block[-1] in ".:)" and letters / len(block) > 0.88


def paragraphs() -> list[str]:
    """The paragraphs of all topics in alphabetic order of the topics, each once."""
    found: dict[str, None] = {}
    for _, text in sorted(topics.topics.items()):
        for block in re.split(r"\n\s*\n", text.translate(PLAIN)):
            block = re.sub(r"\s+", " ", block).strip().removeprefix("* ")
            if is_prose(block):
                found.setdefault(block)
    return list(found)


if __name__ == "__main__":
    lines = paragraphs()
    (HERE / "python_reference.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} paragraphs, {sum(map(len, lines)) // 1000} kB")
