"""Loads the tokenizer of a model's directory, and says which tokens end a request."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm_jax.files import check_readable, is_there, read_json
from nanovllm_jax.models import ModelConfig

# Files with a vocabulary, and files that only add to one.
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")
ADDITIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
ADDITIONS += ("chat_template.jinja",)


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """Load the directory's tokenizer; None if it has no tokenizer files at all.

    Raises:
        FileNotFoundError: some of its files are there, and others that they need are not.
        ValueError: a file is damaged, or the tokenizer knows no word.
    """
    names = [name for name in (*VOCABULARIES, *ADDITIONS) if is_there(directory / name)]
    for name in names:
        small = name.endswith(".json") and name not in VOCABULARIES
        (read_json if small else check_readable)(directory / name)
    if not names:
        return None
    if not set(names) & set(VOCABULARIES):
        raise FileNotFoundError(
            f"{directory} has {', '.join(names)}, but no {', '.join(VOCABULARIES)}: download the "
            f"tokenizer's files again, or remove these to pass prompts as token ids only"
        )
    if set(names) & {*VOCABULARIES, "merges.txt"} == {"vocab.json"}:
        raise FileNotFoundError(f"{directory} has vocab.json, but no merges.txt; download it again")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        words = tokenizer.vocab_size
        tokenizer.decode(tokenizer.encode("a"))
    except Exception as error:  # transformers lets through whatever a damaged file leads to
        for name in {"tokenizer.json", "vocab.json"}.intersection(names):
            read_json(directory / name)  # may name the one that is no JSON
        raise ValueError(
            f"the tokenizer of {directory} ({', '.join(names)}, config.json) cannot be loaded: "
            f"{type(error).__name__}: {error}; download these files again"
        ) from error
    if not words:
        raise ValueError(
            f"the tokenizer of {directory} ({', '.join(names)}) has no vocabulary; download these "
            f"files again"
        )
    return tokenizer


def eos_token_ids(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    """Return all tokens that end a request: those that any of the model's files names.

    Raises:
        ValueError: the tokenizer's end token is none of the model's tokens.
    """
    if tokenizer is None or (end := tokenizer.eos_token_id) is None:
        return config.eos_token_ids
    if type(end) is not int or not 0 <= end < config.vocab_size:
        raise ValueError(
            f"tokenizer_config.json: eos_token {tokenizer.eos_token!r} is token {end!r}, but "
            f"config.json has vocab_size={config.vocab_size}; correct it, or tokenizer.json (or "
            f"vocab.json), which should hold it"
        )
    return tuple(dict.fromkeys([*config.eos_token_ids, end]))
