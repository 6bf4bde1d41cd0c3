"""Measures what adaLN-single saves compared with adaLN: parameters, memory, time (claim a of docs/claims.md).

    python benchmarks/claims/cost.py

Parameters and memory are given for the small models of run.py and for the paper's XL/2 at 256 pixels; memory
is what the compiler reports for a training step. The steps of the small models are timed in alternating
rounds, so that other work on the machine affects both equally.
"""

from __future__ import annotations

import json
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from captions import Captions
from flax import nnx
from run import CONFIGS, RESULTS, Program, compile_program, draw_batch, train_config

from pixart_jax.denoiser import NETWORK, abstract_model
from pixart_jax.training.objectives import make_objective
from pixart_jax.training.optimizers import make_optimizer
from pixart_jax.training.state import new_state
from pixart_jax.training.step import make_train_step

KINDS = ("single", "adaln")
ROUNDS, STEPS_A_ROUND = 15, 20
XL = dict(remat="full")


def memory(compiled: Any) -> dict[str, float]:
    """Returns the MiB of a compiled step: its arguments (state and batch) and its temporary memory."""
    analysis = compiled.memory_analysis()
    return {
        "arguments_MiB": round(analysis.argument_size_in_bytes / 2**20, 2),
        "temporary_MiB": round(analysis.temp_size_in_bytes / 2**20, 2),
    }


def parameters(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def xl(kind: str) -> dict[str, Any]:
    """Returns parameters and memory of XL/2 with batch size 1, which is compiled but not run."""
    config = train_config(CONFIGS[kind](**XL))
    objective = make_objective(config)
    optimizer = make_optimizer(config.optimizer, 1)
    params = nnx.to_pure_dict(abstract_model(config.model)[1])
    state = jax.eval_shape(lambda tree: new_state(tree, objective, optimizer), {NETWORK: params})
    shape = jax.ShapeDtypeStruct
    latents = shape((1, 32, 32, 4), jnp.float32)
    batch = {
        "latent_mean": latents,
        "latent_std": latents,
        "text": shape((1, config.model.text_length, config.model.text_dim), jnp.float32),
        "text_mask": shape((1, config.model.text_length), bool),
        "index": shape((1,), jnp.uint32),
    }
    step = (
        jax.jit(make_train_step(config, objective, optimizer), donate_argnums=0).lower(state, batch).compile()
    )
    return {"parameters": parameters(params), **memory(step)}


def times(programs: dict[str, Program], captions: Captions) -> dict[str, list[float]]:
    """Returns the milliseconds per step of each round, by kind of model."""
    batch = jax.device_put(draw_batch(0, 0, captions, "full"))
    states = {
        kind: jax.jit(lambda tree, p=program: new_state(tree, p.objective, p.optimizer))(
            program.random_params(0, captions)
        )
        for kind, program in programs.items()
    }
    out = {kind: [] for kind in programs}
    for number in range(ROUNDS + 1):
        # The order alternates from round to round.
        for kind in KINDS[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                states[kind], _ = programs[kind].step(states[kind], batch)
            jax.block_until_ready(states[kind])
            if number:  # the first round is a warm-up
                out[kind].append(1000 * (time.perf_counter() - start) / STEPS_A_ROUND)
    return out


def main() -> None:
    captions = Captions()
    programs = {kind: compile_program(kind, captions) for kind in KINDS}
    measured = times(programs, captions)
    ratios = [a / b for a, b in zip(measured["adaln"], measured["single"])]
    result = {
        kind: {
            "parameters": parameters(programs[kind].random_params(0, captions)),
            "flops_per_step": programs[kind].flops,
            **memory(programs[kind].step),
            "ms_per_step": round(statistics.median(measured[kind]), 2),
            "all_ms_per_step": [round(value, 2) for value in measured[kind]],
            "XL/2": xl(kind),
        }
        for kind in KINDS
    }
    result["adaln_times_single"] = {
        "median": round(statistics.median(ratios), 3),
        "quartiles": [round(float(value), 3) for value in np.percentile(ratios, [25, 75])],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "cost.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
