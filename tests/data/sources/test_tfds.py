import pytest
from source_files import write_tfds

from pixart_jax.data import images as I
from pixart_jax.data import sources as S
from pixart_jax.errors import UserError


@pytest.mark.filterwarnings("ignore")
def test_tfds_options(tmp_path, files):
    builder = write_tfds(tmp_path, files)
    source = S.open_source("tfds", "photos", data_dir=tmp_path, split="train[:4]", label_field="label")
    assert len(source) == 4 and source.classes == ["cat", "dog"]
    assert source.key(1) == "photos/1.2.3/train[:4]/0000000001"
    assert source[1].label in (0, 1) and source[1].captions[0].name == "text"
    several = S.open_source("tfds", builder.data_dir, caption_fields=["captions/text"])[0].captions
    assert [c.weight for c in several] == [0.5, 0.5] and several[1].text == "second"
    for options, words in [
        ({"split": "trian"}, "Unknown split 'trian'"),
        ({"image_field": "imgae"}, "Did you mean 'image'"),
        ({"caption_fields": ["txet"]}, "Did you mean 'text'"),
        ({"label_field": "labels"}, "Did you mean 'label'"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            S.open_source("tfds", "photos", data_dir=tmp_path, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="Did you mean 'mnist'"):
        S.open_source("tfds", "mnits", data_dir=tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_damaged_records_are_skipped(tmp_path, files, monkeypatch):
    builder = write_tfds(tmp_path, files)
    source = S.open_source("tfds", builder.data_dir, caption_fields=["text"], key_field="name")

    class Damaged(list):
        def __getitem__(self, index):
            if index == 1:
                raise ValueError("the checksum of a chunk is wrong\nat 17")
            return super().__getitem__(index)

    source._data = Damaged(source._data)
    assert source.key(1) == "photos/1.2.3/train/0000000001" and source[0].captions
    with pytest.raises(I.Refused, match=r"^unreadable: record 1: the checksum of a chunk is wrong$"):
        source[1]
