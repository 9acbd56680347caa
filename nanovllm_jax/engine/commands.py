"""The commands that decide what an engine runs.

`EngineCore.apply` carries them out. A process that leads an engine of several records its own and
sends them to the others, which repeat them.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import get_args

from nanovllm_jax.engine.edits import Edit
from nanovllm_jax.sampling_params import SamplingParams

RequestId = int | str


@dataclass(frozen=True)
class AddRequest:
    """Queue a request, which has been found valid."""

    token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None  # its text, if it came as one
    request_id: str | None = None  # default: its number
    # Those of the completions' sequences, once there are any; the first is the request's number.
    numbers: Sequence[int] = ()
    edits: list[Edit] = field(default_factory=list)  # of its logits, as `params` asks for


@dataclass(frozen=True)
class AbortRequests:
    """End those of the requests that have not ended."""

    request_ids: list[RequestId]


@dataclass(frozen=True)
class StopSequence:
    """End a sequence, by its number, in whose text the process that leads found a stop string."""

    number: int


@dataclass(frozen=True)
class ResetPrefixCache:
    """Forget all cached prefixes."""


@dataclass(frozen=True)
class StartOver:
    """Forget what the device has computed, and compute every request again."""


@dataclass(frozen=True)
class Dispatch:
    """Schedule and start the next batch, which has this digest in the process that leads.

    `num_steps` is what its scheduler was asked for.
    """

    digest: int
    num_steps: int


@dataclass(frozen=True)
class Collect:
    """Read the tokens of the oldest batch under way."""


@dataclass(frozen=True)
class Exit:
    """Shut the engine down."""


Command = (
    AddRequest | AbortRequests | StopSequence | ResetPrefixCache | StartOver | Dispatch | Collect
    | Exit
)  # fmt: skip

_KINDS = {kind.__name__: kind for kind in get_args(Command)}


def encode(commands: Sequence[Command]) -> str:
    """Write commands as JSON."""
    return json.dumps([[type(c).__name__, asdict(c)] for c in commands], default=list)


def decode(text: str) -> list[Command]:
    """Read what `encode` wrote."""
    commands: list[Command] = []
    for name, fields in json.loads(text):
        if "params" in fields:
            biases = fields["params"]["logit_bias"]
            if biases is not None:  # JSON's keys are texts
                fields["params"]["logit_bias"] = {int(t): bias for t, bias in biases.items()}
            fields["params"] = SamplingParams(**fields["params"]).frozen()
            fields["edits"] = [Edit(*edit) for edit in fields["edits"]]
        commands.append(_KINDS[name](**fields))
    return commands
