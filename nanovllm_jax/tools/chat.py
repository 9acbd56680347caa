"""`nanovllm-jax chat`: a conversation in the terminal."""

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanovllm_jax.sampling_params import SamplingParams
from nanovllm_jax.tools import options
from nanovllm_jax.tools.options import UsageError, refusals

if TYPE_CHECKING:
    from nanovllm_jax import LLM

BEGIN, END = "<think>", "</think>"  # what Qwen3 and others write around their thoughts

HELP = """/reset  begin a new conversation
/exit   leave, as the end of the input (Ctrl-D) does
/help   show this
Ctrl-C ends an answer. A message that begins with a slash is written with a space before it."""


def main(argv: Sequence[str]) -> int:
    """Talk until the input ends, and return the exit status."""
    args = parse(argv)
    sampling = options.sampling_params(args, args.model, max_tokens=None)
    with refusals(*options.ENGINE_ERRORS):
        given = options.small_steps(args.model, options.engine_options(args), max_num_seqs=1)
        _check_template(args.model)
        from nanovllm_jax import LLM

        llm = LLM(str(args.model), **given)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with llm, _interruptions_end_answers():
        chat = Chat(
            llm, sampling, options.opening(args), options.template(args), args.hide_thinking
        )
        if sys.stdin.isatty():
            print("/help lists commands; Ctrl-D leaves.", file=sys.stderr)
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                chat.reset()
            elif line.startswith("/"):
                print(HELP, file=sys.stderr)
            elif line.strip():
                chat.answer(line.strip())
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; UsageError if it is wrong."""
    parser = options.Parser(
        prog="nanovllm-jax chat",
        description="Talk with a model. Each line of the input is a message.",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model = "Hugging Face style model directory (default: the small demo model shipped here)"
    parser.add_argument("--model", type=Path, default=options.DEMO_MODEL, metavar="DIR", help=model)
    options.add_chat_options(parser)
    hide = f"show an answer from {END} on; either way the history keeps no thoughts"
    parser.add_argument("--hide-thinking", action="store_true", help=hide)
    options.add_sampling_options(parser, max_tokens="as many as fit")
    options.add_engine_options(parser)
    return parser.parse_args(argv)


class Chat:
    """A conversation, whose answers are printed as they come.

    Args:
        opening: the messages that it begins with.
        template: further values for the chat template.
    """

    def __init__(
        self,
        llm: "LLM",
        sampling: SamplingParams,
        opening: list[dict[str, Any]],
        template: dict[str, Any],
        hide_thinking: bool = False,
    ):
        self._llm, self._sampling, self._hide = llm, sampling, hide_thinking
        self._opening, self._template = opening, template
        self.messages = list(opening)

    def reset(self) -> None:
        """Forget what has been said."""
        self.messages = list(self._opening)

    def answer(self, text: str) -> None:
        """Print the answer to a message, and remember both; a refused message is not remembered."""
        from nanovllm_jax.engine.prompts import encode_chat

        question = {"role": "user", "content": text}
        try:
            prompt = encode_chat(self._llm.tokenizer, [*self.messages, question], **self._template)  # pyright: ignore[reportArgumentType]
            request_id = self._llm.add_request(prompt, self._sampling)
        except (TypeError, ValueError) as error:
            print(f"nanovllm-jax: {error} (/reset begins anew)", file=sys.stderr)
            return
        # Some templates write the beginning of the thoughts themselves.
        tail = str(self._llm.tokenizer.decode(prompt[-8:])).rstrip()  # pyright: ignore[reportOptionalMemberAccess]
        written = self._print_answer(request_id, BEGIN if tail.endswith(BEGIN) else "")
        answer = {"role": "assistant", "content": without_thoughts(written).strip()}
        self.messages += [question, answer]

    def _print_answer(self, request_id: int | str, begun: str) -> str:
        """Print the answer as it comes, and return all of it.

        Args:
            begun: what the prompt has of the answer.
        """
        printed, text, output = 0, begun, None
        try:
            while not self._llm.is_finished():
                for output in self._llm.step_outputs():
                    if output.request_id != request_id:
                        continue  # an answer that was interrupted
                    text = begun + output.outputs[0].text
                    shown = without_thoughts(text) if self._hide else text
                    print(shown[printed:], end="", flush=True)
                    printed = len(shown)
        except KeyboardInterrupt:
            self._llm.abort_request(request_id)
            print("\nnanovllm-jax: interrupted", end="", file=sys.stderr)
        print(flush=True)
        if output and output.error:
            print(f"nanovllm-jax: {output.error}", file=sys.stderr)
        elif output and (notice := options.cut_notice(output.outputs[0], self._sampling)):
            print(f"nanovllm-jax: {notice}", file=sys.stderr)
        return text


def without_thoughts(text: str) -> str:
    """The part of an answer, or of the beginning of one, that is no thinking.

    More of an answer never gives less.
    """
    start = text.lstrip()
    if BEGIN.startswith(start[: len(BEGIN)]):
        _, _, text = text.partition(END)
        return text.lstrip("\n")
    return text


@contextlib.contextmanager
def _interruptions_end_answers() -> Iterator[None]:
    """Have an interruption raise KeyboardInterrupt here, and nothing else.

    The process of the command reads signals from a pipe too, to end itself if they end nothing.
    """
    before = signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)


def _check_template(model: Path) -> None:
    """Raise UsageError if the model has no chat template, before anything is loaded."""
    from nanovllm_jax.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(model)
    if tokenizer is None or not tokenizer.chat_template:
        raise UsageError(f"{model} has no chat template: chat needs one's files, too")


def _read_line() -> str | None:
    """A line of the input, or None at its end."""
    if sys.stdin is None:
        raise UsageError("chat reads standard input, which is closed")
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and keys to edit)
    try:
        return input("> ")
    except EOFError:
        print()
        return None
