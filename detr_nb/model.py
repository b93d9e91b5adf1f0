"""Object queries, heads, and DETR put together."""
from collections.abc import Callable, Sequence
from importlib.resources import files

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet50

from detr_nb.backbone import ResNet, TinyBackbone
from detr_nb.boxes import cxcywh_to_xyxy, scale_boxes
from detr_nb.notation import Memory, Number, Output, Queries, Target
from detr_nb.positions import SinePositions
from detr_nb.transformer import Decoder, DecoderLayer, Encoder, EncoderLayer

def resize_padding(pad: Bool[Tensor, "b y x"], size: tuple[int, int]) -> Bool[Tensor, "b y2 x2"]:
    """Shrink a padding mask to a feature grid by picking the nearest pixel, as the original does.

    Args:
        pad: True where a pixel is padding.
        size: (rows, columns) of the grid.

    Returns:
        True where a cell is padding.
    """
    return F.interpolate(pad[None].float(), size=size, mode="nearest")[0].bool()

def cell_centres(pad: Bool[Tensor, "b y x"]) -> Float[Tensor, "b y x 2"]:
    """Centre (x, y) of each cell, 0 to 1 over the unpadded part of the grid."""
    valid = ~pad
    y, x = valid.cumsum(1).float(), valid.cumsum(2).float()
    return torch.stack(((x - 0.5) / x[:, :, -1:].clamp(min=1), (y - 0.5) / y[:, -1:].clamp(min=1)), -1)

def check_padding(pad: Bool[Tensor, "b y x"]) -> None:
    """Refuse a grid without any valid cell: attention over nothing would be NaN. Silent while a graph is traced.

    Raises:
        ValueError: naming the images of the batch that are all padding.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    empty = pad.flatten(1).all(1)
    if empty.any():
        raise ValueError(f"images {empty.nonzero().flatten().tolist()} of the batch are all padding on the "
                         f"{pad.shape[1]} x {pad.shape[2]} feature grid: pad is True where there is NO picture")

class SingleLevelMemory(nn.Module):
    """Images to tokens: backbone, projection to the model width, positions.

    Args:
        backbone: maps images to a list of features, finest first; its `channels` is the width of the last.
        positions: maps a padding mask to position embeddings.
        d: model width.
    """

    def __init__(self, backbone: nn.Module, positions: nn.Module, d: int):
        super().__init__()
        self.backbone, self.positions, self.project = backbone, positions, nn.Conv2d(backbone.channels, d, 1)

    def forward(self, images: Float[Tensor, "b 3 y x"], pad: Bool[Tensor, "b y x"]) -> Memory:
        """Read a batch of normalised images; `pad` is True where there is no picture.

        Raises:
            ValueError: if an image is all padding.
        """
        features = self.backbone(images)
        x = self.project(features[-1])  # b d y x
        size = tuple(x.shape[-2:])
        pad = resize_padding(pad, size)
        check_padding(pad)
        tokens = (x.permute(0, 2, 3, 1), self.positions(pad), pad, cell_centres(pad))
        return Memory(*(token.flatten(1, 2) for token in tokens), shapes=(size,), features=tuple(features))

class ObjectQueries(nn.Module):
    """One learned vector a query, used as its position; the content starts at zero (DETR, section 3.2).

    Args:
        count: number of queries, the largest number of objects that can be found in one image.
        d: model width.

    Raises:
        ValueError: if there is no query.
    """

    def __init__(self, count: int, d: int):
        super().__init__()
        if count < 1:
            raise ValueError(f"a DETR needs at least one query, got num_queries={count}")
        self.embedding = nn.Embedding(count, d)

    def forward(self, memory: Memory, targets: Sequence[Target] | None = None) -> Queries:
        """Give every image of the batch the same queries; DETR asks neither the image nor the targets."""
        pos = self.embedding.weight.expand(len(memory.x), -1, -1)
        return Queries(torch.zeros_like(pos), pos)

def columns(num_classes: int) -> int:
    """Number of class scores: every class, and no-object in the last column.

    Raises:
        ValueError: if there is no class.
    """
    if num_classes < 1:
        raise ValueError(f"a detector needs at least one class, got num_classes={num_classes} "
                         "(no-object is added by the model: do not count it)")
    return num_classes + 1

class MLP(nn.Sequential):
    """Linear maps with ReLUs between.

    Args:
        widths: input, hidden and output widths in order.
    """

    def __init__(self, *widths: int):
        layers = [part for a, b in zip(widths, widths[1:], strict=False) for part in (nn.Linear(a, b), nn.ReLU())]
        super().__init__(*layers[:-1])

class Head(nn.Module):
    """Class scores and a box for every query (DETR, section 3.2: prediction feed-forward networks).

    Args:
        d: model width.
        num_classes: number of classes, no-object not counted.
    """

    def __init__(self, d: int, num_classes: int):
        super().__init__()
        self.classes, self.boxes = nn.Linear(d, columns(num_classes)), MLP(d, d, d, 4)

    def forward(
        self, content: Float[Tensor, "b q d"], ref: Float[Tensor, "b q r"] | None = None
    ) -> tuple[Float[Tensor, "b q c"], Float[Tensor, "b q 4"]]:
        """Return logits and normalised cxcywh boxes; DETR has no reference and ignores `ref`."""
        return self.classes(content), self.boxes(content).sigmoid()

    def refine(
        self, boxes: Float[Tensor, "b q 4"], ref: Float[Tensor, "b q r"] | None
    ) -> Float[Tensor, "b q r"] | None:
        """The reference of the next layer: unchanged here."""
        return ref

def softmax_scores(logits: Float[Tensor, "*n c"]) -> Float[Tensor, "*n _"]:
    """Class probabilities without those of no-object, the last column; they sum to at most 1."""
    return logits.softmax(-1)[..., :-1]

def check_images(images: Tensor, pad: Tensor | None) -> None:
    """Refuse a batch that the model would misread or fail on deep inside.

    Raises:
        ValueError: if the images are not floats of shape b 3 y x, or the mask is not boolean of shape b y x.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError("images must be one batch of normalised floats, b 3 y x (images[None] makes a batch of one); "
                         f"got {images.dtype} of shape {tuple(images.shape)}")
    if pad is not None and (pad.shape != images[:, 0].shape or pad.dtype != torch.bool):
        raise ValueError(f"pad must be boolean, True where there is no picture, here {tuple(images[:, 0].shape)}; "
                         f"got {pad.dtype} of shape {tuple(pad.shape)}")

class DETR(nn.Module):
    """Images in, a set of classes and boxes out (Carion et al. 2020, figure 2).

    Args:
        memory: `memory(images, pad) -> Memory`.
        encoder: `encoder(memory) -> memory`.
        queries: `queries(memory) -> Queries`.
        decoder: `decoder(queries, memory) -> Output` of all layers.
        aux_loss: return the predictions of every decoder layer, not only of the last.
        scores: turns logits into scores of the classes, without no-object.

    Attributes:
        names: names of the classes that the model was trained on; None until then.
        category_ids: the dataset's own id of each class; None until then.
    """

    def __init__(
        self,
        memory: nn.Module,
        encoder: nn.Module,
        queries: nn.Module,
        decoder: nn.Module,
        aux_loss: bool = True,
        scores: Callable[[Tensor], Tensor] = softmax_scores,
    ):
        super().__init__()
        self.memory, self.encoder, self.queries, self.decoder = memory, encoder, queries, decoder
        self.aux_loss, self.scores = aux_loss, scores
        self.names: list[str] | None = None
        self.category_ids: list[int] | None = None

    def forward(self, images: Float[Tensor, "b 3 y x"], pad: Bool[Tensor, "b y x"] | None = None) -> Output:
        """Detect.

        Args:
            images: normalised with the mean and standard deviation of the training images.
            pad: True where there is padding; None if there is none.

        Returns:
            Predictions of every decoder layer, or of the last alone if `aux_loss` is off; `[-1]` is the prediction.

        Raises:
            ValueError: if shapes or types do not fit, or an image is all padding.
        """
        check_images(images, pad)
        if pad is None:
            pad = torch.zeros_like(images[:, 0], dtype=torch.bool)
        memory = self.encoder(self.memory(images, pad))
        out = self.decoder(self.queries(memory), memory)
        return out if self.aux_loss else Output(out.logits[-1:], out.boxes[-1:])

def detr(
    backbone: nn.Module,
    num_classes: int,
    num_queries: int = 100,
    hidden_dim: int = 256,
    nheads: int = 8,
    enc_layers: int = 6,
    dec_layers: int = 6,
    dim_feedforward: int = 2048,
    dropout: Number = 0.1,
    pre_norm: bool = False,
    temperature: Number = 10000,
    aux_loss: bool = True,
) -> DETR:
    """Assemble DETR on a backbone.

    Args:
        backbone: maps images to a list of features, finest first; has `channels`.
        num_classes: number of classes, no-object not counted.
        num_queries: the largest number of objects that can be found in one image.
        hidden_dim: width of the tokens and queries.
        nheads: attention heads.
        enc_layers: encoder layers.
        dec_layers: decoder layers.
        dim_feedforward: hidden width of the feed-forward nets.
        dropout: share dropped in training, in [0, 1).
        pre_norm: normalise before each sublayer instead of after.
        temperature: of the sine positions; about 20 suits small grids.
        aux_loss: return the predictions of every decoder layer.
    """
    sizes = (hidden_dim, nheads, dim_feedforward, float(dropout), pre_norm)
    memory = SingleLevelMemory(backbone, SinePositions(hidden_dim, temperature), hidden_dim)
    encoder = Encoder([EncoderLayer(*sizes) for _ in range(enc_layers)], nn.LayerNorm(hidden_dim) if pre_norm else None)
    layers = [DecoderLayer(*sizes) for _ in range(dec_layers)]
    decoder = Decoder(layers, nn.LayerNorm(hidden_dim), Head(hidden_dim, num_classes))
    return DETR(memory, encoder, ObjectQueries(num_queries, hidden_dim), decoder, aux_loss)

def detr_resnet50(
    num_classes: int = 91, num_queries: int = 100, pretrained_backbone: bool = True, hidden_dim: int = 256,
    nheads: int = 8, enc_layers: int = 6, dec_layers: int = 6, dim_feedforward: int = 2048, dropout: Number = 0.1,
    aux_loss: bool = True,
) -> DETR:
    """DETR on ResNet-50: the arguments are those of `detr`; the backbone starts from ImageNet unless told otherwise."""
    backbone = ResNet("resnet50", pretrained=pretrained_backbone)
    sizes = (hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
    return detr(backbone, num_classes, num_queries, *sizes, aux_loss=aux_loss)

def detr_resnet50_dc5(
    num_classes: int = 91, num_queries: int = 100, pretrained_backbone: bool = True, hidden_dim: int = 256,
    nheads: int = 8, enc_layers: int = 6, dec_layers: int = 6, dim_feedforward: int = 2048, dropout: Number = 0.1,
    aux_loss: bool = True,
) -> DETR:
    """As `detr_resnet50`, but the last stage dilates: four times as many tokens, better on small objects."""
    backbone = ResNet("resnet50", dilation=True, pretrained=pretrained_backbone)
    sizes = (hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
    return detr(backbone, num_classes, num_queries, *sizes, aux_loss=aux_loss)

def detr_resnet101(
    num_classes: int = 91, num_queries: int = 100, pretrained_backbone: bool = True, hidden_dim: int = 256,
    nheads: int = 8, enc_layers: int = 6, dec_layers: int = 6, dim_feedforward: int = 2048, dropout: Number = 0.1,
    aux_loss: bool = True,
) -> DETR:
    """As `detr_resnet50`, on ResNet-101."""
    backbone = ResNet("resnet101", pretrained=pretrained_backbone)
    sizes = (hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
    return detr(backbone, num_classes, num_queries, *sizes, aux_loss=aux_loss)

def detr_resnet101_dc5(
    num_classes: int = 91, num_queries: int = 100, pretrained_backbone: bool = True, hidden_dim: int = 256,
    nheads: int = 8, enc_layers: int = 6, dec_layers: int = 6, dim_feedforward: int = 2048, dropout: Number = 0.1,
    aux_loss: bool = True,
) -> DETR:
    """As `detr_resnet50_dc5`, on ResNet-101."""
    backbone = ResNet("resnet101", dilation=True, pretrained=pretrained_backbone)
    sizes = (hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
    return detr(backbone, num_classes, num_queries, *sizes, aux_loss=aux_loss)

def detr_resnet18(
    num_classes: int = 91, num_queries: int = 100, pretrained_backbone: bool = True, hidden_dim: int = 256,
    nheads: int = 8, enc_layers: int = 6, dec_layers: int = 6, dim_feedforward: int = 2048, dropout: Number = 0.1,
    aux_loss: bool = True,
) -> DETR:
    """As `detr_resnet50`, on ResNet-18: not in the paper, half the time of a step."""
    backbone = ResNet("resnet18", pretrained=pretrained_backbone)
    sizes = (hidden_dim, nheads, enc_layers, dec_layers, dim_feedforward, dropout)
    return detr(backbone, num_classes, num_queries, *sizes, aux_loss=aux_loss)

TINY = {
    "hidden_dim": 128, "nheads": 4, "enc_layers": 2, "dec_layers": 3, "dim_feedforward": 256,
    "dropout": 0.0, "pre_norm": True, "temperature": 20,
}

def load_tiny_weights(model: DETR) -> DETR:
    """Give a `detr_tiny` the weights that come with the package, and set it to evaluation.

    Raises:
        FileNotFoundError: if this copy of the package has no weights.
        ValueError: if the model was built with other arguments than the trained one.
    """
    file = files("detr_nb") / "weights" / "detr_tiny.pt"
    if not file.is_file():
        raise FileNotFoundError("this copy of detr_nb carries no trained weights (weights/detr_tiny.pt): "
                                "train the model yourself, or install a released version")
    with file.open("rb") as stream:
        saved = torch.load(stream, map_location="cpu", weights_only=True)
    try:
        model.load_state_dict(saved["model"])
    except RuntimeError as error:
        raise ValueError("the trained weights belong to detr_tiny with its default arguments; leave out what differs "
                         f"or train from pretrained=False. {error}") from error
    model.names, model.category_ids = saved["names"], saved["category_ids"]
    return model.eval()

def detr_tiny(
    pretrained: bool = False, num_classes: int = 6, num_queries: int = 25, **sizes: Number | tuple[int, ...]
) -> DETR:
    """A DETR of about a million parameters for 128 x 128 pixels, which two CPU cores train in minutes.

    Args:
        pretrained: load the weights that come with the package; the model is returned in evaluation mode.
        num_classes: number of classes, no-object not counted.
        num_queries: the largest number of objects that can be found in one image.
        sizes: any other argument of `detr`, instead of the value in `TINY`.

    Raises:
        ValueError: if the other arguments do not fit the pretrained weights.
    """
    model = detr(TinyBackbone(), num_classes, num_queries, **(TINY | sizes))
    return load_tiny_weights(model) if pretrained else model

@torch.no_grad()
def postprocess(
    out: Output,
    sizes: Sequence[tuple[int, int]] | Int[Tensor, "b 2"],
    scores: Callable[[Tensor], Tensor] = softmax_scores,
) -> list[dict[str, Tensor]]:
    """Turn the last layer's predictions into detections, one for every query: no threshold, no clamping.

    Args:
        out: predictions.
        sizes: (height, width) of every image, in the units that the boxes should have.
        scores: turns logits into scores of the classes, without no-object.

    Returns:
        For each image the `scores`, `labels` (contiguous ids) and `boxes` (xyxy, in the units of `sizes`).

    Raises:
        ValueError: if there is not one size for every image.
    """
    if len(sizes) != out.boxes.shape[1]:
        raise ValueError(f"{out.boxes.shape[1]} images need as many (height, width) sizes, got {len(sizes)}")
    best, labels = scores(out.logits[-1].float()).max(-1)  # b q
    boxes_xyxy = cxcywh_to_xyxy(out.boxes[-1].float())
    boxes_abs = [scale_boxes(boxes, *map(int, size)) for boxes, size in zip(boxes_xyxy, sizes, strict=True)]
    return [{"scores": s, "labels": n, "boxes": b} for s, n, b in zip(best, labels, boxes_abs, strict=True)]

class DETRDemo(nn.Module):
    """The demonstration model of the paper's appendix: everything that can be left out is left out.

    Args:
        num_classes: number of classes, no-object not counted.
        hidden_dim: width of the tokens and queries.
        nheads: attention heads.
        enc_layers: encoder layers.
        dec_layers: decoder layers.
        pretrained_backbone: start from ImageNet weights (needs a network or torchvision's cache).

    Attributes:
        names: names of the classes that the model was trained on; None until then.
        category_ids: the dataset's own id of each class; None until then.

    Source: DETR, appendix A.6; the original takes one image at a time, this one images of equal size.
    """

    def __init__(
        self, num_classes: int = 91, hidden_dim: int = 256, nheads: int = 8, enc_layers: int = 6, dec_layers: int = 6,
        pretrained_backbone: bool = False,
    ):
        super().__init__()
        self.backbone = resnet50(weights="DEFAULT" if pretrained_backbone else None)
        del self.backbone.fc, self.backbone.avgpool
        self.conv = nn.Conv2d(2048, hidden_dim, 1)
        self.transformer = nn.Transformer(hidden_dim, nheads, enc_layers, dec_layers, batch_first=True)
        self.linear_class = nn.Linear(hidden_dim, columns(num_classes))
        self.linear_bbox = nn.Linear(hidden_dim, 4)
        self.query_pos = nn.Parameter(torch.rand(100, hidden_dim))
        self.row_embed = nn.Parameter(torch.rand(50, hidden_dim // 2))
        self.col_embed = nn.Parameter(torch.rand(50, hidden_dim // 2))
        self.scores, self.names, self.category_ids = softmax_scores, None, None

    def features(self, images: Float[Tensor, "b 3 y x"]) -> Float[Tensor, "b d y2 x2"]:
        """The backbone's last feature map, projected to the model width."""
        net = self.backbone
        x = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        return self.conv(net.layer4(net.layer3(net.layer2(net.layer1(x)))))

    def positions(self, rows: int, cols: int) -> Float[Tensor, "s d"]:
        """One learned vector for each cell: half from its column, half from its row."""
        col = self.col_embed[:cols].expand(rows, -1, -1)
        row = self.row_embed[:rows, None].expand(-1, cols, -1)
        return torch.cat((col, row), -1).flatten(0, 1)

    def forward(self, images: Float[Tensor, "b 3 y x"], pad: Bool[Tensor, "b y x"] | None = None) -> Output:
        """Detect in images of equal size.

        Args:
            images: normalised images, at most 1600 pixels a side.
            pad: accepted so that it can stand in for a DETR, but nothing may be padded.

        Returns:
            One layer of predictions.

        Raises:
            ValueError: if something is padded, an image is too large, or shapes do not fit.
        """
        check_images(images, pad)
        if pad is not None and pad.any():
            raise ValueError("the demonstration model cannot ignore padding: give it images of equal size")
        x = self.features(images)
        rows, cols = x.shape[-2:]
        if max(rows, cols) > len(self.row_embed):
            raise ValueError(f"a grid of {rows} x {cols} cells needs more than {len(self.row_embed)} learned positions")
        tokens = self.positions(rows, cols) + 0.1 * x.flatten(2).transpose(1, 2)  # b s d
        content = self.transformer(tokens, self.query_pos.expand(len(images), -1, -1))
        return Output(self.linear_class(content)[None], self.linear_bbox(content).sigmoid()[None])
