"""Sequence: the state of one completion's tokens, from its arrival to its end."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import Enum, auto

from nanovllm_jax.engine.edits import Edit
from nanovllm_jax.engine.grammar import Matcher
from nanovllm_jax.engine.token_scores import TokenScores
from nanovllm_jax.outputs import FinishReason
from nanovllm_jax.sampling_params import SamplingParams

NO_SLOT = -1


class Status(Enum):
    """Where a sequence stands."""

    WAITING = auto()  # in the waiting queue, its prompt not or only partly computed
    RUNNING = auto()  # decoding
    FINISHED = auto()


@dataclass(eq=False, slots=True)
class Sequence:
    """One completion of a request.

    Tokens that the device has sampled but the host not yet read are `in_flight`.
    `num_computed` counts the tokens whose keys and values have been *scheduled*: the device runs
    steps in order, so for every later step they are there.
    """

    seq_id: int
    token_ids: list[int]
    params: SamplingParams
    seed: int
    max_tokens: int  # params.max_tokens, capped by max_model_len
    edits: list[Edit] = field(default_factory=list)  # of its logits, as `params` asks for
    index: int = 0  # among the request's completions
    matcher: Matcher | None = None  # of params.structured_outputs, up to the last token read
    num_prompt_tokens: int = field(init=False)
    needs_sample_all: bool = field(init=False)  # see SamplingParams; asked at each step
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # which of params.stop_token_ids or params.stop ended it
    error: str | None = None  # what went wrong, if finish_reason is "error"
    # Takes each new token, and why the sequence ends with it if it does, and returns a stop string
    # that the text now has. None: there is none to look for.
    find_stop_string: Callable[[int, FinishReason | None], str | None] | None = None

    num_computed: int = 0
    num_cached: int = 0  # tokens found in the prefix cache: computed, and never written again
    in_flight: int = 0
    slot: int = NO_SLOT  # row of the runner's tables while admitted
    shard: int = 0  # shard of the batch that its blocks are in, while it has any
    block_table: list[int] = field(default_factory=list)
    prefix: list[tuple[int, int]] = field(default_factory=list)  # (hash, uid) of hashed blocks

    scores: list[TokenScores] = field(default_factory=list)  # of the completion, if wanted
    prompt_scores: dict[int, TokenScores] = field(default_factory=dict)  # the prompt's, by position

    def __post_init__(self):
        self.num_prompt_tokens = len(self.token_ids)
        self.needs_sample_all = self.params.needs_sample_all

    @property
    def num_tokens(self) -> int:
        """Tokens known to the host."""
        return len(self.token_ids)

    @property
    def completion_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_completion_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED

    @property
    def has_options(self) -> bool:
        """Whether its slot has to know more of it than a row says."""
        return bool(self.edits) or self.params.allowed_token_ids is not None

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether tokens of the prompt, all of which follow another, have no scores yet.

        The first completion gets them for all.
        """
        wanted = self.params.prompt_logprobs is not None and self.index == 0
        return wanted and len(self.prompt_scores) < self.num_prompt_tokens - 1

    def end_with(self, token_id: int, eos_token_ids: Collection[int]) -> FinishReason | None:
        """Why the completion ends with the token that comes next, if it does.

        It shows `find_stop_string` the token, so it is called once for each, before the token is
        appended; and it notes the `stop_reason`.
        """
        params, reason = self.params, None
        if token_id in eos_token_ids and not params.ignore_eos:
            reason = "stop"
        elif params.stop_token_ids and token_id in params.stop_token_ids:
            self.stop_reason, reason = token_id, "stop"
        elif self.num_completion_tokens + 1 >= self.max_tokens:
            reason = "length"
        if self.find_stop_string and (found := self.find_stop_string(token_id, reason)) is not None:
            self.stop_reason, reason = found, "stop"
        return reason

    @property
    def num_wanted(self) -> int:
        """How many tokens remain to be sampled after those in flight."""
        return self.max_tokens - self.num_completion_tokens - self.in_flight
