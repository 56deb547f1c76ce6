import pytest

from accessory.data.finding import find_files
from accessory.data.published import PUBLISHED, published_name
from accessory.data.shapes import SHAPES
from accessory.errors import DataError

FILES = {
    "alpaca": "data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",
    "alpaca-gpt4": "data/train-00000-of-00001-6ef3991c06080e14.parquet",
    "self-instruct": "gpt3_finetuning_data.jsonl",
    "hh-rlhf": "harmless-base/train.jsonl.gz",
    "longform": "dataset/train.jsonl",
    "olcc": "OL-CC.jsonl",
}
"""A file of a data set as its publisher lays it, where its table has a pattern for it."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_finds_what_was_downloaded_as_the_error_says(name, tmp_path):
    """In a folder of its name, or of its repository's, or in the data directory itself."""
    with pytest.raises(DataError) as caught:
        find_files(name, [tmp_path], tmp_path / "data")
    data, said = PUBLISHED[name], str(caught.value)
    assert said.startswith(f"{name} ({data.what}) is not in --data_dir ") and str(tmp_path / "data" / name) in said
    fetch = f"hf download {data.hub}" if data.hub and not data.url else f"download {data.url} into"
    assert fetch in said
    file = FILES.get(name) or data.files[0]
    for folder in (name, data.hub.rpartition("/")[2], data.hub, *(["."] if "/" not in file else [])):
        path = tmp_path / f"of {folder.replace('/', ' ')}" / folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert find_files(name, [tmp_path], tmp_path / f"of {folder.replace('/', ' ')}").files == [path], folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_may_be_called_as_on_the_hub(name):
    hub = PUBLISHED[name].hub
    assert published_name(name) == name and PUBLISHED[name].shape in SHAPES
    assert not hub or published_name(hub) == published_name(hub.rpartition("/")[2].upper()) == name


def test_training_records_are_taken_and_no_others(tmp_path):
    for folder in ("harmless-base", "helpful-base", "helpful-online", "red-team-attempts"):
        (tmp_path / "hh-rlhf" / folder).mkdir(parents=True)
        for split in ("train", "test"):
            (tmp_path / "hh-rlhf" / folder / f"{split}.jsonl.gz").touch()
    files = find_files("hh-rlhf", [tmp_path / "none"], tmp_path).files
    assert [path.parent.name for path in files] == ["harmless-base", "helpful-base", "helpful-online"]
    assert {path.name for path in files} == {"train.jsonl.gz"}


def test_a_file_of_its_name_will_do(tmp_path):
    (tmp_path / "oasst1.json").touch()
    assert find_files("oasst1", [tmp_path / "none"], tmp_path).files == [tmp_path / "oasst1.json"]
