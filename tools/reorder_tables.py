"""Write the tables of docs/reorder.md: what tensor-parallel ranks hold before and after heads are moved.

They follow from patterns and byte formulas alone, so they are computed rather than recorded; the reference
implementation's patterns lie beside a developer's checkout. Run `python tools/reorder_tables.py` after a change;
`tests/test_reorder_page.py` fails while the page says something else.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from duohead import HeadPattern, HeadPolicy, pocket  # noqa: E402
from duohead.files import write_text  # noqa: E402
from duohead.models.ranks import in_order, rank_shares  # noqa: E402
from tools.readme import MARK  # noqa: E402
from tools.speed_tables import table  # noqa: E402

PAGE = ROOT / "docs" / "reorder.md"
PUBLISHED = ROOT.parent / "shared" / "patterns" / "Llama-3-8B-Instruct-Gradient-1048k"
RANKS = (2, 4, 8)
RATIOS = (0.5, 0.25)
HEAD = ["retrieval heads", "ranks", "as they are", "retrieval first", "`ranks=` of `reorder_heads`"]


def balance(pattern: HeadPattern, *, tokens: int, head_dim: int) -> str:
    """Most and fewest retrieval heads of a rank, and the cache of the fullest one, for three orders of heads."""
    rows = []
    for ratio in RATIOS:
        for ranks in RANKS:
            policy = pattern.policy(retrieval_ratio=ratio, sink=64, recent=256)
            cells = [
                _cell(one, ranks, tokens, head_dim)
                for one in (policy, in_order(policy), in_order(policy, ranks=ranks))
            ]
            rows.append([f"{ratio:.0%}".replace("%", " %"), str(ranks), *cells])
    return table(HEAD, rows)


def _cell(policy: HeadPolicy, ranks: int, tokens: int, head_dim: int) -> str:
    shares = rank_shares(policy, ranks=ranks, tokens=tokens, head_dim=head_dim)
    heads = [share.retrieval_heads for share in shares]
    fullest = max(share.kv_bytes for share in shares) / 2**20
    return f"{max(heads)} – {min(heads)}, {fullest:,.0f} MiB"


def tables() -> dict[str, str]:
    """The tables that can be computed here, by name."""
    found = {
        "pocket_mha": balance(
            HeadPattern.load(pocket.pattern("pocket-mha")), tokens=16384, head_dim=64
        )
    }
    if PUBLISHED.is_dir():
        (folder,) = PUBLISHED.iterdir()
        found["llama_3_8b"] = balance(HeadPattern.load(folder), tokens=131072, head_dim=128)
    return found


def rendered(text: str) -> str:
    """The page with its tables made anew; one that cannot be computed here stays as it is."""
    fresh = tables()
    return MARK.sub(
        lambda part: part[1] + fresh[part[2]] + part[3] if part[2] in fresh else part[0], text
    )


if __name__ == "__main__":
    write_text(PAGE, rendered(PAGE.read_text()))
