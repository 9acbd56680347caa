"""The sampling options that a model's makers recommend, in its generation_config.json."""

from pathlib import Path
from typing import Any

from nanovllm_jax.files import is_there, read_json
from nanovllm_jax.sampling_params import SamplingParams

# Keys of generation_config.json that vLLM reads too, with their names in SamplingParams.
NAMES = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def recommended_sampling(directory: Path) -> dict[str, Any]:
    """The options of SamplingParams that the directory's generation_config.json sets.

    `do_sample: false` means greedy decoding, as in transformers; vLLM overlooks it.

    Raises:
        ValueError: the file is damaged, or one of its values is no valid option.
    """
    path = directory / "generation_config.json"
    if not is_there(path):
        return {}
    settings = read_json(path)
    if settings.get("do_sample") is False:
        settings |= {"temperature": 0.0} | dict.fromkeys(("top_k", "top_p", "min_p"))
    found = {name: settings[key] for key, name in NAMES.items() if settings.get(key) is not None}
    try:
        SamplingParams(**found)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}; correct the file, or pass sampling_params") from error
    return found
