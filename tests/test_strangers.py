"""What strangers' files may do (give numbers and names, checked), and how their classes are joined with ours."""

import json
import resource
import socket
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from inputs import CASES, fault
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

import detr_nb.checkpoints
from detr_nb import detr_tiny, evaluate, pretrained_model
from detr_nb.checkpoints import download, read_checkpoint
from detr_nb.checks import Classes, join_classes
from detr_nb.cli import main
from detr_nb.evaluation import boxes_in_pixels
from detr_nb.finetuning import FineTuned
from detr_nb.formats import CocoDataset, YoloDataset
from detr_nb.hub import describe
from detr_nb.loading import MemoryDataset
from detr_nb.model import DETR, TinyModel
from detr_nb.pretrained import load_pretrained
from detr_nb.shapes import EASY, Scenes

SMALL = TinyModel(hidden_dim=32, enc_layers=1, dec_layers=1, num_queries=5, dim_feedforward=32, widths=(8, 8, 8))


# classes have a name and a number


class Oracle(nn.Module):
    """Finds everything, under its own labels."""

    def __init__(self, names: list | None, ids: list | None, data: object, own: object):
        super().__init__()
        self.names, self.category_ids, self.data, self.own, self.place = names, ids, data, own, 0

    def forward(self, images: Tensor, pad: Tensor) -> None:
        """Looks at nothing."""

    def postprocess(self, out: None, sizes: list) -> list[dict[str, Tensor]]:
        """The truth of the next images."""
        found = []
        for _ in sizes:
            _, target = self.data[self.place]
            labels = torch.tensor([self.own(int(label)) for label in target["labels"]], dtype=torch.int64)
            boxes = boxes_in_pixels(target).float()
            found.append({"scores": torch.ones(len(labels)), "labels": labels, "boxes": boxes})
            self.place += 1
        return found


def case(name: str) -> CocoDataset:
    """A COCO folder of the cases."""
    return CocoDataset(CASES / name / "img", CASES / name / "ann.json")


@pytest.mark.fault("25_ids_differ_train")
@pytest.mark.fault("25_ids_differ_val")
@pytest.mark.fault("model's ids and data's share nothing")
def test_other_numbers_cost_nothing_and_are_said():
    train, val = case("25_ids_differ_train"), case("25_ids_differ_val")
    assert set(train.names) == set(val.names) and train.category_ids != val.category_ids
    model = Oracle(train.names, train.category_ids, val, lambda label: train.names.index(val.names[label]))
    with pytest.warns(UserWarning, match="classes of data and model differ and are joined by name: "):
        assert evaluate(model, val)["AP"] == pytest.approx(1)
    same = Oracle(val.names, val.category_ids, val, lambda label: label)
    assert evaluate(same, val)["AP"] == pytest.approx(1)  # and no warning, which would be an error


@pytest.mark.parametrize(
    ("ours", "theirs", "expected", "said"),
    [
        ((["a", "b"], [1, 2]), (["a", "b"], [1, 2]), [0, 1], False),
        ((["a", "b"], [1, 2]), (["a", "b"], [0, 1]), [0, 1], True),
        ((["a", "b"], [1, 2]), (["b", "a"], [1, 2]), [1, 0], True),
        ((["circle", "square", "dot"], [1, 2, 3]), (["dot", "square", "circle"], [0, 1, 2]), [2, 1, 0], True),
        ((["Traffic Light", "dog"], [1, 2]), (["dog", "traffic_light"], [2, 1]), [1, 0], True),
        ((["cat", "Cat"], [1, 2]), (["Cat", "cat"], [2, 1]), [1, 0], False),
        ((["N/A", "person", "N/A", "cat"], [0, 1, 2, 3]), (["person", "cat"], [1, 3]), [-1, 0, -1, 1], False),
        ((["cat", "cat"], [1, 2]), (["cat"], [2]), [-1, 0], False),  # the number decides
        ((None, [5, 7]), (["b", "a"], [7, 5]), [1, 0], False),
        ((["a"], None), (["a"], [9]), [0], False),
        ((None, None), (["a"], [1]), None, False),
    ],
)  # fmt: skip
def test_classes_are_joined_by_name_then_number(ours, theirs, expected, said):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert join_classes(Classes(*ours), Classes(*theirs)) == expected
    assert bool(found) == said


def one_of_each(names: list[str], ids: list[int]) -> MemoryDataset:
    """A picture with one object of every class, each in a place of its own."""
    count = len(names)
    boxes = torch.tensor([[(i + 0.5) / count, 0.5, 0.5 / count, 0.5] for i in range(count)])
    target = {"labels": torch.arange(count), "boxes": boxes, "size": torch.tensor([64, 64])}
    return MemoryDataset(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [target], names, ids)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        fault("model's ids and data's share nothing", (["a", "b"], [1, 2]), (["a", "b"], [70, 80])),
        fault("model's names in another order than the data's", (["a", "b", "c"], [1, 2, 3]),
            (["c", "a", "b"], [1, 2, 3])),
    ],
)  # fmt: skip
def test_an_evaluation_joins_by_name_and_says_so(ours, theirs):
    data = one_of_each(*theirs)
    model = Oracle(*ours, data, lambda label: ours[0].index(theirs[0][label]))
    with pytest.warns(UserWarning, match="classes of data and model differ and are joined by name: "):
        found = evaluate(model, data)
    assert found["AP"] == pytest.approx(1) and list(found["per_class"].values()) == pytest.approx([1] * len(theirs[0]))


def yolo_of(scenes: Scenes, names: list[str], folder: Path) -> YoloDataset:
    """Scenes as a YOLO folder, whose classes stand in an order of their own."""
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for number in range(len(scenes)):
        image, target = scenes[number]
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "images" / f"{number}.png")
        rows = zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True)
        lines = [" ".join(map(str, [names.index(scenes.names[label]), *box])) for label, box in rows]
        (folder / "labels" / f"{number}.txt").write_text("\n".join(lines))
    return YoloDataset(folder / "images", names)


@pytest.mark.fault("the package's model on YOLO data with its own names in its own order")
def test_the_packages_model_finds_its_classes_in_another_order(tmp_path):
    model, scenes = detr_tiny(pretrained=True), Scenes(EASY, 4, 1)
    data = yolo_of(scenes, scenes.names[::-1], tmp_path)
    expected = evaluate(model, scenes)
    with pytest.warns(UserWarning, match="joined by name"):
        found = evaluate(model, data)
    assert found["AP"] == pytest.approx(expected["AP"], abs=1e-6) and expected["AP"] > 0.5
    assert found["per_class"] == pytest.approx(expected["per_class"], abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ((["a", "b"], [1, 2]), (["a", "zebra"], [1, 2]), "does not know 'zebra'"),
        ((["cat", "cat"], [1, 2]), (["cat"], [3]), "does not know 'cat'"),
        ((["cat"], [1]), (["Cat", "cat"], [1, 2]), "does not know 'Cat', 'cat'"),
        ((None, [5, 7]), (["a"], [1]), "does not know 'a'"),
        ((["a\x1b[31m"], [1]), (["b"], [1]), r"1 a\x1b[31m"),
    ],
)
def test_other_differences_are_an_error_with_both_tables(ours, theirs, words):
    with pytest.raises(ValueError, match="The model has: .*The data have: ") as found:
        join_classes(Classes(*ours), Classes(*theirs))
    assert words in str(found.value) and "\x1b" not in str(found.value)


def test_evaluate_refuses_what_cannot_be_joined():
    model = detr_tiny(pretrained=True)
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    data = MemoryDataset(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [target], ["zebra"], [1])
    with pytest.raises(ValueError, match="does not know 'zebra' of the data"):
        evaluate(model, data)


# a file's numbers


@pytest.fixture(scope="module")
def model() -> DETR:
    """A small model of three classes."""
    torch.manual_seed(0)
    made = SMALL.build(3)
    made.names, made.category_ids = ["cat", "dog", "cow"], [1, 2, 5]
    return made


def checkpoint(model: DETR, **more: object) -> dict[str, object]:
    """What a run saves, in short."""
    told = {"names": model.names, "category_ids": model.category_ids, "description": describe(model)}
    return {"model": model.state_dict(), **told, **more}


def write(path: Path, value: object) -> Path:
    """Save as torch does."""
    torch.save(value, path)
    return path


@contextmanager
def little_memory() -> Iterator[None]:
    """In the block no more than 400 MB can be had beyond what the process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 400 * 2**20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def refused(path: Path, *words: str) -> str:
    """Neither way of loading takes it, and the message names the file."""
    for load in (pretrained_model, lambda source: load_pretrained(SMALL.build(3), source)):
        with little_memory(), pytest.raises(ValueError) as found:
            load(path)
        message = str(found.value)
        assert str(path) in message and "\n" not in message and "\x1b" not in message, message
        for word in words:
            assert word in message, message
    return message


def test_little_memory_is_little():
    with little_memory(), pytest.raises((MemoryError, RuntimeError), match="allocate memory"):
        torch.zeros(2 * 10**8)


def test_what_a_run_and_save_pretrained_write_is_read(model, tmp_path):
    write(tmp_path / "checkpoint.pt", checkpoint(model, threshold=0.4))
    model.save_pretrained(tmp_path / "saved")
    for source in (tmp_path, tmp_path / "saved", tmp_path / "checkpoint.pt"):
        found = pretrained_model(source)
        assert found.names == model.names and found.category_ids == model.category_ids
        assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)


BOMBS = {
    "expanded": (
        lambda state: state.update({"queries.embedding.weight": torch.zeros(1, 32).expand(10**7, 32)}),
        "claims 320000000 numbers",
        "2 MB .pth whose query table is expanded by stride 0 to 10^7 rows",
    ),
    "10^12 rows": (
        lambda state: state.update({"queries.embedding.weight": torch.zeros(1, 32).expand(10**12, 32)}),
        "claims 32000000000000 numbers",
        "the same with 10^12 rows",
    ),
    "one storage, a thousand tensors": (
        lambda state: state.update({f"encoder.layers.{i}.x": torch.zeros(10**4)[:] for i in range(1)}
                                   | dict.fromkeys([f"encoder.layers.{i}.y" for i in range(1000)], torch.zeros(10**5))),
        "its tensors claim",
        None,
    ),
    "sparse": (lambda state: state.update({"x": torch.zeros(10, 10).to_sparse()}), "not stored as plain numbers", None),
    "meta": (lambda state: state.update({"x": torch.zeros(10**9, device="meta")}), "holds no numbers at all", None),
    "NaN": (
        lambda state: state["decoder.head.classes.bias"].fill_(float("nan")),
        "tensor 'decoder.head.classes.bias' is not finite",
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [fault(mark, change, words) if mark else pytest.param(change, words, id=name)
     for name, (change, words, mark) in BOMBS.items()],
)  # fmt: skip
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of sparse tensors
def test_tensors_that_claim_more_than_the_file_holds_are_refused(model, tmp_path, change, words, described):
    saved = checkpoint(model)
    saved["model"] = {key: value.clone() for key, value in saved["model"].items()}
    change(saved["model"])
    refused(write(tmp_path / "a.pth", saved if described else saved["model"]), words)


LIAR = "queries.embedding.weight"  # has 5 rows of 32 numbers


def lying(content: bytes, rows: int) -> bytes:
    """A pickled state that says more rows of a tensor, and more numbers of its storage."""
    start = content.index(LIAR.encode())
    head, tail = content[:start], content[start:]
    for told, number in ((5 * 32, rows * 32), (5, rows)):
        assert bytes([ord("K"), told]) in tail
        tail = tail.replace(bytes([ord("K"), told]), b"J" + number.to_bytes(4, "little"), 1)
    return head + tail


@pytest.mark.fault("1 MB .pth that unpacks to 1 GB")
def test_a_compressed_storage_is_refused_before_it_is_unpacked(model, tmp_path):
    megabytes, entries = 1000, {}
    small = write(tmp_path / "small.pth", checkpoint(model))
    with zipfile.ZipFile(small) as source:
        for name in source.namelist():
            entries[name] = source.read(name)
    weight = model.state_dict()[LIAR].numpy().tobytes()
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as goal:
        for name, content in entries.items():
            with goal.open(name, "w") as file:
                if content == weight:
                    for _ in range(megabytes):
                        file.write(bytes(10**6))
                else:
                    rows = megabytes * 10**6 // (4 * 32)
                    file.write(lying(content, rows) if name.endswith("data.pkl") else content)
    with zipfile.ZipFile(tmp_path / "a.pth") as packed:
        assert max(entry.file_size for entry in packed.infolist()) == megabytes * 10**6
    assert (tmp_path / "a.pth").stat().st_size < 10**7
    refused(tmp_path / "a.pth", "unpacks to", "torch.save compresses nothing")


def with_rows(honest: Path, goal: Path, rows: int) -> Path:
    """A copy of a checkpoint whose pickle says so many rows of a tensor; its record in the zip stays as it is."""
    with zipfile.ZipFile(honest) as source, zipfile.ZipFile(goal, "w") as copy:
        for name in source.namelist():
            content = source.read(name)
            copy.writestr(name, lying(content, rows) if name.endswith("data.pkl") else content)
    return goal


def test_a_storage_that_lies_about_its_length_is_refused(model, tmp_path):
    honest = write(tmp_path / "honest.pth", checkpoint(model))
    same = pretrained_model(with_rows(honest, tmp_path / "same.pth", 5))  # the copy is read, so the lie is the reason
    assert_close(same.state_dict(), model.state_dict(), rtol=0, atol=0)
    for rows in (6, 10, 10**6):
        refused(with_rows(honest, tmp_path / "a.pth", rows), "is damaged, cut off or no checkpoint")
        with pytest.raises(ValueError) as found:
            pretrained_model(tmp_path / "a.pth")
        assert "record size" in str(found.value.__cause__)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        fault("config.json enc_layers 10^7 (835 B)", {"enc_layers": 10**7}, "enc_layers"),
        ({"num_queries": 10**12}, "num_queries"),
        ({"num_classes": 10**12}, "num_classes"),
        ({"hidden_dim": 2**16, "nheads": 1}, "hidden_dim is 65536"),
        ({"num_queries": 10**4}, "does not belong to the config.json"),
        fault("config.json preprocess.size [40000, 40000]", {"preprocess": {"size": [40000, 40000]}},
            "preprocess.size[0] is 40000"),
        fault("config.json preprocess.size [100000, 100000]", {"preprocess": {"size": [100000, 100000]}},
            "preprocess.size[0] is 100000"),
        fault("config.json preprocess.size [1.5, 64]", {"preprocess": {"size": [1.5, 64]}},
            "preprocess.size[0] is 1.5"),
        fault("config.json preprocess.mean ['a','b','c']", {"preprocess": {"mean": ["a", "b", "c"]}},
            "preprocess.mean[0] is 'a'"),
        ({"preprocess": None}, "preprocess is None"),
        ({"preprocess": {"colour": 1}}, "preprocess.colour"),
        fault("config.json threshold NaN", {"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": "0.5"}, "threshold is '0.5'"),
        fault("config.json names 'abcdef'", {"names": "abc"}, "names is 'abc'"),
        ({"names": ["a", "b"]}, "names must have one entry for each of the 3 classes"),
        ({"names": ["a", None, "c"]}, "names[1] is None"),
        ({"names": ["a", "\x1b[31mred"]}, "for each of the 3 classes"),
        fault("config.json category_ids ['x', ...]", {"category_ids": ["x", "y", "z"]}, "category_ids[0] is 'x'"),
        ({"category_ids": [1, 2, 1.5]}, "category_ids[2] is 1.5"),
    ],
)  # fmt: skip
def test_a_lying_config_json_is_refused_at_once(model, tmp_path, change, words):
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    told = json.loads(file.read_text())
    pictures = change.get("preprocess")
    if isinstance(pictures, dict):
        change = {**change, "preprocess": {**told["preprocess"], **pictures}}
    file.write_text(json.dumps({**told, **change}))
    refused(tmp_path, words)


def test_broken_json_is_named(model, tmp_path):
    model.save_pretrained(tmp_path)
    for content in ("[" * 100_000, "", "[1]", '{"model_type": '):
        (tmp_path / "config.json").write_text(content)
        refused(tmp_path, "config.json is damaged")


@pytest.mark.parametrize(
    "value", [fault("weights that are NaN (safetensors)", float("nan")), float("inf"), -float("inf")]
)
def test_weights_that_are_no_numbers_are_named(model, tmp_path, value):
    model.save_pretrained(tmp_path)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["queries.embedding.weight"][2, 3] = value
    save_file(state, tmp_path / "model.safetensors")
    refused(tmp_path, "model.safetensors: tensor 'queries.embedding.weight' is not finite")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        fault("checkpoint.pt with preprocess 'x'", {"preprocess": "x"}, "preprocess is 'x'"),
        fault("checkpoint.pt with names 7", {"names": 7}, "names is 7"),
        fault("checkpoint.pt whose names are fewer than its classes", {"names": ["cat", "dog"]},
            "names must have one entry for each of the 3 classes"),
        ({"category_ids": [1]}, "category_ids must have one entry for each of the 3 classes"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"threshold": 7}, "threshold is 7"),
        ({"description": 7}, "does not describe a model"),
        fault("... description.nheads 0", {"description": {"nheads": 0}}, "nheads"),
        ({"description": {"num_classes": "3"}}, "num_classes is '3'"),
        ({"description": None, "args": 3}, "args is a int"),
    ],
)  # fmt: skip
def test_the_fields_of_a_checkpoint_are_checked_when_it_is_loaded(model, tmp_path, change, words):
    saved = checkpoint(model)
    if isinstance(change.get("description"), dict):
        change = {"description": {**saved["description"], **change["description"]}}
    refused(write(tmp_path / "a.pt", {**saved, **change}), words)


@pytest.mark.fault("save_pretrained (5 new classes) into the folder of a run")
def test_two_models_in_one_folder_are_not_mixed_up(model, tmp_path):
    write(tmp_path / "checkpoint.pt", checkpoint(model))
    other = SMALL.build(5)
    with pytest.raises(ValueError, match="folder of a training run"):
        other.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path / "saved")
    for file in (tmp_path / "saved").iterdir():  # as an earlier release did, or a person
        file.rename(tmp_path / file.name)
    refused(tmp_path, "checkpoint.pt", "model.safetensors", "name the one that you mean")
    assert pretrained_model(tmp_path / "model.safetensors").num_classes == 5
    assert DETR.from_pretrained(tmp_path).num_classes == 5
    assert pretrained_model(tmp_path / "checkpoint.pt").num_classes == 3


# wrappings


WRAPPINGS: dict[str, Callable[[dict], dict]] = {
    "module.": lambda state: {f"module.{name}": value for name, value in state.items()},
    "_orig_mod.": lambda state: {f"_orig_mod.{name}": value for name, value in state.items()},
    "both": lambda state: {"model": {f"module._orig_mod.{name}": value for name, value in state.items()}},
    "Lightning": lambda state: {
        "state_dict": {f"model.{name}": value for name, value in state.items()} | {"criterion.weight": torch.ones(4)},
        "epoch": 3, "pytorch-lightning_version": "2.1", "optimizer_states": [],
    },
    "model_state_dict": lambda state: {"model_state_dict": state, "epoch": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPINGS)
def test_common_wrappings_are_no_strangers(model, tmp_path, name):
    found = pretrained_model(write(tmp_path / "a.ckpt", WRAPPINGS[name](model.state_dict())))
    assert_close(found.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_what_is_no_detr_is_named_and_told(tmp_path):
    refused(write(tmp_path / "a.pth", {"net.fc.weight": torch.zeros(2)}), "the names of no DETR")
    refused(write(tmp_path / "b.pth", {"epoch": 3}), "holds no weights", "save {'model': model.state_dict()}")
    refused(write(tmp_path / "c.pth", {3: torch.zeros(2)}), "holds no weights")


def test_a_file_without_a_class_head_goes_on(model, tmp_path):
    state = {name: value for name, value in model.state_dict().items() if ".classes." not in name}
    file = write(tmp_path / "a.pth", {"model": state})
    tuned = FineTuned(weights=str(file)).build(4)
    assert tuned.num_classes == 4
    assert_close(tuned.state_dict()["queries.embedding.weight"], state["queries.embedding.weight"])
    with pytest.raises(ValueError, match=r"a\.pth: .*num_classes.*FineTuned\(weights="):
        pretrained_model(file)


# folders of Hugging Face, in our own names (chapter 88 reads any)


def hub_folder(path: Path, model: DETR, **config: object) -> Path:
    """A folder as `transformers` writes it; the weights are ours."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "detr", "encoder_attention_heads": 8, **config}))
    return path


def halves(state: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Two parts of a state dict."""
    names = sorted(state)
    return [{name: state[name] for name in part} for part in (names[:20], names[20:])]


def test_pieces_are_put_together(model, tmp_path):
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    folder = hub_folder(tmp_path / "sharded", model, id2label={"0": "cat", "1": "dog", "2": "cow"})
    for part, name in zip(halves(state), names, strict=True):
        save_file(part, folder / name)
    save_file(state, folder / "model.fp16.safetensors")  # a variant, which the index does not name
    index = {name: file for part, file in zip(halves(state), names, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = read_checkpoint(folder)
    assert found.state.keys() == state.keys() and found.names == ["cat", "dog", "cow"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret"}}))
    with pytest.raises(ValueError, match="weight_map must name files of its own folder"):
        read_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(OSError, match=r"gone\.safetensors is missing"):
        read_checkpoint(folder)


def test_a_pickle_beside_its_config_is_read_with_it(model, tmp_path):
    folder = hub_folder(tmp_path / "old", model, id2label={"0": "cat", "1": "dog", "2": "cow"})
    file = write(folder / "pytorch_model.bin", model.state_dict())
    for source in (folder, file):
        found = read_checkpoint(source)
        assert found.state.keys() == model.state_dict().keys()
        assert found.names == ["cat", "dog", "cow"] and found.category_ids == [0, 1, 2]


@pytest.mark.parametrize(
    ("labels", "names", "said"),
    [
        ({"0": "a", "1": "b", "2": "c"}, ["a", "b", "c"], None),
        ({"1": "a", "2": "b"}, ["LABEL_0", "a", "b"], "no name for 0"),
        ({"1": "a", "2": "b", "3": "c"}, ["LABEL_0", "a", "b"], "names 3"),
        ({"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, ["LABEL_0", "LABEL_1", "LABEL_2"], None),
        (None, None, None),
        fault("Hugging Face id2label with two of 91 names / {'0': None}", {"0": "a", "2": "c"},
            ["a", "LABEL_1", "c"], "no name for 1"),
    ],
)  # fmt: skip
def test_label_k_is_called_id2label_k(model, tmp_path, labels, names, said):
    folder = hub_folder(tmp_path / "a", model, id2label=labels)
    state = {"model.x": torch.zeros(3), "class_labels_classifier.bias": torch.zeros(4)}
    save_file(state, folder / "model.safetensors")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        checkpoint = read_checkpoint(folder)
    assert checkpoint.names == names and checkpoint.category_ids == (names and [0, 1, 2])
    assert not found if said is None else said in str(found[0].message) and "config.json" in str(found[0].message)


@pytest.mark.parametrize(
    "labels",
    [
        fault("Hugging Face id2label with two of 91 names / {'0': None}", {"0": None}),
        fault("id2label {'cat': 0} or ['cat']", {"cat": 0}),
        fault("id2label {'cat': 0} or ['cat']", ["cat"]),
        "cat",
        {"0": 3},
    ],
)
def test_an_id2label_of_another_form_is_named(model, tmp_path, labels):
    folder = hub_folder(tmp_path / "a", model, id2label=labels)
    save_file({"model.x": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"config\.json: id2label.* is .*a name for each label"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"size": {"height": 40000, "width": 40000}}, "preprocess.size[0] is 40000"),
        ({"size": {"shortest_edge": "800"}}, "preprocess.short_side is '800'"),
        ({"size": [800]}, "a rule that is not known"),
        ({"size": 800, "image_mean": ["a", 0, 0]}, "preprocess.mean[0] is 'a'"),
        ({"size": 800, "image_std": [0, 1, 1]}, "preprocess.std[0] is 0"),
    ],
)
def test_a_preprocessor_config_is_checked(model, tmp_path, told, words):
    folder = hub_folder(tmp_path / "a", model)
    save_file({"model.x": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError) as found:
        read_checkpoint(folder)
    assert words in str(found.value) and "preprocessor_config.json" in str(found.value)


# servers


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """The cache of downloads."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.mark.fault("another model in the cache under the name detr-r50-e632da11.pth")
def test_a_file_in_the_cache_is_hashed(hub):
    hub.mkdir(parents=True)
    (hub / "detr-r50-e632da11.pth").write_bytes(b"another program's")
    words = r"detr-r50-e632da11\.pth is broken or another file.*instead of e632da11.*Delete"
    with pytest.raises(ValueError, match=words):
        pretrained_model("detr-r50")


class Handler(BaseHTTPRequestHandler):
    """Answers as the path says."""

    def log_message(self, *words: object) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        """Bad answers by name."""
        kind = self.path.strip("/").partition("-")[0]
        if kind == "nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
        elif kind == "missing":
            self.send_error(404)
        elif kind in ("tofile", "toftp"):
            self.send_response(302)
            self.send_header("Location", {"tofile": "file:///etc/hostname", "toftp": "ftp://127.0.0.1/a"}[kind])
            self.end_headers()
        else:
            self.send_response(200)
            if kind == "short":
                self.send_header("Content-Length", "1000")
            self.end_headers()
            self.answer(kind)

    def answer(self, kind: str) -> None:
        """What comes after the head."""
        with suppress(ConnectionError):
            self.wfile.write(b"x" * 100)
            for _ in range(100 if kind in ("drip", "endless") else 0):
                self.wfile.write(b"x" * (10 if kind == "drip" else 10**5))
                if kind == "drip":
                    STOP.wait(0.05)


STOP = threading.Event()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An address whose server answers badly."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        STOP.set()
        made.shutdown()


def said_by_predict(weights: str, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """The line with which `detr-nb predict --weights` ends."""
    Image.new("RGB", (40, 40), "grey").save(folder / "a.png")
    capsys.readouterr()
    assert main(["predict", str(folder / "a.png"), "--out", str(folder / "out"), "--weights", weights]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("detr-nb: ") and said.err.count("\n") == 1, said
    assert "mistake of the program" not in said.err
    return said.err


@pytest.mark.parametrize(
    ("kind", "limits", "words"),
    [
        fault("answer that is no HTTP", "nonsense", {}, "BadStatusLine"),
        ("missing", {}, "404"),
        ("tofile", {}, "file:///etc/hostname"),
        ("toftp", {}, "which is no web address"),
        ("short", {}, "100 of 1000 bytes"),
        ("drip", {"LONGEST": 0.3}, "has not ended"),
        ("endless", {"LARGEST": 10**6}, "has not ended"),
    ],
)
def test_bad_answers_are_one_line_and_nothing_is_kept(
    hub, server, monkeypatch, tmp_path, capsys, kind, limits, words
):
    for name, limit in limits.items():
        monkeypatch.setattr(detr_nb.checkpoints, name, limit)
    address = f"{server}/{kind}-0123abcd.pth"
    with pytest.raises(RuntimeError, match="the network does not give .*give its path") as found:
        download(address)
    assert words in str(found.value) and "\n" not in str(found.value)
    assert words in said_by_predict(address, tmp_path, capsys)
    assert not hub.exists() or not list(hub.iterdir())


def test_another_content_is_told_and_not_kept(hub, server):
    with pytest.raises(ValueError, match="invalid hash value .* instead of 0123abcd"):
        download(f"{server}/plain-0123abcd.pth")
    assert not list(hub.iterdir())


@pytest.mark.fault("--weights from a server that says nothing")
def test_a_silent_server_is_given_up(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(detr_nb.downloads, "SILENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/a-0123abcd.pth"
        said = said_by_predict(address, tmp_path, capsys)
    assert "the network does not give" in said and "timed out" in said and address in said
