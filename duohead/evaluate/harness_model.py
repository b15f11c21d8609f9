"""A model with a head policy as lm-evaluation-harness sees one: scores and texts through the cache that is measured.

lm-eval's own adapter runs a likelihood request without any cache and keeps the logits of the whole prompt; here every
prompt goes into a cache in pieces and only the continuation's logits are ever computed. Everything else (tokens, chat
templates, truncation, where a text is cut) stays lm-eval's, so that scores are comparable. `evaluate_harness` in
`harness.py` makes one `PolicyLM` per method; this module is the only one that imports lm-eval at its top.
"""

from __future__ import annotations

import copy
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from torch import Tensor
from tqdm import tqdm

from duohead.evaluate.scoring import cache_bytes, new_cache
from duohead.models.engine import wait
from duohead.models.generate import KEPT, generate, prefill

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from duohead.policy import HeadPolicy

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""Text of a likelihood request (its key in lm-eval's cache), tokens of context and continuation."""


@dataclass
class Use:
    """What the requests of one task took; bytes are those of allocated caches, padding included."""

    sequences: int = 0
    bytes_of_all: int = 0
    largest: int = 0
    prefill_seconds: float = 0.0
    prefills: int = 0
    decode_seconds: float = 0.0
    decode_steps: int = 0
    late: int = 0  # prefills whose first new token took a decode step as well

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds of a decode step; None without any."""
        return 1000 * self.decode_seconds / self.decode_steps if self.decode_steps else None

    @property
    def ttft_ms(self) -> float:
        """Milliseconds of a batch until its first new token, or until its likelihoods are known."""
        return (1000 * self.prefill_seconds + self.late * (self.tpot_ms or 0.0)) / self.prefills


def total(parts: Sequence[Use]) -> Use:
    """What several tasks took together."""
    summed = {
        item.name: sum(getattr(part, item.name) for part in parts)
        for item in fields(Use)
        if item.name != "largest"
    }
    return Use(**summed, largest=max(part.largest for part in parts))


class PolicyLM(HFLM):
    """lm-eval's Hugging Face model, run through `duohead`'s cache (policy) or transformers' (None).

    `model` must already have `policy` (inside `duohead.duo`). `chunk` is the tokens per prefill forward, None for whole
    prompts; `use` maps the name of a task to what its requests took.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        policy: HeadPolicy | None,
        batch_size: int,
        max_length: int | None,
        chunk: int | None,
    ) -> None:
        # lm-eval gives the tokenizer a padding token; the caller's stays as it is.
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=copy.deepcopy(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
        )
        self.policy = policy
        self.chunk = chunk
        self.use: dict[str, Use] = defaultdict(Use)
        self._task = ""

    @property
    def looks_at_text(self) -> bool:
        """Whether decoding ends at a stop sequence; the engine on a GPU goes on, and lm-eval cuts what is too much."""
        return self.policy is None or self.device.type != "cuda"

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """(log-probability, whether greedy) of every continuation."""
        return self._by_task(
            requests, lambda own: super(PolicyLM, self).loglikelihood(own, disable_tqdm)
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """Log-probability of every whole text, in windows of `max_length` tokens."""
        return self._by_task(
            requests, lambda own: super(PolicyLM, self).loglikelihood_rolling(own, disable_tqdm)
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
        """The text that follows every prompt, cut at the first stop sequence."""
        return self._by_task(
            requests, lambda own: super(PolicyLM, self).generate_until(own, disable_tqdm)
        )

    def _by_task(self, requests: list[Any], run: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Run the requests task by task, so that what the caches take is known for each task."""
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(request.task_name or "", []).append(place)
        answers: list[Any] = [None] * len(requests)
        for self._task, own in places.items():
            for place, answer in zip(own, run([requests[i] for i in own]), strict=True):
                answers[place] = answer
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        # Answers that differ in their last token only, as in multiple choice, share one pass.
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"continuations must fit max_length={self.max_length}, got one of {len(continuation)} tokens in "
                    f"task {self._task!r}; allow longer texts"
                )
            tokens = (*context, *continuation)[-(self.max_length + 1) : -1]
            groups.setdefault(tokens, []).append(index)
        # The longest first: memory that runs out should do so at once.
        order = sorted(groups, key=lambda tokens: (-len(tokens), tokens))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = override_bs or self.batch_size
        quiet = disable_tqdm or override_bs is not None  # then it is one batch of many
        for start in tqdm(range(0, len(order), rows), desc=self._task, disable=quiet):
            batch = order[start : start + rows]
            wanted = [[requests[index][2] for index in groups[tokens]] for tokens in batch]
            for tokens, scores in zip(batch, self._scored(batch, wanted), strict=True):
                for index, answer in zip(groups[tokens], scores, strict=True):
                    answers[index] = answer
                    if (key := requests[index][0]) is not None:
                        self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _scored(
        self, batch: Sequence[Sequence[int]], wanted: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[tuple[float, bool]]]:
        """Scores of the continuations `wanted` of every row, which end one token after the row does."""
        ids, mask = self._padded(batch)
        longest = max(len(tokens) for row in wanted for tokens in row)
        cache = new_cache(self.model, self.policy)
        tail = _Tail(self.model, first=ids.shape[1] - longest)
        started = time.perf_counter()
        prefill(self.model, ids, cache, attention_mask=mask, chunk=self.chunk, forward=tail)
        logits = torch.cat(tail.logits, dim=1)
        wait(self.device)
        seconds = time.perf_counter() - started
        self._count(len(batch), cache_bytes(cache), prefill=seconds)
        scores = []
        for row, continuations in zip(logits, wanted, strict=True):
            logs = row.log_softmax(-1, dtype=torch.float32)
            scores.append([_score(logs, tokens) for tokens in continuations])
        return scores

    def _padded(self, batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
        """Token ids [B, T], padded on the left so that all rows end together, and their mask if any is padded."""
        width = max(map(len, batch))
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        return ids.to(self.device), None if bool(mask.all()) else mask.to(self.device)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **options: Any
    ) -> Tensor:
        mask = options.pop("attention_mask")
        mask = None if bool(mask.all()) else mask
        if not options.get("do_sample"):
            # lm-eval writes 0 for "greedy", which transformers and the engine refuse as a temperature.
            options.pop("temperature", None)
            options["do_sample"] = False
        options["pad_token_id"] = self.tokenizer.pad_token_id
        rows, prompt = context.shape
        if self.looks_at_text:
            options["stopping_criteria"] = stop_sequences_criteria(
                self.tokenizer, stop, prompt, rows
            )
        new = max_length - prompt
        if self.policy is None:
            return self._generate_full(context, mask, new, options)
        made = generate(
            self.model,
            context,
            attention_mask=mask,
            max_new_tokens=new,
            chunk=self.chunk,
            **options,
        )
        self._count(
            rows,
            made.kv_bytes,
            prefill=made.prefill_seconds,
            decode=made.decode_seconds,
            new=made.new_tokens,
            late=made.prefilled_tokens < made.prompt_tokens,
        )
        return made.tokens

    def _generate_full(
        self, context: Tensor, mask: Tensor | None, new: int, options: dict[str, Any]
    ) -> Tensor:
        """What `generate` does, for the model as it is: transformers' own cache, filled in the same pieces."""
        cache = new_cache(self.model, None)
        started = time.perf_counter()
        rows, prompt = context.shape
        if prompt > KEPT:
            prefill(self.model, context[:, :-KEPT], cache, attention_mask=mask, chunk=self.chunk)
            wait(self.device)
        ready = time.perf_counter()
        tokens: Tensor = self.model.generate(
            context,
            attention_mask=torch.ones_like(context) if mask is None else mask,
            past_key_values=cache,
            max_new_tokens=new,
            **options,
        )
        wait(self.device)
        done = time.perf_counter()
        self._count(
            rows,
            cache_bytes(cache),
            prefill=ready - started,
            decode=done - ready,
            new=tokens.shape[1] - prompt,
            late=True,
        )
        return tokens

    def _count(
        self,
        rows: int,
        taken: int,
        *,
        prefill: float,
        decode: float = 0.0,
        new: int = 1,
        late: bool = False,
    ) -> None:
        """Count a batch: bytes of its cache, seconds of both phases, new tokens per row.

        ``late`` says that the end of the prompt was read, and the first of the new tokens picked, while decoding.
        """
        use = self.use[self._task]
        use.sequences += rows
        use.bytes_of_all += taken
        use.largest = max(use.largest, taken)
        use.prefill_seconds += prefill
        use.prefills += 1
        use.decode_seconds += decode
        use.decode_steps += new if late else new - 1
        use.late += late


class _Tail:
    """Runs the pieces of a prompt and keeps the logits of its positions from `first` on, [B, positions, V] each."""

    def __init__(self, model: PreTrainedModel, *, first: int) -> None:
        self.model = model
        self.first = first
        self.done = 0
        self.logits: list[Tensor] = []

    def __call__(self, *, input_ids: Tensor, logits_to_keep: int, **rest: Any) -> Any:
        self.done += input_ids.shape[1]
        wanted = min(self.done - self.first, input_ids.shape[1])
        out = self.model(input_ids=input_ids, logits_to_keep=max(wanted, logits_to_keep), **rest)
        if wanted > 0:
            self.logits.append(out.logits)
        return out


def _score(logs: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """Of a continuation that ends where the log-probabilities [positions, V] do."""
    own = logs[len(logs) - len(tokens) :]
    ids = torch.tensor(tokens, device=logs.device)
    return float(own.gather(1, ids[:, None]).sum()), bool((own.argmax(-1) == ids).all())
