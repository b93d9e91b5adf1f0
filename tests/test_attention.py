"""Attention against loops in NumPy and against torch's own module, and what must not change its result."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn

from detr_nb import attention
from detr_nb.attention import (
    HeadProjections,
    MultiHeadAttention,
    attend,
    attention_bias,
    attention_weights,
)

sizes = st.integers(1, 5)
seeds = st.integers(0, 2**31)
MASKS = [(padded, biased) for padded in (False, True) for biased in (False, True)]


def by_loops(q, k, v, bias):
    """Attention of every image, head and query by itself, in double precision."""
    q, k, v, bias = (x.double().numpy() for x in (q, k, v, bias))
    answer = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, h, i in np.ndindex(*q.shape[:3]):
        scores = np.array([q[b, h, i] @ key for key in k[b, h]]) / math.sqrt(q.shape[-1]) + bias[b, h, i]
        shares = np.exp(scores - scores.max())
        answer[b, h, i] = (shares / shares.sum()) @ v[b, h]
    return torch.from_numpy(answer)


def random_bias(*shape):
    """Numbers, and minus infinity at about a third of the keys, the first key excepted."""
    bias = torch.randn(shape).masked_fill(torch.rand(shape) < 0.33, -math.inf)
    bias[..., 0] = 0.5
    return bias


def random_pad(b, s):
    """Random padding with at least one valid token an image."""
    pad = torch.rand(b, s) < 0.5
    pad[:, 0] = False
    return pad


def torch_module(d, heads, **options):
    """Torch's module with biases that are not zero, and ours with the same numbers."""
    theirs, ours = nn.MultiheadAttention(d, heads, batch_first=True, **options), MultiHeadAttention(d, heads)
    nn.init.normal_(theirs.in_proj_bias)
    nn.init.normal_(theirs.out_proj.bias)
    rows = {"q": slice(0, d), "k": slice(d, 2 * d), "v": slice(2 * d, 3 * d)}
    state = {f"{name}.weight": theirs.in_proj_weight[part] for name, part in rows.items()}
    state |= {f"{name}.bias": theirs.in_proj_bias[part] for name, part in rows.items()}
    ours.load_state_dict(state | {f"out.{name}": value for name, value in theirs.out_proj.state_dict().items()})
    return theirs, ours


# --- functions ----------------------------------------------------------------------------------------------------
@given(b=sizes, h=sizes, q=sizes, s=sizes, width=sizes, out=sizes, seed=seeds)
def test_attend_and_weights_equal_loops(b, h, q, s, width, out, seed):
    torch.manual_seed(seed)
    queries, keys, values = torch.randn(b, h, q, width), torch.randn(b, h, s, width), torch.randn(b, h, s, out)
    bias = random_bias(b, h, q, s)
    expected = by_loops(queries, keys, values, bias).float()
    torch.testing.assert_close(attend(queries, keys, values, bias), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention_weights(queries, keys, bias) @ values, expected, rtol=1e-4, atol=1e-5)


@given(seed=seeds, size=st.floats(1e-3, 1e4))
def test_weights_are_shares_and_answers_stay_among_the_values(seed, size):
    torch.manual_seed(seed)
    q, k, v = size * torch.randn(2, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 3)
    weights, answer = attention_weights(q, k), attend(q, k, v)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 3))
    assert (answer >= v.amin(2, keepdim=True) - 1e-5).all() and (answer <= v.amax(2, keepdim=True) + 1e-5).all()


@pytest.mark.parametrize("shape", [(1, 1, 1, 6), (2, 1, 1, 6), (1, 4, 3, 6), (2, 4, 1, 6)])
def test_bias_broadcasts_over_batch_heads_and_queries(shape):
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    bias = random_bias(*shape)
    full = bias.expand(2, 4, 3, 6)
    torch.testing.assert_close(attend(q, k, v, bias), by_loops(q, k, v, full).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(attention_weights(q, k, bias), attention_weights(q, k, full))


def test_a_constant_added_to_all_scores_changes_nothing():
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    torch.testing.assert_close(attention_weights(q, k, torch.full((1, 1, 1, 5), 50.0)), attention_weights(q, k))


def test_huge_scores_stay_finite():
    q, k, v = torch.full((1, 1, 1, 4), 1e6), torch.randn(1, 1, 5, 4), torch.randn(1, 1, 5, 4)
    assert attend(q, k, v).isfinite().all() and attention_weights(q, k).isfinite().all()


def test_attention_bias_adds_padding_to_the_given_bias():
    pad, bias = torch.tensor([[False, True]]), torch.randn(1, 3, 4, 2)
    both = attention_bias(pad, bias, bias)
    assert torch.equal(both[..., 0], bias[..., 0]) and (both[..., 1] == -math.inf).all()
    assert attention_bias(None, None, bias) is None and attention_bias(None, bias, bias) is bias


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_attention_bias_takes_the_dtype_of_the_scores(dtype):
    bias = attention_bias(torch.tensor([[False, True]]), None, torch.zeros(1, dtype=dtype))
    assert bias.dtype == dtype and bias.flatten().tolist() == [0, -math.inf]


def test_a_row_without_keys_is_nan_in_the_formula_and_never_a_wrong_number_in_the_fused_function():
    q, k, v = torch.randn(1, 1, 2, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    bias = torch.zeros(1, 1, 2, 3)
    bias[0, 0, 0] = -math.inf
    assert attention_weights(q, k, bias)[0, 0, 0].isnan().all()
    answer = attend(q, k, v, bias)[0, 0]
    assert answer[0].isnan().all() or (answer[0] == 0).all()
    torch.testing.assert_close(answer[1], attend(q, k, v)[0, 0, 1])


# --- the module against torch's -----------------------------------------------------------------------------------
@given(b=sizes, q=sizes, s=sizes, heads=st.sampled_from([1, 2, 4]), seed=seeds, mask=st.sampled_from(MASKS))
def test_equal_to_torchs_module(b, q, s, heads, mask, seed):
    padded, biased = mask
    torch.manual_seed(seed)
    theirs, ours = torch_module(8, heads)
    query, key, value = torch.randn(b, q, 8), torch.randn(b, s, 8), torch.randn(b, s, 8)
    pad = random_pad(b, s) if padded else None
    bias = torch.randn(b, heads, q, s) if biased else None
    mask = pad if bias is None or pad is None else torch.zeros(b, s).masked_fill(pad, -math.inf)
    flat = None if bias is None else bias.flatten(0, 1)
    answer, weights = theirs(query, key, value, key_padding_mask=mask, attn_mask=flat, average_attn_weights=False)
    torch.testing.assert_close(ours(query, key, value, pad, bias), answer, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weights(query, key, pad, bias), weights, rtol=1e-4, atol=1e-5)


def test_gradients_equal_torchs():
    theirs, ours = torch_module(8, 2)
    query, key, pad = torch.randn(2, 3, 8), torch.randn(2, 5, 8), random_pad(2, 5)
    theirs(query, key, key, key_padding_mask=pad)[0].square().sum().backward()
    ours(query, key, key, pad).square().sum().backward()
    stacked = torch.cat([getattr(ours, name).weight.grad for name in "qkv"])
    torch.testing.assert_close(stacked, theirs.in_proj_weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.out.weight.grad, theirs.out_proj.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_bias_on_all_keys_is_learned_in_vain():
    """A key bias adds the same number to all scores of a query, so its gradient is zero."""
    module, x = MultiHeadAttention(8, 2), torch.randn(2, 5, 8)
    module(x, x, x).square().sum().backward()
    assert module.k.bias.grad.abs().max() < 1e-5 < module.k.weight.grad.abs().max()


def test_weights_start_as_torchs_do():
    torch.manual_seed(0)
    ours, theirs = MultiHeadAttention(256, 8), nn.MultiheadAttention(256, 8)
    for name, part in zip("qkv", theirs.in_proj_weight.chunk(3), strict=True):
        weight = getattr(ours, name).weight
        torch.testing.assert_close(weight.std(), part.std(), rtol=0.02, atol=0)
        torch.testing.assert_close(weight.abs().max(), part.abs().max(), rtol=0.02, atol=0)
    assert all(linear.bias.abs().max() == 0 for linear in (ours.q, ours.k, ours.v, ours.out))


# --- what must not matter -----------------------------------------------------------------------------------------
@given(seed=seeds)
def test_content_of_padding_changes_nothing_and_gets_no_gradient(seed):
    torch.manual_seed(seed)
    module, query, key, pad = MultiHeadAttention(8, 2), torch.randn(2, 3, 8), torch.randn(2, 6, 8), random_pad(2, 6)
    other = torch.where(pad[..., None], 100 * torch.randn(2, 6, 8), key).requires_grad_()
    answer = module(query, other, other, pad)
    torch.testing.assert_close(answer, module(query, key, key, pad))
    answer.sum().backward()
    assert (other.grad[pad] == 0).all()


def test_padding_equals_leaving_the_tokens_away():
    module, query, key = MultiHeadAttention(8, 2), torch.randn(1, 3, 8), torch.randn(1, 6, 8)
    pad = torch.tensor([[False, True, False, False, True, True]])
    kept = key[:, ~pad[0]]
    torch.testing.assert_close(module(query, key, key, pad), module(query, kept, kept))


@given(seed=seeds)
def test_permutations(seed):
    torch.manual_seed(seed)
    module, x, memory = MultiHeadAttention(8, 2), torch.randn(2, 5, 8), torch.randn(2, 7, 8)
    pad, order, memory_order = random_pad(2, 7), torch.randperm(5), torch.randperm(7)
    torch.testing.assert_close(module(*[x[:, order]] * 3), module(x, x, x)[:, order])
    shuffled = memory[:, memory_order]
    torch.testing.assert_close(module(x, shuffled, shuffled, pad[:, memory_order]), module(x, memory, memory, pad))


def test_images_of_a_batch_do_not_see_each_other():
    module, x, pad = MultiHeadAttention(8, 4), torch.randn(3, 5, 8), random_pad(3, 5)
    alone = torch.cat([module(x[i : i + 1], x[i : i + 1], x[i : i + 1], pad[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(module(x, x, x, pad), alone)


# --- the module by itself -----------------------------------------------------------------------------------------
def test_nothing_is_stored_in_the_module():
    module, x = MultiHeadAttention(8, 2), torch.randn(2, 5, 8)
    before = dict(vars(module))
    module(x, x, x)
    module.weights(x, x)
    assert vars(module) == before and not list(module.buffers())
    names = {f"{part}.{kind}" for part in ("q", "k", "v", "out") for kind in ("weight", "bias")}
    assert set(module.state_dict()) == names


def test_forward_uses_the_fused_function(monkeypatch):
    calls, fused = [], attention.F.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    x = torch.randn(1, 3, 8)
    MultiHeadAttention(8, 2)(x, x, x)
    assert calls == [1]


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    module, x = MultiHeadAttention(8, 2, dropout=0.5), torch.randn(1, 6, 8)
    expected = module.eval()(x, x, x)
    assert torch.equal(module(x, x, x), expected)
    module.train()
    runs = torch.cat([module(x, x, x) for _ in range(400)])
    assert runs.std(0).max() > 0.01
    assert ((runs.mean(0) - expected[0]).abs() < 6 * runs.std(0) / 400**0.5 + 1e-6).all()
    torch.testing.assert_close(module.weights(x, x), module.eval().weights(x, x))


@pytest.mark.parametrize("heads", [0, -1, 3, 16])
def test_heads_must_divide_the_width(heads):
    with pytest.raises(ValueError, match=f"d=8 and heads={heads}"):
        MultiHeadAttention(8, heads)


@given(n=sizes, heads=st.sampled_from([1, 2, 3, 6]), seed=seeds)
def test_join_undoes_split_and_heads_are_slices(n, heads, seed):
    torch.manual_seed(seed)
    maps, x = HeadProjections(12, heads), torch.randn(2, n, 12)
    cut = maps.split(x)
    assert torch.equal(maps.join(cut), x)
    width = 12 // heads
    assert all(torch.equal(cut[:, i], x[..., i * width : (i + 1) * width]) for i in range(heads))


def test_wrong_shapes_are_refused():
    module, x = MultiHeadAttention(8, 2), torch.randn(2, 5, 8)
    with pytest.raises(TypeCheckError):
        module(x, x, x[:, :4])
    with pytest.raises(TypeCheckError):
        module(x, x, x, torch.zeros(2, 5))  # a float mask where True or False belongs
    with pytest.raises(TypeCheckError):
        module(x, x, x, bias=torch.zeros(5, 5))


def test_half_precision_runs_with_padding():
    module, x, pad = MultiHeadAttention(8, 2).bfloat16(), torch.randn(2, 5, 8).bfloat16(), random_pad(2, 5)
    answer = module(x, x, x, pad)
    assert answer.dtype == torch.bfloat16
    torch.testing.assert_close(answer.float(), module.float()(*[x.float()] * 3, pad), rtol=0.05, atol=0.05)
