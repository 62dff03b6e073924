"""What a change does beside its aim: languages, hedges, JSON, pairs, and whole templates drawn."""

import numpy as np
import pytest

import vauban
from vauban.errors import InputError
from vauban.evaluation import bootstrap_interval, compare_answers, language_of, measure_off_target
from vauban.evaluation.off_target import hedges, is_json

SENTENCES = {
    "english": "The river is wide and you can see the old mill from the bridge.",
    "french": "La rivière est large et vous pouvez voir le vieux moulin depuis le pont.",
    "german": "Der Fluss ist breit und von der Brücke sieht man die alte Mühle.",
    "spanish": "El río es ancho y desde el puente se ve el viejo molino de la aldea.",
    "italian": "Il fiume è largo e dal ponte si vede il vecchio mulino della valle.",
    "portuguese": "O rio é largo e da ponte você vê o velho moinho da aldeia.",
    "russian": "Река широкая, и с моста видна старая мельница.",
    "chinese": "河很宽，从桥上可以看到老磨坊。",
    "japanese": "川は広く、橋から古い水車小屋が見えます。",
    "korean": "강은 넓고 다리에서 오래된 방앗간이 보입니다.",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_ten_languages_are_told(language: str) -> None:
    assert language_of(SENTENCES[language]) == language


@pytest.mark.parametrize("text", ["", "42", "OK", "xyzzy plugh", "👍"])
def test_too_little_is_no_language(text: str) -> None:
    assert language_of(text) is None


def test_hedges_are_whole_words() -> None:
    assert hedges("It MIGHT rain.") and hedges("也许会下雨。") and hedges("Vielleicht regnet es.")
    assert not hedges("He is almighty.") and not hedges("Mayberry pie")


@pytest.mark.parametrize(
    ("answer", "valid"),
    [
        ('{"a": 1}', True), ("[1, 2]", True), ('```json\n{"a": 1}\n```', True), ("7", False),
        ('Sure!\n{"a": 1}', False), ('{"a": 1,}', False), ("", False), ('"text"', False),
    ],
)  # fmt: skip
def test_json_and_nothing_else(answer: str, valid: bool) -> None:
    assert is_json(answer) is valid


def test_an_answer_cut_inside_its_reasoning_is_in_no_figure() -> None:
    prompts = ["How do I bake bread at home?", "What is the name of this river?", "Say hello."]
    before = ["Bake it in the oven.", "<think>They want the", "<think>Short.</think>Hello you."]
    after = ["<think>Bread is", "<think>They", "Hello, perhaps, to you all."]
    found = compare_answers(prompts, before, after)
    assert found.unfinished == (1, 2)
    assert found.words and (found.words.before, found.words.after, found.words.n) == (2, 5, 1)
    assert found.hedging and (found.hedging.after, found.hedging.n) == (1, 1)
    assert "not counted: 1 → 2" in found.summary()
    assert found.to_dict()["unfinished"] == [1, 2]
    nothing = compare_answers(prompts[:1], before[:1], after[:1])
    assert (nothing.words, nothing.hedging, nothing.same_language) == (None, None, None)


def test_properties_are_compared_in_pairs() -> None:
    prompts = ["How do I bake bread at home?", "What is the name of this river?", "xyzzy"]
    before = ["You can bake it in an oven for an hour.", "It is the Danube, I think.", "yes"]
    after = ["Vous pouvez le faire dans un four.", "It is the Danube.", "yes yes"]
    found = compare_answers(prompts, before, after)
    assert found.words and found.words.before == pytest.approx(np.mean([10, 6, 1]))
    assert found.words.after == pytest.approx(np.mean([7, 4, 2])) and found.words.interval
    assert found.hedging and (found.hedging.before, found.hedging.after) == (1 / 3, 0)
    assert found.hedging.test and found.hedging.test.only_before == 1
    same = found.same_language
    assert same and same.n == 2 and (same.before, same.after) == (1.0, 0.5)
    assert found.json is None and "words: 5.7 → 4.3" in found.summary()
    reasoned = compare_answers(["Hi"], ["<think>perhaps</think>Hello"], ["Hello"])
    assert reasoned.hedging and reasoned.hedging.before == 0.0
    with pytest.raises(InputError, match="expected one of each"):
        compare_answers(prompts, before, after[:2])


def test_the_packaged_tasks_run_on_a_model() -> None:
    model, tokenizer = vauban.load(vauban.organism_path("dense"))
    found = measure_off_target(model, tokenizer, (), max_tokens=8)
    for one in found:
        assert one is not None and one.n == 8 and one.before == one.after
        assert one.test is not None and one.test.p_value == 1.0


def test_whole_templates_are_drawn() -> None:
    """Ten copies of four texts tell no more than the four."""
    totals, counts, names = [0.0, 1.0, 0.0, 1.0] * 10, [1] * 40, list("abcd") * 10
    plain = bootstrap_interval(totals, counts)
    clustered = bootstrap_interval(totals, counts, clusters=names)
    four = bootstrap_interval(totals[:4], counts[:4])
    assert clustered == pytest.approx(four)
    assert clustered[1] - clustered[0] > 2 * (plain[1] - plain[0])
    with pytest.raises(InputError, match="one each"):
        bootstrap_interval(totals, counts, clusters=names[:3])
    with pytest.raises(InputError, match="one cluster"):
        bootstrap_interval(totals, counts, clusters=["a"] * 40)
