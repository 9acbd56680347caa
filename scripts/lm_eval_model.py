#!/usr/bin/env python3
"""Runs lm-evaluation-harness on an engine: a model class for it, and a command line.

    python -m scripts.lm_eval_model --model DIR --tasks hellaswag,wikitext --limit 100

It needs the extra [eval]. From Python:

    with LLM("/path/to/Qwen3-0.6B") as llm:
        results = lm_eval.simple_evaluate(NanoVLLM(llm), tasks=["hellaswag"])
"""

import argparse
import itertools
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
    make_table,
)
from tqdm import tqdm

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.engine.prompts import encode
from nanovllm_jax.outputs import Logprob, RequestOutput
from nanovllm_jax.tools.options import (
    DEMO_MODEL,
    ENGINE_ERRORS,
    Parser,
    UsageError,
    add_engine_options,
    engine_options,
    refusals,
)

logger = logging.getLogger("nanovllm_jax")

# Tokens that are scored in one call of the engine. Their scores take the host 0.8 GB until it
# returns, and keep a GPU busy for seconds, so that the pause between two calls does not count.
ROUND_TOKENS = 2**20

# A continuation's text with its context, and the tokens of both.
Scorable = tuple[tuple[str, str], list[int], list[int]]


class NanoVLLM(TemplateLM):
    """An engine as lm-eval's local model: scores texts and completes prompts.

    How texts become tokens is inherited. In particular, the spaces at a context's end are scored
    with the continuation, and what has no context is scored after the prefix token.

    Args:
        llm: the engine; it stays the caller's, who closes it.
        max_gen_toks: most tokens of a completion, for tasks that do not say.
        prefix_token_id: the token that stands before texts without context. The default is the
            tokenizer's beginning-of-sequence token, or its end token if it has none.
        chat_template_kwargs: further values for the chat template, such as enable_thinking=False.

    Raises:
        ValueError: the model has no tokenizer.
    """

    def __init__(
        self,
        llm: LLM,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        super().__init__()
        if llm.tokenizer is None:
            raise ValueError(f"{llm.config.model} has no tokenizer, which lm-eval needs")
        self.llm, self.tokenizer, self.max_gen_toks = llm, llm.tokenizer, max_gen_toks
        self._prefix_token_id = prefix_token_id
        self._chat_template_kwargs = chat_template_kwargs or {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id  # pyright: ignore[reportReturnType]

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before texts without context."""
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else first  # pyright: ignore[reportReturnType]

    @property
    def max_length(self) -> int:
        """Most tokens that are read to score a text; the last token is scored, but not read.

        The engine needs room for that one, and for the one token that it generates.
        """
        return self.llm.config.max_model_len - 2

    @property
    def tokenizer_name(self) -> str:
        """The name under which lm-eval caches texts that went through the chat template."""
        return str(self.llm.config.model).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, with a beginning-of-sequence token if the tokenizer adds one.

        Args:
            add_special_tokens: whether it adds one; None leaves that to the tokenizer, and a text
                that begins with one gets no second.
        """
        if add_special_tokens is None:
            return encode(self.tokenizer, string)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt, its last message goes on."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self._chat_template_kwargs,
        )
        return str(text)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log probability of each whole text, in windows if it is longer than `max_length`.

        Windows do not overlap in what they score, and the last one has as much context as fits.
        """
        windows: list[Scorable] = []
        documents: list[int] = []  # the document that each window is of
        for document, request in enumerate(requests):
            token_ids = self.tok_encode(request.arguments[0])
            for window in get_rolling_token_windows(
                token_ids, self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append((("", ""), *make_disjoint_window(window)))
                documents.append(document)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for document, (logprob, _) in zip(documents, scores, strict=True):
            totals[document] += logprob
        return totals

    def _loglikelihood_tokens(
        self, requests: list[Scorable], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each continuation its log probability, and whether greedy decoding would give it.

        Contexts that are too long lose their first tokens.

        Raises:
            ValueError: a continuation is empty, or too long to be scored in one piece.
        """
        pairs = []
        for (_, text), context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation must have 1 to {self.max_length} tokens, which leaves room "
                    f"within max_model_len, got {len(continuation)}: {text!r:.80}"
                )
            # A context of nothing but spaces has lost them to its continuation.
            pairs.append((context or [self.prefix_token_id], continuation))
        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        if cut := sum(length > self.max_length + 1 for length in lengths):
            logger.warning(
                "%d of %d contexts lose their beginning: with their continuations they have more "
                "than %d tokens", cut, len(pairs), self.max_length + 1,
            )  # fmt: skip
        # The one token that the engine generates costs no step: prefill draws it.
        params = SamplingParams(
            temperature=0, max_tokens=1, prompt_logprobs=0, truncate_prompt_tokens=-1,
            detokenize=False,
        )  # fmt: skip
        ends = itertools.accumulate(lengths)
        rounds = itertools.groupby(
            zip(ends, pairs, strict=True), lambda pair: pair[0] // ROUND_TOKENS
        )
        scores = []
        with tqdm(total=len(pairs), desc="Scoring", disable=disable_tqdm) as progress:
            for _, part in rounds:
                pairs_of_round = [pair for _, pair in part]
                prompts = [context + continuation for context, continuation in pairs_of_round]
                outputs = self.llm.generate_outputs(prompts, params, use_tqdm=False)
                for (_, continuation), output in zip(pairs_of_round, outputs, strict=True):
                    scores.append(_score(output, continuation))
                progress.update(len(outputs))
        return scores

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Completes prompts up to stop strings; prompts that are too long lose their beginning.

        Raises:
            TypeError, ValueError: the task asks for options that `SamplingParams` does not have.
        """
        prompts, params = [], []
        for request in requests:
            prompts.append(self.tok_encode(request.arguments[0]))
            params.append(_sampling(request.arguments[1], self.max_gen_toks))
        outputs = self.llm.generate_outputs(prompts, params, use_tqdm=not disable_tqdm)
        return [_checked(output).outputs[0].text for output in outputs]


def _sampling(options: dict[str, Any], max_gen_toks: int) -> SamplingParams:
    """What a task's generation_kwargs mean: greedy decoding unless they ask for samples."""
    given: dict[str, Any] = {**normalize_gen_kwargs(options, max_gen_toks)}
    samples = given.pop("do_sample")
    stop = [text for text in given.pop("until") if text]
    # Stop strings are often the texts of special tokens, so these must be in the text.
    defaults = {
        "temperature": 1.0 if samples else 0.0,
        "truncate_prompt_tokens": -1,
        "skip_special_tokens": False,
    }
    return SamplingParams(
        max_tokens=given.pop("max_gen_toks"), stop=stop or None, **defaults | given
    )


def _score(output: RequestOutput, continuation: list[int]) -> tuple[float, bool]:
    """The log probability of the prompt's last tokens, and whether each was the likeliest."""
    # A prompt's first token has None, but a continuation never has that token.
    positions = cast(list[dict[int, Logprob]], _checked(output).prompt_logprobs)
    scores = [
        position[token]
        for token, position in zip(continuation, positions[-len(continuation) :], strict=True)
    ]
    return sum(score.logprob for score in scores), all(score.rank == 1 for score in scores)


def _checked(output: RequestOutput) -> RequestOutput:
    if output.error:
        raise RuntimeError(f"request {output.request_id}: {output.error}")
    return output


def run(args: argparse.Namespace) -> None:
    """Evaluates the model on the tasks, prints their table, and writes the results."""
    if args.no_think and not args.apply_chat_template:
        raise UsageError("--no-think does nothing without --apply-chat-template")
    manager = TaskManager(include_path=args.include_path)
    tasks = args.tasks.split(",")
    for task in tasks:
        if not manager.match_tasks([task]) and not Path(task).is_file():
            raise UsageError(f"lm-eval has no task {task!r}; --include-path names folders of more")
    with refusals(*ENGINE_ERRORS):
        llm = LLM(args.model, **engine_options(args))
    with llm:
        with refusals(ValueError):
            thinking = {"enable_thinking": False} if args.no_think else {}
            model = NanoVLLM(llm, chat_template_kwargs=thinking)
        results = simple_evaluate(
            model,
            tasks=tasks,
            num_fewshot=args.num_fewshot,
            limit=args.limit,
            gen_kwargs=args.gen_kwargs,
            apply_chat_template=args.apply_chat_template,
            task_manager=manager,
        )
    assert results is not None  # it is only in other processes than the first
    print(make_table(results))
    if args.output:
        text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False)
        args.output.write_text(text, "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if all tasks were evaluated, 2 for bad usage."""
    parser = Parser(description="Evaluate a model with lm-evaluation-harness.")
    add = parser.add_argument
    add("--model", type=Path, default=DEMO_MODEL, metavar="DIR", help="default: the demo model")
    add("--tasks", required=True, help="names or YAML files, separated by commas")
    add("--include-path", metavar="DIR", help="folder with tasks of your own")
    add("--num-fewshot", type=int, metavar="N", help="examples in each context")
    add("--limit", type=float, metavar="N", help="only N documents of each task, or a share")
    add("--gen-kwargs", metavar="NAME=VALUE,...", help="options for generation, as lm-eval's")
    add("--apply-chat-template", action="store_true", help="put contexts into conversations")
    add("--no-think", action="store_true", help="with enable_thinking=False for the template")
    add("--output", type=Path, metavar="FILE", help="write results and samples as JSON")
    add_engine_options(parser)
    try:
        run(parser.parse_args(argv))
    except UsageError as error:
        print(f"lm_eval_model: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
