"""What students learn: the source's averaged predictive, text, or distributions of tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model

from kilobayes import host
from kilobayes.distil import classes, tokens
from kilobayes.errors import KilobayesError
from kilobayes.host.vocabulary import hidden_states
from kilobayes.language import LanguageModel
from kilobayes.models import load_causal
from kilobayes.options import Options
from kilobayes.predict import class_nll
from kilobayes.tasks.classify import Classify
from kilobayes.tasks.data import load_examples
from kilobayes.tasks.lm import Language
from kilobayes.tasks.packing import IGNORED
from kilobayes.workflows.finetune import fit_examples

from .. import small, small_lm

SEEN = [("fa fe fi fo",), ("ba be",), ("ka ke ki",), ("da de di do du",)]


def options(**more: Any) -> Options:
    given: dict[str, Any] = {
        "model": small.base(),
        "adapter": "LoRA(r=2)",
        "posterior": "Point()",
        "lr": 0.02,
    }
    given |= {"epochs": 8, "batch_size": 8, "max_length": 24, "calibration": "0", "data": "made up"}
    return Options(**given | more)


@pytest.fixture(scope="module")
def teacher() -> Any:
    posterior = "SWAG(rank=3, start=0.3)"
    return fit_examples(options(posterior=posterior), load_examples(small.rows(60, 1)), None)


ROWS = [(row["text"],) for row in small.rows(80, 5)]


def test_soft_labels_are_the_mean_of_the_draws_probabilities(teacher: Any) -> None:
    found = classes.targets(teacher, ROWS)
    predictive = teacher.predict(load_examples([row[0] for row in ROWS], need_labels=False))
    z = predictive.logits.double().numpy()
    by_hand = (np.exp(z) / np.exp(z).sum(-1, keepdims=True)).mean(0)
    assert z.shape[0] == 10
    np.testing.assert_allclose(found.numpy(), by_hand, atol=1e-12)
    hard = classes.targets(teacher, ROWS, "text")
    np.testing.assert_array_equal(hard.numpy(), np.eye(3)[by_hand.argmax(-1)])
    with pytest.raises(KilobayesError, match="not transferred by 'logits'"):
        classes.targets(teacher, ROWS, "logits")


def test_soft_loss_is_cross_entropy_and_the_usual_loss_for_hard_labels(teacher: Any) -> None:
    gen = torch.Generator().manual_seed(0)
    task = Classify(teacher.task.tokenizer, ("a", "b", "c"), 24)
    scores, q = torch.randn(2 * 5, 3, generator=gen), torch.rand(2, 5, 3, generator=gen).softmax(-1)

    class Output:
        logits = scores

    p = scores.double().softmax(-1).reshape(2, 5, 3)
    found = classes.soft_nll(task)(Output(), q.reshape(2, -1))
    torch.testing.assert_close(found.double(), -(q.double() * p.log()).sum(-1), atol=1e-6, rtol=0)
    labels = torch.tensor([[0, 1, 2, 1, 0], [2, 2, 1, 0, 0]])
    hard = torch.nn.functional.one_hot(labels, 3).float().reshape(2, -1)
    torch.testing.assert_close(classes.soft_nll(task)(Output(), hard), class_nll(task)(Output(), labels))


def test_a_student_learns_what_its_teacher_says_and_not_more(teacher: Any) -> None:
    names = list(teacher.task.classes)
    probs = classes.targets(teacher, ROWS)
    held = ([(row["text"],) for row in small.rows(40, 9)], None)
    truth = classes.targets(teacher, held[0])
    student = classes.transfer(options(adapter="LoRA(r=4)", epochs=12), ROWS, probs, names)
    blank = classes.transfer(options(lr=1e-9, epochs=1), ROWS, probs, names)
    learned, before = (classes.agreement(s, held[0], truth) for s in (student, blank))
    assert learned["same"] > before["same"] + 0.2
    assert learned["divergence_nats"] < 0.5 * before["divergence_nats"]
    own = classes.agreement(teacher, held[0], truth)
    assert own == {"same": 1.0, "divergence_nats": pytest.approx(0.0, abs=1e-9), "rows": 40}
    told = classes.told(truth, names)
    assert sum(told["classes"].values()) == 40
    assert told["entropy_nats"] < math.log(3)


def test_the_same_from_hard_labels_as_from_labelled_rows(teacher: Any) -> None:
    rows = load_examples(small.rows(24, 3))
    hard = torch.nn.functional.one_hot(torch.tensor(rows.labels), 3).double()
    mine = classes.transfer(options(epochs=2), [(t,) for t in rows.texts], hard, rows.classes)
    usual = fit_examples(options(epochs=2), rows, None)
    for key, value in usual.state.theta.items():
        torch.testing.assert_close(mine.state.theta[key], value, atol=1e-5, rtol=1e-4)


def test_a_posterior_that_needs_rows_held_out_says_so() -> None:
    soft = torch.full((4, 3), 1 / 3).double()
    with pytest.raises(KilobayesError, match="needs rows to calibrate on"):
        classes.transfer(options(posterior="Temperature(Point())"), ROWS[:4], soft, ["a", "b", "c"])


@pytest.fixture(scope="module")
def writer() -> LanguageModel:
    return LanguageModel.load(small_lm.run())


def student(**more: Any) -> Options:
    given: dict[str, Any] = {"model": str(small_lm.base()), "task": "lm", "target_modules": "q_proj,v_proj"}
    return options(**given | {"epochs": 3, "max_length": 32} | more)


def test_what_is_written_repeats_and_what_was_cut_teaches_no_end(writer: LanguageModel) -> None:
    found = tokens.write(writer, SEEN, max_new_tokens=6, completions=2, seed=3)
    assert found == tokens.write(writer, SEEN, max_new_tokens=6, completions=2, seed=3)
    assert {given for given, _, _ in found} <= {row[0] for row in SEEN}
    task = Language(writer.tokenizer, 32)
    given = [("fa fe", " ba be", True), ("fa fe", " ba be", False)]
    cut, whole = tokens.encode(task, given).labels
    assert cut[:-1] == whole[:-1]
    assert (cut[-1], whole[-1]) == (IGNORED, task.end[0])


def test_distributions_are_the_averaged_probabilities(writer: LanguageModel) -> None:
    task = Language(writer.tokenizer, 32)
    rows = tokens.encode(task, [("fa fe", " ba be bi", False), ("ka", " ke ki ko ku", True)])
    soft = tokens.distributions(writer, task, rows, most=1000)
    theta = writer.draws()
    assert theta is not None
    at = 0
    for ids, labels in zip(rows.ids, rows.labels, strict=True):
        each = []
        for s in range(4):
            host.install(writer.model, host.build(writer.model, {k: v[s : s + 1] for k, v in theta.items()}))
            with torch.no_grad():
                each.append(writer.model(input_ids=torch.tensor([ids])).logits[0].double())
        host.install(writer.model, None)
        probs = (torch.stack(each) / small_lm.TEMPERATURE).softmax(-1).mean(0)
        for place, label in enumerate(labels):
            if label != IGNORED:
                found = torch.zeros(64).double().index_add(0, soft.tokens[at], soft.probs[at].double())
                torch.testing.assert_close(found, probs[place], atol=1e-6, rtol=0)
                at += 1
    assert at == len(soft.tokens)
    few = tokens.distributions(writer, task, rows, most=3)
    torch.testing.assert_close(few.probs.sum(-1), torch.ones(at))
    assert few.tokens.tolist() == soft.tokens[:, :3].tolist()


def test_loss_by_logits_is_cross_entropy_at_each_learned_token(writer: LanguageModel) -> None:
    base = load_causal(str(small_lm.base()))
    config = host.KilobayesConfig(adapter="LoRA(r=2)", target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base.model, config).eval()
    task = Language(base.tokenizer, 32)
    rows = tokens.encode(task, [("fa fe", " ba be bi", False), ("ka", " ke ki", False)])
    soft = tokens.distributions(writer, task, rows, most=5)
    inputs, labels = task.collate(tokens.numbered(rows), [0, 1])
    _, plain = task.collate(rows, [0, 1])
    with torch.no_grad():
        logs = model(**inputs).logits.double().log_softmax(-1)
        with hidden_states(model) as head:
            model(**inputs)
            found = tokens.soft_nll(head, soft, 2.0)(None, labels.reshape(1, -1))
    by_hand = torch.zeros(2).double()
    for at, (row, place) in enumerate((plain != IGNORED).nonzero().tolist()):
        by_hand[row] -= (soft.probs[at].double() * logs[row, place, soft.tokens[at]]).sum() / 2.0
    torch.testing.assert_close(found[0].double(), by_hand, atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", ["text", "logits"])
def test_a_language_model_learns_from_another(writer: LanguageModel, objective: str) -> None:
    written = tokens.write(writer, [(w,) for w in small_lm.WORDS], max_new_tokens=12, seed=1)
    own, held = written[:40], written[40:]
    source = writer if objective == "logits" else None
    learned = tokens.transfer(student(adapter="LoRA(r=8)", epochs=8), own, held, teacher=source)
    before = tokens.transfer(student(lr=1e-9, epochs=1), own, held)
    apart = [m.scores(tokens.encode(m.task, held)).nll.mean() for m in (learned, before)]
    assert apart[0] < apart[1] - 0.1


def test_logits_need_one_tokenizer(writer: LanguageModel, tmp_path: Path) -> None:
    tokens.check("logits", writer.tokenizer, load_causal(str(small_lm.base())).tokenizer)
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(str(small_lm.base()))
    other.add_tokens(["bears"])
    with pytest.raises(KilobayesError, match="tokenizers differ") as caught:
        tokens.check("logits", writer.tokenizer, other)
    assert "--objective text" in caught.value.remedy
    elsewhere = replace(writer, tokenizer=other)
    with pytest.raises(KilobayesError, match="tokenizers differ"):
        tokens.transfer(student(), [("fa", " fe", False)], teacher=elsewhere)
    with pytest.raises(KilobayesError, match="not transferred by 'probabilities'"):
        tokens.check("probabilities")
