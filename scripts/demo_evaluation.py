"""Measures the demo model through the engine: how many of its answers and stories are right."""

import random
from collections.abc import Sequence

from nanovllm_jax import LLM, SamplingParams
from scripts import demo_data, stories
from scripts.demo_data import Turn

MAX_STORY = 320  # tokens


def complete(llm: LLM, prompts: Sequence[str], max_tokens: int) -> list[tuple[str, bool]]:
    """Continues prompts greedily; returns each text, and whether it ended by itself."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    ends = llm.config.model_config.eos_token_ids
    return [(out["text"], out["token_ids"][-1] in ends) for out in outputs]


def wrong_answers(llm: LLM, turns: Sequence[Turn]) -> list[tuple[Turn, str]]:
    """Returns the questions whose greedy answer is not right to the last character, or goes on."""
    longest = max(len(turn.answer) for turn in turns) + 1  # characters: never fewer than tokens
    answers = complete(llm, [demo_data.chat_prompt(turn.question) for turn in turns], longest)
    return [
        (turn, text)
        for turn, (text, ended) in zip(turns, answers, strict=True)
        if (text, ended) != (turn.answer, True)
    ]


def evaluate(llm: LLM, questions: int, told: int) -> dict[str, float]:
    """Measures the share of right answers of each task, and what shares of stories are good.

    Args:
        questions: Number of unseen questions per task.
        told: Number of stories.
    """
    sets = {task: demo_data.evaluation_set(task, questions, seed=1) for task in demo_data.TASKS}
    rng = random.Random(2)
    sets["addition_any_phrasing"] = [
        demo_data.addition(rng, held_out=True) for _ in range(questions)
    ]
    digits = range(10)
    sets["addition_one_digit_seen"] = [
        Turn(demo_data.MAIN_ADDITION.format(a=a, b=b), str(a + b)) for a in digits for b in digits
    ]
    result = {name: 1 - len(wrong_answers(llm, turns)) / len(turns) for name, turns in sets.items()}
    return result | _evaluate_stories(llm, told)


def _evaluate_stories(llm: LLM, count: int) -> dict[str, float]:
    rng, known = random.Random(3), stories.story_words()
    subjects = [
        (rng.choice(stories.KINDS), rng.choice(tuple(stories.OBJECTS))) for _ in range(count)
    ]
    prompts = [demo_data.chat_prompt(demo_data.story_request(*subject)) for subject in subjects]
    outputs = complete(llm, prompts, MAX_STORY)
    words = [set(stories.words_of(text)) for text, _ in outputs]
    good = {
        "story_ends": [ended for _, ended in outputs],
        "story_is_about_both": [
            set(subject) <= used for subject, used in zip(subjects, words, strict=True)
        ],
        "story_known_words": [used <= known for used in words],
    }
    return {name: sum(values) / count for name, values in good.items()}


def samples(llm: LLM) -> list[str]:
    """Tells two stories to look at, one that was asked for and one that was begun."""
    request, begin = demo_data.story_request("fox", "lantern"), "Once upon a time"
    (asked, _), (told, _) = complete(llm, [demo_data.chat_prompt(request), begin], MAX_STORY)
    return [f"> {request}\n{asked}", begin + told]
