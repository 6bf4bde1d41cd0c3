import pytest
from huggingface_hub import constants

from pixart_jax.errors import UserError
from pixart_jax.weights.hub import local_folder


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert local_folder(str(tmp_path), "features.vae") == tmp_path


def test_a_name_of_the_hub_is_its_folder_in_the_cache(tmp_path, monkeypatch):
    repository = tmp_path / "models--someone--vae"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder("someone/vae", "features.vae") == snapshot
    with pytest.raises(UserError, match=r"features\.vae is 'someone/other': no such folder"):
        local_folder("someone/other", "features.vae")


@pytest.mark.parametrize("name", ["no such/name", "a/b/c", "/absent/folder"])
def test_what_is_neither_is_one_line(name):
    with pytest.raises(UserError) as error:
        local_folder(name, "features.text_encoder.weights")
    assert f"features.text_encoder.weights is '{name}'" in str(error.value) and "\n" not in str(error.value)
