import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pixart_jax.benchmarking.compile import lower_step
from pixart_jax.benchmarking.flops import forward_flops, latent_size, stage_flops, train_flops
from pixart_jax.config import AdapterConfig, FeaturesConfig, MeshConfig, RoutingConfig, TrainConfig, from_file
from pixart_jax.denoiser import abstract_model
from pixart_jax.errors import UserError
from pixart_jax.models.configs import DiTConfig, PixArtConfig
from pixart_jax.training.sharding import make_mesh


@pytest.mark.parametrize(
    ("side", "forward", "train"), [(32, 0.298, 0.894), (64, 1.236, 3.708), (128, 6.51, 19.53)]
)
def test_pixart_xl2_matches_the_published_flops(side, forward, train):
    model = PixArtConfig(size="XL/2")
    assert forward_flops(model, side, side).total / 1e12 == pytest.approx(forward, rel=1e-3)
    assert train_flops(model, side, side) / 1e12 == pytest.approx(train, rel=1e-3)


@pytest.mark.parametrize(("side", "giga"), [(32, 118.6), (64, 524.5)])
def test_dit_xl2_matches_its_paper(side, giga):
    """arXiv 2212.09748, table 4: multiply-adds."""
    assert forward_flops(DiTConfig(size="XL/2"), side, side).total / 2e9 == pytest.approx(giga, rel=1e-3)


SHAPE = dict(size="custom", depth=2, hidden_size=384, num_heads=6, scan_layers=False)


TEXT = dict(text_dim=512, text_length=40)


@pytest.mark.parametrize(
    ("model", "side"),
    [
        (PixArtConfig(**SHAPE, **TEXT, size_conditions=True), 32),
        (DiTConfig(**SHAPE, num_classes=10), 32),
        # Half of the FLOPs are in self-attention. One of the two blocks compresses, or both do.
        (PixArtConfig(**SHAPE, **TEXT, kv_compression="conv", qk_norm=True), 64),
        (PixArtConfig(**SHAPE, **TEXT, kv_compression="uniform_every", kv_compression_layers="0-1"), 64),
    ],
    ids=["pixart", "dit", "conv", "uniform_every"],
)
@pytest.mark.parametrize("train", [False, True])
def test_the_count_matches_the_compiler(model, side, train):
    """Unrolled and without rematerialization, the compiler counts only elementwise operations in addition."""
    graph, state = abstract_model(model)
    params = nnx.to_pure_dict(state)
    batch = 2
    latents = jax.ShapeDtypeStruct((batch, side, side, 4), jnp.float32)
    t = jax.ShapeDtypeStruct((batch,), jnp.float32)
    if isinstance(model, PixArtConfig):
        shapes = ((40, 512), (40,), (2,), (1,))[: 4 if model.size_conditions else 2]
        conditions = tuple(jax.ShapeDtypeStruct((batch, *shape), jnp.float32) for shape in shapes)
    else:
        conditions = (jax.ShapeDtypeStruct((batch,), jnp.int32),)

    def forward(params, *arguments):
        return nnx.merge(graph, params)(*arguments)

    def loss(params, *arguments):
        return jnp.square(forward(params, *arguments)).mean()

    function = jax.grad(loss) if train else forward
    compiled = jax.jit(function).lower(params, latents, t, *conditions).compile()
    counted = compiled.cost_analysis()["flops"] / batch
    expected = train_flops(model, side, side) if train else forward_flops(model, side, side).total
    # At 1024 tokens, the softmax is 4 % of the count.
    assert counted == pytest.approx(expected, rel=0.03 if side == 32 else 0.06)


def test_flops_of_sigma_at_2048_and_4096_px():
    """Compression leaves 4 N (N / 4) D of the 4 N^2 D of a block: it saves 25 % and 33 % of a step."""
    plain, compressed = (from_file(f"configs/sigma.py:{stage}").model for stage in ("2048", "2048-kv"))
    for side, ratio in ((256, 0.752), (512, 0.667)):
        pair = [forward_flops(model, side, side).total for model in (plain, compressed)]
        assert pair[1] / pair[0] == pytest.approx(ratio, abs=0.001)
        tokens = (side // 2) ** 2
        assert pair[0] - pair[1] == pytest.approx(14 * 0.75 * 4 * tokens**2 * 1152, rel=1e-12)


def test_routing_saves_the_flops_of_skipped_blocks():
    model = PixArtConfig(size="XL/2")
    routing = RoutingConfig(rate=0.5, first_blocks=2, last_blocks=4)
    full, routed = (train_flops(model, 32, 32, routing=one) for one in (RoutingConfig(), routing))
    # 22 of 28 blocks process half of the tokens, but still the keys and values of the whole caption.
    assert routed / full == pytest.approx(1 - 22 / 28 / 2, abs=0.03)


def test_a_latent_that_cannot_be_divided_into_patches_raises():
    with pytest.raises(UserError, match="latents are 33x32"):
        forward_flops(PixArtConfig(), 33, 32)


def test_the_latent_size_depends_on_the_codec():
    assert latent_size(FeaturesConfig(image_size=256)) == (32, 32)
    assert latent_size(FeaturesConfig(image_size=16, codec="pixels")) == (16, 16)
    assert latent_size(FeaturesConfig(), 512, 1024) == (64, 128)
    with pytest.raises(UserError, match="100x256 px has no latent"):
        latent_size(FeaturesConfig(image_size=256), 100)


def test_flops_of_a_stage_depend_on_text_length_image_size_and_routing():
    features = FeaturesConfig(image_size=512, text_length=77)
    stage = TrainConfig(model=PixArtConfig(size="XL/2"), features=features)
    assert stage_flops(stage) == train_flops(stage.model, 64, 64, 77)
    assert stage_flops(stage, 256, 1024) == train_flops(stage.model, 32, 128, 77)
    routed = dataclasses.replace(stage, routing=RoutingConfig(rate=0.5))
    assert stage_flops(routed) == train_flops(stage.model, 64, 64, 77, routed.routing) < stage_flops(stage)


def test_the_projector_of_an_aligned_stage_counts():
    """1.4 % of a step of XL/2, and less where its tokens skip blocks."""
    features = FeaturesConfig(image_size=256, image_encoder="dinov2")
    stage = TrainConfig(objective="alignment", model=PixArtConfig(size="XL/2"), features=features)
    plain = dataclasses.replace(stage, objective="diffusion")
    product = 1152 * 2048 + 2048 * 2048 + 2048 * 768
    assert stage_flops(stage) == stage_flops(plain) + 3 * 2 * 256 * product
    assert stage_flops(stage) / stage_flops(plain) == pytest.approx(1.014, abs=0.001)
    for first, tokens in ((7, 128), (8, 256)):
        routed = RoutingConfig(rate=0.5, first_blocks=first, last_blocks=4)
        pair = (stage_flops(dataclasses.replace(each, routing=routed)) for each in (stage, plain))
        assert next(pair) - next(pair) == 3 * 2 * tokens * product


def test_adapters_save_the_gradients_of_frozen_kernels():
    """The compiler's count before it optimizes, for a step of the published LoRA with fewer blocks."""
    config = from_file("configs/lora.py:512")
    model = dataclasses.replace(config.model, size="custom", depth=2, remat="none", scan_layers=False)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(model, attention="xla"),
        data=dataclasses.replace(config.data, batch_size=4),
        optimizer=dataclasses.replace(config.optimizer, accumulation=1),
        mesh=MeshConfig(data=1),
    )
    lowered = lower_step(config, make_mesh(config.mesh, config, jax.devices()[:1]))
    counted = lowered.cost_analysis()["flops"] / 4
    # The compiler leaves out the gradients of the inputs of the first block.
    assert counted == pytest.approx(stage_flops(config), rel=0.06)
    assert counted < stage_flops(config)
    published = from_file("configs/lora.py:512")
    whole = dataclasses.replace(published, adapter=AdapterConfig())
    assert stage_flops(published) / stage_flops(whole) == pytest.approx(0.727, abs=0.001)
