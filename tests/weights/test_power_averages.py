from pathlib import Path

import numpy as np
import pytest

from pixart_jax.weights.power_averages import PowerAverage, Profile, fit_profile, inner_products

GOLDEN = np.load(Path(__file__).parents[1] / "data/posthoc_ema.npz")  # of the official code of EDM2


def test_the_exponent_gives_the_width():
    for width, expected in zip(GOLDEN["stds"], GOLDEN["gamma"]):
        exponent = PowerAverage(width).exponent
        np.testing.assert_allclose(exponent, expected, rtol=1e-9)
        found = np.sqrt((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3)))
        np.testing.assert_allclose(found, width, rtol=1e-9)
    assert PowerAverage(0.05).name == "power_ema_0.05"


@pytest.mark.parametrize("a, b", [((3, 0.05), (7, 0.1)), ((7, 0.1), (3, 0.05)), ((5, 0.2), (5, 0.2))])
def test_inner_products_are_integrals_of_the_profiles(a, b):
    """The profile of an average at time t is (gamma + 1) s^gamma / t^(gamma + 1) for s <= t, else 0."""
    s = (np.arange(200_000) + 0.5) * 7 / 200_000

    def profile(step, width):
        exponent = PowerAverage(width).exponent
        return np.where(s <= step, (exponent + 1) * (s / step) ** exponent / step, 0)

    expected = np.sum(profile(*a) * profile(*b)) * 7 / 200_000
    np.testing.assert_allclose(inner_products([Profile(*a)], [Profile(*b)]), [[expected]], rtol=1e-4)


def test_the_combination_of_the_official_code():
    stored = [Profile(step, width) for step in (20, 40) for width in (0.05, 0.1)]
    fit = fit_profile(stored, Profile(40, 0.075))
    np.testing.assert_allclose(fit.weights, GOLDEN["coeff_0075"], rtol=1e-6)
    snapshots = [GOLDEN[f"snap_{name}"] for name in ("half_005", "half_010", "end_005", "end_010")]
    np.testing.assert_allclose(fit.weights @ np.array(snapshots), GOLDEN["reconstructed_0075"], rtol=1e-6)


def test_the_error_shrinks_with_the_number_of_snapshots():
    widths = (0.02, 0.03, 0.075, 0.15, 0.2, 0.25)
    expected = {  # the table of docs/evaluation.md
        2: (0.49, 0.23, 0.054, 0.22, 0.47, 0.73),
        8: (0.25, 0.10, 0.013, 0.033, 0.078, 0.18),
        32: (0.040, 0.011, 0.001, 0.002, 0.006, 0.034),
    }
    for count, row in expected.items():
        stored = [Profile(k, width) for k in range(1, count + 1) for width in (0.05, 0.1)]
        errors = [fit_profile(stored, Profile(count, width)).error for width in widths]
        np.testing.assert_allclose(errors, row, atol=0.007, rtol=0.03)
    # The error is the distance of the profiles, relative to the length of the one that is wanted.
    one = fit_profile([Profile(5, 0.05)], Profile(5, 0.075))
    a, b = PowerAverage(0.05).exponent, PowerAverage(0.075).exponent
    s = (np.arange(100_000) + 0.5) / 100_000
    wanted = (b + 1) * s**b
    distance = np.sqrt(np.mean(np.square((a + 1) * s**a - wanted)) / np.mean(np.square(wanted)))
    np.testing.assert_allclose(one.error, distance, rtol=1e-4)
    exact = fit_profile(stored, Profile(32, 0.1))
    assert exact.error < 1e-6
    np.testing.assert_allclose(exact.weights, [0] * 63 + [1], atol=1e-9)
