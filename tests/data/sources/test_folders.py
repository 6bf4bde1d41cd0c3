import os
import shutil

import pytest
from source_files import write_folder, write_special_files

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


def test_splits_are_not_classes(tmp_path, files):
    for name in ("train/cat/a.png", "val/cat/b.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(files["a.png"][0])
    (tmp_path / "devkit").mkdir()
    message = (
        "train and val are names of splits, not of classes; give the folder of a split, such as '.*train'"
    )
    with pytest.raises(UserError, match=message):
        S.open_source("classes", tmp_path)
    assert S.open_source("classes", tmp_path / "train").classes == ["cat"]
    for name in ("devkit", "val"):
        shutil.rmtree(tmp_path / name)
    with pytest.raises(UserError, match="train are names of splits"):
        S.open_source("classes", tmp_path)


def test_a_folder_with_splits_says_that_it_reads_all(tmp_path, files):
    for name in ("Train/a", "test/b", "more/c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(files["a.png"][0])
        (tmp_path / f"{name}.txt").write_text("a cat")
    source = S.open_source("auto", tmp_path)
    assert source.kind == "folder" and len(source) == 3
    assert "the images of Train and test are all read; to keep one" in source.notes[0]
    assert f"such as '{tmp_path / 'Train'}'" in source.notes[0]
    shutil.copytree(tmp_path, tmp_path.with_name("above") / "deep")
    above = S.open_source("auto", tmp_path.with_name("above"))
    assert "the images of deep/Train and deep/test are all read" in above.notes[0]
    shutil.rmtree(tmp_path / "test")
    assert S.open_source("auto", tmp_path).notes == ()


@pytest.mark.parametrize("suffix", [".txt", ".TXT", ".Txt", ".caption", ".CAPTION"])
@pytest.mark.parametrize("start", ["c.JPEG", "c"])
def test_suffixes_of_captions(tmp_path, files, suffix, start):
    folder = write_folder(tmp_path, {"deep/c.JPEG": files["deep/c.JPEG"]}, captions=False)
    with pytest.raises(I.Refused, match=r"no text in 'c.txt' or 'c.caption'"):
        S.open_source("folder", folder)[0]
    (folder / "deep" / f"{start}{suffix}").write_text("a caption")
    source = S.open_source("auto", folder)
    assert (source.kind, source[0].captions, source.notes) == ("folder", (C.Caption("a caption"),), ())


def test_notes_about_files_that_are_not_read(tmp_path, files):
    names = [f"{i}.png" for i in range(4)]
    folder = write_folder(tmp_path, dict.fromkeys(names, files["a.png"]))
    (folder / "0.caption").write_text("other")
    (folder / "1.png.txt").unlink()
    (folder / "1.json").write_text("{}")
    source = S.open_source("folder", folder)
    assert source[0].captions[0].text != "other"
    assert source.notes == (
        f"'{folder}': 1 images have .txt and .caption files, for example '0.png'; only the .txt files are "
        "read",
        f"'{folder}': 1 images have no caption file; other files, which are not read: 1 .json",
    )
    assert S.open_source("folder", folder, require_captions=False).notes == ()


def test_folders_of_kohya(tmp_path, files):
    image = files["a.png"]
    write_folder(tmp_path / "10_sks dog", {"0.png": image, "1.png": image}, captions=False)
    (tmp_path / "10_sks dog" / "0.caption").write_text("a photo of sks dog, outdoors")
    assert S.open_source("auto", tmp_path).kind == "folder"
    alone = S.open_source("kohya", tmp_path)
    assert [(e.key, e.captions[0].text) for e in map(alone.__getitem__, range(len(alone)))] == [
        ("10_sks dog/0.png", "a photo of sks dog, outdoors"),
        ("10_sks dog/1.png", "sks dog"),
    ]
    # Only the ratio of the numbers matters: 10 to 4 is 5 to 2.
    write_folder(tmp_path / "4_dog", {"0.png": image}, captions=False)
    # Its images are never used, and the name of the other folder has no caption.
    for name in ("0_unused", "3_ "):
        write_folder(tmp_path / name, {"0.png": image}, captions=False)
    source = S.open_source("kohya", tmp_path)
    keys = [source.key(i) for i in range(len(source))]
    assert keys[:6] == [
        "10_sks dog/0.png",
        *(f"10_sks dog/0.png#{k}" for k in (2, 3, 4, 5)),
        "10_sks dog/1.png",
    ]
    assert keys[10:] == ["4_dog/0.png", "4_dog/0.png#2"] and len(set(keys)) == 12
    assert source[11].captions[0].text == "dog" and source[11].read() == image[0]
    assert "2 images are not read, because their folder" in source.notes[0]
    assert "source=kohya repeats images" in S.open_source("folder", tmp_path).notes[0]
    with pytest.raises(UserError, match="no images in folders named like '10_sks dog'"):
        S.open_source("kohya", tmp_path / "4_dog")


def test_special_files_in_place_of_images_and_captions(tmp_path, files):
    write_special_files(tmp_path)
    for name in os.listdir(tmp_path):
        (tmp_path / name).with_suffix(".txt").write_text("a caption")
    for number, name in enumerate(["fifo.png", "socket.png", "circle.png", "device.png", "broken.png"]):
        (tmp_path / f"{number}.png").write_bytes(files["a.png"][0])
        (tmp_path / f"{number}.txt").symlink_to(name)
    (tmp_path / "5.png").write_bytes(files["a.png"][0])
    (tmp_path / "5.txt").write_text("word " * 1_000_000)
    source = S.open_source("folder", tmp_path)
    found = {}
    for index in range(len(source)):
        with pytest.raises(I.Refused) as error:
            source[index].size()
        found[source.key(index)] = error.value.reason
    assert found == {
        **dict.fromkeys(("0.png", "1.png", "2.png", "3.png"), "unreadable"),
        **dict.fromkeys(("fifo.png", "socket.png", "circle.png", "device.png"), "unreadable"),
        **{"4.png": "missing_image", "broken.png": "missing_image"},
        **{"5.png": "too_large", "empty.png": "format"},
    }


def test_names_of_folders_that_are_no_text(tmp_path, files):
    (tmp_path / os.fsdecode(b"10_caf\xe9")).mkdir()
    (tmp_path / os.fsdecode(b"10_caf\xe9") / "a.png").write_bytes(files["a.png"][0])
    with pytest.raises(I.Refused, match=r"bad_caption.*not Unicode"):
        S.open_source("kohya", tmp_path)[0]
    assert S.open_source("classes", tmp_path, require_captions=False).classes == ["10_caf\\udce9"]
    (tmp_path / "1_dog").mkdir()
    shutil.copy(tmp_path / os.fsdecode(b"10_caf\xe9") / "a.png", tmp_path / "1_dog")
    assert len(S.open_source("kohya", tmp_path)) == 11
    (tmp_path / "1_dog").rename(tmp_path / "99999999999999999999_dog")
    with pytest.raises(UserError, match=r"'99999999999999999999_dog' would repeat its images .* rename it"):
        S.open_source("kohya", tmp_path)
