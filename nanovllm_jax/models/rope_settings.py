"""Reads RoPE's settings from every place of config.json in which they may stand.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, flat or as
one dict for each type of layer. It lets one place win silently (`rope_scaling` takes the place of
`rope_parameters` whole, and a dict's `rope_theta` that of the flat one); here all must agree.
"""

from typing import Any

DEFAULT_THETA = 10000.0
LARGEST = 3e38  # The largest base: angles are computed in float32.
LAYER_TYPES = ("full_attention", "sliding_attention")


def rope_theta(raw: dict[str, Any]) -> tuple[float, list[str]]:
    """Return RoPE's base, and all reasons to refuse these settings."""
    places, problems = _places(raw)
    outer = raw.get("rope_theta", DEFAULT_THETA)
    bases = {}
    if "rope_theta" in raw and (outer is not None or not places):
        bases["config.json"] = outer
    for place, settings in places.items():
        named = [settings[k] for k in ("rope_type", "type") if k in settings]
        others = [rope_type for rope_type in named if rope_type != "default"]
        problems += [
            f"{place}: rope_type {rope_type!r} is not supported; only 'default' is (Qwen3 runs as "
            f"published without YaRN: remove {place})"
            for rope_type in others
        ]
        if others:  # its further keys are its own
            continue
        bases[place] = settings.get("rope_theta", outer)
        for key, value in settings.items():
            neutral = value is None or (key == "partial_rotary_factor" and value == 1)
            if key not in ("rope_type", "type", "rope_theta") and not neutral:
                problems.append(
                    f"{place}: {key}={value!r} is not supported with rope_type 'default'"
                )
    wrong = {place: base for place, base in bases.items() if not _is_base(base)}
    problems += [
        f"rope_theta in {place} must be a number between 1 and {LARGEST:g}, got {base!r:.30}"
        for place, base in wrong.items()
    ]
    if not wrong and len(set(bases.values())) > 1:
        said = ", ".join(f"{base} in {place}" for place, base in bases.items())
        problems.append(f"rope_theta is {said}; these contradict each other: leave the right one")
    theta = DEFAULT_THETA if wrong else next(iter(bases.values()), DEFAULT_THETA)
    return float(theta), problems


def _is_base(value: Any) -> bool:
    return type(value) in (int, float) and 1 <= value <= LARGEST


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
