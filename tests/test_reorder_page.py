"""The page about moving heads shows the tables that follow from patterns, and its numbers in prose."""

import re
from pathlib import Path

from duohead import HeadPattern
from tools import reorder_tables


def test_the_tables_are_those_of_the_patterns(root: Path) -> None:
    text = (root / "docs" / "reorder.md").read_text()
    assert set(re.findall(r"<!-- table: (\w+) -->", text)) == {"llama_3_8b", "pocket_mha"}
    assert set(reorder_tables.tables()) <= {"llama_3_8b", "pocket_mha"}
    assert reorder_tables.rendered(text) == text, "run python tools/reorder_tables.py"


def test_selecting_for_ranks_changes_as_many_heads_as_the_page_says(
    shared: Path, root: Path
) -> None:
    (folder,) = (shared / "patterns" / "Llama-3-8B-Instruct-Gradient-1048k").iterdir()
    pattern = HeadPattern.load(folder)
    best = pattern.policy(retrieval_ratio=0.5)
    other = []
    for ranks in reorder_tables.RANKS:
        chosen = pattern.policy(retrieval_ratio=0.5, ranks=ranks)
        pairs = zip(best.layers, chosen.layers, strict=True)
        other.append(sum(len({*one.retrieval} - {*two.retrieval}) for one, two in pairs))
    text = (root / "docs" / "reorder.md").read_text()
    assert f"chooses others: {min(other)} to {max(other)} of 128" in text
