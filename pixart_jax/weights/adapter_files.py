"""Reads adapter files of every tool that trains PixArt, into `adapters.Adapter`.

Files differ in three ways: what the modules are called (diffusers' names, or the official ones with fused
projections), what the factors are called, and where the scale s is stated:

    peft                       in adapter_config.json beside the tensors
    diffusers, SimpleTuner     in the header, under 'lora_adapter_metadata'
    Kohya, ComfyUI             s = alpha / r with the tensor '.alpha' of the module; without it, s = 1
    OneTrainer for diffusers   s = 1, because B was multiplied by alpha / r

If a file has none of these, the user has to give alpha. docs/adapters.md has the table of formats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pixart_jax.errors import UserError, finite, short
from pixart_jax.hub import is_hub, local, name_of, without_weight
from pixart_jax.readers import OrNull, check_shape, parse_json, read_json
from pixart_jax.weights import cards
from pixart_jax.weights.adapters import Adapter, Factors, split
from pixart_jax.weights.backbones import official_modules
from pixart_jax.weights.checkpoints import is_checkpoint
from pixart_jax.weights.files import COPY, Tensors, open_tensors
from pixart_jax.weights.tables import by, first_names
from pixart_jax.weights.trained_adapters import read_run_adapter

# The two files of peft, without the suffix of the second one.
CONFIG, STEM = "adapter_config.json", "adapter_model"
# Keys in the header of a safetensors file: this project's and diffusers'.
OURS, DIFFUSERS = "pixart_jax.adapter", "lora_adapter_metadata"

# What other tools call the file in their folders.
_FOLDER_NAMES = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "lora.safetensors")

# What follows the name of a module, and what the tensor is.
_SUFFIXES = {
    **dict.fromkeys((".lora_A.weight", ".lora_A.default.weight"), "A"),
    **dict.fromkeys((".lora_B.weight", ".lora_B.default.weight"), "B"),
    **dict.fromkeys((".lora_down.weight", ".lora.down.weight", "_lora.down.weight"), "A"),
    **dict.fromkeys((".lora_up.weight", ".lora.up.weight", "_lora.up.weight"), "B"),
    **{".lora_linear_layer.down.weight": "A", ".lora_linear_layer.up.weight": "B"},
    **dict.fromkeys((".lora_magnitude_vector", ".lora_magnitude_vector.weight", ".dora_scale"), "m"),
    **{".lora_magnitude_vector.default.weight": "m", ".alpha": "alpha"},
}
# What precedes it.
_PREFIX = re.compile(
    r"(?:model\.)?diffusion_model\.|lora_unet_|lora_transformer_|(?:(?:unet|transformer)\.)?base_model\.model\.|"
    r"transformer\.|unet\.|"
)
# Prefixes of formats whose loaders all take s = 1 for a module without '.alpha'.
_ALPHA_IS_RANK = ("diffusion_model.", "model.diffusion_model.", "lora_unet_", "lora_transformer_")
# Keys in the headers of OneTrainer. It writes '.alpha' in all formats but the one for diffusers.
_ONE_TRAINER = ("ot_config", "ot_branch", "ot_revision")

_TEXT_PARTS = re.compile(r"lora_te\d*_.+|text_encoders?(?:_\d)?\..+|cond_stage_model\..+|bundle_emb.*")
_CONTROLNET = re.compile(r"(?:lora_)?controlnet[._].+")
# Adapters that are no products of two matrices, by a pattern that occurs in their names.
_OTHER_KINDS = {
    "LoKr": r"\.lokr_",
    "LoHa": r"\.hada_",
    "OFT or BOFT": r"\.(?:oft|boft)_",
    "IA3": r"\.ia3_|\.on_input$",
    "GLoRA": r"\.[ab][12]\.weight$",
    "LoCon with Tucker decomposition": r"\.lora_mid\.|\.lora_t[12]$",
    "set of full differences (diff)": r"\.(?:diff|diff_b|w_norm|b_norm)$",
    "LyCORIS": r"^lycoris_",
}
_ONLY = (
    "only LoRA, rsLoRA and DoRA are read; merge it with the tool that made it, and give the merged weights"
)

_LARGEST = float(np.finfo(np.float32).max)
_RANK = range(1, 2**20)
# What is read of the settings of peft.
_SETTINGS = {
    **{"peft_type?": str, "r?": _RANK, "lora_alpha?": float, "use_rslora?": bool, "use_dora?": bool},
    **{"rank_pattern?": OrNull({str: _RANK}), "alpha_pattern?": OrNull({str: float})},
    "base_model_name_or_path?": OrNull(str),
}
# Settings of peft with which the change is not s B A, or not that of the base weights.
_VARIANTS = (
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora"),
    *("kasa_config", "lora_bias"),
)
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq")
# Patterns of modules are regular expressions. Only those that cannot take exponential time are read.
_PATTERNS = ("rank_pattern", "alpha_pattern")
_SAFE_PATTERN = re.compile(r"\^?(?:[\w-]|\\?\.[*+]?|\\d\+?)*")
_MOST_REPEATS = 2
_MOST_PATTERNS = 10_000

# Names of modules with '_' in place of '.', and '{}' in place of the number of the block: those of diffusers
# and the official ones, with the modules of diffusers that they stand for.
_MODULES = {
    name.replace(".", "_"): parts
    for official, modules in official_modules().items()
    for name, parts in ((official, modules), *((module, (module,)) for module in modules))
}
_BLOCK = re.compile(r"((?:transformer_)?blocks)_(\d{1,4})_(.+)")


# A path; 'PATH' or 'PATH:WEIGHT'; several of these; or weights by path. None for no adapter.
Specs = str | Path | Sequence[str | Path] | Mapping[str | Path, float] | None


def read_adapters(specs: Specs, alpha: float | None = None) -> list[tuple[Adapter, float]]:
    """Reads the adapters that a user names, each with its weight.

    Args:
      specs: see `Specs`. Without a weight, it is 1.
      alpha: see `read_adapter`.

    Raises:
      UserError: as `read_adapter`; a weight that is not a finite number; one path twice; or files that state
        different bases.
    """
    if isinstance(specs, Mapping):
        pairs = [(str(path), weight) for path, weight in specs.items()]
    else:
        specs = [specs] if isinstance(specs, str | Path) else specs
        pairs = [parse_spec(spec) if isinstance(spec, str) else (str(spec), None) for spec in specs or ()]
        pairs = [(path, 1.0 if weight is None else weight) for path, weight in pairs]
    for number, (path, weight) in enumerate(pairs):
        if isinstance(weight, bool) or not isinstance(weight, int | float | np.number):
            raise UserError(f"the weight of adapter '{path}' is {short(weight, quote=True)}: give a number.")
        finite(f"the weight of adapter '{path}'", weight)
        if path in [other for other, _ in pairs[:number]]:
            raise UserError(f"adapter '{path}' is given twice: give it once, with the sum of the weights.")
    if alpha is not None and not pairs:
        raise UserError("--adapter_alpha has no effect without --adapter: leave it out.")
    adapters = [(read_adapter(path, alpha), float(weight)) for path, weight in pairs]
    # One may be named by its folder, the other by its name on the Hub.
    bases = {adapter.base.rstrip("/").rpartition("/")[2]: adapter for adapter, _ in adapters if adapter.base}
    if len(bases) > 1:
        listed = ", ".join(f"'{each.name}' of '{each.base}'" for each in bases.values())
        raise UserError(f"the adapters belong to different base weights ({listed}): give those of one base.")
    return adapters


def parse_spec(spec: str) -> tuple[str, float | None]:
    """The path and weight in 'PATH' or 'PATH:WEIGHT'. A path that exists may have a ':' itself.

    Raises:
      UserError: what follows the ':' is not a number.
    """
    path, colon, weight = spec.rpartition(":")
    try:
        if is_hub(spec):
            path = without_weight(spec)
            return path, float(weight) if path != spec else None
        if not colon or Path(spec).exists():
            return spec, None
        return path, float(weight)
    except (OSError, ValueError):
        raise UserError(
            f"adapter '{spec}': there is no such file, and '{short(weight)}' after the ':' is not a number: "
            "give PATH or PATH:WEIGHT."
        ) from None


def read_adapter(path: str | Path, alpha: float | None = None, weights: str | None = None) -> Adapter:
    """Reads an adapter.

    Args:
      path: a .safetensors file or a PyTorch file; a folder with peft's two files, or with one file; or a run
        directory or a checkpoint of a run that trained an adapter; all of them also on the hub.
      alpha: for files that do not state their scale, which is then alpha / r.
      weights: 'ema' or 'raw', of a run; None for the moving average.

    Returns:
      The adapter. Its `notes` say what was left out.

    Raises:
      UserError: there is no such file or it is broken; it is another kind of adapter; tensors are unknown,
        missing, of the wrong shape or not finite; its scale is not stated and `alpha` not given, or the other
        way round.
    """
    if alpha is not None:
        finite("adapter_alpha", alpha)
    path = local(path)
    if is_checkpoint(path):
        if alpha is not None:
            raise UserError(
                f"--adapter_alpha has no effect on '{path}', whose config states it: leave it out."
            )
        return read_run_adapter(path, weights or "ema")
    if weights is not None:
        raise UserError(f"--weights={weights} has no effect on the adapter file '{path}': leave it out.")
    file, config = _find(Path(path))
    tensors = open_tensors(file)
    if tensors.path.stat().st_size < sum(map(math.prod, tensors.shapes.values())):
        raise UserError(f"'{file}' has fewer bytes than its tensors have values: {COPY}.")
    where, stated = _settings(tensors, config)
    own = _own_notes(tensors)
    text = [name for name in tensors if _TEXT_PARTS.fullmatch(name)]
    parts, places = _modules(tensors, [name for name in tensors if not _TEXT_PARTS.fullmatch(name)])
    has_rule = bool(set(_ONE_TRAINER) & set(tensors.metadata))
    modules: dict[str, Factors] = {}
    used = False
    for raw, names in parts.items():
        members = places[raw].modules
        factors = _factors(tensors, raw, names, len(members))
        if stated:
            scale = _stated_scale(where, stated, members[0], factors.rank)
        elif "alpha" in names:
            scale = _alpha(tensors, names["alpha"]) / factors.rank
        elif has_rule or places[raw].prefix in _ALPHA_IS_RANK:
            scale = 1.0
        elif alpha is not None:
            scale, used = alpha / factors.rank, True
        else:
            raise UserError(
                f"'{file}' does not state the scale of {raw}: give the alpha that it was trained with, with "
                "--adapter_alpha (adapter_alpha=…)."
            )
        if abs(scale * factors.rank) > _LARGEST:
            raise UserError(f"'{file}': the scale of {raw} is {scale:g}, which float32 cannot store.")
        for module, part in split(factors._replace(scale=scale), members).items():
            modules[module] = part
    if alpha is not None and not used:
        raise UserError(
            f"'{file}' states its scale, so --adapter_alpha has no effect: leave it out. If another adapter "
            "needs it, first write that one with convert --to=peft."
        )
    if stated and stated.get("use_dora", False) != any(f.magnitude is not None for f in modules.values()):
        raise UserError(
            f"'{file}' and {where} disagree about use_dora: copy both files of the adapter again."
        )
    notes = ()
    if text:
        notes = (
            f"'{file}' also changes the text encoder ({len(text)} tensors, such as {short(text[0])}). That "
            "part is left out: images will differ from those of the tool that trained it.",
        )
    base = own.get("base") or stated.get("base_model_name_or_path") or ""
    rslora = stated.get("use_rslora", own.get("rslora", False))
    return Adapter(modules, rslora, base, own.get("manifest", {}), name_of(path), notes)


def is_adapter(tensors: Mapping[str, Any]) -> bool:
    """Whether the names of tensors are those of an adapter of any kind."""
    kinds = re.compile("|".join(_OTHER_KINDS.values()))
    return any(name.endswith(tuple(_SUFFIXES)) or kinds.search(name) for name in tensors)


# --- Files ------------------------------------------------------------------------------------------


def _find(path: Path) -> tuple[Path, Path | None]:
    """The file with the tensors, and that with peft's settings, if there is one."""
    if not path.exists():
        raise UserError(f"adapter '{path}' does not exist: give a file, or a folder that peft wrote.")
    if not path.is_dir():
        config = path.parent / CONFIG
        return path, config if path.stem == STEM and config.is_file() else None
    if (path / CONFIG).is_file():
        names = (f"{STEM}.safetensors", f"{STEM}.bin")
    else:
        found = [child.name for child in path.iterdir() if child.suffix == ".safetensors"]
        names = _FOLDER_NAMES if len(found) != 1 else tuple(found)
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise UserError(
            f"'{path}' holds no adapter ({', '.join(names)}): give the file, or the complete folder of peft."
        )
    return file, path / CONFIG if (path / CONFIG).is_file() else None


def _settings(tensors: Tensors, config: Path | None) -> tuple[str, dict[str, Any]]:
    """The settings of peft, from its own file or the header of diffusers, with their place; {} for none."""
    if config is not None:
        where, settings = f"'{config}'", read_json(config, COPY, _SETTINGS)
        settings = {"r": 8, "lora_alpha": 8, **settings}  # the defaults of peft
    else:
        where, settings = f"the header of '{tensors.path}'", _in_header(tensors, DIFFUSERS)
        settings = {
            name.removeprefix("transformer."): value
            for name, value in settings.items()
            if name.startswith("transformer.")
        }
        try:
            check_shape(settings, _SETTINGS)
        except ValueError as error:
            raise UserError(f"{where} cannot be read ({error}): {COPY}.") from None
    if not {"r", "lora_alpha"} <= settings.keys():
        return where, {}
    kind, start = settings.get("peft_type", "LORA"), settings.get("init_lora_weights")
    if kind.upper() != "LORA":
        raise UserError(f"{where} describes a {short(kind)} adapter: {_ONLY}.")
    variant = next((name for name in _VARIANTS if settings.get(name)), None)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        variant = f"init_lora_weights={start}"
    if variant:
        raise UserError(f"{where} has {short(variant)}, with which the change is not s B A: {_ONLY}.")
    patterns = {name: _patterns(where, name, settings.get(name) or {}) for name in _PATTERNS}
    return where, settings | patterns


def _patterns(where: str, name: str, given: Mapping[str, Any]) -> list[tuple[re.Pattern, Any]]:
    """The patterns of modules in a setting of peft, compiled as peft does, with their values."""
    if len(given) > _MOST_PATTERNS:
        raise UserError(
            f"{where} has {len(given):,} patterns in {name}: at most {_MOST_PATTERNS:,} are read."
        )
    for pattern in given:
        if not _SAFE_PATTERN.fullmatch(pattern) or len(re.findall(r"[*+]", pattern)) > _MOST_REPEATS:
            raise UserError(
                f"{where} has the {name} '{short(pattern)}': only names of modules are read, and patterns "
                f"with at most {_MOST_REPEATS} of '.*', '.+' and '\\d+'. Write the names."
            )
    return [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in given.items()]


def _own_notes(tensors: Tensors) -> dict[str, Any]:
    """What `adapter_export` stored in the header."""
    notes = _in_header(tensors, OURS)
    if manifest := _in_header(tensors, cards.MANIFEST_KEY):
        notes["manifest"] = manifest
    try:
        check_shape(notes, {"base?": str, "rslora?": bool, "manifest?": dict})
    except ValueError as error:
        raise UserError(
            f"the header of '{tensors.path}' cannot be read ({error}): export it again."
        ) from None
    return notes


def _in_header(tensors: Tensors, key: str) -> dict[str, Any]:
    try:
        value = parse_json(tensors.metadata.get(key, "{}"))
        check_shape(value, dict)
    except ValueError as error:
        raise UserError(
            f"'{key}' in the header of '{tensors.path}' cannot be read ({error}): {COPY}."
        ) from None
    return value


def _stated_scale(where: str, settings: Mapping[str, Any], module: str, rank: int) -> float:
    """s of a module by the settings of peft."""
    stated = _by_pattern(settings["rank_pattern"], module, settings["r"])
    if stated != rank:
        raise UserError(
            f"{module} has rank {rank}, and {where} states {stated}: copy both files of the adapter again."
        )
    alpha = _by_pattern(settings["alpha_pattern"], module, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _by_pattern(patterns: list[tuple[re.Pattern, Any]], module: str, otherwise: Any) -> Any:
    """The rank or alpha of a module: that of the first pattern that matches the end of its name."""
    return next((value for pattern, value in patterns if pattern.match(module)), otherwise)


# --- Tensors ----------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """What the name of a module in a file says."""

    prefix: str
    # The modules of diffusers that it stands for; several for a fused projection.
    modules: tuple[str, ...]


def _modules(tensors: Tensors, names: list[str]) -> tuple[dict[str, dict[str, str]], dict[str, _Place]]:
    """Sorts tensors into modules.

    Returns:
      for each module, by the name that it has in the file: its tensors by what they are, A, B, m or alpha;
      and what its name says.

    Raises:
      UserError: another kind of adapter, unknown names, modules that are given twice, or without A or B.
    """
    path = tensors.path
    for kind, pattern in {"ControlNet": _CONTROLNET.pattern, **_OTHER_KINDS}.items():
        if found := next((name for name in names if re.search(pattern, name)), None):
            what = "an adapter of a ControlNet" if kind == "ControlNet" else f"a {kind} adapter"
            raise UserError(f"'{path}' is {what} ({short(found)}): {_ONLY}.")
    parts: dict[str, dict[str, str]] = {}
    places: dict[str, _Place] = {}
    unknown, seen = [], {}
    for name in names:
        suffix = max((suffix for suffix in _SUFFIXES if name.endswith(suffix)), key=len, default="")
        raw, part = name.removesuffix(suffix), _SUFFIXES.get(suffix)
        place = _parse(raw)
        if part is None or place is None:
            unknown.append(name)
            continue
        if raw not in places:
            places[raw] = place
            for member in place.modules:
                if member in seen:
                    raise UserError(
                        f"'{path}' has {member} twice, as {short(seen[member])} and {short(raw)}: remove one."
                    )
                seen[member] = raw
        if part in parts.setdefault(raw, {}):
            raise UserError(f"'{path}' has {part} of {short(raw)} twice, as {parts[raw][part]} and {name}.")
        parts[raw][part] = name
    if unknown:
        raise UserError(
            f"'{path}' has {len(unknown)} tensors that no adapter of a PixArt has: {first_names(unknown)}. "
            "Give an adapter that was trained from a PixArt."
        )
    if not parts:
        raise UserError(f"'{path}' holds no adapter of the network: give another file.")
    lacking = [f"{raw} has no {part}" for raw, own in parts.items() for part in "AB" if part not in own]
    if lacking:
        raise UserError(f"'{path}' is not complete: {first_names(lacking)}. Copy or export it again.")
    return parts, places


def _parse(raw: str) -> _Place | None:
    """The module that a name in a file stands for; None if it is none of a PixArt."""
    prefix = _PREFIX.match(raw)[0]
    name, number = raw.removeprefix(prefix).replace(".", "_"), ""
    if block := _BLOCK.fullmatch(name):
        number, name = str(int(block[2])), f"{block[1]}_{{}}_{block[3]}"
    modules = _MODULES.get(name)
    return modules and _Place(prefix, tuple(module.replace("{}", number) for module in modules))


def _factors(tensors: Tensors, raw: str, names: Mapping[str, str], members: int) -> Factors:
    """The factors in the file, without their scale."""
    down, up = _read(tensors, names["A"]), _read(tensors, names["B"])
    if up.ndim == 4 and up.shape[2:] == (1, 1):
        up = up[:, :, 0, 0]
    if down.ndim not in (2, 4) or up.ndim != 2 or not down.size or not up.size:
        raise UserError(
            f"'{tensors.path}': A of {raw} is {by(down.shape)} and B {by(up.shape)}: they must be matrices, "
            "or A a convolution."
        )
    if up.shape[1] != len(down) or len(up) % members:
        raise UserError(
            f"'{tensors.path}': A of {raw} is {by(down.shape)} and B {by(up.shape)}: B must have a column "
            f"for each of the {len(down)} rows of A" + (f", and {members} parts." if members > 1 else ".")
        )
    magnitude = _magnitude(tensors, names["m"], len(up)) if "m" in names else None
    return Factors(down, up, 1.0, magnitude)


def _magnitude(tensors: Tensors, name: str, out: int) -> np.ndarray:
    """m of DoRA, [out]. Formats add axes of length 1 before or after it."""
    value = _read(tensors, name)
    per_row = ((out,), (out, 1), (out, 1, 1, 1), (1, out, 1, 1))
    if value.shape in per_row:
        return value.reshape(out)
    if value.shape[:1] == (1,) and value.ndim in (2, 4):
        raise UserError(
            f"'{tensors.path}': {name} is {by(value.shape)}, one magnitude for each column (OneTrainer "
            "without dora_on_output): only DoRA with one for each row is read."
        )
    raise UserError(f"'{tensors.path}': {name} is {by(value.shape)} for {by((out,))}: give another file.")


def _alpha(tensors: Tensors, name: str) -> float:
    value = np.asarray(tensors[name])
    if value.size != 1 or not (value.dtype.kind in "iu" or jnp.issubdtype(value.dtype, jnp.floating)):
        raise UserError(
            f"'{tensors.path}': {name} is {value.dtype} {by(value.shape)}: it must be one number."
        )
    alpha = float(value.reshape(()))
    finite(f"'{tensors.path}': {name}", alpha)
    return alpha


def _read(tensors: Tensors, name: str) -> np.ndarray:
    value = tensors[name]
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise UserError(f"'{tensors.path}': {name} is {value.dtype}, but weights must be floating point.")
    with np.errstate(over="ignore", invalid="ignore"):
        value = np.array(value, np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"'{tensors.path}': {name} has values that are NaN or infinite: give another file.")
    return value
