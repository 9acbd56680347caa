"""StructuredOutputsParams: the form that a request's output must have."""

import json as json_module
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from nanovllm_jax.checks import check_text, explain_unknown_names

# Options of vLLM that this engine lacks, by the reason.
OF_VLLM = {
    "there is one backend, llguidance, and none to fall back to": "disable_fallback",
    'say "additionalProperties": false in the schema': "disable_additional_properties",
    "say it in a grammar": "whitespace_pattern structural_tag",
}


@explain_unknown_names(OF_VLLM)
@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the output must be, named as in vLLM: exactly one of the first five.

    Attributes:
        json: a JSON schema, as text or as a dict; the output is JSON that follows it.
        regex: a regular expression in Rust's syntax, which the whole output matches.
        choice: texts, of which the output is one.
        grammar: a context-free grammar in Lark's syntax or llama.cpp's GBNF.
        json_object: True for any JSON object.
        disable_any_whitespace: write JSON without spaces and line breaks between its parts.

    Raises:
        TypeError, ValueError: a value has the wrong type, or there is not exactly one form.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Collection[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False

    def __post_init__(self):
        forms = ("json", "regex", "choice", "grammar", "json_object")
        given = [name for name in forms if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            has = " and ".join(given) or "none"
            raise ValueError(f"structured_outputs takes one of {', '.join(forms)}, not {has}")
        types: dict[str, Any] = {
            "json": (str, Mapping), "regex": str, "choice": Collection, "grammar": str,
            "json_object": bool, "disable_any_whitespace": bool,
        }  # fmt: skip
        for name, expected in types.items():
            value = getattr(self, name)
            wrong = value is not None and not isinstance(value, expected)
            if wrong or (name == "choice" and isinstance(value, str | bytes)):
                article = "a list of texts" if name == "choice" else f"not {type(value).__name__}"
                raise TypeError(f"structured_outputs: {name} must be {article}, got {value!r:.80}")
        if self.choice is not None:
            if not self.choice:
                raise ValueError("structured_outputs: choice must have at least one text")
            for text in self.choice:
                if not isinstance(text, str):
                    raise TypeError(f"each choice must be a text, got {text!r:.80}")
                check_text(text)
        for text in (self.json, self.regex, self.grammar):
            if isinstance(text, str):
                check_text(text)

    @classmethod
    def of(cls, value: "StructuredOutputsParams | Mapping[str, Any]") -> "StructuredOutputsParams":
        """The same as given, or made of a dict with its names."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(
                f"structured_outputs must be StructuredOutputsParams or a dict, got {value!r:.80}"
            )
        return cls(**value)

    def frozen(self) -> "StructuredOutputsParams":
        """The same, apart from the user's own dicts and lists."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.json is not None:
            own["json"] = self.schema
        if self.choice is not None:
            own["choice"] = tuple(self.choice)
        return StructuredOutputsParams(**own)

    @property
    def schema(self) -> str:
        """The JSON schema as text.

        Raises:
            ValueError: it is none, or not JSON.
        """
        if isinstance(self.json, str):
            return self.json
        try:
            return json_module.dumps(self.json, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"structured_outputs: json is not a JSON schema: {error}") from None
