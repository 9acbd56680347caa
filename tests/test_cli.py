"""The command line: what it prints, what it refuses, and how it ends."""

import io
import json
import logging
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

import nanovllm_jax
from nanovllm_jax import cli as command_line
from nanovllm_jax.cli import main
from nanovllm_jax.tools import profile

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "dtype": "float32",
    "eos_token_id": 256,
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A model of random weights whose tokens are bytes, with a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    (path / "config.json").write_text(json.dumps(CONFIG))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: i for i, sign in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    fast.save_pretrained(path)
    return path


@pytest.fixture
def cli(model_dir):
    """Run the command line on the tiny model and return its exit status."""
    options = ["--model", str(model_dir), "--load-format", "dummy", "--num-kvcache-blocks", "4",
               "--enforce-eager"]  # fmt: skip
    return lambda *argv: main([*argv, *options])


def expected(model_dir, prompts, **sampling):
    """The text that the engine itself gives."""
    params = nanovllm_jax.SamplingParams(temperature=0, **sampling)
    with nanovllm_jax.LLM(
        str(model_dir),
        load_format="dummy",
        num_kvcache_blocks=4,
        max_num_seqs=len(prompts),
        enforce_eager=True,
    ) as llm:
        return [result["text"] for result in llm.generate(prompts, params, use_tqdm=False)]


def test_one_prompt_prints_the_whole_completion(cli, model_dir, capsys):
    assert cli("hello", "--max-tokens", "9", "--ignore-eos") == 0
    (text,) = expected(model_dir, ["hello"], max_tokens=9, ignore_eos=True)
    assert capsys.readouterr().out == text + "\n"


def test_several_prompts_print_in_prompt_order(cli, model_dir, capsys):
    prompts = ["first", "second one", "3"]
    assert cli(*prompts, "--max-tokens", "5") == 0
    texts = expected(model_dir, prompts, max_tokens=5)
    pairs = zip(prompts, texts, strict=True)
    assert capsys.readouterr().out == "".join(f">>> {p}\n{t}\n\n" for p, t in pairs)


def test_a_dash_reads_the_prompt_from_standard_input(cli, model_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert cli("-", "--max-tokens", "3") == 0
    (text,) = expected(model_dir, ["two\nlines"], max_tokens=3)
    assert capsys.readouterr().out == text + "\n"


def test_chat_applies_the_template(cli, model_dir, capsys):
    assert cli("--chat", "hi", "--max-tokens", "3") == 0
    (text,) = expected(model_dir, ["[user] hi\n"], max_tokens=3)
    assert capsys.readouterr().out == text + "\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["hi", "--temperature", "-1"], "temperature"),
        (["hi", "--max-tokens", "0"], "max_tokens"),
        (["hi", "--gpu-memory-utilization", "2"], "gpu_memory_utilization"),
        (["hi", "--kvcache-block-size", "100"], "kvcache_block_size"),
        (["hi", "--dtype", "int3"], "int3"),
        (["hi", "--stop-token-ids", "1,x"], "1,x"),
        (["hi", "--no-such-option"], "--no-such-option"),
        (["-", "-"], "standard input"),
        (["x" * 1000], "256"),
        ([""], "empty"),
    ],
)
def test_a_bad_request_is_one_line_and_status_2(cli, capsys, argv, said):
    assert cli(*argv) == 2
    captured = capsys.readouterr()
    (line,) = [ln for ln in captured.err.splitlines() if ln.startswith("nanovllm-jax: error: ")]
    assert said in line
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_a_missing_model_ends_the_process_with_status_2():
    command = [sys.executable, "-m", "nanovllm_jax", "hi", "--model", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "/no/such/model" in done.stderr
    assert "Traceback" not in done.stderr


def test_interrupting_ends_with_status_130(cli, capsys, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(nanovllm_jax.LLM, "step_outputs", interrupted)
    assert cli("hi") == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_tool_is_reached_by_its_name_and_a_prompt_of_that_name_after_an_option(
    cli, capsys, monkeypatch
):
    monkeypatch.setattr(profile, "main", lambda argv: 40 + len(argv))
    assert main(["profile", "a", "b"]) == 42
    assert cli("--max-tokens", "2", "profile") == 0
    assert capsys.readouterr().out


def test_steps_are_no_larger_than_the_prompts_can_be(model_dir, monkeypatch):
    monkeypatch.setattr(command_line, "LLM", lambda model, **options: options)
    given = {"max_num_seqs": 2, "max_num_batched_tokens": 256}  # the model's longest
    assert command_line._load(model_dir, 2, {}) == given
    options = {"max_model_len": 128, "max_num_seqs": 5}
    assert command_line._load(model_dir, 2, options) == {**options, "max_num_batched_tokens": 128}


def test_messages_of_the_engine_go_to_standard_error(capsys, monkeypatch):
    logger = logging.getLogger("nanovllm_jax")
    monkeypatch.setattr(command_line, "generate", lambda argv: logger.info("KV cache") or 0)
    assert main(["hi"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "KV cache\n")
    assert not logger.handlers
