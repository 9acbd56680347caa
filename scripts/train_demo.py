"""Trains the demo model that ships with the package: data, tokenizer, model, evaluation, card.

    python -m scripts.train_demo --out nanovllm_jax/demo_model

This takes a few minutes on one GPU; `--tiny` runs the whole pipeline on a CPU in about a minute.
The data is made from a seed (demo_data.py) and lives on the device as packed rows; many steps run
per call. The model is the engine's own Flax module, in bfloat16 with float32 master weights, so
that what is trained is what is exported, rounding included.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovllm_jax import LLM
from nanovllm_jax.layers.backend import DenseBackend
from nanovllm_jax.layers.rope import Rope
from nanovllm_jax.models.checkpoint import STACKED, sources
from nanovllm_jax.models.config import ModelConfig
from nanovllm_jax.models.decoder import Decoder
from nanovllm_jax.tools.shapes import as_json
from scripts import demo_data, demo_evaluation, stories
from scripts.demo_data import CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, TURN_END

# Qwen's rule: a word takes the space before it along, a digit stands alone.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MODEL = ModelConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=1536,
    hidden_size=256,
    intermediate_size=704,
    num_layers=6,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=4096,
    rope=Rope(10000.0),
    tie_word_embeddings=True,
    dtype="bfloat16",
)


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on: the model's shape and how it is trained."""

    model: ModelConfig = MODEL  # its dtype is that of the computation and of the export
    row_length: int = 512  # tokens of a packed row, the longest document
    pool_rows: int = 180_000
    batch: int = 64  # rows
    steps: int = 10_000
    steps_per_call: int = 200
    warmup: int = 300
    peak_rate: float = 1.5e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    task_weight: float = 3.0  # of a token of a checkable answer; a story's tokens weigh 1
    seed: int = 0
    questions: int = 1000  # of the evaluation, per task
    stories: int = 100


TINY = Recipe(
    model=replace(MODEL, vocab_size=512, hidden_size=64, num_layers=2, intermediate_size=128),
    row_length=256,
    pool_rows=60,
    batch=2,
    steps=20,
    steps_per_call=5,
    warmup=5,
    questions=4,
    stories=2,
)


def main() -> None:
    """Makes the data, trains, evaluates and writes the directory; see `--help`."""
    args = _arguments()
    given = {name: getattr(args, name) for name in ("steps", "batch", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    recipe = replace(TINY if args.tiny else Recipe(), **given)
    started = time.time()

    def log(text: str) -> None:
        print(f"[{time.time() - started:6.1f} s] {text}", flush=True)

    tokenizer = train_tokenizer(recipe)
    rows = make_rows(recipe, tokenizer, args.workers)
    log(f"{len(rows):,} rows of {recipe.row_length} tokens")
    trainer = Trainer(recipe)
    log(f"{trainer.num_parameters:,} parameters on {jax.devices()[0].device_kind}")
    for step, loss, rate in trainer.run(rows):
        log(f"step {step:6d}/{recipe.steps}  loss {loss:.4f}  {rate:,.0f} tokens/s")

    out = args.out.absolute()
    new, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    export(new, trainer, tokenizer)
    with LLM(
        new,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=64,
        num_kvcache_blocks=140,
    ) as llm:
        result: dict[str, Any] = demo_evaluation.evaluate(llm, recipe.questions, recipe.stories)
        samples = demo_evaluation.samples(llm)
    result |= {"steps": recipe.steps, "minutes": round((time.time() - started) / 60, 1)}
    log("evaluated")
    write_json(new / "evaluation.json", result)
    (new / "README.md").write_text(model_card(trainer, result), "utf-8")
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    print(*samples, json.dumps(result), sep="\n\n", flush=True)


def _arguments() -> argparse.Namespace:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="directory to write or replace")
    parser.add_argument("--steps", type=int, help=f"instead of {Recipe.steps}")
    parser.add_argument("--batch", type=int, help=f"rows, instead of {Recipe.batch}")
    parser.add_argument("--seed", type=int, help=f"instead of {Recipe.seed}")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes for data")
    parser.add_argument("--tiny", action="store_true", help="a test of the pipeline")
    return parser.parse_args()


# ---- tokenizer ------------------------------------------------------------------------------


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """Trains a byte-level BPE on the demo data; it encodes any text, and digits one by one."""
    rng = random.Random(f"tokenizer {recipe.seed}")
    texts = [stories.story(rng) for _ in range(3000)]
    texts += ["".join(t for t, _ in demo_data.document(rng)) for _ in range(10_000)]
    # Repeated often enough that most of these words become one token each.
    words = (*demo_data.WORDS, *stories.KINDS, *stories.OBJECTS)
    texts += [" ".join(rng.sample(words, len(words))) for _ in range(100)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=recipe.model.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tokenizer.get_vocab_size() == recipe.model.vocab_size
    return tokenizer


def eos_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids that end a text: the end of a turn first, as Qwen3 lists them."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in (TURN_END, EOS)]


# ---- data -----------------------------------------------------------------------------------

ROWS_PER_CHUNK = 500


def make_rows(recipe: Recipe, tokenizer: Tokenizer, workers: int) -> Int[np.ndarray, "R 3 S"]:
    """Packs documents into rows.

    Returns:
        For each row three planes: token ids, document numbers (rising from 0), and how each token
        is learnt (demo_data.READ, TOLD, CHECKED). They do not depend on the number of workers.
    """
    chunks = math.ceil(recipe.pool_rows / ROWS_PER_CHUNK)
    make = partial(_make_chunk, recipe, tokenizer.to_str())
    if workers <= 1:
        made = [make(i) for i in range(chunks)]
    else:
        # Spawned, because JAX and the tokenizer run threads, which a fork would lose.
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            made = pool.map(make, range(chunks), chunksize=1)
    return np.concatenate(made)[: recipe.pool_rows]


def _make_chunk(recipe: Recipe, tokenizer_json: str, chunk: int) -> Int[np.ndarray, "R 3 S"]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rng = random.Random(f"chunk {recipe.seed} {chunk}")
    count = min(ROWS_PER_CHUNK, recipe.pool_rows)
    return np.stack(list(_pack(_documents(rng, tokenizer, recipe), count, recipe)))


def _documents(rng: random.Random, tokenizer: Tokenizer, recipe: Recipe):
    """Draws documents that fit into a row, without end: token ids, and how each is learnt."""
    while True:
        documents = [demo_data.document(rng) for _ in range(1000)]
        pieces = [text for document in documents for text, _ in document]
        ids = iter(tokenizer.encode_batch_fast(pieces, add_special_tokens=False))
        for document in documents:
            tokens: list[int] = []
            kinds: list[int] = []
            for _, kind in document:
                piece = next(ids).ids
                tokens += piece
                kinds += [kind] * len(piece)
            if len(tokens) <= recipe.row_length:
                yield tokens, kinds


def _pack(documents, count: int, recipe: Recipe) -> Iterator[Int[np.ndarray, "3 S"]]:
    """Packs by first fit into 16 open rows, closing the fullest when a document fits in none."""
    open_rows: list[list[list[int]]] = []  # token ids, document numbers and kinds of each
    for tokens, kinds in documents:
        room = recipe.row_length - len(tokens)
        row = next((r for r in open_rows if len(r[0]) <= room), None)
        if row is None:
            if len(open_rows) == 16:
                fullest = max(open_rows, key=lambda r: len(r[0]))
                open_rows.remove(fullest)
                yield _padded(fullest, recipe.row_length)
                count -= 1
                if count == 0:
                    return
            row = [[], [], []]
            open_rows.append(row)
        number = row[1][-1] + 1 if row[1] else 0
        row[0] += tokens
        row[1] += [number] * len(tokens)
        row[2] += kinds


def _padded(row: list[list[int]], length: int) -> Int[np.ndarray, "3 S"]:
    missing = length - len(row[0])
    fill = (0, row[1][-1] + 1, demo_data.READ)
    planes = [plane + [value] * missing for plane, value in zip(row, fill, strict=True)]
    return np.array(planes, np.int16)


# ---- model ----------------------------------------------------------------------------------


class TrainingBackend(DenseBackend):
    """Looks tokens up by a product: its gradient is a float32 sum, that of a gather a bf16 one."""

    def embed(self, table, token_ids, then=None):
        weight = table.weight[...]
        return jax.nn.one_hot(token_ids, weight.shape[0], dtype=weight.dtype) @ weight


def answer_loss(model: Decoder, rows: Int[Array, "B 3 S"], task_weight: float) -> Float[Array, ""]:
    """Returns the next token's weighted mean cross-entropy; documents do not see each other."""
    tokens, document, kind = (rows[:, i].astype(jnp.int32) for i in range(3))
    batch, length = tokens.shape
    place = jnp.arange(length)
    begins = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    positions = place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    mask = (document[:, :, None] == document[:, None, :]) & (place[:, None] >= place)
    backend = TrainingBackend(mask)
    hidden, _ = model(tokens.reshape(-1), positions.reshape(-1), backend)
    logits = model.logits(hidden, backend).reshape(batch, length, -1)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    # A document's first token, which the row's previous document would predict, weighs nothing.
    weight = jnp.array([0.0, 1.0, task_weight])[kind[:, 1:]]
    weight = jnp.where(begins[:, 1:], 0, weight)
    return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1)


class Trainer:
    """Holds the model, its optimizer (AdamW, warm-up, cosine) and the compiled steps."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        masters = replace(recipe.model, dtype="float32")
        self.graph, self.params = nnx.split(Decoder(masters, rngs=nnx.Rngs(recipe.seed)))
        self.num_parameters = sum(x.size for x in jax.tree.leaves(self.params))
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(recipe.clip),
            optax.scale_by_adam(b1=0.9, b2=0.98),
            optax.add_decayed_weights(recipe.weight_decay, mask=_without_norms),
        )
        self.moments = self.optimizer.init(self.params)

    def model(self, params: nnx.State) -> Decoder:
        """Returns the model in the type that it computes in and is exported in."""
        dtype = self.recipe.model.dtype
        return nnx.merge(self.graph, jax.tree.map(lambda x: x.astype(dtype), params))

    def learning_rate(self, step: Array) -> Array:
        """Returns the rate of a step: a linear warm-up, then a cosine from the peak to zero."""
        r = self.recipe
        done = (step - r.warmup) / max(r.steps - r.warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        return r.peak_rate * jnp.minimum((step + 1) / r.warmup, cosine)

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _run_steps(self, params, moments, rows, first):
        """Takes `steps_per_call` optimizer steps from step `first` on."""

        def one_step(carry, step):
            params, moments = carry
            key = jax.random.fold_in(jax.random.key(self.recipe.seed), step)
            chosen = jax.random.randint(key, (self.recipe.batch,), 0, rows.shape[0])
            loss, gradient = jax.value_and_grad(
                lambda p: answer_loss(self.model(p), rows[chosen], self.recipe.task_weight)
            )(params)
            updates, moments = self.optimizer.update(gradient, moments, params)
            rate = self.learning_rate(step)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, moments), loss

        todo = first + jnp.arange(self.recipe.steps_per_call)
        (params, moments), losses = jax.lax.scan(one_step, (params, moments), todo)
        return params, moments, jnp.mean(losses)

    def run(self, rows: Int[np.ndarray, "R 3 S"]) -> Iterator[tuple[int, float, float]]:
        """Trains; yields the steps done, their mean loss and tokens per second after each call."""
        r, on_device = self.recipe, jnp.asarray(rows)
        for done in range(0, r.steps, r.steps_per_call):
            began = time.time()
            self.params, self.moments, loss = self._run_steps(
                self.params, self.moments, on_device, done
            )
            loss = float(loss)
            rate = r.steps_per_call * r.batch * r.row_length / (time.time() - began)
            yield done + r.steps_per_call, loss, rate


def _without_norms(params: nnx.State) -> Any:
    """Returns True for the matrices, which decay, and False for the norms' weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )


# ---- the directory --------------------------------------------------------------------------


def checkpoint(config: ModelConfig, params: nnx.State) -> dict[str, np.ndarray]:
    """Splits the parameters into the tensors of a checkpoint, in the config's dtype."""
    flat = nnx.to_flat_state(params)
    values = {".".join(map(str, path)): np.asarray(value[...]) for path, value in flat}
    tensors = {}
    for path, source in sources(config).items():
        layers = values[path] if path.startswith(f"{STACKED}.") else values[path][None]
        for i, value in enumerate(layers):
            for (name, _), tensor in zip(source.tensors, source.split(value), strict=True):
                tensors[name.format(i=i)] = np.ascontiguousarray(tensor, jnp.dtype(config.dtype))
    return tensors


def export(folder: Path, trainer: Trainer, tokenizer: Tokenizer) -> None:
    """Writes what transformers and the engine load: weights, configuration and tokenizer."""
    folder.mkdir(parents=True)
    turn_end, text_end = eos_ids(tokenizer)
    config = replace(trainer.recipe.model, eos_token_ids=(turn_end,))
    weights = save(checkpoint(config, trainer.params), metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)  # save_file's would be its owner's alone
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", as_json(config))
    write_json(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": [turn_end, text_end], "pad_token_id": text_end},
    )
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "model_max_length": config.max_position_embeddings,
            "pad_token": EOS,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a file of indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def model_card(trainer: Trainer, result: dict[str, Any]) -> str:
    """Fills in demo_card.md, the README.md of the model's directory."""
    recipe = trainer.recipe
    return (
        (Path(__file__).parent / "demo_card.md")
        .read_text("utf-8")
        .format(
            r=recipe,
            m=recipe.model,
            result=result,
            parameters=trainer.num_parameters,
            megabytes=2 * trainer.num_parameters / 1e6,
            device=jax.devices()[0].device_kind,
            seen=recipe.steps * recipe.batch * recipe.row_length / 1e6,
            words=len(demo_data.WORDS),
        )
    )


if __name__ == "__main__":
    main()
