import collections
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval as pe

from pixart_jax.errors import UserError
from pixart_jax.models.attention import (
    SPLASH_MIN_KEYS,
    attention,
    choose_implementation,
    compact_keys,
    splash_attention,
    target_platform,
)
from pixart_jax.models.configs import PixArtConfig
from pixart_jax.models.layers import REMAT_POLICIES
from pixart_jax.models.pixart import PixArt


def reference(query, key, value, mask):
    """Attention in float64, with loops over the keys that the mask keeps."""
    out = np.zeros(query.shape)
    for b in range(query.shape[0]):
        kept = np.flatnonzero(mask[b])
        for h in range(query.shape[2]):
            logits = query[b, :, h] @ key[b, kept, h].T / np.sqrt(query.shape[3])
            weights = np.exp(logits - logits.max(axis=1, keepdims=True))
            out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ value[b, kept, h]
    return out


@pytest.fixture
def ragged():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(3, 5, 2, 8))
    key, value = rng.normal(size=(2, 3, 7, 2, 8))
    mask = np.array([[1, 1, 1, 0, 0, 0, 0], [1] * 7, [0, 1, 0, 0, 1, 0, 1]], bool)
    return query, key, value, mask


def run(implementation, *arguments, key_lengths):
    if implementation == "splash":
        # The kernel runs only on TPUs, so the tests interpret it.
        return splash_attention(*arguments, key_lengths, interpret=True)
    return attention(*arguments, key_lengths=key_lengths, implementation=implementation)


def can_run(implementation):
    return implementation != "cudnn" or jax.default_backend() == "gpu"


def test_backward_pass_saves_only_the_probabilities():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 10, 3, 4))
    _, pullback = jax.vjp(attention, query, key, value)
    tables = [leaf for leaf in jax.tree.leaves(pullback) if leaf.size == 2 * 3 * 10 * 10]
    assert len(tables) == 1


@pytest.mark.parametrize("implementation", list(filter(can_run, ("xla", "splash", "cudnn"))))
def test_lengths_of_compacted_keys_are_equivalent_to_any_mask(ragged, implementation):
    """Output and gradients match loops over the keys that the mask keeps."""
    query, key, value, mask = ragged
    if implementation == "cudnn":
        query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))

    def out(query, key, value):
        pair = jnp.concatenate([key, value], axis=-1)
        compacted, lengths = compact_keys(pair.reshape(3, 7, -1), jnp.asarray(mask))
        key, value = jnp.split(compacted.reshape(pair.shape), 2, axis=-1)
        return run(implementation, query, key, value, key_lengths=lengths)

    dtype = jnp.bfloat16 if implementation == "cudnn" else jnp.float32
    arguments = [jnp.asarray(x, dtype) for x in (query, key, value)]
    tolerance = dict(rtol=0, atol=2e-2 if implementation == "cudnn" else 5e-6)
    expected = reference(query, key, value, mask)
    np.testing.assert_allclose(jax.jit(out)(*arguments), expected, **tolerance)

    weights = np.random.default_rng(1).normal(size=expected.shape)
    gradients = jax.jit(jax.grad(lambda *x: (out(*x) * weights).sum(), argnums=(0, 1, 2)))(*arguments)
    step = 1e-4
    rng = np.random.default_rng(2)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [query, key, value]
            moved[i] = moved[i] + sign * step * direction
            ends.append((reference(*moved, mask) * weights).sum())
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((np.asarray(gradient, np.float64) * direction).sum(), slope, rtol=1e-2)


@pytest.mark.parametrize("tokens", [128, 130])
def test_splash_pads_to_its_blocks(tokens):
    """Self-attention with head width 72, with and without padding."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(1, tokens, 2, 72)), jnp.float32) for _ in range(3))
    out = splash_attention(query, key, value, interpret=True)
    np.testing.assert_allclose(out, attention(query, key, value), atol=3e-6)


@pytest.mark.parametrize(("tokens", "keys"), [(1024, 1024), (960, 120)])
def test_splash_lowers_for_a_tpu(tokens, keys):
    """Pallas lowers the kernel for head width 72, captions and odd buckets, forward and backward."""
    query, key = (jax.ShapeDtypeStruct((2, n, 16, 72), jnp.bfloat16) for n in (tokens, keys))
    lengths = None if keys == tokens else jax.ShapeDtypeStruct((2,), jnp.int32)

    def total(query, key, value, lengths):
        out = attention(query, key, value, key_lengths=lengths, implementation="splash")
        return out.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    program = gradient.trace(query, key, key, lengths).lower(lowering_platforms=("tpu",)).as_text()
    assert program.count("tpu_custom_call") == 2  # forward, and one kernel for all three gradients


def test_masked_keys_have_no_gradient(ragged):
    query, key, value, mask = ragged

    def total(value):
        compacted, lengths = compact_keys(value.reshape(3, 7, -1), jnp.asarray(mask))
        value = compacted.reshape(value.shape)
        return jnp.square(attention(jnp.asarray(query), jnp.asarray(key), value, key_lengths=lengths)).sum()

    gradient = np.asarray(jax.grad(total)(jnp.asarray(value)))
    assert np.all(gradient[~mask] == 0)
    assert np.all(np.abs(gradient[mask]).sum(axis=(1, 2)) > 0)


def test_an_empty_mask_keeps_one_key():
    _, lengths = compact_keys(jnp.ones((1, 3, 2)), jnp.zeros((1, 3)))
    np.testing.assert_array_equal(lengths, [1])


@pytest.mark.parametrize("tokens, keys", [(6, 5), (7, 8), (3, 3)])
def test_cudnn_gets_even_numbers_of_tokens_and_keys(monkeypatch, tokens, keys):
    """JAX differentiates cuDNN attention only for even numbers; padding must not change the result."""
    plain = jax.nn.dot_product_attention

    def kernel(query, key, value, *, key_value_seq_lengths, implementation):
        assert implementation == "cudnn"
        assert query.shape[1] % 2 == key.shape[1] % 2 == value.shape[1] % 2 == 0
        return plain(query, key, value, key_value_seq_lengths=key_value_seq_lengths)

    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, tokens, 2, 8)), jnp.float32)
    key, value = jnp.asarray(rng.normal(size=(2, 2, keys, 2, 8)), jnp.float32)
    lengths = jnp.asarray([keys, 1])
    expected = [attention(query, key, value, key_lengths=one) for one in (None, lengths)]
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    for one, out in zip((None, lengths), expected):
        found = attention(query, key, value, key_lengths=one, implementation="cudnn")
        np.testing.assert_allclose(found, out, atol=1e-6)


def test_float16_has_logits_and_softmax_in_float32():
    rng = np.random.default_rng(0)
    # Logits of some hundred thousand, which exceed the range of float16.
    query, key = (jnp.asarray(300 * rng.normal(size=(2, 12, 2, 72)), jnp.float16) for _ in range(2))
    value = jnp.asarray(rng.normal(size=(2, 12, 2, 72)), jnp.float16)
    lengths = jnp.asarray([12, 3])
    for scale, given in ((1.0, None), (1.0, lengths), (1 / 300, None), (1 / 300, lengths)):
        arrays = [query * scale, key * scale, value]
        out = jax.jit(attention)(*arrays, key_lengths=given)
        exact = attention(*(x.astype(jnp.float32) for x in arrays), key_lengths=given)
        assert out.dtype == jnp.float16 and jnp.abs(exact).max() > 0.5
        np.testing.assert_allclose(out, exact, rtol=0, atol=2e-3)


# --- Choice of the implementation -------------------------------------------------------------------


def test_unsupported_implementations_say_why():
    with pytest.raises(UserError, match=r"is 'cudn': choose.*Did you mean 'cudnn'"):
        choose_implementation("cudn", dtype="float32", head_dim=72)
    with pytest.raises(UserError, match=r"needs a GPU; the dtype is float32.*head width is 12"):
        choose_implementation("cudnn", dtype="float32", head_dim=12)
    with pytest.raises(UserError, match=r"'splash' cannot run: the backend is cpu, it needs a TPU; the head"):
        choose_implementation("splash", dtype="float32", head_dim=136)


def test_target_platform_chooses_for_devices_that_are_absent():
    with target_platform("tpu"):
        assert choose_implementation("splash", dtype="bfloat16", head_dim=72).implementation == "splash"
        with pytest.raises(UserError, match="the backend is tpu, it needs a GPU"):
            choose_implementation("cudnn", dtype="bfloat16", head_dim=72)
    with target_platform("gpu"):
        assert choose_implementation("cudnn", dtype="bfloat16", head_dim=72).implementation == "cudnn"


@pytest.mark.parametrize(
    ("platform", "dtype", "head_dim", "expected", "reason"),
    [
        ("cpu", "bfloat16", 72, "xla", "the backend is cpu"),
        ("gpu", "bfloat16", 72, "cudnn", "the backend is gpu, the dtype bfloat16, the head width 72"),
        ("gpu", "float16", 64, "cudnn", "float16"),
        ("gpu", "float32", 72, "xla", "'cudnn' cannot run, the dtype is float32"),
        ("gpu", "bfloat16", 36, "xla", "'cudnn' cannot run, the head width is 36"),
        ("tpu", "bfloat16", 72, "splash", "the backend is tpu"),
        ("tpu", "float32", 72, "splash", "the dtype float32"),
        ("tpu", "bfloat16", 256, "xla", "'splash' cannot run, the head width is 256"),
    ],
)
def test_auto_chooses_the_kernel_of_the_platform(platform, dtype, head_dim, expected, reason):
    with target_platform(platform):
        choice = choose_implementation("auto", dtype=dtype, head_dim=head_dim)
    assert choice.implementation == expected
    assert reason in choice.reason and choice.reason.startswith("auto: ")
    assert str(choice).startswith(f"{expected} (auto: ")


@pytest.mark.parametrize(
    ("capability", "flags", "expected", "reason"),
    [
        ("9.0", "", "cudnn", "the backend is gpu"),
        ("7.5", "", "xla", "has compute capability 7.5, it needs 8.0"),
        ("gfx942", "", "xla", "it needs an NVIDIA GPU"),
        ("9.0", "--x=1 --xla_gpu_deterministic_ops=true --y=2", "xla", "compile.deterministic"),
        ("9.0", "--xla_gpu_deterministic_ops", "xla", "compile.deterministic"),
        ("9.0", "--xla_gpu_deterministic_ops --xla_gpu_deterministic_ops=false", "cudnn", "backend is gpu"),
    ],
)
def test_auto_depends_on_the_local_gpu(monkeypatch, capability, flags, expected, reason):
    monkeypatch.setenv("XLA_FLAGS", flags)
    device = SimpleNamespace(compute_capability=capability, device_kind="card")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    choice = choose_implementation("auto", dtype="float16", head_dim=72)
    assert (choice.implementation, reason in choice.reason) == (expected, True)
    if expected == "xla":
        with pytest.raises(UserError, match="Use attention 'auto' or 'xla'"):
            choose_implementation("cudnn", dtype="float16", head_dim=72)


def test_auto_uses_xla_for_short_captions_on_a_tpu():
    with target_platform("tpu"):
        chosen, explicit = (
            choose_implementation(n, dtype="bfloat16", head_dim=72) for n in ("auto", "splash")
        )
    assert (chosen.of(120), chosen.of(SPLASH_MIN_KEYS), chosen.of(4096)) == ("xla", "splash", "splash")
    assert explicit.of(120) == "splash"


# --- Rematerialization ------------------------------------------------------------------------------


def kernels(jaxpr):
    """Counts the calls of each attention kernel, after eliminating dead code as `jax.jit` does."""
    jaxpr, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "pallas_call":
            name = re.search(r"splash_mha_(fwd|dkv)", str(equation.params))[0]
        if re.match("dot_product_attention|splash_mha", name):
            counts[re.sub("_wrapper$", "", name)] += 1
            continue
        for inner in jaxprs_in_params(equation.params):
            counts += kernels(getattr(inner, "jaxpr", inner))
    return dict(counts)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_forward_kernel_runs_once(monkeypatch, platform, remat, scan):
    """Once per attention layer in the gradient: the 28 blocks of XL/2 have 56 attention layers."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    config = PixArtConfig(
        **dict(size="custom", depth=2, hidden_size=48, num_heads=2, text_dim=8, text_length=5, base_size=16),
        **dict(dtype="bfloat16", remat=remat, scan_layers=scan),
    )
    with target_platform(platform):
        graph, state = nnx.split(nnx.eval_shape(lambda: PixArt(config, rngs=nnx.Rngs(0))))

        def loss(state, latents, text):
            return nnx.merge(graph, state)(latents, jnp.zeros(2), text, jnp.ones(text.shape[:2])).sum()

        latents = jax.ShapeDtypeStruct((2, 32, 32, 4), jnp.float32)
        text = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
        found = kernels(jax.make_jaxpr(jax.grad(loss))(state, latents, text).jaxpr)
    bodies = 1 if scan else config.depth
    # On a TPU cross-attention uses XLA, because captions are short.
    layers = bodies * (2 if platform == "gpu" else 1)
    forward, backward = (
        ("dot_product_attention_fwd", "dot_product_attention_bwd")
        if platform == "gpu"
        else ("splash_mha_fwd", "splash_mha_dkv")
    )
    assert found == {forward: layers * (2 if remat == "full" else 1), backward: layers}
