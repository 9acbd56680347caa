"""Tokenizers: which files are one, which are refused, and which tokens end a request."""

import json

import pytest
from helpers import VOCAB, byte_tokenizer, config_json, make_checkpoint

from nanovllm_jax import LLM, SamplingParams
from nanovllm_jax.models import ModelConfig
from nanovllm_jax.tokenizer import eos_token_ids, load_tokenizer


@pytest.fixture
def directory(tmp_path):
    """A directory with config.json, tokenizer.json and tokenizer_config.json."""
    byte_tokenizer(VOCAB).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_json()), "utf-8")
    return tmp_path


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def test_a_directory_without_tokenizer_files_has_none(checkpoint):
    assert load_tokenizer(checkpoint()) is None


@pytest.mark.parametrize("kept", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_tokenizer_is_loaded_from_what_is_enough_for_it(directory, kept):
    for file in directory.glob("*token*"):
        if file.name not in kept:
            file.unlink()
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None
    assert tokenizer.decode(tokenizer.encode("Hello, you!")) == "Hello, you!"


def test_a_vocabulary_and_merges_are_a_tokenizer(directory):
    for file in directory.glob("*token*"):
        file.unlink()
    vocab = {"<|endoftext|>": 0, "l": 1, "o": 2, "lo": 3, "Ġ": 4}
    (directory / "vocab.json").write_text(json.dumps(vocab), "utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\nl o\n", "utf-8")
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None and tokenizer.encode("lol") == [3, 1]
    (directory / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has vocab\.json, but no merges\.txt"):
        load_tokenizer(directory)


def test_settings_without_a_vocabulary_are_an_unfinished_download(directory):
    """transformers 5 makes an empty tokenizer of them: prompts of unknown tokens, texts of none."""
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has tokenizer_config\.json.*no tokenizer\.json"):
        LLM(str(directory))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "", r"tokenizer\.json is not valid JSON: Expecting value"),
        ("tokenizer.json", '{"version": "1.0", "added_tok', r"tokenizer\.json is not valid JSON"),
        ("tokenizer.json", "{}", r"\(tokenizer\.json, .*\) cannot be loaded"),
        ("tokenizer.json", "[]", r"tokenizer\.json holds no JSON object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json is not valid JSON"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json holds no JSON object"),
        ("tokenizer_config.json", '{"eos_token": 5}', "cannot be loaded: TypeError.*eos_token"),
        ("tokenizer_config.json", '{"model_max_length": "9"}', "cannot be loaded: TypeError"),
        ("tokenizer_config.json", '{"eos_token": "a", "eos_token": "b"}', "'eos_token' twice"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "json is a Git-LFS poin"),
        ("merges.txt", "version https://git-lfs.github.com/spec/v1", "txt is a Git-LFS pointer"),
        ("chat_template.jinja", "version https://git-lfs.github.com/spec/v1", "jinja is a Git-LFS"),
    ],
)
def test_a_damaged_file_is_named(directory, file, content, message):
    (directory / file).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        LLM(str(directory))


def test_a_tokenizer_without_words_is_refused(directory):
    file = directory / "tokenizer.json"
    model = json.loads(file.read_text("utf-8"))["model"] | {"vocab": {}, "merges": []}
    edit(file, model=model)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*has no vocabulary"):
        load_tokenizer(directory)


def test_a_link_of_an_unfinished_download_is_named(directory):
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.json").symlink_to("../../blobs/abc")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is a link to .*blobs/abc"):
        LLM(str(directory))


def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(directory, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked"))
    edit(directory / "config.json", model_type="my_own")
    edit(
        directory / "tokenizer_config.json",
        tokenizer_class="MyTokenizer",
        auto_map={"AutoTokenizer": ["my.MyTokenizer", None]},
    )
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded: ValueError.*trust_remote_code"):
        load_tokenizer(directory)


# --- which tokens end a request ---


def test_an_end_that_any_file_names_ends_a_request(directory):
    tokenizer = load_tokenizer(directory)
    assert tokenizer is not None and tokenizer.eos_token_id == 0
    edit(directory / "config.json", eos_token_id=5)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0]}), "utf-8")
    config = ModelConfig.from_directory(directory)
    assert sorted(eos_token_ids(config, tokenizer)) == [0, 5, 7]
    assert sorted(eos_token_ids(config, None)) == [0, 5, 7]
    (directory / "generation_config.json").unlink()
    config = ModelConfig.from_directory(directory)
    assert sorted(eos_token_ids(config, tokenizer)) == [0, 5]


def test_an_end_token_that_the_model_lacks_is_named(directory):
    edit(directory / "tokenizer_config.json", eos_token="<new>")
    tokenizer, config = load_tokenizer(directory), ModelConfig.from_directory(directory)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token '<new>' is token 131"):
        eos_token_ids(config, tokenizer)


def test_a_base_model_stops_at_the_tokenizers_end(tmp_path, fake_engine):
    """config.json of a Base model names another end than the tokenizer of a fine-tune of it."""
    path = make_checkpoint(tmp_path, tokenizer=True, eos_token_id=5)
    llm = fake_engine(path)
    assert llm.scheduler.eos_token_ids == {0, 5}
    params = SamplingParams(temperature=0, max_tokens=300)
    prompts = [[i] for i in range(1, 9)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output in outputs:
        *before, last = output["token_ids"]
        assert not {0, 5} & set(before) and (last in (0, 5) or len(before) == 299)
    assert {output["token_ids"][-1] for output in outputs} >= {0, 5}
