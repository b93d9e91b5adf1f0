"""The transformer against torch's and Hugging Face's layers, and the symmetries that a set detector lives on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import nn
from torch.testing import assert_close

from detr_nb.notation import Memory, Prediction, Queries, QueryGroup
from detr_nb.transformer import (
    Decoder,
    DecoderLayer,
    DenseCrossAttention,
    Encoder,
    EncoderLayer,
    FeedForward,
    QueryPosition,
    Residual,
    StaticQueryPosition,
)

D, HEADS, HIDDEN = 16, 4, 24
seeds = st.integers(0, 2**31)
sizes = st.integers(1, 7)


class Head(nn.Module):
    """Linear scores and boxes; notes what it is asked."""

    def __init__(self, columns=3):
        super().__init__()
        self.classes, self.boxes, self.refs = nn.Linear(D, columns), nn.Linear(D, 4), []

    def forward(self, layer, content, base):
        self.refs.append(base)
        return Prediction(self.classes(content), self.boxes(content).sigmoid())

    def refine(self, layer, content, prediction, ref):
        return ref, ref


def make_memory(b=2, s=6, positions=True, padding=True, dtype=torch.float32):
    """Random tokens, of which some are padding; the first of each image is not."""
    pad = torch.rand(b, s) < 0.4 if padding else torch.zeros(b, s, dtype=torch.bool)
    pad[:, 0] = False
    pos = torch.randn(b, s, D, dtype=dtype) * positions
    return Memory(torch.randn(b, s, D, dtype=dtype), pos, pad, torch.rand(b, s, 2), ((1, s),), ())


def make_queries(b=2, q=5):
    pos = torch.randn(q, D).expand(b, -1, -1)
    return Queries(torch.zeros_like(pos), pos)


def randomise(net):
    """Numbers everywhere, also where fresh modules have zeros and ones."""
    for p in net.parameters():
        nn.init.normal_(p, 0.0 if p.ndim > 1 else 0.3, 0.3)
    return net


def make_decoder(depth=3, pre_norm=False, **options):
    layers = [DecoderLayer(D, HEADS, HIDDEN, pre_norm=pre_norm) for _ in range(depth)]
    return randomise(Decoder(layers, nn.LayerNorm(D), Head(), **options))


@torch.no_grad()
def copy_attention(ours, theirs):
    rows = zip((ours.q, ours.k, ours.v), theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True)
    for linear, weight, bias in rows:
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)
    ours.out.load_state_dict(theirs.out_proj.state_dict())


def copy_layer(ours, theirs):
    """Weights of torch's encoder or decoder layer into ours."""
    pairs = [(ours.feed_forward[0], theirs.linear1), (ours.feed_forward[3], theirs.linear2)]
    copy_attention(ours.attention, theirs.self_attn)
    steps = [ours.attention_step, ours.feed_step]
    if isinstance(ours, DecoderLayer):
        copy_attention(ours.cross.attention, theirs.multihead_attn)
        steps.insert(1, ours.cross_step)
    pairs += [(step.norm, getattr(theirs, f"norm{i}")) for i, step in enumerate(steps, 1)]
    for a, b in pairs:
        a.load_state_dict(b.state_dict())
    return ours


# --- torch's layers -----------------------------------------------------------------------------------------------
@given(b=st.integers(1, 3), s=sizes, pre_norm=st.booleans(), seed=seeds)
@settings(max_examples=20)
def test_encoder_equals_torchs_without_positions(b, s, pre_norm, seed):
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(D, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=pre_norm)
    theirs = nn.TransformerEncoder(layer, 2, nn.LayerNorm(D) if pre_norm else None, enable_nested_tensor=False)
    randomise(theirs)
    layers = [copy_layer(EncoderLayer(D, HEADS, HIDDEN, pre_norm=pre_norm), peer) for peer in theirs.layers]
    ours = Encoder(layers, theirs.norm)
    memory = make_memory(b, s, positions=False)
    expected = theirs(memory.x, src_key_padding_mask=memory.pad)
    assert_close(ours(memory).x, expected, rtol=1e-4, atol=1e-4)


@given(b=st.integers(1, 3), q=sizes, s=sizes, pre_norm=st.booleans(), causal=st.booleans(), seed=seeds)
@settings(max_examples=20)
def test_decoder_equals_torchs_without_positions(b, q, s, pre_norm, causal, seed):
    torch.manual_seed(seed)
    layer = nn.TransformerDecoderLayer(D, HEADS, HIDDEN, dropout=0.0, batch_first=True, norm_first=pre_norm)
    theirs = randomise(nn.TransformerDecoder(layer, 2, nn.LayerNorm(D)))
    layers = [copy_layer(DecoderLayer(D, HEADS, HIDDEN, pre_norm=pre_norm), peer) for peer in theirs.layers]
    head = Head()
    memory, content = make_memory(b, s, positions=False), torch.randn(b, q, D)
    mask = nn.Transformer.generate_square_subsequent_mask(q) if causal else None
    out = Decoder(layers, theirs.norm, head)(
        Queries(content, torch.zeros_like(content), None, None if mask is None else mask[None, None]), memory
    )
    hidden = theirs(content, memory.x, tgt_mask=mask, memory_key_padding_mask=memory.pad)
    assert_close(out.logits[-1], head.classes(hidden), rtol=1e-4, atol=1e-4)
    hidden = theirs.norm(theirs.layers[0](content, memory.x, tgt_mask=mask, memory_key_padding_mask=memory.pad))
    assert_close(out.boxes[0], head.boxes(hidden).sigmoid(), rtol=1e-4, atol=1e-4)


# --- Hugging Face's layers, with positions ------------------------------------------------------------------------
def hugging_face(kind):
    from transformers import DetrConfig, ResNetConfig
    from transformers.models.detr import modeling_detr as detr

    config = DetrConfig(
        backbone_config=ResNetConfig(), use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        d_model=D, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN, dropout=0.0, activation_function="relu",
    )
    config._attn_implementation = "eager"
    return randomise(getattr(detr, kind)(config)).eval()


def copy_hugging_face(ours, theirs):
    pairs = [(ours.feed_forward[0], theirs.mlp.fc1), (ours.feed_forward[3], theirs.mlp.fc2)]
    pairs += [(ours.attention_step.norm, theirs.self_attn_layer_norm), (ours.feed_step.norm, theirs.final_layer_norm)]
    attentions = [(ours.attention, theirs.self_attn)]
    if isinstance(ours, DecoderLayer):
        attentions.append((ours.cross.attention, theirs.encoder_attn))
        pairs.append((ours.cross_step.norm, theirs.encoder_attn_layer_norm))
    for a, b in attentions:
        pairs += [(getattr(a, name), getattr(b, f"{name}_proj")) for name in "qkv"] + [(a.out, b.o_proj)]
    for a, b in pairs:
        a.load_state_dict(b.state_dict())
    return ours


def as_bias(pad):
    return torch.zeros(pad.shape).masked_fill(pad, torch.finfo(torch.float32).min)[:, None, None]


def test_encoder_layer_equals_hugging_faces_with_positions():
    theirs, memory = hugging_face("DetrEncoderLayer"), make_memory()
    ours = copy_hugging_face(EncoderLayer(D, HEADS, HIDDEN), theirs)
    expected = theirs(memory.x, as_bias(memory.pad), memory.pos)
    assert_close(ours(memory).x, expected, rtol=1e-4, atol=1e-4)


def test_decoder_layer_equals_hugging_faces_with_positions():
    theirs, memory = hugging_face("DetrDecoderLayer"), make_memory()
    ours = copy_hugging_face(DecoderLayer(D, HEADS, HIDDEN), theirs)
    content, query_pos = torch.randn(2, 5, D), torch.randn(2, 5, D)
    expected = theirs(content, None, memory.pos, query_pos, memory.x, as_bias(memory.pad))
    assert_close(ours(content, QueryPosition(query_pos, query_pos), None, None, memory), expected, rtol=1e-4, atol=1e-4)


# --- symmetries ---------------------------------------------------------------------------------------------------
@given(q=st.integers(2, 7), s=sizes, pre_norm=st.booleans(), seed=seeds)
@settings(max_examples=20)
def test_permuted_queries_permute_the_outputs(q, s, pre_norm, seed):
    torch.manual_seed(seed)
    decoder, memory, queries = make_decoder(pre_norm=pre_norm), make_memory(s=s), make_queries(q=q)
    order = torch.randperm(q)
    out, permuted = decoder(queries, memory), decoder(queries._replace(pos=queries.pos[:, order]), memory)
    assert_close(permuted.logits, out.logits[:, :, order], rtol=1e-4, atol=1e-4)
    assert_close(permuted.boxes, out.boxes[:, :, order], rtol=1e-4, atol=1e-4)


@given(s=st.integers(2, 7), pre_norm=st.booleans(), seed=seeds)
@settings(max_examples=20)
def test_permuted_cells_change_nothing_when_their_positions_go_along(s, pre_norm, seed):
    torch.manual_seed(seed)
    encoder = randomise(Encoder([EncoderLayer(D, HEADS, HIDDEN, pre_norm=pre_norm) for _ in range(2)]))
    decoder, memory, queries = make_decoder(pre_norm=pre_norm), make_memory(s=s), make_queries()
    order = torch.randperm(s)
    moved = memory._replace(x=memory.x[:, order], pos=memory.pos[:, order], pad=memory.pad[:, order])
    assert_close(decoder(queries, encoder(moved)).boxes, decoder(queries, encoder(memory)).boxes, rtol=1e-4, atol=1e-4)


@given(s=st.integers(2, 7), pre_norm=st.booleans(), seed=seeds)
@settings(max_examples=20)
def test_padded_cells_change_nothing(s, pre_norm, seed):
    torch.manual_seed(seed)
    encoder = randomise(Encoder([EncoderLayer(D, HEADS, HIDDEN, pre_norm=pre_norm) for _ in range(2)]))
    decoder, memory, queries = make_decoder(pre_norm=pre_norm), make_memory(s=s), make_queries()
    hidden = memory.pad[..., None]
    other = memory._replace(x=torch.where(hidden, 1e3, memory.x), pos=torch.where(hidden, -1e3, memory.pos))
    assert_close(encoder(other).x[~memory.pad], encoder(memory).x[~memory.pad], rtol=1e-4, atol=1e-4)
    assert_close(decoder(queries, encoder(other)).boxes, decoder(queries, encoder(memory)).boxes, rtol=1e-4, atol=1e-4)


def test_padded_cells_equal_a_shorter_memory():
    encoder, memory = randomise(Encoder([EncoderLayer(D, HEADS, HIDDEN) for _ in range(2)])), make_memory(padding=False)
    memory.pad[:, 4:] = True
    short = memory._replace(x=memory.x[:, :4], pos=memory.pos[:, :4], pad=memory.pad[:, :4], xy=memory.xy[:, :4])
    assert_close(encoder(memory).x[:, :4], encoder(short).x, rtol=1e-4, atol=1e-4)
    decoder, queries = make_decoder(), make_queries()
    assert_close(decoder(queries, memory).boxes, decoder(queries, short).boxes, rtol=1e-4, atol=1e-4)


def test_an_image_in_company_equals_the_image_alone():
    encoder, decoder = randomise(Encoder([EncoderLayer(D, HEADS, HIDDEN)])), make_decoder()
    memory, queries = make_memory(b=3), make_queries(b=3)
    alone = Memory(*(part[1:2] for part in memory[:4]), memory.shapes, ())
    together = decoder(queries, encoder(memory)).logits[:, 1:2]
    assert_close(together, decoder(make_queries_like(queries, 1), encoder(alone)).logits, rtol=1e-4, atol=1e-4)


def make_queries_like(queries, b):
    return Queries(queries.content[:b], queries.pos[:b])


@pytest.mark.parametrize("pre_norm", [False, True])
def test_queries_with_one_position_say_the_same(pre_norm):
    decoder, memory, queries = make_decoder(6, pre_norm), make_memory(), make_queries()
    pos = queries.pos.clone()
    pos[:, 3] = pos[:, 0]
    boxes = decoder(queries._replace(pos=pos), memory).boxes
    assert_close(boxes[:, :, 3], boxes[:, :, 0])
    assert (boxes[:, :, 3] - boxes[:, :, 1]).abs().max() > 1e-3


@pytest.mark.parametrize("pre_norm", [False, True])
def test_memory_of_equal_contents_says_nothing_about_place(pre_norm):
    """Values carry no positions: if all contents are equal, even queries at different positions agree."""
    memory = make_memory()
    memory = memory._replace(x=memory.x[:, :1].expand_as(memory.x))
    encoder = randomise(Encoder([EncoderLayer(D, HEADS, HIDDEN, pre_norm=pre_norm) for _ in range(3)]))
    boxes = make_decoder(pre_norm=pre_norm)(make_queries(), encoder(memory)).boxes
    assert_close(boxes, boxes[:, :, :1].expand_as(boxes), rtol=1e-4, atol=1e-4)


# --- gradients ----------------------------------------------------------------------------------------------------
def gradients(encoder, decoder, dropout=0.0):
    queries, memory = make_queries(), make_memory(dtype=torch.float64)
    queries = Queries(queries.content.double(), queries.pos.double())
    net = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).double()
    out = decoder(queries, encoder(memory))
    loss = sum((part * torch.randn_like(part)).sum() for part in (out.logits, out.boxes))
    return dict(zip(dict(net.named_parameters()), torch.autograd.grad(loss, net.parameters()), strict=True))


def fresh(pre_norm):
    encoder = Encoder([EncoderLayer(D, HEADS, HIDDEN, pre_norm=pre_norm) for _ in range(2)])
    layers = [DecoderLayer(D, HEADS, HIDDEN, pre_norm=pre_norm) for _ in range(3)]
    return encoder, Decoder(layers, nn.LayerNorm(D), Head())


SILENT = {"q.weight", "q.bias", "k.weight", "k.bias", "v.weight", "out.weight"}


@pytest.mark.parametrize("pre_norm", [False, True])
def test_which_parameters_are_silent_at_the_start(pre_norm):
    found = gradients(*fresh(pre_norm))
    zero = {f"decoder.layers.0.attention.{name}" for name in SILENT} | {"decoder.layers.0.attention_step.norm.weight"}
    zero |= {"decoder.layers.0.cross_step.norm.weight"} if pre_norm else set()
    assert {name for name, g in found.items() if (g == 0).all()} == zero
    rounding = {name for name in found if name.endswith("k.bias")}
    assert all(found[name].abs().max() < 1e-12 for name in rounding)
    assert all(g.abs().max() > 1e-8 for name, g in found.items() if name not in zero | rounding)


def test_first_value_projection_is_silent_for_ever():
    """Post-norm: whatever the weights have become, the first self-attention's input is zero."""
    encoder, decoder = (randomise(part) for part in fresh(pre_norm=False))
    found = gradients(encoder, decoder)
    first = "decoder.layers.0.attention."
    assert (found[first + "v.weight"] == 0).all()
    for name in ("q.weight", "k.weight"):
        assert found[first + name].abs().max() < 1e-10  # everybody says the same, so nobody cares who listens
    assert found[first + "v.bias"].abs().max() > 1e-6 and found[first + "out.weight"].abs().max() > 1e-6


def test_double_precision_gradients_are_right():
    layer = randomise(DecoderLayer(4, 2, 6)).double()
    memory = Memory(*(part[..., :4].double() for part in make_memory(1, 3)[:2]), torch.tensor([[False, False, True]]),
                    torch.rand(1, 3, 2), ((1, 3),), ())
    content, pos = (torch.randn(1, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda c, p: layer(c, QueryPosition(p, p), None, None, memory), (content, pos))


# --- parts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pre_norm", [False, True])
def test_step_by_the_formula(pre_norm):
    step, x, matrix = Residual(D, pre_norm=pre_norm), torch.randn(2, 3, D), torch.randn(D, D)

    def norm(t):
        return nn.functional.layer_norm(t, (D,))

    expected = x + norm(x) @ matrix if pre_norm else norm(x + x @ matrix)
    assert_close(step(x, lambda t: t @ matrix), expected)


def test_feed_forward_starts_xavier_uniform_with_torchs_biases():
    torch.manual_seed(0)
    net = FeedForward(64, 256)
    for linear in (net[0], net[3]):
        limit = (6 / sum(linear.weight.shape)) ** 0.5
        assert 0.95 * limit < linear.weight.abs().max() <= limit
        assert 0 < linear.bias.abs().max() <= linear.in_features**-0.5


def test_dropout_acts_in_training_only():
    memory, queries = make_memory(), make_queries()
    encoder = Encoder([EncoderLayer(D, HEADS, HIDDEN, dropout=0.5)])
    decoder = Decoder([DecoderLayer(D, HEADS, HIDDEN, dropout=0.5)], nn.LayerNorm(D), Head())
    assert not torch.equal(encoder(memory).x, encoder(memory).x)
    encoder.eval(), decoder.eval()
    assert torch.equal(decoder(queries, encoder(memory)).boxes, decoder(queries, encoder(memory)).boxes)
    EncoderLayer(D, HEADS, HIDDEN, dropout=0)(memory)  # an int is a number, too


def test_no_layers_pass_the_memory_on():
    memory = make_memory()
    assert torch.equal(Encoder([])(memory).x, memory.x)


def test_wrong_shapes_are_refused():
    layer, memory = DecoderLayer(D, HEADS, HIDDEN), make_memory()
    here = QueryPosition(torch.zeros(2, 5, D), torch.zeros(2, 5, D))
    with pytest.raises(TypeCheckError):
        layer(torch.zeros(2, 5, D), QueryPosition(torch.zeros(2, 4, D), here.cross), None, None, memory)
    with pytest.raises(TypeCheckError):
        layer(torch.zeros(2, 5, D), here, None, torch.zeros(5, 5), memory)


# --- seams --------------------------------------------------------------------------------------------------------
def test_query_position_is_asked_once_a_layer_with_what_it_needs():
    asked = []

    class Spy(StaticQueryPosition):
        def forward(self, layer, content, pos, ref, memory):
            asked.append((layer, content.clone(), memory, ref))
            return super().forward(layer, content, pos, ref, memory)

    torch.manual_seed(1)
    plain = make_decoder()
    spied = Decoder(list(plain.layers), plain.norm, plain.head, Spy())
    queries, memory = make_queries()._replace(ref=torch.rand(2, 5, 2)), make_memory()
    assert_close(spied(queries, memory).boxes, plain(queries, memory).boxes)
    assert [layer for layer, *_ in asked] == [0, 1, 2]
    assert (asked[0][1] == 0).all() and not torch.equal(asked[1][1], asked[2][1])
    assert all(seen is memory and ref is queries.ref for *_, seen, ref in asked)


def test_refined_references_reach_the_next_layer_and_only_it():
    class Refining(Head):
        def refine(self, layer, content, prediction, ref):
            return prediction.boxes.detach(), prediction.boxes.detach()

    seen = []

    class Cross(DenseCrossAttention):
        def forward(self, content, where, ref, memory):
            seen.append(ref)
            return super().forward(content, where, ref, memory)

    layers = [DecoderLayer(D, HEADS, HIDDEN, cross=Cross(D, HEADS)) for _ in range(3)]
    head, start = Refining(), torch.rand(2, 5, 4)
    out = Decoder(layers, nn.LayerNorm(D), head)(make_queries()._replace(ref=start), make_memory())
    for refs in (seen, head.refs):
        assert refs[0] is start
        assert_close(refs[1], out.boxes[0]), assert_close(refs[2], out.boxes[1])
        assert not refs[1].requires_grad


def test_cross_attention_can_be_replaced_layer_by_layer():
    class Silence(nn.Module):
        def forward(self, content, where, ref, memory):
            return torch.zeros_like(content)

    deaf = DecoderLayer(D, HEADS, HIDDEN, cross=Silence())
    memory, queries = make_memory(), make_queries()
    other = memory._replace(x=torch.randn_like(memory.x))
    arguments = (queries.content, QueryPosition(queries.pos, queries.pos), None, None)
    assert_close(deaf(*arguments, memory), deaf(*arguments, other))
    assert not any("cross.attention" in name for name, _ in deaf.named_parameters())


@given(groups=st.lists(st.integers(1, 3), min_size=1, max_size=3), seed=seeds)
@settings(max_examples=10)
def test_a_self_mask_of_blocks_separates_groups_of_queries(groups, seed):
    torch.manual_seed(seed)
    member = torch.repeat_interleave(torch.arange(len(groups)), torch.tensor(groups))
    mask = torch.zeros(1, 1, len(member), len(member)).masked_fill(member[:, None] != member, float("-inf"))
    decoder, memory, queries = make_decoder(), make_memory(), make_queries(q=len(member))
    together = decoder(queries._replace(self_mask=mask), memory).boxes
    for group in range(len(groups)):
        own = Queries(queries.content[:, member == group], queries.pos[:, member == group])
        assert_close(together[:, :, member == group], decoder(own, memory).boxes, rtol=1e-4, atol=1e-4)


def test_what_looks_next_and_what_counts_next_may_differ():
    """Look forward twice: the cross-attention gets a detached reference, the next head one with its gradient."""
    class Twice(Head):
        def forward(self, layer, content, base):
            self.refs.append(base)
            return Prediction(self.classes(content), (base.logit(eps=1e-3) + self.boxes(content)).sigmoid())

        def refine(self, layer, content, prediction, ref):
            return prediction.boxes.detach(), prediction.boxes

    seen = []

    class Cross(DenseCrossAttention):
        def forward(self, content, where, ref, memory):
            seen.append(ref)
            return super().forward(content, where, ref, memory)

    layers = [DecoderLayer(D, HEADS, HIDDEN, cross=Cross(D, HEADS)) for _ in range(3)]
    head, start = Twice(), torch.rand(2, 5, 4, requires_grad=True)
    Decoder(layers, nn.LayerNorm(D), head)(make_queries()._replace(ref=start), make_memory())
    assert [ref.requires_grad for ref in seen] == [True, False, False]  # the loop itself detaches nothing
    assert all(base.requires_grad for base in head.refs)
    assert_close(seen[1:], [base.detach() for base in head.refs[1:]])


def test_groups_are_put_aside_under_their_names_and_the_others_answer():
    torch.manual_seed(2)
    decoder, memory, queries = make_decoder(), make_memory(), make_queries(q=6)
    pairs = [(torch.tensor([0]), torch.tensor([1])), (torch.tensor([]).long(), torch.tensor([]).long())]
    groups = (QueryGroup("first", slice(0, 2), pairs, 3), QueryGroup("last", slice(5, 6)))
    everything = decoder(queries, memory)
    proposals = Prediction(torch.rand(2, 7, 3), torch.rand(2, 7, 4))
    out = decoder(queries._replace(groups=groups, proposals=proposals), memory)
    assert_close(out.boxes, everything.boxes[:, :, 2:5])
    assert_close(out.content, everything.content[:, :, 2:5])
    assert list(out.extra) == ["proposals", "first", "last"] and out.matches is None and out.repeats == 1
    assert_close(out.extra["first"].logits, everything.logits[:, :, :2])
    assert out.extra["first"].matches is pairs and out.extra["first"].repeats == 3
    assert out.extra["proposals"].logits.shape == (1, 2, 7, 3)
    assert not everything.extra


def test_a_position_of_its_own_for_each_attention_and_a_bias():
    """What is added to the self-attention does not reach the cross-attention, and a bias of minus infinity hides."""
    layer, memory = DecoderLayer(D, HEADS, HIDDEN), make_memory(padding=False)
    content, pos = torch.randn(2, 5, D), torch.randn(2, 5, D)
    bias = torch.zeros(2, HEADS, 5, 6)
    bias[..., 3] = float("-inf")
    where = QueryPosition(torch.zeros_like(pos), pos, bias)
    weights = layer.cross.look(content, where, None, memory)
    assert (weights[..., 3] == 0).all()
    others = memory._replace(x=memory.x.clone())
    others.x[:, 3] = 100
    assert_close(layer.cross(content, where, None, others), layer.cross(content, where, None, memory))
