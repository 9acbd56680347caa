"""Train the demo model that ships with the package: data, tokenizer, model, evaluation, model card.

    python scripts/train_demo.py --out nanovllm_jax/demo_model

A few minutes on one GPU; `--tiny` runs the whole pipeline on a CPU in under a minute. The data is
made from a seed (demo_data.py), lives on the device as packed rows, and many steps run per call.
The model is the engine's own Flax module, in bfloat16 with float32 master weights, so that what
is trained is what is exported, rounding included.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import demo_data
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from demo_data import CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, TURN_END, Turn, chat_prompt
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from safetensors.numpy import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from nanovllm_jax.config import ModelConfig
from nanovllm_jax.layers.linear import Embedding
from nanovllm_jax.layers.norm import rms_norm
from nanovllm_jax.layers.rope import apply_rope
from nanovllm_jax.models.qwen3 import Attend, Qwen3

# Qwen's: a word takes the space before it along, a digit stands alone.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TASKS = tuple(demo_data.TASKS)


@dataclass(frozen=True)
class Recipe:
    """The model's shape and how it is trained; everything that the result depends on."""

    vocab_size: int = 1536
    hidden_size: int = 256
    num_layers: int = 6
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
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
    questions_at_once: int = 500
    stories: int = 100


TINY = Recipe(
    vocab_size=512,
    hidden_size=64,
    num_layers=2,
    intermediate_size=128,
    row_length=256,
    pool_rows=60,
    batch=2,
    steps=20,
    steps_per_call=5,
    warmup=5,
    questions=16,
    questions_at_once=16,
    stories=2,
)


def main() -> None:
    """Make the data, train, evaluate, write the directory; see `--help`."""
    args = _arguments()
    recipe = TINY if args.tiny else Recipe()
    changes = {k: getattr(args, k) for k in ("steps", "batch", "seed") if getattr(args, k)}
    recipe = Recipe(**{**asdict(recipe), **changes})
    started = time.time()

    tokenizer = train_tokenizer(recipe)
    rows = make_rows(recipe, tokenizer, args.workers)
    _log(started, f"{len(rows):,} rows of {recipe.row_length} tokens")

    trainer = Trainer(recipe, args.dtype)
    _log(started, f"{trainer.num_parameters:,} parameters on {jax.devices()[0].device_kind}")
    saved_early = False
    for step, loss, rate in trainer.run(rows, args.minutes):
        _log(started, f"step {step:6d}/{trainer.steps}  loss {loss:.4f}  {rate:,.0f} tokens/s")
        if step >= 0.6 * trainer.steps and not saved_early:
            saved_early = True
            quick = evaluate_tasks(trainer, tokenizer, ("addition",), min(recipe.questions, 200))
            _log(started, f"checkpoint; addition so far {quick['addition']:.3f}")
            note = f"Unfinished: {step} of {trainer.steps} steps.\n\n"
            write_model(args.out, trainer, tokenizer, quick, note)

    result: dict[str, Any] = evaluate_tasks(trainer, tokenizer, TASKS, recipe.questions)
    result |= evaluate_more_additions(trainer, tokenizer, recipe.questions)
    story_result, samples = evaluate_stories(trainer, tokenizer, recipe.stories)
    result |= story_result
    result |= {"steps": trainer.steps, "minutes": round((time.time() - started) / 60, 1)}
    _log(started, "evaluated")
    write_model(args.out, trainer, tokenizer, result)
    for request, text in samples:
        print(f"\n> {request}\n{text}", flush=True)
    print(f"\neval.json {json.dumps(result)}", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write or replace")
    parser.add_argument("--steps", type=int, help=f"instead of {Recipe.steps}")
    parser.add_argument("--batch", type=int, help=f"rows, instead of {Recipe.batch}")
    parser.add_argument("--seed", type=int, help=f"instead of {Recipe.seed}")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="limit of the training proper; fewer steps are run if they would take longer",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes for data")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--tiny", action="store_true", help="a test of the pipeline")
    return parser.parse_args()


def _log(started: float, text: str) -> None:
    print(f"[{time.time() - started:6.1f} s] {text}", flush=True)


# ---- tokenizer ------------------------------------------------------------------------------


def train_tokenizer(recipe: Recipe) -> Tokenizer:
    """Byte-level BPE over the demo data: any text can be encoded, digits one by one."""
    rng = random.Random(f"tokenizer {recipe.seed}")
    texts = [demo_data.story(rng) for _ in range(3000)]
    texts += ["".join(t for t, _ in demo_data.document(rng)) for _ in range(10_000)]
    # Often enough that most become one token.
    words = (*demo_data.WORDS, *demo_data.KINDS, *demo_data.OBJECTS)
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
            vocab_size=recipe.vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tokenizer.get_vocab_size() == recipe.vocab_size
    return tokenizer


def eos_ids(tokenizer: Tokenizer) -> list[int]:
    """The ids that end an answer, the end of a turn first, as Qwen3 lists them."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in (TURN_END, EOS)]


# ---- data -----------------------------------------------------------------------------------

ROWS_PER_CHUNK = 500


def make_rows(recipe: Recipe, tokenizer: Tokenizer, workers: int) -> Int[np.ndarray, "R 3 S"]:
    """Packed rows; planes: token ids, document numbers (rising from 0), and how a token is
    learnt (demo_data.READ, TOLD, CHECKED).

    The result depends on the recipe only, not on the number of workers.
    """
    chunks = math.ceil(recipe.pool_rows / ROWS_PER_CHUNK)
    make = partial(_make_chunk, recipe, tokenizer.to_str())
    if workers <= 1:
        made = [make(i) for i in range(chunks)]
    else:
        # Not forked: JAX and the tokenizer run threads.
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
    """Endless (token ids, how each is learnt) of documents that fit into a row."""
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
    """First fit into a few open rows; the fullest is closed when a document fits nowhere."""
    open_rows: list[list[list[int]]] = []  # of each: token ids, document numbers, kinds
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


class MatmulEmbedding(Embedding):
    """The lookup as a product, whose gradient is summed in float32 and not by bfloat16 scatter."""

    def lookup(self, token_ids: Int[Array, " T"]) -> Float[Array, "T D"]:
        table = self.weight[...]
        return jax.nn.one_hot(token_ids, table.shape[0], dtype=table.dtype) @ table


def model_config(recipe: Recipe) -> ModelConfig:
    """The shape of the model, in float32: the master weights."""
    return ModelConfig(
        architecture="Qwen3ForCausalLM",
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        dtype="float32",
    )


def dense_attention(mask: Bool[Array, "B S S"]) -> Attend:
    """Attention of B rows of S tokens each, which the model sees as one axis of T = B * S."""
    batch, length, _ = mask.shape

    def attend(qkv, q_norm, k_norm, rope, cache, layer):
        tokens, kv_heads, group, head_dim = qkv.shape
        q, k, v = qkv[:, :, :-2], qkv[:, :, -2], qkv[:, :, -1]
        q = q.reshape(tokens, kv_heads * (group - 2), head_dim)
        q, k = (
            apply_rope(rms_norm(x, norm.weight[layer], norm.eps), *rope)
            for x, norm in ((q, q_norm), (k, k_norm))
        )
        q, k, v = (x.reshape(batch, length, -1, head_dim) for x in (q, k, v))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], implementation="xla")
        return out.reshape(tokens, -1, head_dim), cache

    return attend


def causal(length: int) -> Bool[Array, "S S"]:
    """Whether query i may see key j: the keys up to its own place."""
    return jnp.tril(jnp.ones((length, length), bool))


def answer_loss(model: Qwen3, rows: Int[Array, "B 3 S"], task_weight: float) -> Float[Array, ""]:
    """Weighted mean cross-entropy of the next token; documents do not see each other."""
    tokens, document, kind = (rows[:, i].astype(jnp.int32) for i in range(3))
    batch, length = tokens.shape
    place = jnp.arange(length)
    begins = jnp.pad(document[:, 1:] != document[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    positions = place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
    mask = (document[:, :, None] == document[:, None, :]) & causal(length)
    hidden, _ = model(tokens.reshape(-1), positions.reshape(-1), dense_attention(mask))
    logits = model.logits(hidden).reshape(batch, length, -1)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    # A document's first token, which the row's previous document would predict, weighs nothing.
    weight = jnp.array([0.0, 1.0, task_weight])[kind[:, 1:]]
    weight = jnp.where(begins[:, 1:], 0, weight)
    return jnp.sum(losses * weight) / jnp.maximum(jnp.sum(weight), 1)


class Trainer:
    """The model, its optimizer (AdamW, warm-up, cosine) and the compiled steps."""

    def __init__(self, recipe: Recipe, dtype: str = "bfloat16"):
        self.recipe, self.dtype, self.steps = recipe, jnp.dtype(dtype), recipe.steps
        self.config = model_config(recipe)
        rngs = nnx.Rngs(recipe.seed)
        model = Qwen3(self.config, rngs=rngs)
        size = (recipe.vocab_size, recipe.hidden_size)
        model.embed_tokens = MatmulEmbedding(*size, dtype=jnp.float32, rngs=rngs)
        self.graph, self.params = nnx.split(model)
        self.num_parameters = sum(x.size for x in jax.tree.leaves(self.params))
        self.optimizer = optax.chain(
            optax.clip_by_global_norm(recipe.clip),
            optax.scale_by_adam(b1=0.9, b2=0.98),
            optax.add_decayed_weights(recipe.weight_decay, mask=_without_norms),
        )
        self.moments = self.optimizer.init(self.params)

    def model(self, params: nnx.State) -> Qwen3:
        """The model in the type that it computes in and is exported in."""
        return nnx.merge(self.graph, jax.tree.map(lambda x: x.astype(self.dtype), params))

    def learning_rate(self, step: Array, steps: Array) -> Array:
        """Linear warm-up, then a cosine from the peak down to zero."""
        r = self.recipe
        done = (step - r.warmup) / jnp.maximum(steps - r.warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        return r.peak_rate * jnp.minimum((step + 1) / r.warmup, cosine)

    @partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
    def _run_steps(self, params, moments, rows, first, steps):
        """`steps_per_call` optimizer steps from step `first` of `steps`."""

        def one_step(carry, step):
            params, moments = carry
            key = jax.random.fold_in(jax.random.key(self.recipe.seed), step)
            chosen = jax.random.randint(key, (self.recipe.batch,), 0, rows.shape[0])
            loss, gradient = jax.value_and_grad(
                lambda p: answer_loss(self.model(p), rows[chosen], self.recipe.task_weight)
            )(params)
            updates, moments = self.optimizer.update(gradient, moments, params)
            rate = self.learning_rate(step, steps)
            params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
            return (params, moments), loss

        todo = first + jnp.arange(self.recipe.steps_per_call)
        (params, moments), losses = jax.lax.scan(one_step, (params, moments), todo)
        return params, moments, jnp.mean(losses)

    def run(self, rows: np.ndarray, minutes: float) -> Iterator[tuple[int, float, float]]:
        """Train; yields (steps done, mean loss, tokens per second) after each call.

        Where `recipe.steps` would take longer than `minutes` (compilation aside), `self.steps`,
        and with it the schedule, becomes what fits.
        """
        recipe, on_device = self.recipe, jnp.asarray(rows)
        done, spent = 0, 0.0
        while done < self.steps:
            began = time.time()
            self.params, self.moments, loss = self._run_steps(
                self.params, self.moments, on_device, done, self.steps
            )
            loss = float(loss)
            taken = time.time() - began
            done += recipe.steps_per_call
            rate = recipe.steps_per_call * recipe.batch * recipe.row_length / taken
            if done > recipe.steps_per_call:  # the first call compiles
                spent += taken
                per_step = spent / (done - recipe.steps_per_call)
                fits = int((60 * minutes - spent) / per_step) if minutes < math.inf else self.steps
                calls = max(fits, 0) // recipe.steps_per_call
                if minutes < math.inf:
                    self.steps = min(self.steps, done + calls * recipe.steps_per_call)
            yield done, loss, rate

    @partial(jax.jit, static_argnums=0)
    def _decode(self, params, tokens, lengths, max_new, eos):
        """Greedy continuation of each row, recomputing all of it for every token (no cache)."""
        model = self.model(params)
        batch, width = tokens.shape
        positions = jnp.tile(jnp.arange(width), batch)
        mask = jnp.broadcast_to(causal(width), (batch, width, width))
        each = jnp.arange(batch)

        def unfinished(carry):
            step, _, _, done = carry
            return (step < max_new) & ~jnp.all(done)

        def one_token(carry):
            step, tokens, lengths, done = carry
            hidden, _ = model(tokens.reshape(-1), positions, dense_attention(mask))
            last = hidden.reshape(batch, width, -1)[each, lengths - 1]
            new = jnp.argmax(model.logits(last), axis=-1).astype(tokens.dtype)
            tokens = tokens.at[each, lengths].set(jnp.where(done, tokens[each, lengths], new))
            lengths = jnp.where(done, lengths, lengths + 1)
            return step + 1, tokens, lengths, done | jnp.isin(new, eos)

        start = (0, tokens, lengths, jnp.zeros(batch, bool))
        _, tokens, lengths, _ = jax.lax.while_loop(unfinished, one_token, start)
        return tokens, lengths

    def generate(
        self, tokenizer: Tokenizer, prompts: Sequence[str], max_new: int, batch: int
    ) -> list[tuple[str, bool]]:
        """Greedy continuations: text, and whether it ended by itself.

        At most `batch` prompts; it and the length in steps of 128 are what is compiled for.
        """
        ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
        width = max(map(len, ids)) + max_new
        buffer = np.zeros((batch, width + -width % 128), np.int32)
        starts = np.ones(batch, np.int32)
        for i, prompt in enumerate(ids):
            buffer[i, : len(prompt)] = prompt
            starts[i] = len(prompt)
        ends = eos_ids(tokenizer)
        made = self._decode(self.params, buffer, starts, max_new, jnp.array(ends))
        outputs = []
        for row, start, stop in zip(*map(np.asarray, (made[0], starts, made[1])), strict=True):
            new = row[start:stop].tolist()
            outputs.append((tokenizer.decode(new), new[-1] in ends))
        return outputs[: len(prompts)]


def _without_norms(params: nnx.State) -> Any:
    """True for the matrices: only these decay."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "norm" not in jax.tree_util.keystr(path), params
    )


# ---- evaluation -----------------------------------------------------------------------------


def accuracy(trainer: Trainer, tokenizer: Tokenizer, turns: Sequence[Turn]) -> float:
    """Share of questions whose greedy answer is right to the last character, and ends."""
    right, at_once = 0, trainer.recipe.questions_at_once
    for some in (turns[i : i + at_once] for i in range(0, len(turns), at_once)):
        longest = max(len(tokenizer.encode(turn.answer).ids) for turn in some)
        prompts = [chat_prompt(turn.question) for turn in some]
        outputs = trainer.generate(tokenizer, prompts, longest + 1, at_once)
        right += sum(out == (turn.answer, True) for out, turn in zip(outputs, some, strict=True))
    return right / len(turns)


def evaluate_tasks(
    trainer: Trainer, tokenizer: Tokenizer, tasks: Sequence[str], size: int
) -> dict[str, float]:
    """Accuracy per task on unseen questions in the main phrasing."""
    return {
        task: accuracy(trainer, tokenizer, demo_data.evaluation_set(task, size, seed=1))
        for task in tasks
    }


def evaluate_more_additions(trainer: Trainer, tokenizer: Tokenizer, size: int) -> dict[str, float]:
    """Additions in all phrasings, of mixed lengths and with many carries; the one-digit table."""
    rng = random.Random(2)
    mixed = [demo_data.addition(rng, held_out=True) for _ in range(size)]
    pairs = [(a, b) for a in range(10) for b in range(10)][: max(size, 4)]
    table = [Turn(demo_data.MAIN_ADDITION.format(a=a, b=b), str(a + b)) for a, b in pairs]
    return {
        "addition_any_phrasing": accuracy(trainer, tokenizer, mixed),
        "addition_one_digit_seen": accuracy(trainer, tokenizer, table),
    }


def evaluate_stories(
    trainer: Trainer, tokenizer: Tokenizer, size: int
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """How many stories end, are about what was asked, and use known words only; two samples."""
    rng, known = random.Random(3), demo_data.story_words()
    subjects = [(rng.choice(demo_data.KINDS), rng.choice(tuple(demo_data.OBJECTS)))]
    subjects += [("fox", "lantern")]
    while len(subjects) < size:
        subjects.append((rng.choice(demo_data.KINDS), rng.choice(tuple(demo_data.OBJECTS))))
    requests = [demo_data.story_request(*subject) for subject in subjects]
    prompts = [chat_prompt(request) for request in requests] + ["Once upon a time"]
    max_new = min(320, trainer.recipe.row_length - 64)
    outputs = trainer.generate(tokenizer, prompts, max_new, len(prompts))
    told = list(zip(subjects, outputs[:-1], strict=True))
    words = [set(demo_data.words_of(text)) for _, (text, _) in told]
    result = {
        "story_ends": sum(ended for _, (_, ended) in told) / len(told),
        "story_is_about_both": sum(
            set(subject) <= w for (subject, _), w in zip(told, words, strict=True)
        )
        / len(told),
        "story_known_words": sum(w <= known for w in words) / len(told),
    }
    samples = [(requests[i], outputs[i][0]) for i in (0, 1)]
    return result, [*samples, (prompts[-1], prompts[-1] + outputs[-1][0])]


# ---- the directory --------------------------------------------------------------------------


def checkpoint(config: ModelConfig, params: nnx.State) -> dict[str, np.ndarray]:
    """The parameters under their Hugging Face names, un-fused, in bfloat16."""
    p = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    layers, d = p["layers"], config.hidden_size
    tensors = {
        "model.embed_tokens.weight": p["embed_tokens"]["weight"],
        "model.norm.weight": p["norm"]["weight"],
    }
    for i in range(config.num_layers):
        attn, mlp, at = layers["self_attn"], layers["mlp"], f"model.layers.{i}."
        qkv = attn["qkv_proj"]["weight"][i]  # [K G+2 H D]
        gate_up = mlp["gate_up_proj"]["weight"][i]  # [2 F D]
        tensors |= {
            at + "self_attn.q_proj.weight": qkv[:, :-2].reshape(-1, d),
            at + "self_attn.k_proj.weight": qkv[:, -2].reshape(-1, d),
            at + "self_attn.v_proj.weight": qkv[:, -1].reshape(-1, d),
            at + "self_attn.o_proj.weight": attn["o_proj"]["weight"][i].reshape(d, -1),
            at + "self_attn.q_norm.weight": attn["q_norm"]["weight"][i],
            at + "self_attn.k_norm.weight": attn["k_norm"]["weight"][i],
            at + "mlp.gate_proj.weight": gate_up[0],
            at + "mlp.up_proj.weight": gate_up[1],
            at + "mlp.down_proj.weight": mlp["down_proj"]["weight"][i],
            at + "input_layernorm.weight": layers["input_layernorm"]["weight"][i],
            at + "post_attention_layernorm.weight": layers["post_attention_layernorm"]["weight"][i],
        }
    return {
        name: np.ascontiguousarray(tensor, dtype=ml_dtypes.bfloat16)
        for name, tensor in sorted(tensors.items())
    }


def write_model(
    out: Path, trainer: Trainer, tokenizer: Tokenizer, result: dict[str, Any], note: str = ""
) -> None:
    """Write everything that transformers and the engine load; `out` is replaced as a whole."""
    out = out.absolute()
    new, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    new.mkdir(parents=True)
    c, (eos, pad) = trainer.config, eos_ids(tokenizer)
    weights = save(checkpoint(c, trainer.params), metadata={"format": "pt"})
    (new / "model.safetensors").write_bytes(weights)
    tokenizer.save(str(new / "tokenizer.json"))
    files = {
        "config.json": {
            "architectures": [c.architecture],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": pad,
            "eos_token_id": eos,
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "hidden_size": c.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_position_embeddings,
            "max_window_layers": c.num_layers,
            "model_type": "qwen3",
            "num_attention_heads": c.num_heads,
            "num_hidden_layers": c.num_layers,
            "num_key_value_heads": c.num_kv_heads,
            "rms_norm_eps": c.rms_norm_eps,
            "rope_scaling": None,
            "rope_theta": c.rope_theta,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": c.vocab_size,
        },
        "generation_config.json": {
            "bos_token_id": pad,
            "do_sample": False,
            "eos_token_id": [eos, pad],
            "pad_token_id": pad,
        },
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": TURN_END,
            "model_max_length": c.max_position_embeddings,
            "pad_token": EOS,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
        "evaluation.json": result,
    }
    for name, content in files.items():
        (new / name).write_text(json.dumps(content, indent=2) + "\n")
    (new / "README.md").write_text(model_card(trainer, result, note, len(weights)))
    if out.exists():
        out.rename(old)
    new.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def model_card(trainer: Trainer, result: dict[str, Any], note: str, size: int) -> str:
    """README.md of the model's directory."""
    r = trainer.recipe
    names = {
        "addition": 'unseen additions, uniform in 0..999, "What is 345 + 678?"',
        "addition_any_phrasing": "unseen additions, all phrasings and lengths, many carries",
        "addition_one_digit_seen": "one-digit additions (seen in training)",
        "sort_numbers": "sorting 3 to 8 numbers below 1000",
        "sort_words": "sorting 3 to 8 of the words that it knows",
        "copy": "copying words, numbers and random strings",
        "reverse": "reversing 2 to 6 such words or numbers",
        "count": "counting 1 to 10 such words",
        "story_ends": "stories that come to an end",
        "story_is_about_both": "stories that are about both subjects asked for",
        "story_known_words": "stories made of known words only",
    }
    table = "\n".join(f"| {names[k]} | {100 * v:.1f}% |" for k, v in result.items() if k in names)
    rows = f"{r.pool_rows:,} rows of {r.row_length} tokens"
    seen = trainer.steps * r.batch * r.row_length / 1e6
    minutes = f"; {result['minutes']:g} minutes with data and tests" if "minutes" in result else ""
    return f"""\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# The nanovllm_jax demo model

{note}A very small language model that ships with `nanovllm_jax`, so that the first command prints
real text without a download, and so that every change of the engine can be checked against
answers that are known to be right.

    from nanovllm_jax import LLM, SamplingParams
    llm = LLM("nanovllm_jax/demo_model")
    llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens=256))

## Architecture

- Qwen3 (`Qwen3ForCausalLM`, tied embeddings): {trainer.num_parameters:,} parameters,
  {size / 1e6:.2f} MB in bfloat16
- {r.num_layers} layers, hidden size {r.hidden_size}, MLP {r.intermediate_size}; \
{r.num_heads} query and {r.num_kv_heads} key/value heads of {r.head_dim}
- byte-level BPE, {r.vocab_size} tokens, trained on the same data; every digit is a token
- ChatML template; an answer ends with `<|im_end|>`, a text with `<|endoftext|>`

## Training

By `scripts/train_demo.py`, from random weights, on one {jax.devices()[0].device_kind}:

- {trainer.steps:,} steps of {r.batch} x {r.row_length} tokens, {seen:.0f} million in all{minutes}
- AdamW: peak {r.peak_rate}, {r.warmup} steps of warm-up, cosine to zero, weight decay \
{r.weight_decay}, clipping {r.clip}
- {trainer.dtype.name} with float32 master weights
- loss on answers and stories only; a token of a checkable answer weighs {r.task_weight:g}

The data is synthetic and made by `scripts/demo_data.py` from seed {r.seed}, {rows}:
children's stories from a template grammar (some twenty plots), additions of numbers of up to
three digits, sorting, copying, reversing and counting lists, and a little small talk. No text was
taken from anywhere else.

What is evaluated was never trained on: one tenth of all additions (by a hash of the pair, in
either order and every phrasing; `is_held_out`) and one tenth of all lists (`is_held_out_list`).

## Measured

Greedy, in {trainer.dtype.name}, right to the last character; {r.questions} unseen questions of \
each kind, in the
main phrasing where nothing else is said; {r.stories} stories.

| task | right |
|---|---|
{table}

## What it is not good for

Anything else. It knows no facts, only English, only these tasks, and only roughly these
phrasings; it cannot subtract or multiply. It sorts, reverses and counts \
{len(demo_data.WORDS)} words (`WORDS`), and
often fails on others. Its stories follow the templates that it was trained on.
It has seen at most {r.row_length} tokens of context, although the position limit is \
{trainer.config.max_position_embeddings}.
"""


if __name__ == "__main__":
    main()
