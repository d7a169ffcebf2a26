"""Draw layout.svg: the rows of a group, the packed row, and what one query sees. Every number comes from PrefixLayout.

python docs/images/layout.py
"""

from pathlib import Path

import torch

from prefix_grouper_plugins import PrefixLayout

CELL, GAP, LEFT = 50, 16, 150
COLOURS = {"p": "#c9d6e8", "a": "#f6cf9c", "b": "#b7dfc0", "c": "#dcc6ea"}
ROWS = ["p1 p2 p3 p4 a1 a2 a3", "p1 p2 p3 p4 b1 b2 b3 b4", "p1 p2 p3 p4 c1 c2"]
QUERY = "b2"


def text(x: float, y: float, content: str, size: int = 15, anchor: str = "middle", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">{content}</text>'


def cell(x: float, y: float, token: str, *, faded: bool = False, bold: bool = False) -> str:
    style = (
        'fill="#ffffff" stroke="#c8c8c8"'
        if faded
        else f'fill="{COLOURS[token[0]]}" stroke="#333333" stroke-width="{3 if bold else 1}"'
    )
    label = text(x + CELL / 2, y + 25, token, weight="bold" if bold else "normal")
    if faded:
        label = label.replace("<text", '<text fill="#a0a0a0"')
    return f'<rect x="{x}" y="{y}" width="{CELL}" height="38" {style}/>{label}'


def draw() -> str:
    names = sorted({token for row in ROWS for token in row.split()})
    rows = [torch.tensor([names.index(token) for token in row.split()]) for row in ROWS]
    layout = PrefixLayout.from_groups([4], [[len(row) - 4 for row in rows]])
    tokens = [names[i] for i in layout.pack(rows).tolist()]
    labels = [names[i] for i in layout.labels(rows).tolist()]
    query, subtree_end = tokens.index(QUERY), layout.subtree_end.tolist()
    segment_of = [s for s, (start, end, _, _) in enumerate(layout.segments.tolist()) for _ in range(start, end)]
    xs = [LEFT + k * CELL + segment_of[k] * GAP for k in range(layout.num_tokens)]
    out = [text(16, 28, "Rows: what the trainer holds", 17, "start", "bold")]
    for r, row in enumerate(ROWS):
        y = 44 + r * 46
        out.append(text(16, y + 25, f"row {r}", anchor="start"))
        out += [cell(LEFT + k * CELL, y, token) for k, token in enumerate(row.split())]
    forwarded = f"{layout.num_tokens} positions instead of {layout.num_row_tokens} tokens"
    out.append(text(16, 222, f"Packed: what the model sees ({forwarded})", 17, "start", "bold"))
    for title, y in (("token", 263), ("position", 300), ("label", 324)):
        out.append(text(16, y, title, anchor="start"))
    for k, x in enumerate(xs):
        out += [cell(x, 238, tokens[k]), text(x + CELL / 2, 300, str(int(layout.position_ids[k])))]
        out.append(text(x + CELL / 2, 324, labels[k]))
    out.append(text(16, 374, f"One query: {QUERY} sees the filled keys", 17, "start", "bold"))
    for k in sorted(
        range(layout.num_tokens), key=lambda k: k == query
    ):  # the query last, so that no frame covers its own
        out.append(cell(xs[k], 390, tokens[k], faded=not k <= query < subtree_end[k], bold=k == query))
    for s, caption in ((0, "prompt: all of it"), (2, "own branch: up to itself")):
        inside = [x for k, x in enumerate(xs) if segment_of[k] == s]
        out.append(text((inside[0] + inside[-1] + CELL) / 2, 450, caption, 14))
    width = xs[-1] + CELL + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 470" width="{width}" height="470" '
        'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="Rows, packed row, and one query">\n'
        f'<rect width="{width}" height="470" fill="#ffffff"/>\n' + "\n".join(out) + "\n</svg>\n"
    )


if __name__ == "__main__":
    (Path(__file__).parent / "layout.svg").write_text(draw(), encoding="utf-8")
