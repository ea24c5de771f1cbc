"""A source that cannot be read is refused, with the sources that can be."""

import pytest

from annotated_images import save_coco, save_images
from transformers_rfdetr import check_dataset, load_instance_dataset


def test_an_empty_folder_is_refused_with_what_can_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"source. .*a dataset id on the Hub.* 0 images"):
        load_instance_dataset(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/not/there/at/all", "source. must be a dataset id on the Hub.*got '/not/there/at/all', which does not exist"),
        ("not/there/train.json", r"not/there/train\.json"),
        (5, "source. .*got 5"),
        ({}, r"source. .*got \{\}"),
        ({"train": 5}, r"source. .*got \{'train': 5\}"),
    ],
)
def test_an_unknown_source_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_instance_dataset(source)


@pytest.mark.parametrize("read", [load_instance_dataset, check_dataset])
def test_what_is_loaded_already_is_refused(read, tmp_path):
    save_images(tmp_path)
    data = load_instance_dataset(save_coco(tmp_path / "a.json"))
    for loaded in (data, data["train"]):
        with pytest.raises(ValueError, match=rf"not be loaded yet, got {type(loaded).__name__}\. Give what it was"):
            read(loaded)


def test_files_that_are_no_json_are_refused(tmp_path):
    path = tmp_path / "train.json"
    for content, message in (
        ("{", "must be a JSON file"),
        ("[1]", "got list"),
        ('{"a": 1}', r"train.json: .*got \['a'\]"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_instance_dataset(path)


def test_arguments_for_rows_are_refused_for_files(tmp_path):
    save_images(tmp_path)
    path = save_coco(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"\['streaming', 'revision'\] .*a\.json"):
        load_instance_dataset(path, streaming=True, revision="main")
