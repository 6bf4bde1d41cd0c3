import pytest
from hub_server import HubServer, in_process

from pixart_jax.errors import UserError
from pixart_jax.hub import downloads, name_of
from pixart_jax.weights.hub import (
    ALPHA_PIPELINE,
    SIGMA_PIPELINE,
    check_hub_name,
    local_folder,
    local_network,
    local_pipeline,
    pipeline_for,
)

TRANSFORMER = {
    "transformer/config.json": b"{}",
    "transformer/diffusion_pytorch_model.safetensors": b"x" * 4000,
}
ENCODERS = {
    **{"text_encoder/config.json": b"{}", "text_encoder/model.safetensors": b"x" * 40_000},
    **{"vae/config.json": b"{}", "vae/diffusion_pytorch_model.safetensors": b"x" * 8000},
    **{"tokenizer/spiece.model": b"x", "scheduler/scheduler_config.json": b"{}", "model_index.json": b"{}"},
}
ITEMSIZES = {"transformer": 4, "text_encoder": 2, "vae": 4}


@pytest.fixture
def server(tmp_path):
    with HubServer() as found, in_process(found, tmp_path / "home"):
        yield found


def test_a_folder_is_taken_as_it_is(tmp_path):
    assert local_folder(str(tmp_path), "features.vae") == tmp_path
    assert local_network(tmp_path) == tmp_path


def test_plain_names_and_paths_of_the_hub_are_the_same_folder(server):
    commit = server.add("someone/sd-vae", {"config.json": b"{}"})
    server.add("PixArt-alpha/PixArt-XL-2-512x512", ENCODERS)
    folder = local_folder("someone/sd-vae", "features.vae")
    assert local_folder("hub:someone/sd-vae", "features.vae") == folder
    assert name_of(folder) == f"hub:someone/sd-vae@{commit}"
    assert local_folder("PixArt-alpha/PixArt-XL-2-512x512", "features.vae").is_dir()
    with pytest.raises(UserError, match=r"features\.vae is 'someone/other': no such folder, and .*not exist"):
        local_folder("someone/other", "features.vae")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("PixArt-XL-2-512x512/vae", "or 'hub:PixArt-alpha/PixArt-XL-2-512x512/vae', which is downloaded."),
        ("/data/PixArt-XL-2-512x512/vae", "or 'hub:PixArt-alpha/PixArt-XL-2-512x512/vae'"),
        ("PixArt-XL-2-512x512", "or 'hub:PixArt-alpha/PixArt-XL-2-512x512'"),
        ("pixart_sigma_sdxlvae_T5_diffusers", f"or '{SIGMA_PIPELINE}'"),
        ("tiny/text_encoder", "give its path."),
        ("a/b/c", "give its path."),
        ("./sd-vae", "give its path."),
        ("~/sd-vae", "give its path."),
        ("no such/name", "give its path."),
    ],
)
def test_a_name_that_can_only_be_a_folder_is_not_looked_up(name, hint, monkeypatch):
    monkeypatch.setattr("pixart_jax.hub.local_all", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(UserError, match="there is no such folder") as error:
        local_folder(name, "features.vae")
    assert f"features.vae is '{name}'" in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "google/t5-v1_1-xxl", "PixArt-alpha/PixArt-XL-2-512x512"])
def test_names_of_the_hub_are_looked_up(name):
    check_hub_name(name, "features.vae")
    with pytest.raises(UserError, match=f"features.vae is '{name}'.*HF_HUB_OFFLINE") as error:
        local_folder(name, "features.vae")
    assert "\n" not in str(error.value)


def test_of_a_network_only_the_transformer_is_downloaded(server):
    server.add("a/pipeline", TRANSFORMER | ENCODERS)
    server.add("a/network", TRANSFORMER)
    folder = local_network("hub:a/pipeline")
    assert (folder / "model_index.json").is_file() and (folder / "vae" / "config.json").is_file()
    weights = {name for name in server.files_read() if name.endswith(".safetensors")}
    assert weights == {"transformer/diffusion_pytorch_model.safetensors"}
    # A repository that has nothing else is the folder of its transformer.
    assert local_network("hub:a/network").name == "transformer"


def test_releases_without_encoders_are_used_with_those_of_another_release(server, capsys):
    server.add("PixArt-alpha/PixArt-XL-2-1024-MS", TRANSFORMER | ENCODERS)
    for name in ("PixArt-Sigma-XL-2-512-MS", "PixArt-XL-2-256x256"):
        server.add(f"PixArt-alpha/{name}", TRANSFORMER)
    server.add("PixArt-alpha/PixArt-Sigma", {"PixArt-Sigma-XL-2-512-MS.pth": b"x"})
    server.add("someone/my-sigma", TRANSFORMER)
    assert pipeline_for("runs/a") is None and pipeline_for("hub:someone/my-sigma") is None
    assert pipeline_for("hub:PixArt-alpha/PixArt-XL-2-1024-MS") is None
    assert capsys.readouterr().err == ""
    assert pipeline_for("hub:PixArt-alpha/PixArt-Sigma-XL-2-512-MS") == SIGMA_PIPELINE
    assert (
        f"512-MS' has no text encoder and VAE: those of {SIGMA_PIPELINE} are used" in capsys.readouterr().err
    )
    assert pipeline_for("hub:PixArt-alpha/PixArt-Sigma/PixArt-Sigma-XL-2-512-MS.pth") == SIGMA_PIPELINE
    assert pipeline_for("hub:PixArt-alpha/PixArt-XL-2-256x256") == ALPHA_PIPELINE
    assert pipeline_for("hub:PixArt-alpha/PixArt-XL-2-256x256", "mine") == "mine"


def test_sizes_are_said_before_the_first_download(server, capsys, monkeypatch):
    server.add("PixArt-alpha/PixArt-Sigma-XL-2-512-MS", TRANSFORMER)
    server.add("PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers", ENCODERS)
    path = "hub:PixArt-alpha/PixArt-Sigma-XL-2-512-MS"
    monkeypatch.setattr(downloads, "_download", lambda *_: pytest.fail("downloaded"))
    with pytest.raises(pytest.fail.Exception):
        local_pipeline(path, SIGMA_PIPELINE, ITEMSIZES)
    said = capsys.readouterr().err
    # These are no safetensors files with a header: 4 bytes are counted as a value.
    assert "memory of the weights: transformer 4.0 kB, text_encoder 20.0 kB, vae 8.0 kB" in said
    assert "2 files, 4.0 kB, of hub:PixArt-alpha/PixArt-Sigma-XL-2-512-MS" in said
    assert "7 files, 48.0 kB, of hub:PixArt-alpha/pixart_sigma" in said
    monkeypatch.undo()
    network, pipeline = local_pipeline(path, SIGMA_PIPELINE, ITEMSIZES)
    assert network.name == "transformer" and (pipeline / "vae" / "config.json").is_file()
    capsys.readouterr()
    local_pipeline(path, SIGMA_PIPELINE, ITEMSIZES)
    assert capsys.readouterr().err == ""
