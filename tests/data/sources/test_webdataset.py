import io
import os
import re
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


def test_suffixes_of_archives_in_upper_case(tmp_path, files):
    for name in ("a.tar", "B.TAR"):
        write_tar(tmp_path / name, [(f"{name[0]}.png", files["a.png"][0])])
    source = S.open_source("auto", tmp_path, require_captions=False)
    assert [source.key(i) for i in range(len(source))] == ["B.TAR/B.png", "a.tar/a.png"]


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


def keys_of(source):
    return [source.key(i) for i in range(len(source))]


def test_names_with_dots(tmp_path, files):
    png = files["a.png"][0]
    members = [
        (f"photo.v{i}.{end}", data) for i in range(3) for end, data in (("png", png), ("txt", b"view %d" % i))
    ]
    members += [
        ("b.png", png),
        ("b.txt", b"plain"),
        ("b.crop.png", png),
        ("b.crop.txt", b"cropped"),
        ("b.mask.png", png),
    ]
    members += [("c.note.txt", b"no image"), ("c.v1.json", b"{}")]
    source = S.open_source("auto", write_tar(tmp_path / "s.tar", members))
    names = ["photo.v0.png", "photo.v1.png", "photo.v2.png", "b.png", "b.crop.png", "c"]
    assert keys_of(source) == [f"s.tar/{name}" for name in names]
    captions = ["view 0", "view 1", "view 2", "plain", "cropped"]
    assert [source[i].captions[0].text for i in range(5)] == captions
    with pytest.raises(I.Refused, match=r"\(members: note.txt, v1.json\); set image_field"):
        source[5]
    assert source.notes == (
        f"'{tmp_path / 's.tar'}': members that are not read: 1 .mask.png; image_field and caption_fields "
        "name more",
    )


def test_every_member_is_counted(tmp_path, files):
    png = files["a.png"][0]
    members = [
        ("0.png", png),
        ("0.txt", b"t"),
        ("0.npy", b""),
        ("1.png", png),
        ("1.txt", b"a"),
        ("1.txt", b"b"),
    ]
    path = write_tar(tmp_path / "s.tar", [*members, ("readme", b""), (".hidden.txt", b"")])
    with tarfile.open(path, "a") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.png"
            archive.addfile(info)
    (note,) = S.open_source("auto", path).notes
    counts = re.search("not read: (.*); image_field", note)[1].split(", ")
    assert sorted(counts) == [
        "1 .npy", "1 hidden", "1 links and special files", "1 replaced by a later member of the same name",
        "1 without a suffix",
    ]  # fmt: skip


def test_concatenated_files(tmp_path, files):
    png = files["a.png"][0]
    parts = [
        write_tar(tmp_path / f"{i}", [(f"{i}.png", png), (f"{i}.txt", b"%d" % i)]).read_bytes()
        for i in range(3)
    ]
    # Files of several programs end with zeros of different lengths.
    data = parts[0] + parts[1].rstrip(b"\0").ljust(len(png) // 512 * 512 + 4096, b"\0") + parts[2]
    (tmp_path / "all.tar").write_bytes(data)
    source = S.open_source("auto", tmp_path / "all.tar")
    assert keys_of(source) == [f"all.tar/{i}.png" for i in range(3)]
    assert [(source[i].captions[0].text, source[i].read()) for i in range(3)] == [
        (str(i), png) for i in range(3)
    ]
    # A damaged header, at which `tarfile` ends without an exception.
    second = len(parts[0]) + 100
    (tmp_path / "all.tar").write_bytes(data[:second] + b"damaged" + data[second + 7 :])
    with pytest.raises(UserError, match=rf"no header at byte {len(parts[0]):,}"):
        S.open_source("auto", tmp_path / "all.tar")
    (tmp_path / "all.tar").write_bytes(parts[0] + parts[1][:300])
    with pytest.raises(UserError, match="not a readable uncompressed tar file"):
        S.open_source("auto", tmp_path / "all.tar")


def test_names_of_files_with_wildcards_and_splits(tmp_path, files):
    members = [("0.png", files["a.png"][0]), ("0.txt", b"t")]
    folder = tmp_path / "real[1]"
    folder.mkdir()
    for name in ("train-0[1].tar", "train-1.tar", "test-0.tar", "{0..1}.tar"):
        write_tar(folder / name, members)
    assert keys_of(S.open_source("auto", folder / "train-0[1].tar")) == ["train-0[1].tar/0.png"]
    assert keys_of(S.open_source("auto", folder / "{0..1}.tar")) == ["{0..1}.tar/0.png"]
    assert keys_of(S.open_source("auto", folder / "tr*.tar")) == ["train-0[1].tar/0.png", "train-1.tar/0.png"]
    source = S.open_source("auto", folder)
    assert keys_of(source) == ["train-0[1].tar/0.png", "train-1.tar/0.png", "{0..1}.tar/0.png"]
    assert "3 of 4 files are read, without those of the split test" in source.notes[0]
    assert keys_of(S.open_source("auto", folder, split="test")) == ["test-0.tar/0.png"]
    with pytest.raises(UserError, match=r"train-2.tar' is missing"):
        S.open_source("webdataset", folder / "train-{1..2}.tar")


def test_hostile_members(tmp_path, files):
    png, text = files["a.png"][0], b"a caption"
    with tarfile.open(tmp_path / "s.tar", "w") as archive:

        def add(name, data=b"", kind=tarfile.REGTYPE, **options):
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            for option, value in options.items():
                setattr(info, option, value)
            archive.addfile(info, io.BytesIO(data))

        for name in ("/etc/0", "../../1", "good"):
            add(f"{name}.png", png)
            add(f"{name}.txt", text)
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            add(f"special{ord(kind)}.png", kind=kind, linkname="/etc/passwd")
        add("nested.tar", write_tar(tmp_path / "inner.tar", [("0.png", png)]).read_bytes())
        add(f"{'n' * 70_000}.png", png)
        add(f"{'n' * 70_000}.txt", text)
        for number, caption in enumerate([b"word " * 1_000_000, b"a\0b", b"\xff"]):
            add(f"caption{number}.png", png)
            add(f"caption{number}.txt", caption)
        for number, label in enumerate([b"2147483648", b"-2", b"1.5", b"9" * 5000]):
            add(f"label{number}.png", png)
            add(f"label{number}.txt", text)
            add(f"label{number}.cls", label)
        add("deep.png", png)
        add("deep.json", b"[" * 100_000)
    source = S.open_source("webdataset", tmp_path / "s.tar")
    found = {}
    for index in range(len(source)):
        try:
            found[source.key(index)[6:30]] = source[index].captions[0].text
        except I.Refused as refused:
            found[source.key(index)[6:30]] = refused.reason
    # The name of a member is only a key: nothing is read or written by it.
    assert found == {
        **dict.fromkeys(("/etc/0.png", "../../1.png", "good.png"), "a caption"),
        **{"nested": "missing_image", "n" * 24: "bad_record", "deep.png": "bad_record"},
        **{"caption0.png": "too_large", "caption1.png": "bad_caption", "caption2.png": "bad_caption"},
        **{f"label{number}.png": "bad_record" for number in range(4)},
    }
    assert "5 links and special files" in source.notes[0]


def test_an_archive_that_is_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(UserError, match=r"0\.tar': is not a file; remove it"):
        S.open_source("webdataset", tmp_path)
