"""LLM: the one class that most programs need."""

import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nanovllm_jax.engine.llm_engine import LLMEngine
from nanovllm_jax.engine.owner import Round, Waiter
from nanovllm_jax.engine.prompts import Message, Prompt, encode_chat, naming, paired
from nanovllm_jax.engine.request import Request
from nanovllm_jax.outputs import RequestOutput
from nanovllm_jax.recommended import recommended_sampling
from nanovllm_jax.sampling_params import SamplingParams


class LLM(LLMEngine):
    """A language model loaded from a local directory, ready to complete prompts.

    Args:
        model: local directory with config.json, safetensors weights and tokenizer files.
        max_num_batched_tokens: most prompt tokens of one step (default 16384); at least
            max_model_len.
        chunked_prefill_size: most prompt tokens of one step while other requests decode, which
            wait for it: a smaller number makes their tokens come more evenly, and those of
            newcomers later. A power of two fits the compiled steps best. None, the default, is
            max_num_batched_tokens, for the highest throughput.
        enable_mixed_chunk: compute such prompt tokens and the next tokens of those other requests
            in one step, of chunked_prefill_size tokens together, instead of in turns; takes more
            programs, and so a longer start.
        max_num_seqs: most sequences in flight at once (default 512).
        max_model_len: longest sequence, prompt and completion (default 4096); capped to the model's
            max_position_embeddings.
        num_scheduler_steps: most decode steps that the device takes in one call, while nothing
            arrives and the host would hold it up otherwise; their tokens come together (default 4).
        gpu_memory_utilization: share, in (0, 1], of each GPU's memory to use for weights, steps and
            KV cache (default 0.9). JAX's pool is the most: up to 0.95 of it.
        tensor_parallel_size: devices to split the model over, 1 to 8 (default 1).
        mesh_shape: instead, devices along each axis of the mesh, {"data": 2, "tensor": 4}: "data"
            splits the sequences and their cache, "tensor" the model. num_kvcache_blocks is then
            the size of one data shard's cache.
        sharding_rules: changes to nanovllm_jax.sharding.DEFAULT_RULES, logical axis -> mesh axis,
            a list of them, or None.
        enforce_eager: run operation by operation, without compiling the model; to debug.
        kvcache_block_size: tokens of a KV-cache block, a multiple of 256 (default 256).
        num_kvcache_blocks: size of the KV cache; None, the default, fills the memory.
        dtype: "float32" or "bfloat16"; None, the default, takes config.json's, and float32 on a
            CPU.
        kv_cache_dtype: "fp8" keeps keys and values as float8_e4m3fn, in half the memory of bfloat16
            and read in half the time; "auto", the default, keeps them in `dtype`.
        seed: 64 bits, from which requests that name no seed get their random streams (default 0).
        async_scheduling: let the device run one step ahead of the host; off only to debug.
        attention_backend: "triton" or "mosaic" (GPU; "mosaic" is prefill on Hopper, the rest stays
            Triton), "xla", or "auto", the default and fastest, which also computes all layers of a
            decode step of up to 16 sequences in one kernel, where that fits the model and the GPU.
        load_format: "auto" reads the weights; "dummy" makes random ones, to measure speed.

    Raises:
        AssertionError: `model` is no local directory with a config.json.
        TypeError: an option is unknown (the nearest valid one is named) or of the wrong type.
        ValueError: an option lies out of range, the checkpoint does not fit its config.json, or
            there is no memory for a KV cache.
        FileNotFoundError: the directory has no safetensors file.
        MemoryError: the devices' memory does not suffice; the message has numbers and remedies.

    Example:
        >>> from nanovllm_jax import LLM, SamplingParams
        >>> with LLM("/path/to/Qwen3-0.6B") as llm:
        ...     outputs = llm.generate(["Hello."], SamplingParams(temperature=0.6, max_tokens=256))
        >>> outputs[0]["text"]
    """

    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[dict[str, Any]]:
        """Complete all prompts.

        Args:
            prompts: texts, lists or arrays of token ids, and vLLM's {"prompt": text} and
                {"prompt_token_ids": ids}, also mixed. A text that begins with the
                beginning-of-sequence token, as a chat template writes it, gets no second one.
            sampling_params: one for all prompts, or exactly one for each; None: SamplingParams().
                (The model's own are `get_default_sampling_params()`.)
            use_tqdm: show completed requests and live prefill and decode tokens/s.

        Returns:
            In the order of the prompts: {"text": str, "token_ids": list[int]}. `token_ids` holds
            the completion, with the token that ended it; `text` leaves out special tokens, and
            what a stop string cut off. With n > 1 they are the first completion's, and "outputs"
            is a list with such a dict for each. Whoever asked for them finds in each dict
            "logprobs", for each token a dict {token id: Logprob(logprob, rank, decoded_token)}, and
            beside the first "prompt_logprobs", whose first entry is None. A request that outgrew
            the KV cache also has "error": str and what it got so far.

        Raises:
            TypeError, ValueError: a request could never run; the message has the prompt's index,
                and nothing has been started then.
        """
        return [
            _result(output) for output in self.generate_outputs(prompts, sampling_params, use_tqdm)
        ]

    def generate_outputs(
        self,
        prompts: Iterable[Prompt],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete all prompts, as `generate` does, and return all that is known of them.

        Returns:
            vLLM's outputs in the order of the prompts: why each completion ended, the request's
            times, and so on.
        """
        commands = []
        for i, (prompt, params) in enumerate(paired(prompts, sampling_params)):
            with naming(f"prompts[{i}]"):
                commands.append(self._check(prompt, params))
        waiter = Waiter()
        outputs: dict[Request, RequestOutput] = {}
        try:
            requests = [self._request(command) for command in commands]
            self._thread.add(requests, waiter)
            with _Progress(len(requests), use_tqdm) as progress:
                while len(outputs) < len(requests) or not waiter.rounds.empty():
                    new_round = waiter.wait()
                    for request in waiter.ended[len(outputs) :]:
                        outputs[request] = request.output()
                    progress.update(new_round, len(outputs))
        except BaseException:
            self._thread.abandon(waiter)
            raise
        return [outputs[request] for request in requests]

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer one conversation, or each of several, through the model's chat template.

        Args:
            messages: a conversation's messages, {"role": ..., "content": ...} each; or a list of
                conversations.
            sampling_params, use_tqdm: as for `generate`.
            chat_template: a Jinja template in place of the tokenizer's.
            add_generation_prompt: end the prompt with the beginning of an answer.
            continue_final_message: let the model continue the last message instead.
            tools: function descriptions for the template.
            chat_template_kwargs: further values for the template, such as enable_thinking=False.

        Returns:
            As `generate`, one for each conversation.

        Raises:
            TypeError, ValueError: as `generate`; also if there is no tokenizer or no template.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.config.model} has no tokenizer, so no chat template")
        if not messages or not isinstance(messages, list):
            raise TypeError(f"messages must be a list of messages, got {messages!r:.80}")
        several = isinstance(messages[0], list)
        token_ids = []
        for i, conversation in enumerate(messages if several else [messages]):
            with naming(f"messages[{i}]" if several else "messages"):
                token_ids.append(
                    encode_chat(
                        self.tokenizer,
                        conversation,  # pyright: ignore[reportArgumentType]
                        chat_template=chat_template,
                        add_generation_prompt=add_generation_prompt and not continue_final_message,
                        continue_final_message=continue_final_message,
                        tools=tools,
                        **(chat_template_kwargs or {}),
                    )
                )
        return self.generate(token_ids, sampling_params, use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling options that the model's generation_config.json recommends.

        What the file leaves open has SamplingParams' own default, and so has everything if there is
        no file. `generate` does not use them by itself: pass them.

        Raises:
            ValueError: the file is damaged, or one of its values is no valid option.
        """
        return SamplingParams(**recommended_sampling(Path(self.config.model)))

    def stream(self, prompt: Prompt, sampling_params: SamplingParams) -> Iterator[list[int]]:
        """Complete one prompt, yielding new token ids as they come; closing it ends the request.

        Several streams may run at once, and beside requests of `add_request`. (`step_outputs` has
        the text as it comes, and several completions.)

        Raises:
            TypeError, ValueError: as `add_request`, at the first token; also for n > 1.
            RuntimeError: the request outgrew the KV cache.
        """
        command, waiter = self._check(prompt, sampling_params), Waiter()
        if command.params.n > 1:
            raise ValueError(
                f"a stream has one completion, got n={command.params.n}; use generate, or "
                f"add_request and step_outputs"
            )
        try:
            request = self._request(command)
            self._thread.add([request], waiter)
            [seq] = request.seqs
            seen = seq.num_prompt_tokens
            is_finished = False
            while not is_finished:
                waiter.wait()
                is_finished = seq.is_finished  # before its tokens: the engine may be adding some
                if new := seq.token_ids[seen:]:
                    seen += len(new)
                    yield new
            waiter.check()
        finally:
            self._thread.abandon(waiter)
        if seq.error:
            raise RuntimeError(seq.error)


def _result(output: RequestOutput) -> dict[str, Any]:
    """What `generate` returns of a request."""
    results: list[dict[str, Any]] = []
    for completion in output.outputs:
        results.append({"text": completion.text, "token_ids": completion.token_ids})
        if completion.logprobs is not None:
            results[-1]["logprobs"] = completion.logprobs
    result = results[0]
    if len(results) > 1:
        result = {**result, "outputs": results}
    if output.prompt_logprobs is not None:
        result = {**result, "prompt_logprobs": output.prompt_logprobs}
    return result | ({"error": output.error} if output.error else {})


class _Bar(tqdm):
    """A bar with a lock that an interruption cannot leave taken.

    tqdm's own is a list of locks taken one after the other; interrupted between two, it would keep
    every later bar of the process waiting for ever.
    """

    _lock = threading.RLock()


class _Progress:
    """Shows a bar of completed requests with the current prefill and decode rates."""

    def __init__(self, total: int, show: bool):
        self.bar = _Bar(total=total, desc="Generating", dynamic_ncols=True) if show else None
        self.rates = {"Prefill": "0tok/s", "Decode": "0tok/s"}
        self.last: Round | None = None

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        if self.bar is not None:
            self.bar.close()

    def update(self, new: Round, completed: int) -> None:
        if self.bar is None:
            return
        if self.last and new.num_tokens:
            kind = "Prefill" if new.num_tokens > 0 else "Decode"
            self.rates[kind] = f"{int(abs(new.num_tokens) / (new.end - self.last.end))}tok/s"
        self.last = new
        self.bar.set_postfix(self.rates, refresh=False)
        self.bar.update(completed - self.bar.n)
