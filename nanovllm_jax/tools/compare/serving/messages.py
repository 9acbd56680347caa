"""What the client's processes are given, and what they give back."""

from dataclasses import dataclass, field
from typing import Any

from nanovllm_jax.tools.compare.serving.load import Request


@dataclass(frozen=True)
class ClientJob:
    """The requests of one client process.

    Attributes:
        address: of the server, without /v1.
        fields: what every request says besides prompt and length.
        wait_s: seconds after the load's beginning at which what is unfinished is given up.
    """

    address: str
    requests: list[Request]
    fields: dict[str, Any]
    wait_s: float
    api_key: str | None = None


@dataclass
class Answer:
    """What became of one request; all times are seconds since it was due.

    Attributes:
        late_s: when it was sent.
        times: when chunks with a choice came: each is one token, or a few.
        ended_s: when its stream ended or it was given up.
        completion_tokens: by the server's account; None if it gives none.
        error: why it is no complete answer.
    """

    late_s: float = 0.0
    times: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    error: str | None = None


@dataclass
class ClientResult:
    """The answers in the order of the requests, and how busy the client was.

    Attributes:
        beats_s: how late the event loop came back from sleeping, every 10 ms.
        cpu_share: processor time over wall time.
    """

    answers: list[Answer]
    beats_s: list[float]
    cpu_share: float
