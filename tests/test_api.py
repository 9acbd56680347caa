"""The contract: what generate, add_request, step, stream and exit promise.

Most of it needs no device: `llm` is an engine with a runner whose tokens are checksums.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from itertools import chain, pairwise

import jax
import numpy as np
import pytest
from helpers import (
    VOCAB,
    Spy,
    drain,
    edge_prompts,
    greedy,
    prompt,
    tokens,
)

import nanovllm_jax
from nanovllm_jax import SamplingParams

WITH_TEXT = {"tokenizer": True}


@pytest.fixture
def llm(fake_engine):
    """An engine with a tokenizer of one character a token, whose EOS is token 0."""
    return fake_engine()


# --- generate ---


def test_results_have_exactly_text_and_token_ids_in_prompt_order(engine):
    llm = engine(checkpoint=WITH_TEXT)
    prompts = ["abc", prompt(300), "x", prompt(5)]
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 3, 1, 6)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [set(output) for output in outputs] == [{"text", "token_ids"}] * 4
    for text, param, output in zip(prompts, params, outputs, strict=True):
        alone = llm.generate([text], param, use_tqdm=False)[0]
        assert output == alone
        assert len(output["token_ids"]) <= param.max_tokens
        decoded = llm.tokenizer.decode(output["token_ids"], skip_special_tokens=True)
        assert output["text"] == decoded
        assert all(type(token) is int for token in output["token_ids"])


def test_a_string_and_its_token_ids_are_the_same_prompt(llm):
    text = "The capital of France is"
    ids = llm.tokenizer.encode(text)
    assert len(ids) == len(text)
    first, second = llm.generate([text, ids], greedy(), use_tqdm=False)
    assert first == second


def test_no_prompts_give_no_results(llm):
    assert llm.generate([], greedy(), use_tqdm=False) == []


def test_token_ids_may_be_tuples(llm):
    assert tokens(llm, [tuple(prompt(9))], greedy()) == tokens(llm, [prompt(9)], greedy())


def test_detokenize_false_leaves_the_text_empty(llm):
    (output,) = llm.generate(["abc"], greedy(detokenize=False), use_tqdm=False)
    assert output["text"] == "" and output["token_ids"]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_as_many_sampling_params_as_prompts(llm, count):
    with pytest.raises(ValueError, match=f"2 prompts and {count} sampling_params"):
        llm.generate(["a", "b"], [greedy()] * count, use_tqdm=False)
    assert llm.is_finished()


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ([], ValueError, "empty"),
        ("", ValueError, "empty"),
        (prompt(768), ValueError, "768 tokens.*max_model_len=768"),
        ([1, VOCAB], ValueError, f"token id {VOCAB} .*vocabulary of {VOCAB}"),
        ([-1], ValueError, "token id -1"),
        ([1.0], TypeError, "token ids"),
        (None, TypeError, "token ids"),
        ([[1]], TypeError, "token ids"),
    ],
)
def test_a_bad_request_refuses_the_call_before_anything_is_scheduled(llm, bad, error, message):
    with pytest.raises(error, match=message):
        llm.generate([prompt(5), bad], greedy(), use_tqdm=False)
    assert llm.is_finished() and not llm.scheduler.waiting
    with pytest.raises(error, match=message):
        llm.add_request(bad, greedy())
    assert llm.is_finished()


def test_sampling_params_of_another_kind_are_refused(llm):
    with pytest.raises(TypeError, match="SamplingParams"):
        llm.generate(["a"], [{"temperature": 0}], use_tqdm=False)
    with pytest.raises(TypeError, match="SamplingParams"):
        llm.add_request("a", None)
    assert llm.is_finished()


def test_one_string_is_no_list_of_prompts(llm):
    with pytest.raises(TypeError, match="list of prompts"):
        llm.generate("abc", greedy())


def test_a_prompt_that_needs_more_blocks_than_the_pool_is_refused(fake_engine):
    """nano-vLLM #106: it was accepted, and then never scheduled."""
    llm = fake_engine(num_kvcache_blocks=2)
    with pytest.raises(ValueError, match=r"513 tokens and needs 3 blocks of 256.* has 2"):
        llm.add_request(prompt(513), greedy())
    assert llm.is_finished()


def test_strings_need_a_tokenizer(fake_engine, checkpoint):
    llm = fake_engine(checkpoint())
    assert llm.tokenizer is None
    with pytest.raises(ValueError, match="no tokenizer"):
        llm.generate(["abc"], greedy(), use_tqdm=False)


def test_the_bar_shows_requests_and_both_rates(llm, capsys):
    llm.generate(["abc", "de"], greedy(20))
    bar = capsys.readouterr().err
    assert "2/2" in bar
    assert re.search(r"Prefill=\d+tok/s", bar) and re.search(r"Decode=[1-9]\d*tok/s", bar)
    llm.generate(["abc"], greedy(), use_tqdm=False)
    assert capsys.readouterr().err == ""


# --- where a completion ends ---


def test_stop_token_ids_end_a_request_and_stay_in_the_output(llm):
    (free,) = tokens(llm, [prompt(7)], greedy(20, ignore_eos=True))
    stop = free[5]
    first = free.index(stop)
    for ignore_eos in (False, True):
        params = greedy(20, stop_token_ids=[stop], ignore_eos=ignore_eos)
        assert tokens(llm, [prompt(7)], params)[0] == free[: first + 1]


def test_two_eos_ids_of_generation_config_json(fake_engine, checkpoint, tmp_path):
    path = shutil.copytree(checkpoint(), tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}), "utf-8")
    llm = fake_engine(path)
    ends = set()
    for seed in range(8):
        params = {"seed": seed, "max_tokens": 300}
        (out,) = tokens(llm, [prompt(7)], SamplingParams(**params))
        assert not {7, 9} & set(out[:-1])
        ends.add(out[-1])
        (out,) = tokens(llm, [prompt(7)], SamplingParams(**params, ignore_eos=True))
        assert len(out) == 300
    assert {7, 9} <= ends, "both ids end a request"


def test_the_tokenizers_eos_counts_where_no_file_names_one(llm):
    params = [SamplingParams(seed=seed, max_tokens=300) for seed in range(8)]
    outputs = tokens(llm, [prompt(7)] * 8, params)
    assert any(out[-1] == 0 for out in outputs)
    assert all(0 not in out[:-1] for out in outputs)
    texts = [llm.tokenizer.decode(out) for out in outputs if out[-1] == 0]
    shown = llm.generate([prompt(7)] * 8, params, use_tqdm=False)
    assert all(text.endswith("<end>") for text in texts)
    assert all("<end>" not in output["text"] for output in shown)


def test_the_models_own_sampling_options_are_there_to_pass(fake_engine, checkpoint, tmp_path):
    path = shutil.copytree(checkpoint(tokenizer=True), tmp_path / "model")
    assert fake_engine(path).get_default_sampling_params() == SamplingParams()
    settings = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    settings |= {"repetition_penalty": 1.05, "max_new_tokens": 5}
    (path / "generation_config.json").write_text(
        json.dumps(settings | {"eos_token_id": 7}), "utf-8"
    )
    llm = fake_engine(path)
    params = llm.get_default_sampling_params()
    others = {"repetition_penalty": 1.05, "max_tokens": 5}
    assert params == SamplingParams(temperature=0.6, top_k=20, top_p=0.95, **others)
    assert llm.generate(["a"], params, use_tqdm=False)
    (path / "generation_config.json").write_text(json.dumps(settings | {"top_p": 2}), "utf-8")
    with pytest.raises(
        ValueError, match=r"generation_config.json: top_p must be in \(0, 1\], got 2"
    ):
        llm.get_default_sampling_params()


@pytest.mark.parametrize("length", [700, 766, 767])
def test_max_tokens_is_capped_by_max_model_len(llm, length):
    (out,) = tokens(llm, [prompt(length)], greedy(1000, ignore_eos=True))
    assert len(out) == 768 - length


# --- add_request, step, is_finished ---


def test_step_reports_each_request_once_under_its_id(llm):
    assert llm.is_finished()
    prompts = [prompt(n) for n in (4, 300, 2)]
    ids = [llm.add_request(p, greedy(n)) for p, n in zip(prompts, (3, 1, 7), strict=True)]
    assert len(set(ids)) == 3 and not llm.is_finished()
    results, _ = drain(llm)
    assert set(results) == set(ids)
    want = tokens(llm, prompts, [greedy(n) for n in (3, 1, 7)])
    assert [results[i] for i in ids] == want


def test_step_counts_prefill_tokens_up_and_decoded_sequences_down(llm):
    for n in (4, 300, 2):
        llm.add_request(prompt(n), greedy(5, ignore_eos=True))
    _, counts = drain(llm)
    assert counts == [306, -3, -3, -3, -3]


def test_step_without_requests_does_nothing(llm):
    assert llm.step() == ([], 0)


def test_generate_leaves_other_requests_to_step(llm):
    """nano-vLLM mixed requests that were left over into generate's results."""
    mine = llm.add_request(prompt(30), greedy(4, ignore_eos=True))
    slow = llm.add_request(prompt(31), greedy(40, ignore_eos=True))
    outputs = llm.generate([prompt(5)], greedy(8, ignore_eos=True), use_tqdm=False)
    assert len(outputs) == 1 and len(outputs[0]["token_ids"]) == 8
    assert not llm.is_finished()
    results, _ = drain(llm)
    assert set(results) == {mine, slow}
    assert [len(results[i]) for i in (mine, slow)] == [4, 40]
    assert results[mine] == tokens(llm, [prompt(30)], greedy(4, ignore_eos=True))[0]


# --- chat ---


def test_chat_goes_through_the_template(llm):
    one = [{"role": "user", "content": "hi"}]
    two = [*one, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so"}]
    texts = ["[user] hi [assistant] ", "[user] hi [assistant] yes [user] so [assistant] "]
    want = llm.generate(texts, greedy(), use_tqdm=False)
    assert llm.chat([one, two], greedy(), use_tqdm=False) == want
    assert llm.chat(one, greedy(), use_tqdm=False) == want[:1]
    (plain,) = llm.generate(["[user] hi "], greedy(), use_tqdm=False)
    assert llm.chat(one, greedy(), use_tqdm=False, add_generation_prompt=False) == [plain]
    (own,) = llm.generate(["hi!"], greedy(), use_tqdm=False)
    template = "{{ messages[0].content }}{{ end }}"
    options = {"chat_template": template, "chat_template_kwargs": {"end": "!"}}
    assert llm.chat(one, greedy(), use_tqdm=False, **options) == [own]


def test_chat_needs_messages_and_a_tokenizer(llm, fake_engine, checkpoint):
    for wrong in ([], "hi", None):
        with pytest.raises(TypeError, match="messages"):
            llm.chat(wrong, greedy())
    with pytest.raises(ValueError, match="no tokenizer"):
        fake_engine(checkpoint()).chat([{"role": "user", "content": "hi"}], greedy())
    assert llm.is_finished()


# --- stream ---


@pytest.fixture
def slow(llm):
    """The engine on a device that takes a moment for each step, so that one sees tokens come."""
    llm.runner.before_read = lambda: time.sleep(0.005)
    return llm


def test_stream_yields_what_generate_returns(slow):
    parts = list(slow.stream("abc", greedy(20, ignore_eos=True)))
    assert len(parts) > 4 and all(parts)  # several tokens of one call may come together
    (want,) = tokens(slow, ["abc"], greedy(20, ignore_eos=True))
    assert [*chain(*parts)] == want
    assert slow.is_finished()


def test_closing_a_stream_ends_its_request(llm):
    stream = llm.stream("abc", greedy(500, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.is_finished()
    llm.pools[0].check([])


def test_a_stream_loses_nothing_to_a_generate_in_between(slow):
    params = greedy(12, ignore_eos=True)
    (want,) = tokens(slow, ["abc"], params)
    stream = slow.stream("abc", params)
    parts = [next(stream)]
    tokens(slow, ["other"], greedy(5, ignore_eos=True))  # the stream's request advances as well
    parts.append(next(stream))
    tokens(slow, ["other"], greedy(30, ignore_eos=True))  # and ends
    parts += stream
    assert [*chain(*parts)] == want
    assert slow.is_finished(), "a streamed request is not reported by step"


def test_two_streams_at_once(llm):
    params = greedy(12, ignore_eos=True)
    want = tokens(llm, ["abc", "de"], params)
    streams = [llm.stream(text, params) for text in ("abc", "de")]
    got = [[], []]
    for pair in zip(*streams, strict=False):
        for i, part in enumerate(pair):
            got[i] += part
    for i, stream in enumerate(streams):
        got[i] += chain(*stream)
    assert got == want


def test_a_stream_that_outgrows_the_pool_raises(fake_engine):
    llm = fake_engine(num_kvcache_blocks=2)
    got = []
    with pytest.raises(RuntimeError, match="the pool has 2"):
        for part in llm.stream(prompt(505), greedy(100)):
            got += part
    assert len(got) == 8 and llm.is_finished()


# --- interruption and the end ---


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupted_generate_leaves_a_usable_engine(llm, at):
    others = [prompt(40), prompt(41)]
    want_others = tokens(llm, others, greedy(ignore_eos=True))
    want = tokens(llm, edge_prompts(), greedy(ignore_eos=True))
    llm.reset_prefix_cache()
    ids = [llm.add_request(p, greedy(ignore_eos=True)) for p in others]
    reads = []

    def interrupt():
        reads.append(at)
        if len(reads) == at:
            raise KeyboardInterrupt

    llm.runner.before_read = interrupt
    with pytest.raises(KeyboardInterrupt):
        llm.generate(edge_prompts(), greedy(ignore_eos=True), use_tqdm=False)
    results, _ = drain(llm)
    assert [results[i] for i in ids] == want_others, "requests that were not generate's go on"
    llm.pools[0].check([])
    assert tokens(llm, edge_prompts(), greedy(ignore_eos=True)) == want


# --- whose request it is, and how it ends ---


def test_requests_have_the_ids_that_users_give_them(llm):
    assert llm.add_request(prompt(5), greedy(), "mine") == "mine"
    ids = [llm.add_request(prompt(5), greedy()) for _ in range(2)]
    assert len({"mine", *ids}) == 3
    with pytest.raises(ValueError, match="'mine' is under way"):
        llm.add_request(prompt(6), greedy(), "mine")
    results, _ = drain(llm)
    assert results.keys() == {"mine", *ids}
    assert llm.add_request(prompt(6), greedy(), "mine") == "mine", "it has ended: free again"
    drain(llm)


def test_step_outputs_tell_each_new_token(llm):
    (want,) = llm.generate(["abc"], greedy(12, ignore_eos=True), use_tqdm=False)
    llm.add_request("abc", greedy(12, ignore_eos=True), "text")
    llm.add_request(prompt(5), greedy(3, ignore_eos=True), "ids")
    seen = {"text": [], "ids": []}
    while not llm.is_finished():
        for output in llm.step_outputs():
            seen[output.request_id].append(output)
    for outputs, length in ((seen["text"], 12), (seen["ids"], 3)):
        assert [len(output.outputs[0].token_ids) for output in outputs] == [*range(1, length + 1)]
        assert [output.finished for output in outputs] == [False] * (length - 1) + [True]
        reasons = [output.outputs[0].finish_reason for output in outputs]
        assert reasons == [None] * (length - 1) + ["length"]
    last = seen["text"][-1]
    assert (last.prompt, last.prompt_token_ids) == ("abc", llm.tokenizer.encode("abc"))
    assert (last.outputs[0].index, last.outputs[0].text) == (0, want["text"])
    texts = [output.outputs[0].text for output in seen["text"]]
    assert all(later.startswith(text) for text, later in pairwise(texts))
    assert seen["ids"][-1].prompt is None


def test_outputs_name_what_ended_them(fake_engine):
    llm = fake_engine(num_kvcache_blocks=2)
    (free,) = tokens(llm, [prompt(7)], greedy(20, ignore_eos=True))
    llm.scheduler.eos_token_ids = frozenset({free[3]})
    llm.add_request(prompt(7), greedy(20), "eos")
    llm.add_request(prompt(7), greedy(20, ignore_eos=True, stop_token_ids=[free[2]]), "token")
    ended = {}
    while not llm.is_finished():
        ended |= {o.request_id: o for o in llm.step_outputs() if o.finished}
    llm.add_request(prompt(505), greedy(100, ignore_eos=True), "too long")
    while not llm.is_finished():
        ended |= {o.request_id: o for o in llm.step_outputs() if o.finished}
    said = {i: (o.outputs[0].finish_reason, o.outputs[0].stop_reason) for i, o in ended.items()}
    assert said == {"eos": ("stop", None), "token": ("stop", free[2]), "too long": ("error", None)}
    assert "the pool has 2" in ended["too long"].error and ended["eos"].error is None


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_an_aborted_request_is_told_with_what_it_has_got(llm, rounds):
    (want,) = tokens(llm, [prompt(5)], greedy(20, ignore_eos=True))
    for name in ("a", "b", "c"):
        llm.add_request(prompt(5), greedy(20, ignore_eos=True), name)
    for _ in range(rounds):
        llm.step()
    llm.abort_request(["a", "b", "nobody"])
    outputs = {output.request_id: output for output in llm.step_outputs()}
    for name in ("a", "b"):
        completion = outputs[name].outputs[0]
        assert outputs[name].finished and completion.finish_reason == "abort"
        assert completion.token_ids == want[: len(completion.token_ids)]
        assert len(completion.token_ids) >= rounds
    results, _ = drain(llm)
    assert results == {"c": want}
    llm.pools[0].check([])


def test_every_request_is_reported_once(fake_engine):
    """mini-sglang #113: abort and finish both freed a request's blocks."""
    llm, rng = fake_engine(num_kvcache_blocks=4), np.random.default_rng(1)
    ids = [
        llm.add_request(prompt(int(n), seed=i), greedy(20, ignore_eos=True))
        for i, n in enumerate(rng.integers(1, 400, 10))
    ]
    seqs = [*llm.scheduler.waiting]
    reported, aborted, rounds = [], set(), 0
    while not llm.is_finished():
        reported += [i for i, _ in llm.step()[0]]
        if (rounds := rounds + 1) % 5 == 4:
            victim = int(rng.choice(ids))
            aborted |= {victim} - set(reported)
            for _ in range(2):
                llm.abort_request(victim)
        llm.pools[0].check([seq for seq in seqs if seq.block_table])
    assert sorted(reported) == sorted(ids)
    assert {seq.seq_id for seq in seqs if seq.finish_reason == "abort"} == aborted != set()
    llm.pools[0].check([])


def test_after_exit_every_use_says_so(llm):
    tokens(llm, [prompt(5)], greedy())
    llm.exit()
    llm.exit()
    for use in (
        lambda: llm.generate([prompt(5)], greedy()),
        lambda: llm.add_request(prompt(5), greedy()),
        lambda: next(llm.stream(prompt(5), greedy())),
        lambda: llm.step(),
    ):
        with pytest.raises(RuntimeError, match=r"exit\(\)"):
            use()


def test_exit_with_requests_under_way_frees_the_device(new_engine, checkpoint):
    llm = new_engine(checkpoint())
    llm.add_request(prompt(5), greedy())
    llm.step()
    arrays = jax.tree.leaves((llm.runner.weights, llm.runner.state.cache))
    llm.exit()
    assert all(array.is_deleted() for array in arrays)


def test_a_context_manager_exits(fake_engine):
    with pytest.raises(ZeroDivisionError), fake_engine() as llm:
        assert tokens(llm, [prompt(5)], greedy())
        _ = 1 / 0
    assert llm.runner is None


def test_reset_prefix_cache_forgets(llm, monkeypatch):
    spy = Spy(llm, monkeypatch)
    for _ in range(2):
        tokens(llm, [prompt(600)], greedy())
    llm.reset_prefix_cache()
    tokens(llm, [prompt(600)], greedy())
    lengths = [rows[0][2] for is_prefill, rows in spy.batches if is_prefill]
    assert lengths == [600, 600 - 512, 600]


TWO_ENGINES = """
import sys
from nanovllm_jax import LLM, SamplingParams

sizes = dict(max_num_seqs=1, max_model_len=64, max_num_batched_tokens=64, num_kvcache_blocks=2)
first, second = (LLM(sys.argv[1], **sizes) for _ in range(2))
params = SamplingParams(temperature=0, max_tokens=3)
outputs = [llm.generate([[1, 2, 3]], params, use_tqdm=False) for llm in (first, second)]
assert outputs[0] == outputs[1]
second.add_request([5], params)
second.step()  # requests may be under way
print("done", flush=True)
"""


def test_two_engines_in_one_process_that_then_ends(checkpoint):
    """nano-vLLM #19, #21, #61: ports collided, and exit hung."""
    command = [sys.executable, "-c", TWO_ENGINES, str(checkpoint())]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=env) as process:
        watchdog = threading.Timer(180, process.kill)
        watchdog.start()
        assert process.stdout.readline() == "done\n"
        ended = time.perf_counter()
        assert process.wait(timeout=10) == 0
        assert time.perf_counter() - ended < 10
        watchdog.cancel()


# --- nano-vLLM's documented programs, with the import changed ---

PROGRAMS = {
    "single_prompt": """
        from nanovllm_jax import LLM, SamplingParams

        llm = LLM("/path/to/model", enforce_eager=True)
        sampling_params = SamplingParams(temperature=0.6, max_tokens=256)

        outputs = llm.generate(["Hello, Nano-vLLM."], sampling_params)
        print(outputs[0]["text"])
    """,
    "batch": """
        import os
        from nanovllm_jax import LLM, SamplingParams
        from transformers import AutoTokenizer

        path = os.path.expanduser("/path/to/model")
        tokenizer = AutoTokenizer.from_pretrained(path)
        llm = LLM(path, enforce_eager=False, tensor_parallel_size=1)

        sampling_params = SamplingParams(temperature=0.6, max_tokens=256)
        prompts = [
            "introduce yourself",
            "list all prime numbers within 100",
        ]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
        outputs = llm.generate(prompts, sampling_params)

        for prompt, output in zip(prompts, outputs):
            print(f"Prompt: {prompt!r}")
            print(f"Completion: {output['text']!r}")
    """,
    "per_request_params": """
        from nanovllm_jax import LLM, SamplingParams

        llm = LLM("/path/to/model")

        prompts = [
            "Write a haiku about the ocean.",
            "Explain quantum entanglement in one sentence.",
            "List the capitals of all G7 countries.",
        ]

        sampling_params = [
            SamplingParams(temperature=0.9, max_tokens=64),   # creative
            SamplingParams(temperature=0.3, max_tokens=128),  # factual
            SamplingParams(temperature=0.6, max_tokens=256),  # balanced
        ]

        outputs = llm.generate(prompts, sampling_params)
        print("Completion:", len(outputs))
    """,
    "token_ids": """
        from nanovllm_jax import LLM, SamplingParams
        from transformers import AutoTokenizer
        from random import randint, seed

        path = "/path/to/model"
        tokenizer = AutoTokenizer.from_pretrained(path)
        llm = LLM(path)

        # pass raw token IDs directly
        seed(0)
        prompt_token_ids = [
            [randint(0, VOCAB) for _ in range(randint(100, 640))]
            for _ in range(8)
        ]
        sampling_params = SamplingParams(temperature=0.6, max_tokens=128)

        outputs = llm.generate(prompt_token_ids, sampling_params)
        for output in outputs:
            print("Completion:", output["token_ids"])  # list[int]
    """,
    "step_by_step": """
        from nanovllm_jax import LLM, SamplingParams

        llm = LLM("/path/to/model")
        sp = SamplingParams(temperature=0.6, max_tokens=128)

        prompts = ["Tell me a joke.", "What is 2 + 2?"]
        for prompt in prompts:
            llm.add_request(prompt, sp)

        results = {}
        while not llm.is_finished():
            outputs, num_tokens = llm.step()
            for seq_id, token_ids in outputs:
                # decode as each sequence finishes
                text = llm.tokenizer.decode(token_ids)
                results[seq_id] = text
                print(f"Completion: [seq {seq_id}] {text}")
    """,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_written_for_nano_vllm(name, checkpoint, engine, monkeypatch, capsys):
    """They run as documented; only the path, the sizes and the token ids are the test model's.

    Eager steps would take 10 seconds here; they are tested in test_parity.py.
    """
    path = checkpoint(**WITH_TEXT)

    def make(model, **options):
        assert model == str(path)
        assert options.pop("enforce_eager", False) in (False, True)
        return engine(checkpoint=WITH_TEXT, **options)

    code = textwrap.dedent(PROGRAMS[name])
    code = code.replace("/path/to/model", str(path)).replace("VOCAB", str(VOCAB - 1))
    monkeypatch.setattr(nanovllm_jax, "LLM", make)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    if name == "single_prompt":
        assert len(printed) > 1
    else:
        assert "Completion:" in printed
