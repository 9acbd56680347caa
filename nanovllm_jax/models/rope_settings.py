"""Reads RoPE's settings from every place of config.json in which they may stand.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, flat or as
one dict for each type of layer. It lets one place win silently (`rope_scaling` takes the place of
`rope_parameters` whole, and a dict's `rope_theta` that of the flat one); here all must agree.
"""

from typing import Any

from nanovllm_jax.layers.rope import Rope

LARGEST = 3e38  # The largest base: angles are computed in float32.
LAYER_TYPES = ("full_attention", "sliding_attention")
ORIGINAL = "original_max_position_embeddings"  # the length that the model was first trained for

# The numbers of each kind: the least and the largest value, and whether it must be given. (The
# original length must not: it is then max_position_embeddings.)
Limits = tuple[float, float, bool]
FACTOR: dict[str, Limits] = {"factor": (1, 1e6, True)}
LENGTH: dict[str, Limits] = {ORIGINAL: (2, 2**31 - 1, False)}
NUMBERS: dict[str, dict[str, Limits]] = {
    "default": {},
    "linear": FACTOR,
    "dynamic": FACTOR,
    "llama3": {
        **FACTOR,
        **LENGTH,
        "low_freq_factor": (1e-6, 1e6, True),
        "high_freq_factor": (1e-6, 1e6, True),
    },
    "yarn": {
        **FACTOR,
        **LENGTH,
        "attention_factor": (0, 1e6, False),
        "beta_fast": (1e-6, 1e6, False),
        "beta_slow": (1e-6, 1e6, False),
        "mscale": (0, 1e6, False),
        "mscale_all_dim": (0, 1e6, False),
    },
}
FLAGS = {"yarn": ("truncate",)}
NO_EFFECT = ("finetuned",)


def read_rope(raw: dict[str, Any], default_theta: float) -> tuple[Rope, list[str]]:
    """Return the kind of RoPE, and all reasons to refuse these settings."""
    places, problems = _places(raw)
    outer = raw.get("rope_theta", default_theta)
    bases, kinds = {}, {}
    if "rope_theta" in raw and (outer is not None or not places):
        bases["config.json"] = outer
    for place, settings in places.items():
        given = [settings[k] for k in ("rope_type", "type") if k in settings]
        named = [kind for kind in given if kind is not None] or given
        unknown = [kind for kind in named if not isinstance(kind, str) or kind not in NUMBERS]
        if unknown or len(set(named)) > 1:
            problems.append(
                f"{place}: rope_type {unknown[0]!r} is not supported; only {', '.join(NUMBERS)} are"
                if unknown
                else f"{place}: rope_type {named[0]!r} and type {named[1]!r} contradict each other"
            )
            continue  # its further keys are its own
        bases[place] = settings.get("rope_theta", outer)
        kind = named[0] if named else "default"
        numbers, wrong = _numbers(place, kind, settings, raw)
        kinds[place] = (kind, numbers)
        problems += wrong
    wrong = {place: base for place, base in bases.items() if not _is_number(base, 1, LARGEST)}
    problems += [
        f"rope_theta in {place} must be a number between 1 and {LARGEST:g}, got {base!r:.30}"
        for place, base in wrong.items()
    ]
    for what, values in (("rope_theta", bases if not wrong else {}), ("rope_type", kinds)):
        if any(value != next(iter(values.values())) for value in values.values()):
            said = ", ".join(f"{_said(value)} in {place}" for place, value in values.items())
            problems.append(f"{what} is {said}; these contradict each other: leave the right one")
    theta = default_theta if wrong else next(iter(bases.values()), default_theta)
    kind, numbers = next(iter(kinds.values()), ("default", ()))
    return Rope(float(theta), kind, numbers), problems


def _numbers(
    place: str, kind: str, settings: dict[str, Any], raw: dict[str, Any]
) -> tuple[tuple[tuple[str, float], ...], list[str]]:
    """The numbers of a kind of RoPE, and all problems with them."""
    problems, numbers = [], {}
    known, flags = NUMBERS[kind], FLAGS.get(kind, ())
    given = {key: value for key, value in settings.items() if value is not None}
    if ORIGINAL in known:
        top, lengths = raw.get(ORIGINAL), raw["max_position_embeddings"]
        if top is not None and given.setdefault(ORIGINAL, top) != top:
            problems.append(
                f"{place}: {ORIGINAL}={given[ORIGINAL]!r} contradicts {top!r} beside {place}"
            )
        given.setdefault(ORIGINAL, lengths)
    for key, value in given.items():
        if key in known and not _is_number(value, *known[key][:2]):
            least, most, _ = known[key]
            problems.append(
                f"{place}: {key} must be a number between {least:g} and {most:g}, got {value!r:.30}"
            )
        elif key in flags and not isinstance(value, bool):
            problems.append(f"{place}: {key} must be true or false, got {value!r:.30}")
        elif key in known or key in flags:
            numbers[key] = value
        elif key not in ("rope_type", "type", "rope_theta", *NO_EFFECT) and not (
            key == "partial_rotary_factor" and value == 1
        ):
            problems.append(f"{place}: {key}={value!r} is not supported with rope_type {kind!r}")
    missing = [key for key, (_, _, needed) in known.items() if needed and key not in given]
    if missing:
        problems.append(f"{place}: rope_type {kind!r} needs {', '.join(missing)}")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in numbers and high in numbers and numbers[low] >= numbers[high]:
            problems.append(f"{place}: {low}={numbers[low]} must be below {high}={numbers[high]}")
    return tuple(sorted(numbers.items())), problems


def _said(value: Any) -> str:
    """A base, or a kind with its numbers, in words."""
    if not isinstance(value, tuple):
        return str(value)
    kind, numbers = value
    return " ".join([repr(kind), *(f"{key}={number}" for key, number in numbers)])


def _is_number(value: Any, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def _places(raw: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The dicts of settings by their place, one for each type of layer if nested; and problems."""
    places, problems = {}, []
    for name in ("rope_scaling", "rope_parameters"):
        settings = {} if raw.get(name) is None else raw[name]
        if not isinstance(settings, dict):
            problems.append(f"{name} must be an object, got {settings!r}")
            continue
        nested = {key: value for key, value in settings.items() if key in LAYER_TYPES}
        flat = {key: value for key, value in settings.items() if key not in nested}
        if nested and "full_attention" not in nested:
            problems.append(f"{name} has no settings for full_attention, which all layers are")
        for key, value in nested.items():
            if isinstance(value, dict):
                places[f"{name}.{key}"] = value
            else:
                problems.append(f"{name}.{key} must be an object, got {value!r}")
        if flat:
            places[name] = flat
    return places, problems
