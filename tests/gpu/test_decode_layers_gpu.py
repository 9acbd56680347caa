"""The kernel of all layers against plain layers and float32, in the engine, on text."""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import pytest

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.layers import backend
from nanovllm_jax.tools.options import DEMO_MODEL

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]

STORIES = [
    "Once upon a time, there was a little girl",
    "The dog ran into the garden because",
    "One day, Tom and his mother went to",
    "It was a cold morning, and the old man",
]
NEW_TOKENS = 300  # past the first page
LEAST_PROBABLE = 0.2  # nats below the best token: what bfloat16 may decide
OPTIONS: dict[str, Any] = {"max_num_seqs": 16, "num_kvcache_blocks": 64, "max_model_len": 1024}


@pytest.fixture(autouse=True, scope="module")
def nothing_from_disk():
    """Programs are traced anew, so that it can be watched."""
    config: Any = jax.config
    folder = config.jax_compilation_cache_dir
    config.update("jax_enable_compilation_cache", False)
    config.update("jax_compilation_cache_dir", None)
    yield
    config.update("jax_enable_compilation_cache", True)
    config.update("jax_compilation_cache_dir", folder)


@pytest.fixture(scope="module")
def float32():
    with LLM(str(DEMO_MODEL), dtype="float32", attention_backend="xla", **OPTIONS) as llm:
        yield llm


@pytest.mark.parametrize("count", [1, 3, 16])
def test_its_greedy_tokens_are_the_likeliest_in_float32(float32, monkeypatch, count):
    """All but bfloat16's ties, and the kernel is what has computed them."""
    used = []

    def watch(*args, **options):
        used.append(options["implementation"])
        return decode_layers(*args, **options)

    decode_layers = backend.decode_layers
    monkeypatch.setattr(backend, "decode_layers", watch)
    prompts = [f"{story}{' and' * (i // 4)}" for i, story in enumerate(STORIES * 4)][:count]
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    with LLM(str(DEMO_MODEL), dtype="bfloat16", **OPTIONS) as llm:
        tokenizer: Any = llm.tokenizer
        starts = [tokenizer.encode(prompt) for prompt in prompts]
        outputs = [out["token_ids"] for out in llm.generate(starts, params, use_tqdm=False)]
    assert set(used) == {"cuda"}

    score = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    texts = [start + out for start, out in zip(starts, outputs, strict=True)]
    different = 0
    for start, text, scored in zip(
        starts, texts, float32.generate(texts, score, use_tqdm=False), strict=True
    ):
        for token, found in list(zip(text, scored["prompt_logprobs"], strict=True))[len(start) :]:
            best = max(entry.logprob for entry in found.values())
            assert found[token].logprob > best - LEAST_PROBABLE
            different += found[token].logprob < best
    assert different < 0.03 * NEW_TOKENS * count


# A program that reads how often to generate, and prints each time which kernels ran and the tokens.
GENERATOR = f"""
import json, sys
from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.layers import backend

used, decode_layers = set(), backend.decode_layers

def watch(*args, **options):
    used.add(options["implementation"])
    return decode_layers(*args, **options)

backend.decode_layers = watch
params = SamplingParams(temperature=0, max_tokens={NEW_TOKENS}, ignore_eos=True)
with LLM({str(DEMO_MODEL)!r}, dtype="bfloat16", **{OPTIONS!r}) as llm:
    print("ready", flush=True)
    for times in map(int, sys.stdin):
        for _ in range(times):
            outputs = llm.generate({STORIES!r}, params, use_tqdm=False)
            tokens = [out["token_ids"] for out in outputs]
            print(json.dumps([sorted(used), tokens]), flush=True)
"""


def test_two_processes_on_one_gpu_get_what_each_gets_alone():
    """The blocks of a kernel wait for each other, so the other process must not keep any away."""
    env = os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # two processes share the memory
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program is traced, so that it can be watched
    }
    rounds = 10

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", GENERATOR],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", env=env,
        )  # fmt: skip

    def ask(process, times):
        print(times, file=process.stdin, flush=True)

    with start() as one, start() as other:
        processes: Any = [one, other]
        try:
            assert [process.stdout.readline() for process in processes] == ["ready\n"] * 2
            ask(one, 1)
            alone = json.loads(one.stdout.readline())
            assert alone[0] == ["cuda"]
            for process in processes:
                ask(process, rounds)
            for process in processes:
                for _ in range(rounds):
                    assert json.loads(process.stdout.readline()) == alone
        finally:
            for process in processes:
                process.kill()
