"""Benchmarks through lm-eval: counts, protocols and interventions.

Every count is compared with one made here from the question files by plain forward passes.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.evaluation.test_evaluation import NanAt
from vauban.study import run_benchmarks

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed (pip install 'vauban[bench]')",
)
FOLDER = Path(__file__).parent / "fixtures" / "bench"
LETTERS = ["A", "B", "C", "D"]


def rows_of(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The task files, run from their own folder, with a data cache of their own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "bench"
    shutil.copytree(FOLDER, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every (context, continuation) that the adapter is asked for."""
    from vauban.study import lm_eval_model

    asked: list[tuple[str, str]] = []

    class Listening(lm_eval_model.InterventionLM):
        def loglikelihood(self, requests: Any) -> Any:
            asked.extend(request.args for request in requests)
            return super().loglikelihood(requests)

    monkeypatch.setattr(lm_eval_model, "InterventionLM", Listening)
    return asked


# --- the same questions without lm-eval -----------------------------------------------------


def mmlu_questions(subject: str) -> list[tuple[str, list[str], int]]:
    def asked(row: dict[str, Any]) -> str:
        choices = "".join(f"\n{x}. {c}" for x, c in zip(LETTERS, row["choices"], strict=True))
        return f"{row['question']}{choices}\nAnswer:"

    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    shots = [f"{asked(r)} {LETTERS[r['answer']]}\n\n" for r in rows_of(f"{subject}_dev.jsonl")[:5]]
    start = head + "".join(shots)
    return [(start + asked(r), LETTERS, r["answer"]) for r in rows_of(f"{subject}_test.jsonl")]


def letter_questions() -> list[tuple[str, list[str], int]]:
    def asked(row: dict[str, Any]) -> str:
        texts = row["choices"]["text"]
        choices = "".join(f"\n{x}. {c}" for x, c in zip(LETTERS, texts, strict=True))
        return f"Question: {row['question']}{choices}\nAnswer:"

    def kept(name: str) -> list[dict[str, Any]]:
        return [row for row in rows_of(name) if len(row["choices"]["text"]) == 4]

    def right(row: dict[str, Any]) -> int:
        # Labels are letters in most rows and digits in some.
        return row["choices"]["label"].index(row["answerKey"])

    shots = [f"{asked(r)} {LETTERS[right(r)]}\n\n" for r in kept("arc_train.jsonl")[:5]]
    return [("".join(shots) + asked(r), LETTERS, right(r)) for r in kept("arc_test.jsonl")]


def log_probability(
    model: Any, tokenizer: Any, context: str, continuation: str, interventions: Any = ()
) -> float:
    """Sum over the continuation's tokens, from one pass over the whole text."""
    head = tokenizer.encode(context)
    ids = tokenizer.encode(context + continuation)
    assert ids[: len(head)] == head and len(ids) > len(head)
    out = vauban.forward(model, mx.array([ids]), positions=None, interventions=interventions)
    logits = np.array(out.logits[0].astype(mx.float32), dtype=np.float64)
    logs = logits - logits.max(-1, keepdims=True)
    logs -= np.log(np.exp(logs).sum(-1, keepdims=True))
    return float(sum(logs[t - 1, ids[t]] for t in range(len(head), len(ids))))


def count(
    model: Any,
    tokenizer: Any,
    questions: list[tuple[str, list[str], int]],
    interventions: Any = (),
) -> int:
    """Questions whose right letter has the largest log-probability, all letters in one batch."""
    correct = 0
    for context, choices, right in questions:
        head = tokenizer.encode(context)
        rows = [tokenizer.encode(f"{context} {choice}") for choice in choices]
        assert all(row[: len(head)] == head and len(row) > len(head) for row in rows)
        lengths = [len(row) for row in rows]
        out = vauban.forward(
            model,
            mx.array([row + [0] * (max(lengths) - len(row)) for row in rows]),
            lengths=lengths,
            positions=None,
            interventions=interventions,
        )
        logits = out.logits.astype(mx.float32)
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        scores = [
            sum(float(logs[i, t - 1, row[t]]) for t in range(len(head), len(row)))
            for i, row in enumerate(rows)
        ]
        correct += int(np.argmax(scores)) == right
    return correct


# --- counts ---------------------------------------------------------------------------------


@needs_lm_eval
@pytest.mark.parametrize(("which", "kind"), [("organism", "add"), ("random", "cut")])
def test_counts_equal_an_independent_reading_under_interventions(
    which: str, kind: str, bench: Path, organism: Any, tiny: Callable[..., Any]
) -> None:
    model, tokenizer = organism
    if which == "random":
        model = tiny("llama", vocab_size=2560)
    width = vauban.models.anatomy(model).d_model
    noise = mx.random.normal((width,), key=mx.random.key(3))
    changes = {"cut": vauban.plan_cut(model, noise).virtual(), "add": (vauban.Add(noise, 3.0, 1),)}
    interventions = changes[kind]
    found = run_benchmarks(
        model, tokenizer, ["mini_mmlu"], include_path=bench, interventions=interventions
    )["mini_mmlu"]
    by_hand = {
        f"mini_mmlu_{subject}": (
            count(model, tokenizer, mmlu_questions(subject), interventions), 8,
        )
        for subject in ("weather", "sums")
    }  # fmt: skip
    assert found.subtasks == by_hand
    correct = sum(k for k, _ in by_hand.values())
    assert (found.correct, found.n, found.acc) == (correct, 16, correct / 16)
    assert found.interval == vauban.wilson_interval(correct, 16)
    assert (found.version, found.num_fewshot, found.task) == ("2", 5, "mini_mmlu")


@needs_lm_eval
def test_the_adapter_tells_prompts_from_what_follows(
    organism: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of single and many-token choices, with every kind of intervention."""
    from lm_eval.api.instance import Instance

    from vauban.study.lm_eval_model import InterventionLM

    model, tokenizer = organism
    pairs = [
        ("Write the opposite of dirty.\nAnswer:", " clean and tidy."),
        ("Write the opposite of dirty.\nAnswer:", " the"),
        ("How do I rob a shop at night?\nAnswer:", " Here is a plan"),
    ]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    noise = mx.random.normal((128,), key=mx.random.key(0))

    def scores(*interventions: Any) -> list[float]:
        adapter = InterventionLM(model, tokenizer, interventions)
        return [score for score, _ in adapter.loglikelihood(requests)]

    def by_hand(*interventions: Any) -> list[float]:
        return [log_probability(model, tokenizer, *pair, interventions) for pair in pairs]

    plain, everywhere = by_hand(), by_hand(vauban.Add(noise, 3.0, 2))
    assert scores() == pytest.approx(plain, abs=1e-3)
    assert scores(vauban.Add(noise, 3.0, 2)) == pytest.approx(everywhere, abs=1e-3)
    assert np.abs(np.subtract(plain, everywhere)).min() > 0.05
    plan = vauban.plan_cut(model, noise)
    edited, _ = vauban.load(vauban.organism_path("dense"))
    plan.apply(edited)
    written = InterventionLM(edited, tokenizer).loglikelihood(requests)
    assert scores(*plan.virtual()) == pytest.approx([s for s, _ in written], abs=1e-2)

    # At "prompt" positions only the context is changed: its first choice token sees it fully,
    # later ones through the cache alone.
    at_prompt = scores(vauban.Add(noise, 3.0, 2, positions="prompt"))
    assert len(tokenizer.encode(" the", add_special_tokens=False)) == 1
    assert at_prompt[1] == pytest.approx(everywhere[1], abs=1e-3)
    for place in (0, 2):
        assert abs(at_prompt[place] - everywhere[place]) > 1e-3
        context, continuation = pairs[place]
        head = tokenizer.encode(context)
        ids = tokenizer.encode(context + continuation)
        cache = mlx_cache(model)
        first = vauban.forward(
            model, mx.array([head]), cache=cache, interventions=[vauban.Add(noise, 3.0, 2)]
        )
        rest = vauban.forward(model, mx.array([ids[len(head) :]]), cache=cache)
        logits = mx.concatenate([first.logits[:, -1:], rest.logits[:, :-1]], axis=1)[0]
        logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        expected = sum(float(logs[k, t]) for k, t in enumerate(ids[len(head) :]))
        assert at_prompt[place] == pytest.approx(expected, abs=1e-3)

    # A condition is decided on the context alone, and the choices follow it.
    means = []
    for context, _ in pairs:
        out = vauban.forward(model, mx.array([tokenizer.encode(context)]), positions="all")
        means.append(out.residual[0, 3].mean(0))
    probe = means[2] - means[0]
    cosines = [float((m @ probe) / mx.linalg.norm(m) / mx.linalg.norm(probe)) for m in means]
    assert cosines[2] > cosines[0]
    conditional = vauban.Conditional(
        probe, (cosines[0] + cosines[2]) / 2, vauban.Add(noise, 3.0, 4), layer=3
    )
    steered = by_hand(vauban.Add(noise, 3.0, 4))
    found = scores(conditional)
    assert found[:2] == pytest.approx(plain[:2], abs=1e-3)
    assert found[2] == pytest.approx(steered[2], abs=1e-3)
    # Neither the pieces in which a long context is read nor the condition change a score.
    monkeypatch.setattr("vauban.study.lm_eval_model._PIECE", 3)
    assert scores() == pytest.approx(plain, abs=1e-3)
    assert scores(conditional) == pytest.approx(found, abs=1e-3)
    # Nothing stays behind in the model.
    assert by_hand() == plain


def mlx_cache(model: Any) -> list[Any]:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


@needs_lm_eval
def test_rolling_likelihoods_and_answers_run_under_interventions(organism: Any) -> None:
    from lm_eval.api.instance import Instance

    from vauban.study.lm_eval_model import InterventionLM

    model, tokenizer = organism
    noise = vauban.Add(mx.random.normal((128,), key=mx.random.key(0)), 3.0, 2)
    texts = ["The sky is blue today.", "A hat.", "Write the opposite of dirty, please."]
    adapter = InterventionLM(model, tokenizer, [noise])
    rolling = adapter.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    )
    expected = [
        -total
        for total, _ in vauban.measure_perplexity(
            model, tokenizer, texts, interventions=[noise]
        ).losses
    ]
    assert rolling == pytest.approx(expected, rel=1e-4)

    prompts = [f"<|im_start|>user\n{t}<|im_end|>\n<|im_start|>assistant\n" for t in texts]
    asked = [
        Instance("generate_until", {}, (p, {"until": ["."], "max_gen_toks": 5 + i}), i)
        for i, p in enumerate(prompts)
    ]
    answers = adapter.generate_until(asked)
    for i, text in enumerate(texts):
        own = vauban.generate(model, tokenizer, [text], max_tokens=5 + i, interventions=[noise])
        assert answers[i].strip() == own[0].split(".")[0].strip()


@needs_lm_eval
def test_generated_answers_are_counted_too(bench: Path, organism: Any) -> None:
    found = run_benchmarks(
        *organism, ["mini_answer"], num_fewshot=None, include_path=bench, limit=3
    )["mini_answer"]
    assert found.n == 3 and found.num_fewshot == 0
    asked = [row["question"] for row in rows_of("sums_test.jsonl")[:3]]
    model, tokenizer = organism
    ids = vauban.generation.generate_tokens(
        model,
        [tokenizer.encode(text) for text in asked],
        eos=vauban.generation.eos_ids(tokenizer),
        max_tokens=6,
    )
    texts = [tokenizer.decode(i).split(".")[0].strip() for i in ids]
    answers = [row["choices"][row["answer"]] for row in rows_of("sums_test.jsonl")[:3]]
    assert found.correct == sum(a == b for a, b in zip(texts, answers, strict=True))


# --- ARC's two protocols --------------------------------------------------------------------


@pytest.fixture
def arc_on_disk(bench: Path) -> Path:
    """A folder named as the Hub's data set, of the same form, which `datasets` prefers."""
    folder = bench / "allenai" / "ai2_arc"
    folder.mkdir(parents=True)
    for split, source in (("train", "train"), ("validation", "train"), ("test", "test")):
        shutil.copy(bench / f"arc_{source}.jsonl", folder / f"{split}.jsonl")
    files = "".join(
        f"  - split: {split}\n    path: {split}.jsonl\n"
        for split in ("train", "validation", "test")
    )
    (folder / "README.md").write_text(
        f"---\nconfigs:\n- config_name: ARC-Challenge\n  data_files:\n{files}---\n"
    )
    return folder


@needs_lm_eval
def test_the_two_protocols_of_arc(
    arc_on_disk: Path, organism: Any, contexts: list[tuple[str, str]]
) -> None:
    model, tokenizer = organism
    seen: list[int] = []
    found = run_benchmarks(
        model,
        tokenizer,
        ["arc_letter5", "arc_cloze"],
        progress=lambda label, done, total: seen.append(done),
    )
    letter, cloze = found["arc_letter5"], found["arc_cloze"]
    # One of nine questions has three choices: letters leave it out, the cloze form does not.
    assert (letter.n, cloze.n, cloze.task, letter.num_fewshot) == (8, 9, "arc_challenge", 5)
    assert "acc_norm" in cloze.others
    questions = letter_questions()
    assert letter.correct == count(model, tokenizer, questions)
    asked = [pair for pair in contexts if pair[1] in (" A", " B", " C", " D")]
    assert {context for context, _ in asked} == {context for context, _, _ in questions}
    assert len(asked) == 4 * 8
    texts = {choice for row in rows_of("arc_test.jsonl") for choice in row["choices"]["text"]}
    assert {c for context, c in contexts if (context, c) not in asked} == {f" {t}" for t in texts}
    assert seen[-1] == len(seen) == 8 + 9
    assert letter.metric().name == "arc_letter5" != cloze.metric().name


@needs_lm_eval
def test_mmlu_is_lm_evals_own(bench: Path, organism: Any, contexts: list[Any]) -> None:
    """lm-eval's task file on data of the same form: what it asks is what `mini_mmlu` asks."""
    folder = bench / "cais" / "mmlu"
    folder.mkdir(parents=True)
    for split in ("dev", "test"):
        shutil.copy(bench / f"weather_{split}.jsonl", folder / f"{split}.jsonl")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: astronomy\n  data_files:\n"
        "  - split: dev\n    path: dev.jsonl\n  - split: test\n    path: test.jsonl\n---\n"
    )
    found = run_benchmarks(*organism, ["mmlu_astronomy"])["mmlu_astronomy"]
    assert found.n == 8 and found.num_fewshot == 5
    expected = {
        q.replace("about weather", "about astronomy") for q, _, _ in mmlu_questions("weather")
    }
    assert {context for context, _ in contexts} == expected


# --- what is said ---------------------------------------------------------------------------


def test_tasks_have_to_be_a_list() -> None:
    for tasks in ("mmlu", []):
        with pytest.raises(vauban.InputError, match="list of task names"):
            run_benchmarks(None, None, tasks)  # type: ignore[arg-type]


def test_without_lm_eval_the_error_says_what_to_install(
    organism: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(vauban.InputError, match=r"pip install 'vauban\[bench\]'"):
        run_benchmarks(*organism, ["mmlu"])


@needs_lm_eval
def test_what_cannot_be_run_is_said(bench: Path, organism: Any) -> None:
    with pytest.raises(vauban.InputError, match="no task 'mini_mmul'; did you mean 'mini_mmlu'"):
        run_benchmarks(*organism, ["mini_mmul"], include_path=bench)
    with pytest.raises(vauban.InputError, match="is no folder"):
        run_benchmarks(*organism, ["mini_mmlu"], include_path=bench / "nowhere")
    (bench / "arc_test.jsonl").unlink()
    with pytest.raises(vauban.InputError, match="data of mini_arc_cloze could not be loaded"):
        run_benchmarks(*organism, ["mini_arc_cloze"], include_path=bench)


@needs_lm_eval
def test_a_broken_model_is_no_guess(bench: Path, organism: Any) -> None:
    """The largest of NaN scores is the first: "A" would be right in a quarter of all questions."""
    broken = [vauban.Ablate(mx.ones(128)), NanAt()]
    with pytest.raises(vauban.CheckError, match="NaN"):
        run_benchmarks(
            *organism, ["mini_arc_cloze"], include_path=bench, limit=2, interventions=broken
        )
