import pytest
from huggingface_hub import constants

from pixart_jax.errors import UserError
from pixart_jax.weights.hub import local_folder


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert local_folder(str(tmp_path), "features.vae") == tmp_path


def test_a_name_of_the_hub_is_its_folder_in_the_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--sd-vae"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder("someone/sd-vae", "features.vae") == snapshot
    with pytest.raises(UserError, match=r"features\.vae is 'someone/other': no such folder"):
        local_folder("someone/other", "features.vae")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PixArt-XL-2-512x512/vae", "--local-dir=PixArt-XL-2-512x512`"),
        ("/data/PixArt-XL-2-512x512/vae", "--local-dir=/data/PixArt-XL-2-512x512`"),
        ("PixArt-XL-2-512x512", "`hf download PixArt-alpha/PixArt-XL-2-512x512 "),
        ("pixart_sigma_sdxlvae_T5_diffusers", "`hf download PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers "),
        ("tiny/text_encoder", "give its path."),
        ("a/b/c", "give its path."),
        ("./sd-vae", "give its path."),
        ("~/sd-vae", "give its path."),
    ],
)
def test_a_name_that_can_only_be_a_folder_is_not_looked_up(name, hint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(UserError, match="there is no such folder") as error:
        local_folder(name, "features.vae")
    assert f"features.vae is '{name}'" in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "google/t5-v1_1-xxl", "PixArt-alpha/PixArt-XL-2-512x512"])
def test_names_of_the_hub_are_looked_up(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: tmp_path / name)
    assert local_folder(name, "features.vae") == tmp_path / name


@pytest.mark.parametrize("name", ["no such/name", "a/b/c", "/absent/folder"])
def test_what_is_neither_is_one_line(name):
    with pytest.raises(UserError) as error:
        local_folder(name, "features.text_encoder.weights")
    assert f"features.text_encoder.weights is '{name}'" in str(error.value) and "\n" not in str(error.value)
