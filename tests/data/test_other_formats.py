"""Annotations in formats that are not read are recognised, and the error says how to convert them."""

import json

import pytest
from PIL import Image

from transformers_rfdetr import check_dataset, load_instance_dataset

FILES = {
    "via.csv": ("VIA", "#filename,file_size,file_attributes,region_count,region_id\n"),
    "Annotations/a.xml": ("datum convert -if voc", "<annotation>\n\t<folder>x</folder><object/></annotation>"),
    "export.json": ("as JSON", [{"id": 1, "image": "a.png", "annotator": 1, "annotation_id": 1, "label": []}]),
    "ml.json": ("Create ML", [{"image": "a.png", "annotations": []}]),
    "annotations/default.json": ("datum convert -if datumaro", {"info": {}, "categories": {}, "items": []}),
}


@pytest.mark.parametrize("name", FILES)
def test_annotations_of_other_programs_are_named_with_their_converter(name, tmp_path, monkeypatch):
    converter, content = FILES[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("transformers_rfdetr.data.hub_rows.import_datasets", lambda: pytest.fail("datasets is called"))
    for source in (tmp_path, path):
        for read in (load_instance_dataset, check_dataset):
            with pytest.raises(ValueError, match=converter) as raised:
                read(source)
            assert str(path) in str(raised.value)


def test_a_folder_of_images_without_annotations_is_not_copied_into_a_cache(tmp_path, monkeypatch):
    Image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    monkeypatch.setattr("transformers_rfdetr.data.hub_rows.import_datasets", lambda: pytest.fail("datasets is called"))
    for read in (load_instance_dataset, check_dataset):
        with pytest.raises(ValueError, match="1 images and no annotations"):
            read(tmp_path)
