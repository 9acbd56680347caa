"""Prompts: from what users pass to token ids."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Items
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from nanovllm_jax.checks import check_text, is_integer
from nanovllm_jax.sampling_params import SamplingParams

# A text or token ids, also as vLLM's {"prompt": ...} and {"prompt_token_ids": ...}.
Prompt = str | Items[int] | np.ndarray | jax.Array | Mapping[str, Any]
Message = dict[str, Any]  # {"role": "user", "content": "..."}


def paired(
    prompts: Iterable[Prompt], sampling_params: SamplingParams | Iterable[SamplingParams] | None
) -> list[tuple[Prompt, SamplingParams]]:
    """Each prompt of a batch with its sampling options.

    Args:
        sampling_params: one for all prompts, one for each, or None for the default.

    Raises:
        TypeError: one of the two is no list, or `prompts` is a single prompt.
        ValueError: there are not as many of one as of the other.
    """
    if isinstance(prompts, jax.Array):
        prompts = jax.device_get(prompts)
    single = isinstance(prompts, str | bytes | Mapping)
    if single or not isinstance(prompts, Iterable):
        remedy = "; pass [prompt]" if single else ""
        raise TypeError(f"prompts must be a list of prompts, got {prompts!r:.80}{remedy}")
    prompts = list(prompts)
    if prompts and all(map(is_integer, prompts)):
        raise TypeError("prompts must be a list of prompts, got token ids; pass [token_ids]")
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [(prompt, sampling_params) for prompt in prompts]
    if isinstance(sampling_params, str | Mapping) or not isinstance(sampling_params, Iterable):
        raise TypeError(
            f"sampling_params must be SamplingParams or a list of them, got {sampling_params!r:.80}"
        )
    params = list(sampling_params)
    if len(params) != len(prompts):
        raise ValueError(
            f"got {len(prompts)} prompts and {len(params)} sampling_params; pass one for all "
            f"prompts or one for each"
        )
    return list(zip(prompts, params, strict=True))


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Say in a TypeError or ValueError, raised inside, what it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}: {error}") from error


def tokenized(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str | None, list[int]]:
    """The prompt's text, None if it has none, and its token ids.

    Raises:
        TypeError: the prompt is neither text nor token ids.
        ValueError: the text is not valid Unicode, or there is no tokenizer for it.
    """
    text, token_ids = _from_dict(prompt) if isinstance(prompt, Mapping) else (None, prompt)
    if isinstance(token_ids, bytes):
        check_text(token_ids.decode(errors="surrogateescape"))
        raise TypeError("the prompt is bytes; pass text: prompt.decode()")
    if not isinstance(token_ids, str):
        return text, _integers(token_ids)
    if tokenizer is None:
        raise ValueError("the model's directory has no tokenizer; pass the prompt as token ids")
    return token_ids, encode(tokenizer, token_ids)


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """The tokens of a text, without a second beginning-of-sequence token if it begins with one.

    (A chat template writes that token; many tokenizers add one to any text.)

    Args:
        add_special_tokens: whether the tokenizer may add one.

    Raises:
        ValueError: the text is not valid Unicode; the message has the position.
    """
    check_text(text)
    token_ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    if not add_special_tokens:
        return token_ids
    bos, written = tokenizer.bos_token_id, str(tokenizer.bos_token)
    if bos is not None and token_ids[:2] == [bos, bos] and text.startswith(written):
        return token_ids[1:]
    return token_ids


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, conversation: list[Message], **template: Any
) -> list[int]:
    """The tokens of a conversation as the chat template writes it, special tokens included.

    Args:
        template: what `apply_chat_template` of transformers takes.

    Raises:
        TypeError: a message has no role, or its content is no text.
        ValueError: there is no template, it refuses the conversation, or a text is not valid
            Unicode.
    """
    if not isinstance(conversation, list) or not conversation:
        raise TypeError(f"messages must be a list of messages, got {conversation!r:.80}")
    for message in conversation:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"a message must be a dict like {{'role': 'user', 'content': 'text'}}, "
                f"got {message!r:.80}"
            )
        if not isinstance(message.get("content"), str | None):
            raise TypeError(f"a message's content must be a text, got {message['content']!r:.80}")
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, **template)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise
    except Exception as error:  # a template is a program, which may fail in any way
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    check_text(str(text))
    return tokenizer.encode(str(text), add_special_tokens=False)


def _from_dict(prompt: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The text of a dict, if it has one, and what is to be run: its token ids, else the text."""
    given = {key: value for key, value in prompt.items() if value is not None}
    text, token_ids = given.pop("prompt", None), given.pop("prompt_token_ids", None)
    if given or (text is None and token_ids is None):
        remedy = "; pass its 'input_ids' alone" if "input_ids" in given else ""
        raise TypeError(
            f"a dict as a prompt must have 'prompt' or 'prompt_token_ids' and nothing else, "
            f"got the keys {[*prompt]}{remedy}"
        )
    if not isinstance(text, str | None):
        raise TypeError(f"'prompt' must be a string, got {text!r:.80}")
    if isinstance(token_ids, str):
        raise TypeError(f"'prompt_token_ids' must be a list of token ids, got {token_ids!r:.80}")
    return text, text if token_ids is None else token_ids


def _integers(token_ids: Any) -> list[int]:
    """Token ids as a list of Python's integers.

    Raises:
        TypeError: they are something else.
    """
    if isinstance(token_ids, jax.Array):
        token_ids = jax.device_get(token_ids)  # allowed under jax.transfer_guard("disallow")
    if hasattr(token_ids, "__array__"):
        numbers = np.asarray(token_ids)
        if numbers.ndim != 1 or numbers.dtype.kind not in "iu":
            raise TypeError(
                f"an array of token ids must have one dimension and integers, got {numbers.dtype} "
                f"of shape {numbers.shape}; pass each row as a prompt of its own"
            )
        return numbers.tolist()
    if not isinstance(token_ids, Items):
        raise TypeError(f"a prompt must be a string or a list of token ids, got {token_ids!r:.80}")
    if set(map(type, token_ids)) <= {int}:  # which is quick
        return list(token_ids)
    for i, token in enumerate(token_ids):
        if not is_integer(token):
            raise TypeError(f"token ids must be integers, got {token!r:.80} at position {i}")
    return [int(token) for token in token_ids]


def tokens_of_bad_words(
    words: Iterable[str] | None, tokenizer: PreTrainedTokenizerBase | None
) -> list[list[int]]:
    """The token sequences of bad words: at the beginning of a text and, after a space, in it.

    As in vLLM, the second form counts only if it begins with another token and has as many.

    Raises:
        ValueError: there is no tokenizer, or a word has no tokens.
    """
    sequences: list[list[int]] = []
    for word in words or ():
        if tokenizer is None:
            raise ValueError("bad_words: the model has no tokenizer; use logit_bias with token ids")
        first = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        inside = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        if not first:
            raise ValueError(f"bad_words: {word!r} has no tokens; leave it out")
        sequences.append(first)
        if inside[0] != first[0] and len(inside) == len(first):
            sequences.append(inside)
    return sequences
