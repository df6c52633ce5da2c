"""SQuAD's rules against cases worked out by hand from its official script; JSON by value."""

import pytest

from lora_train.evaluation.scores import field_f1, is_exact_match, score, squad_f1, squad_normalize


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Quick,  brown fox!", "quick brown fox"),
        # punctuation goes before articles: "a-b" is one word, and no article is left in it
        ("A-b the.end", "ab theend"),
        ("an Apple a day", "apple day"),
        ("theory of the an", "theory of"),
        ("U.S.A.", "usa"),
        ("1,000", "1000"),
        ("\tthe\n", ""),
        # only ASCII punctuation goes
        ("caf\u00e9 \u201cquoted\u201d", "caf\u00e9 \u201cquoted\u201d"),
    ],
)
def test_normalization(text, normalized):
    assert squad_normalize(text) == normalized


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("Denver Broncos", "the Denver Broncos", 1.0),
        # 2 of 3 words found, 2 of 2 expected: 2 * (2/3 * 1) / (2/3 + 1)
        ("Denver Broncos won", "Denver Broncos", 0.8),
        # "the" is no word: 1 of 1 found, 1 of 2 expected
        ("The Broncos", "Denver Broncos", 2 / 3),
        # words count as often as they stand in both: 1 of 3, 1 of 1
        ("no no no", "no", 0.5),
        ("Panthers", "Broncos", 0.0),
        ("", "Broncos", 0.0),
        ("Broncos", "the", 0.0),
        ("a", "the", 1.0),
    ],
)
def test_f1(answer, reference, f1):
    assert squad_f1(answer, reference) == pytest.approx(f1)
    assert squad_f1(reference, answer) == pytest.approx(f1)


def test_the_best_of_several_references_counts():
    scores = score("the Denver Broncos!", ["Carolina Panthers", "Broncos", "Denver Broncos"])
    assert (scores.exact_match, scores.squad_exact, scores.f1) == (0.0, 1.0, 1.0)
    assert scores.json_valid is None and scores.field_f1 is None
    # each measure has its own best reference
    scores = score("Denver Broncos", ["the denver broncos in full", "Denver Broncos "])
    assert (scores.exact_match, scores.squad_exact, scores.f1) == (1.0, 1.0, 1.0)


def test_json_is_compared_by_value():
    reference = '{"city": "Dover", "zip": "19901"}'
    assert is_exact_match(' {"zip":"19901","city":"Dover"}\n', reference)
    assert not is_exact_match('{"zip": 19901, "city": "Dover"}', reference)
    assert not is_exact_match("Dover", reference)
    assert is_exact_match('{"x": 1.0}', '{"x": 1}') and not is_exact_match(
        '{"x": 1}', '{"x": true}'
    )
    assert not is_exact_match("[]", "{}") and not is_exact_match('{"x": 1, "y": 2}', '{"x": 1}')
    # numbers and words are no structures: as they are written
    assert is_exact_match(" 12 ", "12") and not is_exact_match("12.0", "12")


@pytest.mark.parametrize(
    ("answer", "valid", "fields"),
    [
        ('{"city": "Dover", "zip": "19901"}', 1.0, 1.0),
        # 1 of 2 found, 1 of 2 expected
        ('{"city": "Dover", "zip": "1"}', 1.0, 0.5),
        # 1 of 1 found, 1 of 2 expected
        ('{"city": "Dover"}', 1.0, 2 / 3),
        # the value at another key is another field
        ('{"town": "Dover"}', 1.0, 0.0),
        ('{"city": "Dover"', 0.0, 0.0),
        ('"Dover"', 0.0, 0.0),
    ],
)
def test_fields(answer, valid, fields):
    scores = score(answer, ['{"city": "Dover", "zip": "19901"}'])
    assert scores.json_valid == valid
    assert scores.field_f1 == pytest.approx(fields)


def test_fields_of_nested_values():
    expected = {"a": {"b": [1, 2]}, "c": [], "d": None}
    # four fields: a.b[0], a.b[1], c and d, of which three are the same
    found = {"a": {"b": [1, 3]}, "c": [], "d": None}
    assert field_f1(expected, expected) == 1.0
    assert field_f1(found, expected) == pytest.approx(3 / 4)
    assert field_f1({"x": 1.0}, {"x": 1}) == 1.0
    assert field_f1({"x": True}, {"x": 1}) == 0.0
    assert field_f1(None, expected) == 0.0


def test_text_beside_json_is_scored_as_text():
    scores = score("{}", ["{}", "nothing"])
    assert scores.exact_match == 1.0 and scores.json_valid is None
