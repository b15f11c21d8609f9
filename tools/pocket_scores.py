"""What a pocket model scores: exact match, first token and token accuracy per needle format and length, and perplexity.

Greedy generation gives an answer exactly if the argmax of one teacher-forced forward is right on every token of it, so
one forward scores all answers of a sample. Figures become JSON lines and the card beside the weights.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from duohead.evaluate.tasks import TASKS
from duohead.identify.assembly import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The tasks of the cards; `duohead evaluate needle --tasks all` asks the others.
ASKED = ("passkeys", "needle", "number", "keyvalue")
# (ids (B, L), flat positions) -> logits (positions, vocabulary)
LogitsAt = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Score:
    """Shares in [0, 1] over `n` answers."""

    n: int
    exact_match: float
    first_token: float
    token_accuracy: float


def samples(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Tensor,
    *,
    task: str,
    length: int,
    count: int,
    seed: int = 0,
) -> list[Sample]:
    """`count` samples of one task at evenly spaced depths."""
    generator = torch.Generator().manual_seed(seed)
    depths = torch.linspace(0.0, 1.0, count).tolist()
    return [
        TASKS[task].make(
            tokenizer, haystack, context_length=length, depth=depth, generator=generator
        )
        for depth in depths
    ]


def score(
    logits_at: LogitsAt, data: Sequence[Sample], *, device: torch.device, tokens: int = 65536
) -> Score:
    """Score of samples of equal length, `tokens` of them in one forward."""
    length = len(data[0].input_ids)
    exact = first = right = total = answers = 0
    rows = max(1, tokens // length)
    for start in range(0, len(data), rows):
        part = data[start : start + rows]
        ids = torch.stack([sample.input_ids for sample in part])
        spans = [
            (row * length + a, row * length + b)
            for row, sample in enumerate(part)
            for a, b in sample.answers
        ]
        places = torch.tensor([place for a, b in spans for place in range(a, b)])
        logits = logits_at(ids.to(device), (places - 1).to(device))
        hits = (logits.argmax(-1).cpu() == ids.flatten()[places]).tolist()
        at = 0
        for a, b in spans:
            span = hits[at : at + b - a]
            at += b - a
            exact, first, right = exact + all(span), first + span[0], right + sum(span)
            total, answers = total + len(span), answers + 1
    return Score(answers, exact / answers, first / answers, right / total)


def perplexity(
    logits_at: LogitsAt,
    haystack: Tensor,
    *,
    bos: int,
    device: torch.device,
    window: int = 2048,
    count: int = 64,
) -> float:
    """Perplexity per token over `count` evenly spaced windows of `window` tokens, each after a start token."""
    starts = torch.linspace(0, max(0, len(haystack) - window), count).long()
    loss = tokens = 0.0
    for start in starts.tolist():
        text = haystack[start : start + window - 1]
        ids = torch.cat((torch.tensor([bos]), text)).to(device)
        logits = logits_at(ids[None], torch.arange(len(ids) - 1, device=device))
        loss += float(torch.nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum"))
        tokens += len(ids) - 1
    return math.exp(loss / tokens)


def of_transformers(model: PreTrainedModel) -> LogitsAt:
    """Logits at chosen places of a transformers model, never the logits of a whole long context."""

    @torch.no_grad()
    def logits_at(ids: Tensor, places: Tensor) -> Tensor:
        hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        logits: Tensor = model.get_output_embeddings()(hidden[places])
        return logits

    return logits_at


def evaluate_folder(
    folder: Path,
    text: str,
    *,
    text_name: str,
    lengths: Sequence[int],
    count: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Records (one per figure) of the model as written in `folder`, on a text that it has not seen."""
    import transformers

    from duohead.identify.haystack import tokens

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    haystack = tokens(text, tokenizer, at_least=max(lengths))
    common = {
        "model": folder.name,
        "text": text_name,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    logits_at = of_transformers(model)
    records: list[dict[str, Any]] = []
    for name in ASKED:
        for length in lengths:
            few = count // 4 if name == "passkeys" else count
            data = samples(tokenizer, haystack, task=name, length=length, count=max(2, few))
            result = score(logits_at, data, device=device)
            figure = {
                "op": "needle",
                "task": name,
                "task_version": TASKS[name].version,
                "length": length,
            }
            records.append(figure | vars(result) | common | {"time": _now()})
    value = perplexity(logits_at, haystack, bos=int(tokenizer.bos_token_id), device=device)
    records.append(
        {"op": "perplexity", "perplexity": value, "window": 2048} | common | {"time": _now()}
    )
    return records


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown table of needle records: one row per format and length."""
    rows = [
        "| text | format | tokens | answers | exact match | first token | tokens right |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        if r["op"] == "needle":
            shares = " | ".join(
                f"{100 * r[key]:.1f} %" for key in ("exact_match", "first_token", "token_accuracy")
            )
            rows.append(
                f"| {r['text']} | {r['task']} v{r['task_version']} | {r['length']} | {r['n']} | {shares} |"
            )
    return "\n".join(rows)


def card(records: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The README.md that lies beside the weights."""
    lines = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if name != "family")
    perplexities = ", ".join(
        f"{r['perplexity']:.2f} ({r['text']})" for r in records if r["op"] == "perplexity"
    )
    formats = "\n".join(f"- **{name}**: {TASKS[name].description}" for name in ASKED)
    return f"""# {facts["name"]}

A small {facts["family"]} that was trained to find things in long texts, so that retrieval heads can be found, shown
and tested offline on a CPU. `tools/train_pocket.py` made it from text files; it is a test instrument, not an assistant.

| | |
|---|---|
{lines}

## What it scores

Exact match means that greedy generation gives every token of the answer. These texts do not occur in training, nor
do the wordings of passkeys, needle and keyvalue; that of number may come up there, with other names. Every figure
is also a line of `results/pocket.jsonl`.

{table(records)}

Perplexity per token on the same texts (windows of 2048 tokens): {perplexities}.

{formats}

## How it was trained

Sequences of prose (the text files given, and the source text of CPython's standard library) with needles woven in and
questions after them: ordinal passkeys, values asked by a name, key-value pairs, sentences, quotations, runs of random
tokens, in many wordings drawn from a grammar (`tools/pocket_formats.py`). Length and number of needles grow during
training (`CURRICULUM` in `tools/pocket_data.py`). The loss is the mean over first answer tokens, plus the mean over
other answer tokens, plus half the mean over prose. Matrices are trained with Muon, the rest with AdamW.

## Limits

It knows no facts and follows no instructions. It was never trained beyond {facts["longest training sequence"]} tokens.
A question must share its key with the needle: nothing is rephrased or inferred. Keys that are long strings of arbitrary
characters are often confused with one another, and a wording far from the grammar may fail where others are answered
without error. Its continuation of prose looks like its books and means nothing.
"""


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Appends records to a file, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record) + "\n" for record in records)
