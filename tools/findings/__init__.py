"""The paper's ablations and open questions, each an experiment on the pocket models that ends in records.

`python -m tools.findings QUESTION --model pocket --json results/findings.jsonl` answers one; docs/findings.md says what
came out. A question is a module here with a function `run(lab)`; `lab.py` holds what they share.
"""
