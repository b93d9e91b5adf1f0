"""Anchor DETR beside its authors' recorded outputs, beside its own attention made dense, and beside DETR."""

import math
from dataclasses import replace

import pytest
import torch
from family import Member
from official import DATA, fill
from test_seams import TINY, Pairs, pictures, truth
from torch import Tensor, nn
from torch.testing import assert_close

from detr_nb.attention import MultiHeadAttention
from detr_nb.config import ModelConfig
from detr_nb.family.anchor import AnchorDETR, RowColumnAttention, RowColumnCells
from detr_nb.family.focal import FocalDETR
from detr_nb.finetuning import replace_head, resize_queries
from detr_nb.insight import attention_maps
from detr_nb.losses import criterion_for
from detr_nb.model import DETR, ResNetConfig
from detr_nb.notation import Memory, Target
from detr_nb.pretrained import load_pretrained, pretrained_model
from detr_nb.training import TrainConfig, fit
from detr_nb.transformer import CellAttention, QueryPosition

NAME = "anchor_detr_small"
SMALL = AnchorDETR(ResNetConfig("resnet50", dilation=True, pretrained=False), 20, enc_layers=2, dec_layers=3,
                   dim_feedforward=128)
TINY_ANCHOR = AnchorDETR(num_queries=4, num_query_pattern=2, **TINY)
OPTIONS = {"as it is": TINY_ANCHOR, "dense": replace(TINY_ANCHOR, row_column=False),
           "grid": replace(TINY_ANCHOR, grid_prior=True), "pre-norm": replace(TINY_ANCHOR, pre_norm=True)}
MAPS = ("q", "down.q", "k", "down.k", "v")  # in the order in which the authors stack them


class Once(Member):
    """The authors' small model, read once."""

    def model(self) -> DETR:
        """Ours with the weights of the file."""
        if not hasattr(self, "read"):
            self.read = super().model()
        return self.read


@pytest.fixture(scope="module")
def authors(tmp_path_factory) -> Once:
    return Once(NAME, SMALL, tmp_path_factory.mktemp(NAME))


def build(config: ModelConfig, classes: int = 3) -> DETR:
    torch.manual_seed(0)
    return config.build(classes)


def grid_memory(rows: int, columns: int, d: int = 16, wide: int = 2, seed: int = 0) -> Memory:
    """Two memories of random numbers without padding."""
    draw = torch.Generator().manual_seed(seed)
    x, pos = (torch.randn(2, rows * columns, width, generator=draw) for width in (d, wide * d))
    pad = torch.zeros(2, rows * columns, dtype=torch.bool)
    return Memory(x, pos, pad, torch.rand(2, rows * columns, 2, generator=draw), ((rows, columns),), ())


# --- beside the authors -----------------------------------------------------------------------------------------------
def test_predictions_are_the_authors(authors):
    authors.check_predictions()


def test_losses_and_matches_are_the_authors(authors):
    authors.check_losses()


def test_detections_are_the_authors(authors):
    authors.check_detections()


def test_their_file_says_what_it_holds(authors, monkeypatch):
    """The model is built from the options in the file; the weights have been compared above."""
    monkeypatch.setattr("detr_nb.pretrained.load_checkpoint", lambda model, *_: model)
    model = pretrained_model(authors.file)
    assert model.config == SMALL and model.num_classes == 91


@pytest.mark.parametrize("mask", ["mask", "nomask"])
@pytest.mark.parametrize("shape", ["wide", "tall", "square"])
def test_attention_is_the_authors(shape, mask):
    theirs = {key: torch.from_numpy(value) for key, value in fill.np.load(DATA / "rcda.npz").items()}
    attention = RowColumnAttention(32, 4)
    state = {"out.weight": theirs["w/out_proj.weight"], "out.bias": theirs["w/out_proj.bias"]}
    for kind in ("weight", "bias"):
        parts = theirs[f"w/in_proj_{kind}"].chunk(5)
        state |= {f"{name}.{kind}": part for name, part in zip(MAPS, parts, strict=True)}
    attention.load_state_dict(state)
    x = theirs[f"{shape}/value"]
    pos = torch.cat((theirs[f"{shape}/k_row"] - x, theirs[f"{shape}/k_col"] - x), -1).flatten(1, 2)
    pad = theirs[f"{shape}/mask"] & (mask == "mask")
    memory = Memory(x.flatten(1, 2), pos, pad.flatten(1, 2), pos[..., :2], (tuple(pad.shape[1:]),), ())
    asked = torch.cat((theirs[f"{shape}/q_row"], theirs[f"{shape}/q_col"]), -1)
    content = torch.zeros_like(asked[..., :32])
    inputs = content, QueryPosition(content, asked), None, memory
    out = attention(*inputs)
    assert_close(out.transpose(0, 1), theirs[f"{shape}/{mask}/out"], atol=1e-5, rtol=0)
    dense = attention.look(*inputs) @ attention.split(attention.v(memory.x))
    assert_close(attention.out(attention.join(dense)), out, atol=1e-5, rtol=0)


def dense_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' names of a model with ordinary attention: three stacked maps instead of five."""
    return {name: value[: 3 * len(value) // 5] if "in_proj" in name and len(value) % 5 == 0 else value
            for name, value in state.items()}


def test_their_other_options_load(authors, tmp_path):
    """Ordinary attention, whose file has an adapter that nobody asks; a grid, whose file has no points."""
    saved = torch.load(authors.file, weights_only=False)
    dense = {"model": dense_names(saved["model"]), "args": saved["args"]}
    torch.save(dense, tmp_path / "dense.pth")
    load_pretrained(replace(SMALL, row_column=False).build(91), tmp_path / "dense.pth")
    points = {name: value for name, value in saved["model"].items() if "position" not in name}
    torch.save({"model": points, "args": saved["args"]}, tmp_path / "grid.pth")
    grid = replace(SMALL, grid_prior=True, num_queries=17).build(91)
    load_pretrained(grid, tmp_path / "grid.pth")
    assert grid.queries.count == 16
    assert_close(grid.queries.places()[:5], torch.tensor([[1, 1], [1, 3], [1, 5], [1, 7], [3, 1]]) / 8)


# --- its new parts made neutral ---------------------------------------------------------------------------------------
def test_on_a_grid_of_one_row_it_is_dense_attention():
    attention, memory, dense = RowColumnAttention(16, 2), grid_memory(1, 6), MultiHeadAttention(16, 2)
    dense.load_state_dict({name: value for name, value in attention.state_dict().items() if "down" not in name})
    content, asked = torch.randn(2, 5, 16), torch.randn(2, 5, 32)
    inputs = content, QueryPosition(content, asked), None, memory
    key = memory.x + memory.pos[..., :16]
    assert_close(attention(*inputs), dense(content + asked[..., :16], key, memory.x))
    assert_close(attention.look(*inputs), dense.weights(content + asked[..., :16], key))


def test_without_its_parts_it_is_detr():
    """Dense, one pattern of zeros, points in the middle, adapters that answer zero: DETR with sigmoid scores."""
    model = build(replace(TINY_ANCHOR, row_column=False, num_query_pattern=1, pre_norm=True))
    detr = build(replace(FocalDETR(num_queries=4, **TINY), pre_norm=True))
    with torch.no_grad():
        model.queries.references.weight.fill_(0.5)
        for part in (model.queries.patterns.weight, model.memory.positions.plane[-1].weight,
                     model.memory.positions.plane[-1].bias, detr.queries.embedding.weight):
            part.zero_()
    for part in ("encoder", "decoder"):
        theirs = getattr(model, part).state_dict()
        own = getattr(detr, part).state_dict()
        assert {name for name in theirs.keys() - own.keys() if "query_position" not in name} == set()
        getattr(detr, part).load_state_dict({name: theirs[name] for name in own})
    memory = grid_memory(4, 6, wide=1)
    memory = memory._replace(pos=torch.zeros_like(memory.pos))
    ours, theirs = (one.decoder(one.queries(memory), one.encoder(memory)) for one in (model, detr))
    assert_close(ours[:2], theirs[:2])


# --- memory ---------------------------------------------------------------------------------------------------------
def largest(function: object) -> int:
    """Bytes of the largest tensor that is kept for the way back."""
    sizes = [0]
    keep = lambda tensor: sizes.append(tensor.numel() * tensor.element_size()) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return max(sizes)


@pytest.mark.parametrize(("rows", "columns"), [(32, 32), (24, 40), (40, 24)])
def test_a_training_step_at_a_large_grid_keeps_less_than_dense_attention(rows, columns):
    """With dropout torch's attention on a CPU keeps the table of weights, as all did when RCDA was made: the ratio is
    head width by the longer side."""
    dense, ours = CellAttention(16, 4, 0.1).train(), RowColumnCells(16, 4, 0.1).train()
    one, two = (grid_memory(rows, columns, wide=wide) for wide in (1, 2))
    x = one.x.requires_grad_()
    table, lines = largest(lambda: dense(x, one)), largest(lambda: ours(x, two))
    assert table == 2 * 4 * (rows * columns) ** 2 * 4
    assert lines / table == pytest.approx(4 / max(rows, columns))


# --- everything that DETR passes through ------------------------------------------------------------------------------
def without_gradient(model: DETR, targets: list[Target]) -> set[str]:
    criterion = criterion_for(model)
    total = criterion.total(criterion(model.train()(pictures()), targets))
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    return {name for name, p in model.named_parameters() if p.grad is None}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("count", [0, 1])
def test_gradients_reach_every_parameter_with_and_without_objects(option, count):
    nothing = Target(labels=torch.zeros(0, dtype=torch.int64), boxes=torch.zeros(0, 4))
    assert without_gradient(build(OPTIONS[option]), truth() if count else [nothing] * 2) == set()


@pytest.fixture(scope="module")
def run():
    return fit(TrainConfig(Pairs(), TINY_ANCHOR, steps=2, batch_size=4, evaluations=1, scales=(), progress=False))


def test_it_trains_and_is_saved(run, tmp_path):
    assert all(math.isfinite(value) for value in run.history[-1].values() if isinstance(value, float))
    run.model.eval().save_pretrained(tmp_path)
    again = pretrained_model(tmp_path)
    assert again.config == TINY_ANCHOR and again.memory.positions is again.decoder.query_position.positions
    with torch.no_grad():
        assert_close(again(pictures())[:2], run.model(pictures())[:2])


def test_new_classes_and_points():
    model = build(TINY_ANCHOR)
    assert replace_head(model, 7, keep={4: 2}).num_classes == 7
    assert model.head.classes.bias[0].item() == pytest.approx(-math.log(99))
    old = model.queries.references.weight.clone()
    assert resize_queries(model, 6).config.num_queries == 6
    assert_close(model.queries.references.weight[:4], old)
    assert ((model.queries.references.weight >= 0) & (model.queries.references.weight <= 1)).all()
    assert model.eval()(pictures()).logits.shape == (2, 2, 12, 7)
    grid = resize_queries(build(OPTIONS["grid"]), 9)
    assert grid.queries.count == 9 and not list(grid.queries.references.parameters())


@pytest.mark.parametrize("option", OPTIONS)
def test_what_it_looks_at_is_drawn(option):
    maps = attention_maps(build(OPTIONS[option]), pictures())
    assert maps.cross.shape == (2, 2, 2, 8, 96) and maps.encoder.shape == (1, 2, 2, 96, 96)
    assert_close(maps.cross.sum(-1), torch.ones(2, 2, 2, 8))
    assert_close(maps.encoder.sum(-1), torch.ones(1, 2, 2, 96))


@pytest.mark.parametrize(("row_column", "moves"), [(True, True), (False, False)])
def test_padded_cells_reach_the_means_as_in_the_authors_code(row_column, moves):
    """A faithful exception: what stands in a padded cell moves the mean key of its row and of its column."""
    model = build(replace(TINY_ANCHOR, row_column=row_column)).eval()
    pad = torch.zeros(2, 64, 96, dtype=torch.bool)
    pad[1, 40:] = True
    with torch.no_grad():
        memory = model.memory(pictures(), pad)
        spoilt = memory._replace(x=memory.x.masked_fill(memory.pad[..., None], 7.0))
        one, two = (model.decoder(model.queries(part), model.encoder(part)) for part in (memory, spoilt))
    assert_close(one.logits[:, 0], two.logits[:, 0])
    assert ((one.logits - two.logits).abs().max() > 1e-4) == moves


def test_the_full_size_is_built_without_memory():
    with torch.device("meta"):
        model = AnchorDETR(ResNetConfig("resnet50", pretrained=False)).build(91)
    assert model.queries.count == 300 and model.queries.patterns.num_embeddings == 3
    assert isinstance(model.decoder.norm, nn.Identity) and 30e6 < sum(p.numel() for p in model.parameters()) < 45e6
