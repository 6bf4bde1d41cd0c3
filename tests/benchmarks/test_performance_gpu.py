import importlib
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import xla_flags
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
GPU = ROOT / "benchmarks" / "gpu"
SCRIPT = ROOT / "benchmarks" / "performance_gpu.sh"

# The packages of a bare machine with a GPU; their dependencies are installed too.
BARE = (
    *("jax", "flax", "optax", "orbax-checkpoint", "einops", "absl-py", "numpy", "pillow", "safetensors"),
    *("torch", "transformers", "ml_collections", "diffusers", "importlib_metadata"),
)


@pytest.fixture
def gpu(monkeypatch):
    """Imports a module of benchmarks/gpu by name."""
    monkeypatch.syspath_prepend(str(GPU))
    names = ("parts", "summary", "kernels", "run")
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


# --- The bare machine -------------------------------------------------------------------------------


def distributions():
    """Returns the installed distributions of `BARE` and all their dependencies."""
    found, left = {}, [(name, "") for name in BARE]
    done = set()
    while left:
        name, extra = left.pop()
        if (name, extra) in done:
            continue
        done.add((name, extra))
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform, or not needed by the installed version
        for text in found[name].requires or ():
            need = Requirement(text)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                key = re.sub(r"[-_.]+", "-", need.name).lower()
                left += [(key, ""), *((key, wanted) for wanted in need.extras)]
    return list(found.values())


def link(distribution, site):
    """Links a distribution's packages and metadata into another site-packages folder."""
    tops = {Path(path.parts[0]) for path in distribution.files if path.parts[0] != ".."}
    for top in tops:
        here = Path(distribution.locate_file(top))
        if top.name == "__pycache__" or not here.exists():
            continue
        inner = [top]
        if here.is_dir() and not (here / "__init__.py").exists() and top.suffix != ".dist-info":
            # A namespace package: other distributions contain parts of it.
            inner = {Path(*path.parts[:2]) for path in distribution.files if path.parts[0] == str(top)}
        for path in inner:
            target = site / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if not target.is_symlink():
                target.symlink_to(distribution.locate_file(path))


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python in which only the packages of a bare machine are installed."""
    folder = tmp_path_factory.mktemp("bare") / "environment"
    venv.create(folder, symlinks=True, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for distribution in distributions():
        link(distribution, folder / "lib" / version / "site-packages")
    return folder / "bin" / "python"


def script(*words, python=sys.executable, **variables):
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        env={**os.environ, "PYTHON": str(python), "PYTHONPATH": "", **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_bare_machine_is_bare(bare_python):
    text = "import importlib.util as u; print([n for n in {} if u.find_spec(n)])"
    names = ["grain", "array_record", "sklearn", "tensorboardX", "tensorflow_datasets", "pixart_jax", "torch"]
    done = subprocess.run(
        [bare_python, "-c", text.format(names)],
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    assert done.stdout.strip() == "['torch']"


def test_the_small_list_runs_on_a_bare_machine(gpu, bare_python, tmp_path):
    # The other sizes of the same part differ only in the name of a config.
    parts = {name: part for name, part in gpu("parts").PARTS.items() if not name.endswith(("-512", "-1024"))}
    words = (*parts, "--cases=1", f"--out={tmp_path}", f"--cache={tmp_path / 'c'}")
    done = script("small", *words, python=bare_python, XLA_FLAGS=xla_flags.ONE_DEVICE)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "summary.txt").read_text()
    assert page in done.stdout and "TFLOP/s measured in float32 products" in page
    for name, part in parts.items():
        found = json.loads((tmp_path / f"{name}.json").read_text())
        first = part.cases(True)[0].name
        assert [(case, record["outcome"]) for case, record in found["cases"].items()] == [(first, "ok")]
        assert found["machines"][0]["matrix_peak"]["flops_per_second"] > 0
        assert {"jax", "jaxlib", "torch", "diffusers"} <= found["machines"][0]["versions"].keys()
        # A line with a rate for each case.
        lines = page.partition(f"\n{name}: ")[2].splitlines()
        assert re.match(rf"{re.escape(first)}.* \d\S* (img|tok)/s ", lines[1]), lines[:3]
    assert "bits equal after 4 steps; noise in memory" in page
    assert "ms from the first kernel to the last" in (tmp_path / "profile.txt").read_text()


# --- The command ------------------------------------------------------------------------------------


def test_parts_are_listed_in_one_line_each(gpu):
    parts = gpu("parts").PARTS
    lines = script("--list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(parts)
    assert all(part.what in line for part, line in zip(parts.values(), lines))


def test_without_a_gpu_one_line_says_what_is_needed(tmp_path):
    done = script("train-256", f"--out={tmp_path}", JAX_PLATFORMS="cpu")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "needs one NVIDIA GPU" in line


def test_an_unknown_part_is_named():
    done = script("small", "train-255")
    assert done.returncode == 2
    assert done.stderr == (
        "error: part 'train-255' is unknown: --list prints the parts. Did you mean 'train-256'?\n"
    )


# --- Outcomes ---------------------------------------------------------------------------------------

MACHINE = {
    "device_kind": "NVIDIA H100 80GB HBM3",
    "time": "2026-12-01T10:00:00Z",
    "revision": "",
    "nvidia_smi": {
        "name": "NVIDIA H100 80GB HBM3",
        "driver_version": "580.1",
        "memory.total": "81559 MiB",
        "clocks.max.sm": "1980 MHz",
        "power.limit": "700.00 W",
    },
    "memory_limit_bytes": 70 * 2**30,
    "matrix_peak": {"size": 8192, "dtype": "bfloat16", "flops_per_second": 800e12},
    "datasheet_flops_per_second": 1000e12,
    "versions": {"jax": "0.11.2", "torch": "2.11.0"},
}
# A fake `benchmark train`: it needs 10 GiB, and 2 GiB per image. Batch sizes above 24 do not fit.
STEP = """
import json, sys
values = dict(word.lstrip("-").split("=") for word in sys.argv[1:])
batch = int(values["batch"])
if batch > 24:
    sys.exit("jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory")
json.dump({
    "images_per_second": 10.0 * batch,
    "share_of_matrix_peak": 0.5,
    "share_of_datasheet": 0.4,
    "memory": {
        "planned_arguments_GiB": 10, "planned_temporary_GiB": 2 * batch, "planned_peak_GiB": None,
        "device_peak_GiB": 10 + 2 * batch,
    },
    "compilation": {"compile_seconds": 30, "from_cache": False},
}, open(values["out"], "w"))
"""


@pytest.fixture
def run(gpu, monkeypatch, tmp_path):
    """Runs a part 'train-1' with the given cases: (cases, *words) -> (status, cases of the JSON file)."""
    module, parts = gpu("run"), gpu("parts")
    monkeypatch.setattr(module, "look_at_device", lambda *_: MACHINE)

    def call(cases, *words):
        part = parts.Part("a part", lambda small: [parts.Case(**{"seconds": 1, **case}) for case in cases])
        monkeypatch.setattr(module, "PARTS", {"train-1": part})
        status = module.main([*words, f"--out={tmp_path}", f"--cache={tmp_path / 'c'}"])
        return status, json.loads((tmp_path / "train-1.json").read_text())["cases"]

    return call


def case(name, program=STEP, batch=8, **values):
    return {"name": name, "command": ("-c", program), "batch": batch, **values}


def test_a_failing_case_is_recorded_and_the_list_goes_on(run, tmp_path):
    status, cases = run([case("bad", "print('one'); raise ValueError('of this')"), case("good")])
    assert status == 1
    assert [record["outcome"] for record in cases.values()] == ["failed", "ok"]
    assert cases["bad"]["output"][0] == "one" and cases["bad"]["output"][-1] == "ValueError: of this"
    page = (tmp_path / "summary.txt").read_text()
    assert re.search(r"^bad .*failed at batch 8: ValueError: of this$", page, re.MULTILINE)
    assert re.search(r"^good +80 img/s +50.0% +40.0% +26.0 +30  batch 8$", page, re.MULTILINE)
    assert "NVIDIA H100 80GB HBM3, 81559 MiB, JAX may use 70.0 GiB" in page and "driver      580.1" in page
    assert "800 TFLOP/s measured in bfloat16 products of 8192x8192; datasheet 1000" in page


def test_out_of_memory_is_a_result(run):
    status, cases = run([case("large", batch=32)])
    assert status == 0 and cases["large"]["outcome"] == "out of memory"


def test_what_has_a_result_is_not_run_again(run, tmp_path):
    count = tmp_path / "count"
    program = f"open({str(count)!r}, 'a').write('x')\n" + STEP
    run([case("a", program), case("b", program, batch=32), case("c", "raise SystemExit(3)")])
    _, cases = run([case("a", program), case("b", program, batch=32), case("c")])
    # The failed case is run again.
    assert count.read_text() == "xx" and cases["c"]["outcome"] == "ok"
    assert [record["machine"] for record in cases.values()] == [0, 0, 1]
    run([case("a", program), case("b", program, batch=32)], "--again", "--cases=1")
    assert count.read_text() == "xxx"


def test_a_part_ends_at_its_limit(run, tmp_path):
    """The running case is killed with the processes that it started, and later cases are skipped."""
    beat = tmp_path / "beat"
    child = f"import time\nwhile True: open({str(beat)!r}, 'a').write('x'); time.sleep(0.05)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    words = ("--minutes=0.05",)
    status, cases = run([case("a"), case("endless", program), case("late", seconds=100)], *words)
    assert [record["outcome"] for record in cases.values()] == ["ok", "out of time", "skipped"]
    assert status == 0 and "s left, it needs 100" in cases["late"]["why"]
    size = beat.stat().st_size
    assert size > 0
    subprocess.run(["sleep", "0.3"], check=True)
    assert beat.stat().st_size == size
    # A case that could use the whole time limit and still timed out counts as failed.
    assert run([case("endless", program)], *words)[0] == 1


def test_a_result_outlasts_a_call_that_gives_none(run):
    run([case("a")])
    _, cases = run([case("a", seconds=1000)], "--again")
    assert cases["a"]["outcome"] == "ok" and cases["a"]["machine"] == 0


def test_a_case_without_its_packages_is_skipped(run):
    status, cases = run([case("real", packages=("json", "no_such_package"))])
    assert status == 0
    assert cases["real"]["outcome"] == "skipped" and cases["real"]["why"] == "not installed: no_such_package"


def test_the_largest_batch_is_found_from_the_plan(run, tmp_path):
    """The plan gives (0.97 70 - 10) / 2 = 28, which does not fit; three quarters of it, 21, does."""
    status, cases = run([case("x 8"), case("x largest", largest=True)])
    assert status == 0 and cases["x largest"]["batch"] == 21
    tries = [(row["batch"], row["outcome"]) for row in cases["x largest"]["tries"]]
    assert tries == [(28, "out of memory"), (21, "ok")]
    assert "batch 21 (tried 28 out of memory, 21 ok)" in (tmp_path / "summary.txt").read_text()


def test_the_largest_batch_may_be_below_the_default(run):
    _, cases = run([case("x 96", batch=96), case("x largest", batch=96, largest=True)])
    tries = [row["batch"] for row in cases["x largest"]["tries"]]
    assert tries == [48, 24, 28] and cases["x largest"]["batch"] == 24


def test_both_sides_of_a_comparison_have_their_shares(gpu):
    """80 images per second with 4 TFLOP each are 320 TFLOP/s: 40 % of 800, 32 % of 1000."""
    rows = gpu("summary").rows
    ratio = {"of_medians": 1.25, "of_single_rounds": [1.2, 1.3]}
    training = {
        "batch": 16,
        "median_seconds": {"pixart_jax": 0.2, "pytorch_compiled": 0.25},
        "model_gflops": {"pixart_jax": 320e3, "pytorch_compiled": 256e3},
        "first_call_seconds": {"pixart_jax": 60.0, "pytorch_compiled": 90.0},
        "times_as_fast_as_pytorch_compiled": ratio,
    }
    sampling = {
        "images_per_second": {"pixart_jax": 80.0, "diffusers": 64.0},
        "tflop_per_image": 4.0,
        "compile_seconds": 60.0,
        "times_as_fast_as_diffusers": ratio,
    }
    for part, result in (
        ("compare-512", {"xl2-512": training}),
        ("sample", {"steps": 20, "results": [sampling]}),
    ):
        case = {"outcome": "ok", "machine": 0, "result": result}
        here, there = rows(part, {"machines": [MACHINE], "cases": {"a": case}})
        assert (here.rate, there.rate) == (80, 64)
        assert (here.matrix, here.datasheet) == pytest.approx((0.4, 0.32))
        assert (there.matrix, there.datasheet) == pytest.approx((0.32, 0.256))
        assert here.compile_seconds == 60 and "1.25 times as fast (1.20 to 1.30)" in there.remark


def test_pytorch_gets_memory_where_it_runs(gpu, tmp_path):
    module, Case = gpu("run"), gpu("parts").Case
    alone = module.environment(False, tmp_path, Case("a", ()))
    both = module.environment(False, tmp_path, Case("a", (), torch=True))
    assert "XLA_PYTHON_CLIENT_PREALLOCATE" not in alone
    assert both["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"


def test_the_table_is_consistent(gpu):
    """Names are unique in a part, policies exist, and a 'largest' case follows its default batch size."""
    from pixart_jax.models.layers import REMAT_POLICIES

    parts = gpu("parts")
    assert {remat for _, remat, _, _ in parts.TRAIN} <= REMAT_POLICIES.keys()
    for name, part in parts.PARTS.items():
        cases = part.cases(False)
        names = [one.name for one in cases]
        assert len(set(names)) == len(names) > 0, name
        for number, one in enumerate(cases):
            if one.largest:
                assert one.name.replace("largest", str(one.batch)) in names[:number]


def overridden(spec, words):
    """Returns the config of --config=SPEC after flags such as --config.model.depth=2 are applied."""
    path, _, argument = spec.partition(":")
    config = runpy.run_path(str(ROOT / path))["get_config"](argument)
    for word in words:
        keys, _, value = word.removeprefix("--config.").partition("=")
        *parents, last = keys.split(".")
        place = config
        for key in parents:
            place = place[key]
        kind = place.get_type(last)  # also of a field without a value
        place[last] = value == "True" if kind is bool else kind(value)
    return config


def test_the_commands_for_a_gpu_parse(gpu, monkeypatch):
    """A machine without a GPU cannot run these commands, but it can check their configs and flags."""
    from pixart_jax.config import from_config_dict
    from pixart_jax.models.attention import target_platform

    parts = gpu("parts")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    options = runpy.run_path(str(ROOT / "benchmarks" / "options.py"))["OPTIONS"]
    assert set(parts.OPTIONS) < options.keys()
    configs, scripts = 0, 0
    for part in parts.PARTS.values():
        for one in part.cases(False):
            specs = [word.removeprefix("--config=") for word in one.command if word.startswith("--config=")]
            if specs:
                words = [word for word in one.command if word.startswith("--config.")]
                with target_platform("gpu"):
                    from_config_dict(overridden(specs[0], words))
                configs += 1
            elif "compare" in one.command[0]:
                path = ROOT / one.command[0]
                monkeypatch.setattr(sys, "argv", [str(path), *one.command[1:], f"--batch={one.batch}"])
                given = runpy.run_path(str(path))["parse"]()
                assert given.batch == one.batch and given.platform == "gpu"
                scripts += 1
    assert configs > 30 and scripts > 8


# --- Kernels ----------------------------------------------------------------------------------------


def trace(*kernels):
    """Events of a trace with one GPU: (name, stream, start, duration) in microseconds."""
    meta = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
        {"ph": "M", "pid": 1, "tid": 7, "name": "thread_name", "args": {"name": "Stream #7(Compute)"}},
        {"ph": "M", "pid": 1, "tid": 8, "name": "thread_name", "args": {"name": "Stream #8(MemcpyD2D)"}},
        {"ph": "M", "pid": 1, "tid": 9, "name": "thread_name", "args": {"name": "XLA Ops"}},
        {"ph": "M", "pid": 2, "tid": 7, "name": "thread_name", "args": {"name": "Stream of the host"}},
        {"ph": "X", "pid": 1, "tid": 9, "name": "fusion.1", "ts": 0, "dur": 5000, "args": {}},
        {"ph": "X", "pid": 2, "tid": 7, "name": "python", "ts": 0, "dur": 5000},
    ]
    return meta + [
        {
            "ph": "X",
            "pid": 1,
            "tid": stream,
            "name": name,
            "ts": start,
            "dur": spent,
            "args": {"hlo_op": "op"},
        }
        for name, stream, start, spent in kernels
    ]


def test_shares_are_of_the_streams_of_the_gpu(gpu):
    module = gpu("kernels")
    events = trace(
        ("nvjet_hsh_128x256_64x4", 7, 1000, 400),
        ("nvjet_hsh_128x256_64x4", 7, 1400, 200),
        ("loop_convert_fusion_3", 7, 1600, 100),
        ("MemcpyD2D", 8, 1650, 100),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", 7, 1800, 200),
    )
    found = module.shares(module.kernels(events))
    assert found["window_ms"] == 1.0
    assert {name: value["share"] for name, value in found["classes"].items()} == {
        "attention": 0.2,
        "matrix products": 0.6,
        "copies": 0.1,
        "elementwise": 0.1,
        # From 1750 to 1800: the first half of the copy ran in parallel with the fusion.
        "idle": 0.05,
    }
    first = found["kernels"][0]
    assert (first["name"], first["calls"], first["ms"]) == ("nvjet_hsh_128x256_64x4", 2, 0.6)
    assert "nvjet_hsh_128x256_64x4" in module.table("a step", found)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("gemm_fusion_dot_12", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matrix products"),
        ("void cublasLt::splitKreduce_kernel", "matrix products"),
        ("dot.5", "matrix products"),
        ("wrapped_transpose", "copies"),
        ("loop_dynamic_update_slice_fusion", "copies"),
        ("MemcpyH2D", "copies"),
        ("input_reduce_fusion_4", "elementwise"),
        ("loop_add_copy_fusion", "elementwise"),
        ("wrapped_convert", "elementwise"),
    ],
)
def test_kernels_have_a_class(gpu, name, expected):
    assert gpu("kernels").kind(name) == expected


def test_a_trace_without_streams_is_named(gpu):
    module = gpu("kernels")
    events = [event for event in trace() if not event.get("args", {}).get("name", "").startswith("Stream #")]
    with pytest.raises(ValueError, match="no streams of a GPU, only XLA Ops"):
        module.kernels(events)
    with pytest.raises(ValueError, match="no kernels"):
        module.shares([])
