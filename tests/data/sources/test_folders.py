import os

import pytest
from source_files import write_folder

from pixart_jax.data import captions as C
from pixart_jax.data import images as I
from pixart_jax.data import sources as S
from pixart_jax.errors import UserError


def test_folder_order_keys_and_captions(tmp_path, files):
    root = write_folder(tmp_path, files)
    source = S.open_source("folder", root)
    assert [source.key(i) for i in range(len(source))] == sorted(files)
    (root / "a.jpg.txt").unlink()
    (root / "a.png.txt").unlink()
    (root / "a.txt").write_text("\ufeffshared  caption\nsecond line ", "utf-8")
    shared = [example.captions[0].text for example in (source[0], source[1])]
    assert [source.key(0), source.key(1)] == ["a.jpg", "a.png"] and shared == [
        "shared  caption\nsecond line"
    ] * 2
    (root / "a.png.txt").write_text("own")
    assert source[1].captions == (C.Caption("own", 1.0, "caption"),)


def test_skipped_images_of_a_folder(tmp_path, files):
    root = write_folder(tmp_path, files)
    source = S.open_source("folder", root)
    index = {source.key(i): i for i in range(len(source))}
    (root / "a.png.txt").unlink()
    (root / "z.tif.txt").write_text("  \n")
    (root / "a.jpg.txt").write_bytes(b"caf\xe9")
    (root / "deep/c.JPEG").unlink()
    for key, reason in [("a.png", "missing_caption"), ("z.tif", "missing_caption"), ("a.jpg", "bad_caption")]:
        with pytest.raises(I.Refused, match=reason):
            source[index[key]]
    example = source[index["deep/c.JPEG"]]  # the file is opened only when the image is read
    with pytest.raises(I.Refused, match="missing_image"):
        example.decode()
    without = S.open_source("folder", root, require_captions=False)
    assert [without[i].captions for i in range(len(without)) if without.key(i) == "a.png"] == [()]


def test_folder_with_hidden_files_and_circular_links(tmp_path, files):
    root = write_folder(tmp_path / "root", files)
    (root / "._a.png").write_bytes(b"resource fork")
    (root / ".cache").mkdir()
    (root / ".cache" / "x.png").write_bytes(b"")
    os.symlink(root, root / "deep" / "up")
    os.symlink(write_folder(tmp_path / "else", {"far.png": files["a.png"]}), root / "link")
    source = S.open_source("folder", root)
    assert [source.key(i) for i in range(len(source))] == sorted([*files, "link/far.png"])


def test_file_names_that_are_not_utf8(tmp_path, files):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        (tmp_path / name).write_bytes(files["a.png"][0])
    except OSError:
        pytest.skip("the file system does not allow such names")
    source = S.open_source("folder", tmp_path, require_captions=False)
    assert source.key(0) == "caf\\udce9.png"
    assert source[0].decode().shape == (40, 60, 3)


def test_class_folders(tmp_path, files):
    data = files["a.png"][0]
    for name in ["n02/b.png", "n01/x/a.png", "n10/c.png", "n01/a.JPG"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    source = S.open_source("auto", tmp_path)
    assert source.kind == "classes" and source.classes == ["n01", "n02", "n10"]
    assert [(source[i].key, source[i].label) for i in range(4)] == [
        ("n01/a.JPG", 0), ("n01/x/a.png", 0), ("n02/b.png", 1), ("n10/c.png", 2),
    ]  # fmt: skip
    assert source[0].captions == ()
    (tmp_path / "stray.png").write_bytes(data)
    source = S.open_source("classes", tmp_path)
    with pytest.raises(I.Refused, match=r"stray.png"):
        source[4]
    (tmp_path / "n05").mkdir()
    with pytest.raises(UserError, match=r"n05.*has no images"):
        S.open_source("classes", tmp_path)
    with pytest.raises(UserError, match="no captions"):
        S.open_source("classes", tmp_path, require_captions=True)
