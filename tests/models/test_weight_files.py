"""Which files of a folder are its weights, and what is said of the others."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest

import vauban
from tests.export.checkpoints import save_checkpoint, unit
from vauban._arrays import flat_parameters
from vauban.errors import InputError, VaubanWarning
from vauban.export.tensor_files import stored_tensors
from vauban.models import weight_files

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same checkpoint as one file (`single`) and as two shards (`two`)."""
    place = tmp_path_factory.mktemp("made")
    save_checkpoint(place / "single", "llama")
    save_checkpoint(place / "two", "llama", shards=2)
    return place


def copy(made: Path, name: str, place: Path) -> Path:
    return Path(shutil.copytree(made / name, place / "model"))


def spoil(file: Path, target: Path) -> None:
    """A copy of a safetensors file with other numbers in it."""
    wrong = {name: value + 1 for name, value in mx.load(str(file)).items()}
    mx.save_safetensors(str(target), wrong, {"format": "mlx"})


def same_weights(folder: Path, expected: Path) -> None:
    """The folder gives the expected weights, loaded and exported, after one warning."""
    with pytest.warns(VaubanWarning) as said:
        model, tokenizer = vauban.load(folder)
    assert len(said) == 1 and tokenizer.name_or_path == str(folder)
    weights = flat_parameters(model)
    right = flat_parameters(vauban.load(expected)[0])
    assert weights.keys() == right.keys()
    assert all(mx.array_equal(weights[name], right[name]) for name in right)
    tensors = stored_tensors(folder)
    plan = vauban.plan_cut(model, unit(), layers=[1], embedding=False)
    report = plan.export(folder, folder.parent / "out")
    assert report.ok and report.untouched_identical is True
    shards = sorted(f.name for f in (folder.parent / "out").glob("*.safetensors"))
    assert shards == sorted({t.file.name for t in tensors.values()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vauban.load(folder.parent / "out")


def test_a_stray_file_beside_indexed_shards(made: Path, tmp_path: Path) -> None:
    folder = copy(made, "two", tmp_path)
    spoil(made / "single" / "model.safetensors", folder / "model-zz.safetensors")
    (note,) = weight_files(folder).notes
    assert note.endswith(f"model-zz.safetensors is not loaded: {INDEX} does not name it")
    same_weights(folder, made / "two")


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "model-00001-of-00001.safetensors"])
def test_a_second_copy_without_an_index(made: Path, tmp_path: Path, name: str) -> None:
    folder = copy(made, "single", tmp_path)
    spoil(folder / "model.safetensors", folder / name)
    (note,) = weight_files(folder).notes
    assert f"{name} is not loaded: model.safetensors holds " in note
    same_weights(folder, made / "single")


def test_an_index_whose_shards_are_replaced_by_a_single_file(made: Path, tmp_path: Path) -> None:
    folder = copy(made, "single", tmp_path)
    shutil.copy(made / "two" / INDEX, folder)
    (note,) = weight_files(folder).notes
    assert "model-00001-of-00002.safetensors, which is missing; model.safetensors is read" in note
    same_weights(folder, made / "single")


def test_numbered_shards_without_an_index(made: Path, tmp_path: Path) -> None:
    folder = copy(made, "two", tmp_path)
    (folder / INDEX).unlink()
    assert not weight_files(folder).notes and len(weight_files(folder).files) == 2
    spoil(made / "single" / "model.safetensors", folder / "model-old.safetensors")
    assert [f.name for f in weight_files(folder).ignored] == ["model-old.safetensors"]
    (folder / "model-old.safetensors").unlink()
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"lacks model-00002-of-00002\.safetensors"):
        vauban.load(folder)


def test_files_that_complete_each_other_are_all_read(made: Path, tmp_path: Path) -> None:
    folder = copy(made, "two", tmp_path)
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model.safetensors")
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model.extra.safetensors")
    assert len(weight_files(folder).files) == 2 and not weight_files(folder).ignored
    vauban.load(folder)


def index_is(content: object) -> Callable[[Path], None]:
    return lambda folder: (folder / INDEX).write_text(json.dumps(content)) and None


def cut_off(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text()[:-20])


def absent(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def half_a_single(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model.safetensors")


def twice(folder: Path) -> None:
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    arrays = {**mx.load(str(first)), **mx.load(str(second))}
    mx.eval(arrays)
    mx.save_safetensors(str(second), arrays, {"format": "mlx"})


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (cut_off, "is not JSON"),
        (index_is([1, 2]), r"holds \[1, 2\]; expected an object"),
        (index_is({"weight_map": ["a"]}), r"holds weight_map \['a'\]; expected an object"),
        (index_is({"metadata": {}}), "expected an object"),
        (index_is({"weight_map": {"a": 3}}), "a lies in 3; expected the name of a file"),
        (index_is({"weight_map": {"a": "../b"}}), "a lies in '../b'; expected the name of a file"),
        (index_is({"weight_map": {}}), "names no file"),
        (absent, r"lacks model-00002-of-00002\.safetensors, which its index names"),
        (half_a_single, r"lacks model-00002-of-00002\.safetensors, which its index names"),
        (twice, "is in both model-00001-of-00002.safetensors and model-00002-of-00002.safe"),
        (without_tokenizer, r"has no tokenizer \(tokenizer\*\.json"),
    ],
)
def test_a_folder_that_does_not_say_what_its_weights_are(
    made: Path, tmp_path: Path, harm: Callable[[Path], None], said: str
) -> None:
    folder = copy(made, "two", tmp_path)
    harm(folder)
    with pytest.raises(InputError, match=said) as caught:
        vauban.load(folder)
    assert str(folder) in str(caught.value)
