import numpy as np
from etils import epath
from feature_folders import TEXT_LENGTH, WIDTH, three_shards
from PIL import Image

from pixart_jax.config import DataConfig, FeaturesConfig, LogConfig, TrainConfig
from pixart_jax.data.features import FeatureDataset
from pixart_jax.encoders.images import PixelCodec
from pixart_jax.models.pixart import PixArtConfig
from pixart_jax.training import samples

MODEL = PixArtConfig(
    size="custom", depth=1, hidden_size=16, num_heads=2, base_size=4, text_dim=WIDTH, text_length=TEXT_LENGTH
)
CONFIG = TrainConfig(
    model=MODEL,
    features=FeaturesConfig(text_length=TEXT_LENGTH),
    data=DataConfig(batch_size=4),
    log=LogConfig(samples=4, sample_steps=1),
)


def test_images_that_are_not_finite_do_not_end_the_run(tmp_path, random_params, monkeypatch, capsys):
    monkeypatch.setattr(samples, "make_codec", lambda features: PixelCodec())
    generate = samples.make_sample_grid(
        CONFIG, FeatureDataset(three_shards(tmp_path / "f")), epath.Path(tmp_path)
    )
    params = random_params(MODEL)[1]
    params["final_layer"]["linear"]["bias"] *= np.nan
    grid = generate(params, 7)
    assert grid.shape[2] == 3 and (tmp_path / "samples" / "00000007.png").exists()
    assert not np.asarray(Image.open(tmp_path / "samples" / "00000007.png"))[4, 4].any()
    assert "step 7: the sample images are black, because 4 of 4 decoded images" in capsys.readouterr().err
