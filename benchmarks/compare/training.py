"""Compares a training step of this project and of PyTorch in one process, with equal weights and threads.

    python benchmarks/compare/training.py --case=narrow     # 28 blocks of width 384, 32x32 latents, batch 8
    python benchmarks/compare/training.py --case=digits     # stage 2 of the digits
    python benchmarks/compare/training.py --case=forward    # one forward pass of XL/2 at 256 px
    python benchmarks/compare/training.py --case=xl2 --size=512 --platform=gpu   # bfloat16; needs one H100 or
                                                            # H200, jax[cuda12], PyTorch with CUDA, diffusers

This project runs the step that `train` compiles. PyTorch runs diffusers' `PixArtTransformer2DModel`, eager
and under `torch.compile`, with the same loss (noise and variance), noise and caption dropout sampled in the
step, clipping, fused AdamW, and a moving average of the weights in one foreach call. Results are only written
if both give the same output and loss on equal inputs. Rounds alternate. A ratio is the time of PyTorch
divided by ours, for the medians and for single rounds; above 1 this project is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# Set before any import that reads them. Spinning threads of PyTorch would slow JAX down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

CASES = ("narrow", "digits", "forward", "xl2")
# Maximum difference between the sides relative to the largest output. In bfloat16 they round differently.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}


def stage(arguments: argparse.Namespace) -> Any:
    """Returns the training stage of a case, and the height and width of its latents."""
    from pixart_jax.config import DataConfig, FeaturesConfig, PixArtConfig, TrainConfig, from_config_dict

    if arguments.case == "digits":
        config = from_config_dict(runpy.run_path(str(ROOT / "configs/digits.py"))["get_config"]("stage2"))
    else:
        size = arguments.size
        model = dict(size="XL/2", base_size=size // 16, position_scale=2.0 if size == 1024 else 1.0)
        if arguments.case == "narrow":
            model = dict(size="custom", depth=28, hidden_size=384, num_heads=6, base_size=16)
        if arguments.depth:
            width = dict(hidden_size=72 * arguments.heads, num_heads=arguments.heads)
            model = {**width, **model, "size": "custom", "depth": arguments.depth}
        config = TrainConfig(
            name=arguments.case,
            model=PixArtConfig(**model),
            features=FeaturesConfig(image_size=size),
            data=DataConfig(batch_size={"narrow": 8, "forward": 1, "xl2": 64}[arguments.case]),
        )
    changes = dict(
        dtype=arguments.dtype,
        attention=arguments.attention,
        remat=arguments.remat,
        scan_layers=arguments.scan_layers,
    )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    if arguments.batch:
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, batch_size=arguments.batch)
        )
    return config


def random_params(config: Any) -> dict[str, Any]:
    """Returns weights in which no tensor is zero."""
    import jax
    import numpy as np
    from flax import nnx

    from pixart_jax.denoiser import abstract_model

    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[1:-1]) if leaf.ndim > 2 else 100
        return rng.standard_normal(leaf.shape, np.float32) / np.float32(np.sqrt(fan_in))

    return jax.tree.map(draw, nnx.to_pure_dict(abstract_model(config.model)[1]))


def make_ours(config: Any, params: dict[str, Any], batch: dict[str, Any], train: bool) -> Callable[[], Any]:
    """Returns a function that runs one step or forward pass: () -> arrays to wait for."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pixart_jax.denoiser import NETWORK
    from pixart_jax.training.objectives import make_objective
    from pixart_jax.training.optimizers import make_optimizer
    from pixart_jax.training.state import new_state
    from pixart_jax.training.step import make_train_step
    from pixart_jax.weights.loading import Weights, build_model

    batch = jax.device_put(batch)
    if not train:
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, config.model.dtype), params)
        model = build_model(Weights(params, config, source="random", licence="other"))
        graph, params = nnx.split(model)
        apply = jax.jit(lambda params, *arguments: nnx.merge(graph, params)(*arguments))
        arguments = forward_arguments(batch)
        return lambda: apply(params, *arguments)
    optimizer = make_optimizer(config.optimizer, config.data.batch_size)
    objective = make_objective(config)
    step = jax.jit(make_train_step(config, objective, optimizer), donate_argnums=0)
    state = [jax.jit(lambda tree: new_state(tree, objective, optimizer))({NETWORK: params})]

    def update():
        state[0], metrics = step(state[0], batch)
        return metrics

    return update


def forward_arguments(batch: dict[str, Any]) -> tuple[Any, ...]:
    """Returns noised latents, timesteps and conditions of a forward pass."""
    import jax.numpy as jnp

    timesteps = jnp.linspace(1, 998, len(batch["index"])).astype(jnp.int32)
    return batch["latent_mean"], timesteps, batch["text"], batch["text_mask"]


class TorchSide:
    """The model of diffusers with the loss, optimizer and moving average of a training step."""

    def __init__(self, config: Any, params: dict[str, Any], batch: dict[str, Any], arguments: Any):
        import diffusers
        import numpy as np
        import torch

        from pixart_jax.denoiser import Denoiser
        from pixart_jax.weights.backbones import export_backbone
        from pixart_jax.weights.configs import to_diffusers_config

        torch.manual_seed(0)
        self.config = config
        self.device = "cuda" if arguments.platform == "gpu" else "cpu"
        self.autocast = arguments.dtype == "bfloat16"
        values = to_diffusers_config(config.model)
        values = {name: value for name, value in values.items() if not name.startswith("_")}
        self.model = diffusers.PixArtTransformer2DModel(**values)
        _, tensors = export_backbone("diffusers", params, config.model)
        state = {name: torch.tensor(np.array(value)) for name, value in tensors}
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        if unexpected or [name for name in missing if "pos_embed" not in name]:
            raise SystemExit(f"the weights do not fit diffusers: {missing}, {unexpected}")
        self.model.to(self.device)
        if arguments.remat != "none":
            self.model.enable_gradient_checkpointing()
        self.batch = {
            name: torch.tensor(np.asarray(value, np.float32), device=self.device)
            for name, value in batch.items()
        }
        for name in ("latent_mean", "latent_std"):
            self.batch[name] = self.batch[name].permute(0, 3, 1, 2).contiguous()
        self.null = torch.tensor(np.asarray(params["null_text"], np.float32), device=self.device)

        schedule = Denoiser.of(config).schedule
        snr = schedule.signal_noise_ratio
        gamma = config.diffusion.min_snr_gamma
        tables = {
            "signal": np.sqrt(schedule.alphas_cumprod),
            "noise": np.sqrt(1 - schedule.alphas_cumprod),
            "log_beta": np.log(schedule.betas),
            "log_variance": schedule.posterior_log_variance_clipped,
            "x0": schedule.posterior_mean_x0,
            "xt": schedule.posterior_mean_xt,
            "weight": np.minimum(snr, gamma) / snr if gamma else np.ones_like(snr),
        }
        self.tables = {
            name: torch.tensor(np.asarray(table), dtype=torch.float32, device=self.device)
            for name, table in tables.items()
        }

    def forward(self, latents, timesteps, text, mask):
        import torch

        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            return self.model(
                latents,
                encoder_hidden_states=text,
                timestep=timesteps,
                encoder_attention_mask=mask,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                return_dict=False,
            )[0].float()

    def loss(self, output, x0, noise, t):
        """Computes the same loss as `diffusion.objective.diffusion_loss`, [B]."""
        import math

        import torch

        at = {name: table[t][:, None, None, None] for name, table in self.tables.items()}
        predicted, v = output.chunk(2, dim=1)
        x_t = at["signal"] * x0 + at["noise"] * noise
        mse = (at["weight"] * (noise - predicted).square()).mean((1, 2, 3))
        predicted_x0 = (x_t - at["noise"] * predicted.detach()) / at["signal"]
        mean = at["x0"] * predicted_x0 + at["xt"] * x_t
        true_mean = at["x0"] * x0 + at["xt"] * x_t
        fraction = (v + 1) / 2
        log_variance = fraction * at["log_beta"] + (1 - fraction) * at["log_variance"]
        ratio = log_variance - at["log_variance"]
        distance = (true_mean - mean).square() * torch.exp(-log_variance)
        kl = 0.5 * (ratio - 1 + torch.exp(-ratio) + distance)

        def cdf(x):
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

        centred, inverse = x0 - mean, torch.exp(-0.5 * log_variance)
        upper, lower = cdf(inverse * (centred + 1 / 255)), cdf(inverse * (centred - 1 / 255))
        mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
        nll = -torch.log(mass.clamp(min=1e-12))
        vb = torch.where(t == 0, nll.mean((1, 2, 3)), kl.mean((1, 2, 3))) / math.log(2)
        return mse + vb

    def draw_and_score(self, mean, std, text, mask):
        """Returns the loss of a batch with new noise, timesteps and caption dropout."""
        import torch

        rows = mean.shape[0]
        x0 = self.config.features.latent_scale * (mean + std * torch.randn_like(mean))
        noise = torch.randn_like(x0)
        t = torch.randint(0, 1000, (rows,), device=mean.device)
        dropped = torch.rand(rows, device=mean.device) < self.config.diffusion.condition_dropout
        text = torch.where(dropped[:, None, None], self.null, text)
        signal, sigma = (self.tables[name][t][:, None, None, None] for name in ("signal", "noise"))
        return self.loss(self.forward(signal * x0 + sigma * noise, t, text, mask), x0, noise, t).mean()

    def make_step(self, compiled: bool) -> Callable[[], Any]:
        import torch

        optimizer_config = self.config.optimizer
        parameters = list(self.model.parameters())
        averages = [parameter.detach().clone() for parameter in parameters]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=optimizer_config.learning_rate,
            betas=(optimizer_config.beta1, optimizer_config.beta2),
            eps=optimizer_config.eps,
            weight_decay=optimizer_config.weight_decay,
            fused=True,
        )
        score = torch.compile(self.draw_and_score) if compiled else self.draw_and_score
        batch = [self.batch[name] for name in ("latent_mean", "latent_std", "text", "text_mask")]

        def update():
            loss = score(*batch)
            loss.backward()
            if optimizer_config.clip_norm:
                torch.nn.utils.clip_grad_norm_(parameters, optimizer_config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                torch._foreach_lerp_(averages, parameters, 1 - optimizer_config.ema_decay)
            return loss

        return update

    def make_forward(self, arguments: tuple[Any, ...], compiled: bool) -> Callable[[], Any]:
        import torch

        if self.autocast:
            self.model.to(torch.bfloat16)
        forward = torch.compile(self.forward) if compiled else self.forward

        def call():
            with torch.inference_mode():
                return forward(*arguments)

        return call

    def arguments(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Returns our arguments as tensors, channels first."""
        import numpy as np
        import torch

        latents, timesteps, text, mask = (
            torch.tensor(np.asarray(value, np.float32), device=self.device) for value in arguments
        )
        return latents.permute(0, 3, 1, 2).contiguous(), timesteps.long(), text, mask


def check_equal(config: Any, params: dict[str, Any], batch: dict[str, Any], theirs: TorchSide) -> dict:
    """Compares output and loss on equal inputs; ends the program if a relative difference is too large."""
    import jax
    import numpy as np
    import torch

    from pixart_jax.denoiser import Denoiser
    from pixart_jax.diffusion.objective import diffusion_loss

    arguments = forward_arguments(jax.device_put(batch))
    denoiser = Denoiser.of(config)
    conditions = denoiser.conditions(jax.device_put(batch))
    output = jax.jit(denoiser)(params, *arguments[:2], conditions)
    x0 = jax.random.normal(jax.random.key(1), batch["latent_mean"].shape)
    noise = jax.random.normal(jax.random.key(2), x0.shape)
    gamma = config.diffusion.min_snr_gamma
    loss = diffusion_loss(
        denoiser.schedule,
        output,
        x0,
        noise,
        arguments[1],
        weighting="min_snr" if gamma else "uniform",
        gamma=gamma,
    )["loss"]
    with torch.no_grad():
        given = theirs.arguments(arguments)
        there = theirs.forward(*given)
        x0, noise = (
            torch.tensor(np.asarray(value), device=theirs.device).permute(0, 3, 1, 2) for value in (x0, noise)
        )
        their_loss = theirs.loss(there, x0, noise, given[1])
    there = there.permute(0, 2, 3, 1).cpu().numpy()
    differences = {
        "output": float(np.abs(np.asarray(output) - there).max() / np.abs(there).max()),
        "loss": float(np.abs(np.asarray(loss) / their_loss.cpu().numpy() - 1).max()),
    }
    if not all(value < TOLERANCE[config.model.dtype] for value in differences.values()):
        raise SystemExit(f"the two sides differ: {differences}. No fair comparison.")
    return differences


def cpu_name() -> str:
    """Returns the CPU name that Linux reports, or else the architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def wait(result: Any, gpu: bool) -> None:
    import jax
    import torch

    if not isinstance(result, torch.Tensor):
        jax.block_until_ready(result)
    elif gpu:
        torch.cuda.synchronize()


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    import gc

    from pixart_jax.benchmarking.flops import forward_flops, latent_size, train_flops
    from pixart_jax.benchmarking.throughput import synthetic_batch

    config = stage(arguments)
    train, gpu = arguments.case != "forward", arguments.platform == "gpu"
    height, width = latent_size(config.features)
    batch = synthetic_batch(config, config.data.batch_size, height, width)
    params = random_params(config)
    theirs = TorchSide(config, params, batch, arguments)
    differences = check_equal(config, params, batch, theirs)
    print("largest differences on equal inputs:", differences, flush=True)

    sides = {"pixart_jax": make_ours(config, params, batch, train)}
    given = theirs.arguments(forward_arguments(batch))
    for name in arguments.modes:
        compiled = name == "compiled"
        if train:
            # Each side gets its own model, so that the sides do not train the same weights.
            side = TorchSide(config, params, batch, arguments)
            sides[f"pytorch_{name}"] = side.make_step(compiled)
        else:
            sides[f"pytorch_{name}"] = theirs.make_forward(given, compiled)
    del params
    if train:
        del theirs
    gc.collect()
    first = {}
    for name, call in sides.items():
        start = time.perf_counter()
        wait(call(), gpu)
        first[name] = time.perf_counter() - start
        print(f"first call of {name}: {first[name]:.1f} s", flush=True)
    for call in sides.values():
        wait(call(), gpu)

    seconds: dict[str, list[float]] = {name: [] for name in sides}
    # CPU time of all threads, because other work on the machine affects it least.
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start, start_cpu = time.perf_counter(), time.process_time()
            for _ in range(arguments.calls):
                out = sides[name]()
            wait(out, gpu)
            seconds[name].append((time.perf_counter() - start) / arguments.calls)
            cpu_seconds[name].append((time.process_time() - start_cpu) / arguments.calls)
        line = {name: round(times[-1], 4) for name, times in seconds.items()}
        print(f"round {number + 1}: {line}", flush=True)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    count = train_flops if train else lambda *shape: forward_flops(*shape).total
    flops = config.data.batch_size * count(config.model, height, width, config.features.text_length)
    report = {
        "case": arguments.case,
        "what": "training step" if train else "forward pass",
        "batch": config.data.batch_size,
        "latent": [height, width],
        "model": {
            name: getattr(config.model, name)
            for name in ("depth", "hidden_size", "dtype", "remat", "scan_layers", "attention")
        },
        "seconds": seconds,
        "median_seconds": medians,
        "cpu_seconds": cpu_seconds,
        "first_call_seconds": first,
        "model_gflops": {name: flops / value / 1e9 for name, value in medians.items()},
        "differences_on_equal_inputs": differences,
    }
    for name in list(sides)[1:]:
        rounds = [there / here for here, there in zip(seconds["pixart_jax"], seconds[name])]
        work = [statistics.median(cpu_seconds[side]) for side in ("pixart_jax", name)]
        report[f"times_as_fast_as_{name}"] = {
            "of_medians": medians[name] / medians["pixart_jax"],
            "of_single_rounds": [min(rounds), max(rounds)],
            "of_median_cpu_seconds": work[1] / work[0],
        }
    return report


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--size", type=int, default=256, help="pixels of xl2 and forward")
    parser.add_argument("--batch", type=int, help="batch size; default: that of the case")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1, help="steps in a round")
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--dtype", choices=TOLERANCE, help="default float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--attention", default="auto", help="attention implementation of pixart_jax")
    parser.add_argument("--remat", default="none", help="if not 'none', PyTorch also checkpoints its blocks")
    parser.add_argument("--scan_layers", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--depth", type=int, help="blocks of xl2, narrow and forward, for a quick run")
    parser.add_argument(
        "--heads", type=int, default=16, help="with --depth: attention heads, each of width 72"
    )
    parser.add_argument("--threads", type=int, help="threads of each side on a CPU; default: all cores")
    parser.add_argument("--note", default="", help="a remark to store with the figures")
    parser.add_argument(
        "--out",
        type=Path,
        help="JSON file; its other cases are kept; default: benchmarks/results/training_PLATFORM.json",
    )
    arguments = parser.parse_args()
    gpu = arguments.platform == "gpu"
    arguments.dtype = arguments.dtype or ("bfloat16" if gpu else "float32")
    arguments.threads = arguments.threads or len(os.sched_getaffinity(0))
    arguments.out = arguments.out or ROOT / f"benchmarks/results/training_{arguments.platform}.json"
    return arguments


def main() -> None:
    arguments = parse()
    # XLA uses as many threads as the process has cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    from pixart_jax.training.settings import apply_settings

    apply_settings()
    os.environ["JAX_PLATFORMS"] = {"cpu": "cpu", "gpu": "cuda"}[arguments.platform]
    import jax
    import torch

    torch.set_num_threads(arguments.threads)
    if arguments.platform == "gpu":
        if not torch.cuda.is_available():
            raise SystemExit(
                "--platform=gpu needs an NVIDIA GPU, jax[cuda12] and PyTorch with CUDA: none here."
            )
        torch.backends.cuda.matmul.allow_tf32 = True
    import diffusers

    report = compare(arguments) | {
        "device": jax.devices()[0].device_kind if arguments.platform == "gpu" else cpu_name(),
        "threads": arguments.threads,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "load_average_at_the_end": os.getloadavg(),
        "versions": {"jax": jax.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "note": arguments.note,
    }
    print(json.dumps(report, indent=1))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    name = arguments.case + (f"-{arguments.size}" if arguments.case == "xl2" else "")
    arguments.out.write_text(json.dumps(known | {name: report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
