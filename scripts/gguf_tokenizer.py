"""Makes a fast tokenizer from the tokens, merges and scores that a GGUF file holds.

A GGUF file names the rule that splits text into words (`tokenizer.ggml.pre`) without spelling it
out. transformers' own reader of these files splits all of them by GPT-2's rule, which gives other
tokens for numbers and line breaks than Llama 3 and Qwen were trained with; so the rules are here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

# The types of tokens in `tokenizer.ggml.token_type`.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# Control tokens that end a turn or a text, whichever of them the file names as its end.
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")
# Keys that name an end: of a text, of a turn, of a message that calls a tool.
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")


@dataclass(frozen=True)
class Splitting:
    """How a byte-level tokenizer splits text into words, as its publishers' tokenizer.json says."""

    digits: str | None = None  # most digits of a word, as a regular expression; None: GPT-2's rule
    single_digits: bool = False  # digits stand alone before GPT-2's rule applies
    normalizer: Any = None
    whole_words: bool = False  # a word that is a token is not merged from its parts
    add_bos: bool = False  # what a missing tokenizer.ggml.add_bos_token means

    def pre_tokenizer(self) -> Any:
        """Make the pre-tokenizer: words first, then their bytes."""
        if self.digits is None:
            words = [pre_tokenizers.Digits(individual_digits=True)] * self.single_digits
            byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
            return pre_tokenizers.Sequence([*words, byte_level])
        rule = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + self.digits +
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )  # fmt: skip
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(rule), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )


QWEN2 = Splitting(digits=r"\p{N}", normalizer=normalizers.NFC())
SPLITTINGS = {
    "gpt-2": Splitting(),
    "smollm": Splitting(single_digits=True),
    "llama-bpe": Splitting(digits=r"\p{N}{1,3}", whole_words=True, add_bos=True),
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}


@dataclass(frozen=True)
class GGUFTokenizer:
    """A tokenizer and what is written beside it."""

    tokenizer: Tokenizer
    tokens: Sequence[str]  # the file's own, by id
    special: Mapping[str, int]  # "bos", "eos", "unk", "pad": those that the file names
    ends: Sequence[int]  # tokens that end an answer
    chat_template: str | None

    def config(self, max_length: int) -> dict[str, Any]:
        """The tokenizer_config.json, in the spelling that transformers 4 and 5 both read."""
        names = {f"{kind}_token": self.tokens[i] for kind, i in self.special.items()}
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": max_length,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token")),
            **names,
            **({"chat_template": self.chat_template} if self.chat_template else {}),
        }


def read_tokenizer(values: Mapping[str, Any], vocab_size: int) -> GGUFTokenizer:
    """Make the tokenizer of a GGUF file.

    Args:
        values: the file's keys and values.
        vocab_size: rows of the model's table, of which the last may belong to no token.

    Raises:
        ValueError: a key is missing or wrong, or names a tokenizer that is not known here.
    """

    def value(key: str, default: Any = None, *, length: int | None = None) -> Any:
        found = values.get(f"tokenizer.ggml.{key}", default)
        if found is None:
            raise ValueError(f"tokenizer.ggml.{key} is missing")
        if length is not None and (not isinstance(found, list) or len(found) != length):
            raise ValueError(f"tokenizer.ggml.{key} must be a list of {length}, one for each token")
        return found

    tokens = value("tokens")
    if not isinstance(tokens, list) or not 0 < len(tokens) <= vocab_size:
        raise ValueError(f"tokenizer.ggml.tokens must be a list of 1 to {vocab_size} tokens")
    types = value("token_type", length=len(tokens))
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise ValueError(f"tokenizer.ggml.tokens has {twice!r} twice")

    special = {}
    for kind in ("bos", "eos", "unknown", "padding"):
        key = f"{kind}_token_id"
        if f"tokenizer.ggml.{key}" in values:
            special[{"unknown": "unk", "padding": "pad"}.get(kind, kind)] = value(key)
    ends = [value(key) for key in END_KEYS if f"tokenizer.ggml.{key}" in values]
    for i in [*special.values(), *ends]:
        if type(i) is not int or not 0 <= i < len(tokens):
            raise ValueError(f"tokenizer.ggml names token {i}, but there are {len(tokens)}")
    ends += [vocab[name] for name in ENDS if name in vocab and types[vocab[name]] == CONTROL]

    model = value("model")
    if model == "gpt2":
        name = value("pre")
        if name not in SPLITTINGS:
            raise ValueError(
                f"tokenizer.ggml.pre={name!r} is not known; have {', '.join(SPLITTINGS)}: take the "
                f"model's own checkpoint, or a GGUF file of another model"
            )
        rule = SPLITTINGS[name]
        tokenizer, add_bos = _byte_level(vocab, value("merges"), rule), rule.add_bos
    elif model == "llama":
        scores, unknown = value("scores", length=len(tokens)), special.get("unk", 0)
        has_prefix = value("add_space_prefix", True)
        tokenizer = _sentence_piece(tokens, types, scores, tokens[unknown], has_prefix)
        special.setdefault("unk", unknown)
        add_bos = True
    else:
        raise ValueError(f"tokenizer.ggml.model={model!r} is not known; have 'gpt2' and 'llama'")

    added = [
        AddedToken(token, special=kind == CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (CONTROL, USER_DEFINED)
    ]
    tokenizer.add_tokens(added)  # those of the vocabulary keep their ids
    if value("add_eos_token", False):
        raise ValueError("tokenizer.ggml.add_eos_token=true would end every prompt; only false is")
    if value("add_bos_token", add_bos and "bos" in special):
        if "bos" not in special:
            raise ValueError("tokenizer.ggml.add_bos_token=true, but bos_token_id is missing")
        bos = tokens[special["bos"]]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special["bos"])]
        )
    template = values.get("tokenizer.chat_template")
    return GGUFTokenizer(tokenizer, tokens, special, list(dict.fromkeys(ends)), template)


def _byte_level(vocab: dict[str, int], merges: list[str], rule: Splitting) -> Tokenizer:
    """A tokenizer of bytes that are merged in the order of the file's list."""
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise ValueError(f"tokenizer.ggml.merges has {merge!r}, which are no two tokens")
        pairs.append((left, right))
    tokenizer = Tokenizer(BPE(vocab, pairs, ignore_merges=rule.whole_words))
    if rule.normalizer is not None:
        tokenizer.normalizer = rule.normalizer
    tokenizer.pre_tokenizer = rule.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentence_piece(
    tokens: list[str], types: list[int], scores: list[float], unknown: str, has_prefix: bool
) -> Tokenizer:
    """SentencePiece's BPE: of all neighbours, those are merged whose token has the best score."""
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = {t for t, kind in zip(tokens, types, strict=True) if kind in (NORMAL, USER_DEFINED)}
    merges = [
        (-scores[i], i, token[:cut], token[cut:])
        for i, token in enumerate(tokens)
        if types[i] == NORMAL
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    pairs = [(left, right) for _, _, left, right in sorted(merges)]
    bpe = BPE(vocab, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types)
    tokenizer = Tokenizer(bpe)
    spaces: list[Any] = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * has_prefix)
    return tokenizer
