"""The contract: what the constructor, generate, add_request, step and stream promise."""

import inspect
import re
import textwrap
from itertools import chain

import jax
import pytest
from helpers import VOCAB, Spy, edge_prompts, greedy, prompt, tokens

import nanovllm_jax
from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.config import EngineConfig
from nanovllm_jax.engine.model_runner import TokenFuture

WITH_TEXT = {"tokenizer": True}


@pytest.fixture
def llm(engine):
    """An engine with a tokenizer of one character a token, whose EOS is token 0."""
    return engine(checkpoint=WITH_TEXT)


def drain(llm):
    """Step until all is done: {seq_id: tokens}, and the counts of each step."""
    results, counts = {}, []
    while not llm.is_finished():
        finished, num_tokens = llm.step()
        assert not results.keys() & dict(finished).keys()
        results |= finished
        counts.append(num_tokens)
    return results, counts


# --- the constructor ---


def test_defaults(checkpoint):
    config = EngineConfig(checkpoint(), max_num_seqs=512)
    names = "max_num_batched_tokens max_num_seqs gpu_memory_utilization tensor_parallel_size"
    names += " enforce_eager kvcache_block_size num_kvcache_blocks dtype seed"
    values = [getattr(config, name) for name in names.split()]
    assert values == [16384, 512, 0.9, 1, False, 256, None, None, 0]
    assert EngineConfig.max_model_len == 4096
    assert config.max_model_len == 2048, "capped to max_position_embeddings"


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_num_batched_tokens", 1023, "at least max_model_len=1024"),
        ("max_num_seqs", 0, "at least 1"),
        ("max_model_len", 1, "at least 2"),
        ("gpu_memory_utilization", 0.0, r"\(0, 1\]"),
        ("gpu_memory_utilization", 1.01, r"\(0, 1\]"),
        ("tensor_parallel_size", 0, "between 1 and 8"),
        ("tensor_parallel_size", 9, "between 1 and 8"),
        ("kvcache_block_size", 0, "multiple of 256"),
        ("kvcache_block_size", 128, "multiple of 256"),
        ("kvcache_block_size", 300, "multiple of 256"),
        ("num_kvcache_blocks", 0, "at least 1"),
        ("dtype", "float16", "float32.*bfloat16"),
        ("attention_backend", "cuda", "triton"),
        ("kv_cache_dtype", "int8", "fp8"),
        ("load_format", "pickle", "auto"),
    ],
)
def test_options_out_of_range_name_their_value_and_the_range(checkpoint, name, value, rule):
    options = {"max_model_len": 1024, name: value}
    with pytest.raises(ValueError, match=f"(?s){name}.*{rule}|{name} .*{rule}") as error:
        LLM(str(checkpoint()), **options)
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", 2.0),
        ("max_num_seqs", True),
        ("max_model_len", "1024"),
        ("enforce_eager", 1),
        ("gpu_memory_utilization", "0.9"),
        ("num_kvcache_blocks", 1.5),
        ("seed", None),
    ],
)
def test_options_of_the_wrong_type(checkpoint, name, value):
    with pytest.raises(TypeError, match=f"{name}.*{value!r}"):
        LLM(str(checkpoint()), **{name: value})


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("max_num_seq", "max_num_seqs"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("gpu_memory_utilisation", "gpu_memory_utilization"),
        ("max_model_length", "max_model_len"),
    ],
)
def test_unknown_options_name_the_nearest(checkpoint, wrong, nearest):
    with pytest.raises(TypeError, match=f"{wrong}.*did you mean '{nearest}'"):
        LLM(str(checkpoint()), **{wrong: 1})


def test_a_hub_name_is_an_assertion_error():
    with pytest.raises(AssertionError, match=r"Qwen/Qwen3-0\.6B"):
        LLM("Qwen/Qwen3-0.6B")


def test_a_directory_without_config_json_is_an_assertion_error(tmp_path):
    with pytest.raises(AssertionError, match=str(tmp_path)):
        LLM(str(tmp_path))


def test_heads_that_cannot_be_split_name_the_valid_sizes(checkpoint):
    with pytest.raises(
        ValueError, match=r"over 4 devices.*valid tensor parallel sizes: \[1, 2, 6\]"
    ):
        LLM(str(checkpoint()), tensor_parallel_size=4)


def test_tied_kv_heads_are_never_split_unevenly(checkpoint):
    with pytest.raises(ValueError, match="'heads' cannot be split over 3 devices"):
        LLM(str(checkpoint()), tensor_parallel_size=3)


def test_options_are_documented_where_users_look():
    for name in inspect.signature(EngineConfig).parameters:
        assert f"{name}:" in LLM.__doc__


# --- SamplingParams ---


def test_sampling_params_defaults():
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.ignore_eos) == (1.0, 64, False)
    assert params.detokenize and params.seed is None and params.stop_token_ids == ()
    assert not params.filters
    positional = SamplingParams(0.6, 256, True)
    assert (positional.temperature, positional.max_tokens, positional.ignore_eos) == (
        0.6,
        256,
        True,
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"max_tokens": 0},
        {"top_k": -2},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.5},
    ],
)
def test_sampling_params_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value}"):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": "0"},
        {"temperature": True},
        {"max_tokens": 1.0},
        {"top_k": 1.5},
        {"seed": "x"},
        {"ignore_eos": 1},
        {"stop_token_ids": 5},
        {"stop_token_ids": "ab"},
        {"stop_token_ids": ["a"]},
        {"detokenize": None},
    ],
)
def test_sampling_params_of_the_wrong_type(wrong):
    ((name, _),) = wrong.items()
    with pytest.raises(TypeError, match=name):
        SamplingParams(**wrong)


# --- generate ---


def test_results_have_exactly_text_and_token_ids_in_prompt_order(llm):
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


def test_a_prompt_that_needs_more_blocks_than_the_pool_is_refused(engine):
    llm = engine(num_kvcache_blocks=2)
    with pytest.raises(ValueError, match=r"513 tokens and needs 3 blocks of 256.* has 2"):
        llm.add_request(prompt(513), greedy())
    assert llm.is_finished()


def test_strings_need_a_tokenizer(engine):
    llm = engine()
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


def test_two_eos_ids_of_generation_config_json(new_engine, checkpoint, tmp_path):
    import json
    import shutil

    path = tmp_path / "model"
    shutil.copytree(checkpoint(), path)
    llm = new_engine(path)
    (free,) = tokens(llm, [prompt(7)], greedy(30))
    cuts = {}
    ids = [free[4], free[8]]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    llm = new_engine(path)
    for seed in range(8):
        params = {"seed": seed, "max_tokens": 200}
        (out,) = tokens(llm, [prompt(7)], SamplingParams(**params))
        assert not set(ids) & set(out[:-1])
        cuts[seed] = out[-1]
        (out,) = tokens(llm, [prompt(7)], SamplingParams(**params, ignore_eos=True))
        assert len(out) == 200
    assert set(ids) <= set(cuts.values()), "both ids end a request"


def test_the_tokenizers_eos_counts_where_no_file_names_one(llm):
    params = [SamplingParams(seed=seed, max_tokens=300) for seed in range(8)]
    outputs = tokens(llm, [prompt(7)] * 8, params)
    assert any(out[-1] == 0 for out in outputs)
    assert all(0 not in out[:-1] for out in outputs)
    texts = [llm.tokenizer.decode(out) for out in outputs if out[-1] == 0]
    shown = llm.generate([prompt(7)] * 8, params, use_tqdm=False)
    assert all(text.endswith("<end>") for text in texts)
    assert all("<end>" not in output["text"] for output in shown)


@pytest.mark.parametrize("length", [700, 766, 767])
def test_max_tokens_is_capped_by_max_model_len(llm, length):
    (out,) = tokens(llm, [prompt(length)], greedy(1000, ignore_eos=True))
    assert len(out) == 768 - length


def test_a_request_that_outgrows_the_pool_fails_alone(engine):
    llm = engine(num_kvcache_blocks=2)
    prompts = [prompt(505), prompt(9)]
    params = [greedy(100), greedy(30)]
    big, small = llm.generate(prompts, params, use_tqdm=False)
    assert "513 tokens need 3 blocks of 256, the pool has 2" in big["error"]
    assert len(big["token_ids"]) == 513 - 505
    assert "error" not in small and len(small["token_ids"]) == 30
    assert llm.is_finished()
    llm.pools[0].check([])
    assert tokens(llm, [prompts[1]], greedy(30)) == [small["token_ids"]]


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
    mine = llm.add_request(prompt(30), greedy(4, ignore_eos=True))
    slow = llm.add_request(prompt(31), greedy(40, ignore_eos=True))
    outputs = llm.generate([prompt(5)], greedy(8, ignore_eos=True), use_tqdm=False)
    assert len(outputs) == 1 and len(outputs[0]["token_ids"]) == 8
    assert not llm.is_finished()
    results, _ = drain(llm)
    assert set(results) == {mine, slow}
    assert [len(results[i]) for i in (mine, slow)] == [4, 40]
    assert results[mine] == tokens(llm, [prompt(30)], greedy(4, ignore_eos=True))[0]


# --- stream ---


def test_stream_yields_what_generate_returns(llm):
    parts = list(llm.stream("abc", greedy(20, ignore_eos=True)))
    assert len(parts) > 10 and all(parts)
    (want,) = tokens(llm, ["abc"], greedy(20, ignore_eos=True))
    assert [*chain(*parts)] == want
    assert llm.is_finished()


def test_closing_a_stream_ends_its_request(llm):
    stream = llm.stream("abc", greedy(500, ignore_eos=True))
    next(stream)
    stream.close()
    assert llm.is_finished()
    llm.pools[0].check([])


def test_a_stream_loses_nothing_to_a_generate_in_between(llm):
    params = greedy(12, ignore_eos=True)
    (want,) = tokens(llm, ["abc"], params)
    stream = llm.stream("abc", params)
    parts = [next(stream)]
    tokens(llm, ["other"], greedy(5, ignore_eos=True))  # the stream's request advances as well
    parts.append(next(stream))
    tokens(llm, ["other"], greedy(30, ignore_eos=True))  # and ends
    parts += stream
    assert [*chain(*parts)] == want
    assert llm.is_finished(), "a streamed request is not reported by step"


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


def test_a_stream_that_outgrows_the_pool_raises(engine):
    llm = engine(num_kvcache_blocks=2)
    got = []
    with pytest.raises(RuntimeError, match="the pool has 2"):
        for part in llm.stream(prompt(505), greedy(100)):
            got += part
    assert len(got) == 8 and llm.is_finished()


# --- interruption and the end ---


@pytest.mark.parametrize("at", [1, 2, 5])
def test_an_interrupted_generate_leaves_a_usable_engine(llm, monkeypatch, at):
    others = [prompt(40), prompt(41)]
    want_others = tokens(llm, others, greedy(ignore_eos=True))
    want = tokens(llm, edge_prompts(), greedy(ignore_eos=True))
    llm.reset_prefix_cache()
    ids = [llm.add_request(p, greedy(ignore_eos=True)) for p in others]
    result, calls = TokenFuture.result, []

    def interrupted(future):
        calls.append(future)
        if len(calls) == at:
            raise KeyboardInterrupt
        return result(future)

    with monkeypatch.context() as patch:
        patch.setattr(TokenFuture, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(edge_prompts(), greedy(ignore_eos=True), use_tqdm=False)
    results, _ = drain(llm)
    assert [results[i] for i in ids] == want_others, "requests that were not generate's go on"
    llm.pools[0].check([])
    assert tokens(llm, edge_prompts(), greedy(ignore_eos=True)) == want


def test_after_exit_every_use_says_so(new_engine, checkpoint):
    llm = new_engine(checkpoint())
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


def test_a_context_manager_exits(new_engine, checkpoint):
    with pytest.raises(ZeroDivisionError), new_engine(checkpoint()) as llm:
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
def test_programs_written_for_nano_vllm(name, checkpoint, new_engine, monkeypatch, capsys):
    """They run as documented; only the path, the sizes and the token ids are the test model's."""
    path = checkpoint(**WITH_TEXT)
    code = textwrap.dedent(PROGRAMS[name])
    code = code.replace("/path/to/model", str(path)).replace("VOCAB", str(VOCAB - 1))
    monkeypatch.setattr(nanovllm_jax, "LLM", new_engine)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    if name == "single_prompt":
        assert len(printed) > 1
    else:
        assert "Completion:" in printed
