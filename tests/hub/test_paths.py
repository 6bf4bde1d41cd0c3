import pytest

from pixart_jax.errors import UserError
from pixart_jax.hub.paths import HubPath, check_paths

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("hub:a/b", HubPath("a/b")),
        ("hub:models/a/b", HubPath("a/b")),
        ("hub:a/b/", HubPath("a/b")),
        ("hub:a/b@v1", HubPath("a/b", revision="v1")),
        (f"hub:a/b@{COMMIT}/vae", HubPath("a/b", revision=COMMIT, path="vae")),
        ("hub:a/b@refs/pr/3/x/y.bin", HubPath("a/b", revision="refs/pr/3", path="x/y.bin")),
        ("hub:a/b@feature%2Fx/y", HubPath("a/b", revision="feature/x", path="y")),
        ("hub:datasets/a/b@v1/train", HubPath("a/b", True, "v1", "train")),
        ("hub:a/b/my lora.safetensors", HubPath("a/b", path="my lora.safetensors")),
    ],
)
def test_a_path_is_read_and_written_in_one_form(text, place):
    assert HubPath.parse(text) == place
    assert HubPath.parse(str(place)) == place


@pytest.mark.parametrize(
    "text", ["hub:", "hub:a", "hub:/a/b", "hub:a//b", "hub:a/b@", "hub:a/b/../c", "hub:a b/c", "hub:a/b//c"]
)
def test_another_form_is_one_line_with_the_rule(text):
    with pytest.raises(UserError, match=r"--x is 'hub:.*write a path of the hub as hub:OWNER/NAME"):
        check_paths("--x", text)


def test_what_was_probably_meant_is_named():
    with pytest.raises(UserError, match=r"Did you mean 'hub:PixArt-alpha/PixArt-XL-2-512x512'\?"):
        HubPath.parse("hub:PixArt-XL-2-512x512")
    for address in (
        "https://huggingface.co/a/b/tree/v1/vae",
        "https://hf.co/a/b/blob/v1/vae",
        "hf://a/b@v1/vae",
    ):
        with pytest.raises(UserError, match=r"write it as 'hub:a/b"):
            check_paths("--x", address)


def test_outputs_are_local():
    check_paths("--x", "runs/a", output=True)
    with pytest.raises(UserError, match="give a local path"):
        check_paths("--x", "hub:a/b", output=True)
