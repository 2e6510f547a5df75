"""Choosing by the next token: scores are entries of all logits, absent options have no probability."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model

from kilobayes import host
from kilobayes.energy import ModelEnergy
from kilobayes.errors import KilobayesError
from kilobayes.models import load_causal
from kilobayes.posteriors.laplace import Laplace
from kilobayes.predict import Predictive, bare, logits
from kilobayes.tasks.choice import Choice
from kilobayes.tasks.likelihood import OptionLikelihood
from kilobayes.tasks.prompt import Prompt
from kilobayes.tasks.questions import load_questions
from tests.small_choice import base, labelled, questions

TASKS = {"": Choice, "sum": OptionLikelihood, "token": OptionLikelihood, "byte": OptionLikelihood}


def made(scoring: str = "", side: str = "right", stack: int = 3, count: int = 7) -> tuple[Any, Any, Any, Any]:
    """A hosted model, a task, examples of 2 to 4 options and leaves that differ from each other."""
    loaded = load_causal(base())
    loaded.tokenizer.padding_side = side
    answers = {"": None, "sum": "text", "token": "text/token", "byte": "text/byte"}[scoring]
    examples = load_questions(questions(count, 3), answers=answers)
    task = TASKS[scoring](loaded.tokenizer, examples.classes, examples.prompt, 40)
    config = host.KilobayesConfig(
        adapter="LoRA(r=2)", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model: Any = get_peft_model(loaded.model, config).eval()
    gen = torch.Generator().manual_seed(1)
    theta = {k: 0.5 * torch.randn(stack, *v.shape[1:], generator=gen) for k, v in host.read(model).items()}
    return model, task, examples, theta


def slowly(model: Any, theta: Any, task: Any, examples: Any) -> torch.Tensor:
    """Log-probabilities ``(S, N, C)`` from full logits, one row, option, member at a time; -inf if absent."""
    out = torch.full((len(next(iter(theta.values()))), len(examples), len(task.classes)), -torch.inf)
    for s in range(len(out)):
        host.install(model, host.build(model, {k: v[s : s + 1] for k, v in theta.items()}))
        for n, options in enumerate(examples.options):
            text = f"{task.prompt.head}{examples.texts[n]}{task.prompt.cue}"
            ids = [1, *task.tokenizer(text, add_special_tokens=False)["input_ids"]]
            for c, option in enumerate(options):
                said = option if task.prompt.scoring else task.prompt.answers[c]
                own = task.tokenizer(said, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logs = model(input_ids=torch.tensor([ids + own])).logits[0].log_softmax(-1)
                total = sum(float(logs[len(ids) - 1 + i, token]) for i, token in enumerate(own))
                unit = {"token": len(own), "byte": len(said.encode())}.get(task.prompt.scoring, 1)
                out[s, n, c] = total / unit
    host.install(model, None)
    return out


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("scoring", list(TASKS))
def test_scores_are_those_of_all_logits(scoring: str, side: str) -> None:
    model, task, examples, theta = made(scoring, side)
    encoded = task.encode(examples)
    found = logits(model, theta, task, encoded, batch_size=3)
    expected = slowly(model, theta, task, examples)
    torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), rtol=1e-4, atol=1e-6)
    there = expected.isfinite()
    if scoring:
        torch.testing.assert_close(found[there], expected[there], rtol=1e-5, atol=1e-5)
    mean = expected.double().softmax(-1).mean(0)
    torch.testing.assert_close(Predictive(found).probs, mean, rtol=1e-4, atol=1e-6)
    assert bool((Predictive(found).probs[~there[0]] == 0).all())
    assert bool(Predictive(found).mutual_info.isfinite().all())
    alone = [
        logits(model, theta, task, encoded.take(torch.tensor([i])), pack=False) for i in range(len(encoded))
    ]
    torch.testing.assert_close(torch.cat(alone, dim=1), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scoring", ["", "token"])
def test_without_an_adapter(scoring: str) -> None:
    model, task, examples, theta = made(scoring, stack=1)
    nothing = {k: torch.zeros_like(v) for k, v in theta.items()}
    encoded = task.encode(examples)
    expected = logits(model, nothing, task, encoded)
    with model.disable_adapter():
        found = bare(load_causal(base()).model, task, encoded, batch_size=2)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scoring", ["", "token"])
def test_derivatives_are_those_of_differences(scoring: str) -> None:
    model, task, examples, theta = made(scoring, stack=1, count=4)
    energy = ModelEnergy(model, task, task.encode(examples))
    key = next(k for k in theta if k.endswith("/A"))
    found = torch.zeros(len(examples), *theta[key].shape[1:])
    for batch in energy.jacobians(
        theta,
        [key],
        lambda scores: (torch.arange(scores.shape[1]) == 1).float()[None, :, None].expand(len(scores), -1, 1),
    ):
        found[batch.rows] = batch.gradients[key][:, 0]
    direction = torch.randn(theta[key].shape, generator=torch.Generator().manual_seed(2))
    step = 1e-3
    high, low = (
        energy.logits(theta | {key: theta[key] + sign * step * direction})[0, :, 1] for sign in (1, -1)
    )
    expected = (high - low) / (2 * step)
    torch.testing.assert_close((found * direction[0]).flatten(1).sum(1), expected, rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("scoring", ["", "sum"])
def test_laplace_of_rows_that_lack_options(scoring: str) -> None:
    model, task, examples, theta = made(scoring, stack=1)
    energy = ModelEnergy(model, task, task.encode(examples))
    posterior = Laplace()
    gen = torch.Generator().manual_seed(0)
    state = posterior.fit(posterior.init(theta, gen), energy, gen)
    assert all(v.isfinite().all() for v in posterior.sample(state, 2, gen).values())


def test_answers_that_begin_alike() -> None:
    tokenizer = load_causal(base()).tokenizer
    with pytest.raises(
        KilobayesError, match=r"begin with the same token[\s\S]*one \('yes w1'\), two \('yes w2'\)"
    ):
        Choice(tokenizer, ("one", "two", "three"), Prompt("{text} :", ("yes w1", "yes w2", "no")))
    with pytest.raises(KilobayesError, match="needs an answer"):
        Choice(tokenizer, ("one", "two"), Prompt("{text} :", ("yes",)))
    with pytest.raises(KilobayesError, match="the template alone takes"):
        Choice(tokenizer, ("0", "1"), Prompt("Say {text} :", ("yes", "no")), 3)


def test_long_rows_lose_the_beginning_of_their_own_text() -> None:
    loaded = load_causal(base())
    prompt = Prompt("Say : {text} . Answer:", ("no", "yes"))
    task = Choice(loaded.tokenizer, ("0", "1"), prompt, 10)
    rows = [{"text": "w1 w2 w3 w4 w5 w6 w7", "label": 0}, {"text": "w1", "label": 1}]
    encoded = task.encode(load_questions(rows, prompt=prompt))
    words = [loaded.tokenizer.convert_ids_to_tokens(ids) for ids in encoded.ids]
    assert words[0] == ["<s>", "Say", ":", "w4", "w5", "w6", "w7", ".", "Answer", ":"]
    assert words[1] == ["<s>", "Say", ":", "w1", ".", "Answer", ":"]  # and nothing ends the prompt
    assert encoded.truncated == 1
    long = OptionLikelihood(loaded.tokenizer, ("A", "B"), Prompt("{question} :", (*"AB",), "sum"), 5)
    rows = [{"question": "w1 w2 w3 w4", "choices": ["w5 w6", "w7"], "answer": 0}]
    encoded = long.encode(load_questions(rows, prompt=long.prompt))
    assert loaded.tokenizer.convert_ids_to_tokens(encoded.ids[0]) == [
        "<s>",
        "w4",
        ":",
        "w5",
        "w6",
        "<s>",
        "w4",
        ":",
        "w7",
    ]
    assert encoded.truncated == 1
    with pytest.raises(KilobayesError, match="row 1 does not fit"):
        long.encode(load_questions([rows[0] | {"choices": ["w5 w6 w7 w8", "w7"]}], prompt=long.prompt))


def test_rows_of_another_template_are_refused() -> None:
    task = Choice(load_causal(base()).tokenizer, ("0", "1"), Prompt("{text} :", ("no", "yes")))
    with pytest.raises(KilobayesError, match="were not read for this task's template"):
        task.encode(load_questions(labelled(3)))


@pytest.mark.parametrize("name", ["stories260K", "TinyStories-656K"])
def test_where_real_tokenizers_put_the_space(name: str) -> None:
    folder = Path(os.environ.get("KILOBAYES_MODELS", "")) / name
    if not os.environ.get("KILOBAYES_MODELS") or not folder.is_dir():
        pytest.skip(f"KILOBAYES_MODELS does not hold {name}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for words in ([*"ABCDE"], ["yes", "no"], ["good", "bad"]):
        for cue in ("\nAnswer:", "\nAnswer: ", " It was"):
            task = Choice(tokenizer, words, Prompt("{text}" + cue, tuple(words)), 64)
            first = [tokenizer.convert_ids_to_tokens(token).strip("\u2581 ") for token in task.tokens]
            assert [f[0] for f in first] == [w[0] for w in words]
            encoded = task.encode(load_questions(["One day"], prompt=task.prompt, need_labels=False))
            shown = tokenizer.decode([*encoded.ids[0][1:], task.tokens[0]])
            assert shown.split() == f"One day{cue} {first[0]}".split()
