import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from pixart_jax.models.projector import Projector, projector_products


def test_the_projector_is_that_of_the_paper():
    """Linear SiLU Linear SiLU Linear, as in PyTorch; 8.13 million parameters for XL/2 and DINOv2-B."""
    projector = Projector(12, 16, 10, dtype=jnp.float32, rngs=nnx.Rngs(0))
    linears = []
    for name in ("fc1", "fc2", "fc3"):
        layer = getattr(projector, name)
        assert not np.any(layer.bias[...])
        limit = np.sqrt(6 / sum(layer.kernel.shape))
        assert 0.9 * limit < np.abs(layer.kernel[...]).max() <= limit
        layer.bias[...] = jnp.asarray(np.random.default_rng(1).normal(size=layer.bias.shape), jnp.float32)
        theirs = torch.nn.Linear(*layer.kernel.shape)
        theirs.weight.data = torch.tensor(np.array(layer.kernel[...]).T)
        theirs.bias.data = torch.tensor(np.array(layer.bias[...]))
        linears += [theirs, torch.nn.SiLU()]
    x = np.random.default_rng(0).normal(size=(2, 5, 12)).astype(np.float32)
    expected = torch.nn.Sequential(*linears[:-1])(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(projector(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
    paper = nnx.eval_shape(lambda: Projector(1152, 2048, 768, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(paper)))
    assert count == 2_361_344 + 4_196_352 + 1_573_632
    assert projector_products(1152, 2048, 768) == count - 2048 - 2048 - 768
