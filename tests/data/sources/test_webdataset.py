import tarfile

import pytest
from source_files import write_tar

from pixart_jax.data import captions as C
from pixart_jax.data import images as I
from pixart_jax.data import sources as S
from pixart_jax.errors import UserError


def test_webdataset_members(tmp_path, files):
    png, jpg = files["a.png"][0], files["a.jpg"][0]
    write_tar(
        tmp_path / "s.tar",
        [
            ("./0.png", png), ("./0.json", b'{"caption": "from json", "height": 40, "label": 5}'),
            ("dir/1.v2.png", b"mask"), ("dir/1.jpg", jpg), ("dir/1.txt", b"from txt"), ("dir/1.cls", b"7\n"),
            ("dir/1.json", b'{"caption": "not used"}'),
            ("2.txt", b"no image"),
            ("3.png", png),
            ("4.png", png), ("4.json", b"[]"),
            ("5.png", png), ("5.txt", b"first"), ("5.txt", b"second"),
            ("6.png", png), ("6.json", b'{"captions": [{"text": "t", "weight": 2, "name": "n"}]}'),
            ("noextension", b""),
        ],
    )  # fmt: skip
    source = S.open_source("auto", tmp_path / "s.tar")
    keys = ["s.tar/0.png", "s.tar/dir/1.jpg", "s.tar/2", *(f"s.tar/{i}.png" for i in (3, 4, 5, 6))]
    assert [source.key(i) for i in range(len(source))] == keys
    assert source[0].captions == (C.Caption("from json", 1.0, "caption"),)
    assert (source[0].height, source[0].label) == (40, 5)
    assert source[1].captions == (C.Caption("from txt", 1.0, "txt"),) and source[1].label == 7
    assert source[1].read() == jpg
    for i, reason in [(2, "missing_image"), (3, "missing_caption"), (4, "bad_record")]:
        with pytest.raises(I.Refused, match=reason):
            source[i]
    assert source[5].captions[0].text == "second"
    assert source[6].captions == (C.Caption("t", 2.0, "n"),)
    both = S.open_source("webdataset", tmp_path / "s.tar", caption_fields={"txt": 1, "caption": 3})
    assert [(c.text, c.weight) for c in both[1].captions] == [("from txt", 1.0), ("not used", 3.0)]
    masks = S.open_source("webdataset", tmp_path / "s.tar", image_field="v2.png", require_captions=False)
    assert masks[1].key == "s.tar/dir/1.v2.png" and masks[1].read() == b"mask"


def test_damaged_webdataset(tmp_path, files):
    members = [(f"{i}.png", files["a.png"][0]) for i in range(3)]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    (tmp_path / "torn.tar").write_bytes(whole[: 512 + 3000])
    with pytest.raises(UserError, match=r"torn.tar.*restore or remove"):
        S.open_source("auto", tmp_path / "torn.tar")
    with tarfile.open(tmp_path / "zipped.tar", "w:gz"):
        pass
    with pytest.raises(UserError, match="gunzip"):
        S.open_source("auto", tmp_path / "zipped.tar")
    source = S.open_source("auto", tmp_path / "whole.tar", require_captions=False)
    (tmp_path / "whole.tar").write_bytes(whole[:600])
    with pytest.raises(I.Refused, match="unreadable"):
        source[0].decode()
    (tmp_path / "whole.tar").unlink()
    with pytest.raises(I.Refused, match="missing_image"):
        source[0].decode()
