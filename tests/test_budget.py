"""The error budget row by row: late rows of long texts are held to their own size, lucky rows to a typical error."""

import pytest
import torch
from oracle import FIXED_BOUND, Inputs, assert_within_budget, dense, inputs, weighed
from torch import Tensor

from duohead.bench import kernels
from duohead.bench.cases import Case
from duohead.bench.check import Attended, Truth, allowed_error, sampled, verdict
from duohead.bench.kernels import Place, case_inputs, run_case

LENGTH, EDGE = 8192, 32
HALVES = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


def long_text(dtype: torch.dtype) -> tuple[Inputs, Tensor, Tensor]:
    """Random inputs of 8K tokens, the queries at both ends of the text [1, H, 2 EDGE, D], and their causal mask."""
    x = inputs(LENGTH, kv_heads=1, groups=2, dtype=dtype)
    rows = torch.cat([torch.arange(EDGE), torch.arange(LENGTH - EDGE, LENGTH)])
    return x, x.query[:, :, rows], (torch.arange(LENGTH)[None] <= rows[:, None])[None, None]


def one_budget(eager: Tensor, exact: Tensor) -> float:
    """What all rows together used to be allowed."""
    band = torch.finfo(eager.dtype).eps * exact.abs().max()
    return float(2 * ((eager.double() - exact).abs().max() + band))


@pytest.mark.parametrize(
    ("dtype", "dropped"),
    [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.bfloat16, 1), (torch.float16, 1)],
)
def test_late_rows_that_miss_a_tile_or_one_far_key_are_refused(dtype, dropped: int) -> None:
    x, query, mask = long_text(dtype)
    missing = mask.clone()
    missing[..., EDGE:, 3072 : 3072 + dropped] = False
    wrong = dense(query, x.keys, x.values, missing, scale=0.125)
    exact = dense(query, x.keys, x.values, mask, scale=0.125)
    eager = dense(query, x.keys, x.values, mask, scale=0.125, dtype=dtype)
    assert (wrong - exact).abs().max() < one_budget(eager, exact), "one budget for all is blind"
    with pytest.raises(AssertionError, match="beyond the budget of its row"):
        assert_within_budget(wrong, query, x.keys, x.values, mask, scale=0.125)


@pytest.mark.parametrize("dtype", HALVES)
def test_rounding_weights_as_tensor_cores_do_is_well_within_every_rows_budget(dtype) -> None:
    x, query, mask = long_text(dtype)
    truth = Attended.of(*weighed(query, x.keys, x.values, mask, scale=0.125))
    eager = dense(query, x.keys, x.values, mask, scale=0.125, dtype=dtype)
    scores = (query.float() @ x.keys.float().mT * 0.125).masked_fill(~mask, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    out = weights.to(dtype).float() @ x.values.float() / weights.sum(-1, keepdim=True)
    allowed = allowed_error(truth, eager, dtype)
    error, budget = verdict(out.to(dtype).transpose(1, 2), truth.out, allowed)
    assert error < 0.4 * budget
    assert allowed.max() <= one_budget(eager, truth.out)
    assert allowed[:, EDGE:].max() < 0.1 * one_budget(eager, truth.out)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_row_whose_eager_error_is_luckily_small_gets_a_typical_one(dtype) -> None:
    eps = torch.finfo(dtype).eps
    truth = Attended(
        torch.ones(1, 2, 1, 4).double(), torch.ones(1, 2, 1), torch.full((1, 2, 1), 0.5)
    )
    lucky = truth.out.clone()
    lucky[:, 1] += 8 * eps
    allowed = allowed_error(truth, lucky.to(dtype), dtype).flatten()
    assert allowed.tolist() == pytest.approx([2 * (0.5 * eps + eps), 2 * (8 * eps + eps)])
    # Where the eager code is nowhere off by so much, nobody has to be allowed it.
    exact = allowed_error(truth, truth.out.to(dtype), dtype).flatten()
    assert exact.tolist() == pytest.approx([2 * eps, 2 * eps])


@pytest.mark.parametrize("dtype", FIXED_BOUND)
def test_wide_results_are_held_to_the_terms_of_their_row(dtype) -> None:
    weights, values = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]), torch.tensor([[[[4.0], [-4.0]]]])
    truth = Attended.of(weights.double(), values.double())
    assert truth.out.flatten().tolist() == [0.0, 4.0]
    assert truth.spread.flatten().tolist() == pytest.approx([8**0.5, 4.0])
    allowed = allowed_error(truth, None, dtype)
    assert allowed.flatten().tolist() == pytest.approx([4 * FIXED_BOUND[dtype]] * 2)
    with pytest.raises(ValueError, match="eager must hold the dense result in torch.float16"):
        allowed_error(truth, None, torch.float16)


def test_the_verdict_is_that_of_the_row_worst_for_its_budget() -> None:
    exact, allowed = torch.zeros(3, 2).double(), torch.tensor([1.0, 0.01, 0.0])
    found = torch.tensor([[0.5, 0.0], [0.0, 0.006], [0.0, 0.0]])
    assert verdict(found, exact, allowed) == pytest.approx((0.006, 0.01))
    found[2, 1] = 1e-9
    assert verdict(found, exact, allowed) == pytest.approx((1e-9, 0.0))
    found[0, 0] = torch.nan
    error, budget = verdict(found, exact, allowed)
    assert not error <= budget


def test_the_oracle_of_views_is_the_oracle_of_masks() -> None:
    case = Case("prefill", 300, 4, 2, 32, sink=4, recent=24, retrieval_ratio=0.5, past=100)
    place = Place(CPU, torch.bfloat16)
    query, views, _ = case_inputs(case, place, 0)
    rows = sampled(200, most=20, device=CPU)
    truth = Truth.of(query, views, rows, scale=0.2)
    found = kernels.attention.prefill(query, views, scale=0.2, impl="reference")[:, rows]
    error, budget = truth.verdict(found)
    assert 0 < error < budget
    found[:, -1] += 0.1
    error, budget = truth.verdict(found)
    assert error > budget


def test_a_kernel_that_forgets_a_tile_for_late_queries_has_no_speed(monkeypatch) -> None:
    right = kernels.attention.prefill

    def forgetful(query: Tensor, views, **options):
        out = right(query, views, **options)
        ((keys, values, _, _),) = views[0].reads(0, LENGTH)
        seen = torch.ones(1, 1, 1, LENGTH, dtype=torch.bool)
        seen[..., 3072:3200] = False
        late = dense(query[:, :, -1:], keys, values, seen, scale=options["scale"])
        assert (late - out[:, -1:]).abs().max() < 0.02
        out[:, -1:] = late.to(out.dtype)
        return out

    place = Place(CPU, torch.bfloat16, seconds=0.0)
    case = Case("prefill", LENGTH, 2, 1, 64)
    monkeypatch.setattr(kernels.attention, "prefill", forgetful)
    with pytest.raises(ValueError, match="prefill by tiled is off by .* no speed is reported"):
        run_case(case, place, impl="tiled")
