import dataclasses
import json

import pytest
from damage import damaged

from pixart_jax.diffusion.samplers import SAMPLERS
from pixart_jax.errors import UserError
from pixart_jax.evaluation.fid import FILTERS, RESIZES
from pixart_jax.evaluation.protocol import PRESETS, Protocol, Result, require_same
from pixart_jax.evaluation.tables import result_table

PROTOCOL = Protocol(
    "fid", 100, reference="r", captions="c", sampler="ddim", steps=50, guidance_scale=4.5, seed=0,
    weights="ema", height=512, width=512, network="n",
)  # fmt: skip
# Another value for every field of a protocol.
CHANGED = {
    "metric": "clip", "images": 99, "reference": "s", "captions": "d", "sampler": "iddpm", "steps": 20,
    "guidance_scale": 4.0, "seed": 1, "weights": "raw", "height": 256, "width": 256, "crop": "centre",
    "size": 256, "filter": "lanczos", "rounding": False, "resize": "pytorch", "network": "m",
}  # fmt: skip


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Protocol)])
def test_results_of_different_protocols_do_not_compare(field):
    other = dataclasses.replace(PROTOCOL, **{field: CHANGED[field]})
    assert other.id != PROTOCOL.id
    with pytest.raises(UserError, match=f"protocols differ in {field} "):
        require_same([Result("a", 1.0, PROTOCOL), Result("b", 1.0, PROTOCOL), Result("c", 2.0, other)])
    assert require_same([Result("a", 1.0, other), Result("b", 2.0, other)]) == other


def test_a_result_is_stored_with_its_protocol(tmp_path):
    result = Result("runs/a", 12.5, PROTOCOL, "mjhq-30k")
    result.write(tmp_path / "deep" / "fid.json")
    assert Result.read(tmp_path / "deep" / "fid.json") == result
    stored = json.loads((tmp_path / "deep" / "fid.json").read_text())
    assert stored["protocol"]["captions"] == "c" and stored["protocol_id"] == PROTOCOL.id
    assert stored["versions"]["numpy"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["fid.json"]


@pytest.mark.parametrize("change", [{"metric": ["fid"]}, {"metric": None}, {"images": "9"}, {"seed": {}}])
def test_a_protocol_has_plain_values(tmp_path, change):
    Result("model", 1.0, Protocol("fid", 9)).write(tmp_path / "fid.json")
    values = json.loads((tmp_path / "fid.json").read_text())
    (tmp_path / "fid.json").write_text(json.dumps({**values, "protocol": {**values["protocol"], **change}}))
    with pytest.raises(UserError, match=r"is not a result of `evaluate fid`.*protocol"):
        Result.read(tmp_path / "fid.json")


def test_what_is_no_result(tmp_path):
    (tmp_path / "x.json").write_text('{"value": 1}')
    for path in (tmp_path / "x.json", tmp_path / "none.json"):
        with pytest.raises(UserError, match="is not a result of `evaluate fid`"):
            Result.read(path)


def test_a_damaged_result(tmp_path):
    """A result that is still accepted can be shown in a table."""
    path = tmp_path / "fid.json"
    good = Result("model", 1.0, PROTOCOL, "mjhq-30k")
    good.write(path)
    refused = 0
    for place, changed in damaged(json.loads(path.read_text())):
        path.write_text(json.dumps(changed))
        try:
            result_table([good, Result.read(path)])
        except UserError as error:
            assert "\n" not in str(error), place
            refused += "is not a result of" in str(error)
    assert refused > 60


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_protocols(name):
    values = PRESETS[name].values
    protocol = Protocol("fid", PRESETS[name].images, **values)
    assert protocol.images == 30_000 and protocol.sampler in SAMPLERS
    assert protocol.resize in RESIZES and protocol.filter in FILTERS
    # A preset fixes all settings of the preparation, so no flag can change one under the preset's name.
    assert {"crop", "size", "filter", "rounding", "resize", "steps", "guidance_scale"} <= set(values)
