import datasets
import pytest

from kdfast.common.errors import UserError
from kdfast.data import read
from kdfast.evaluation import suites


def names(*wanted):
    return [each.name for each in suites.choose(wanted, [])]


def test_the_card_has_its_eight_sets():
    assert names("card") == [
        "squad_v2",
        "squad",
        "adversarial_qa",
        "squad_adversarial",
        "squadshifts.amazon",
        "squadshifts.new_wiki",
        "squadshifts.nyt",
        "squadshifts.reddit",
    ]
    assert [each.name for each in suites.CARD if each.unanswerable] == ["squad_v2"]
    assert [each.name for each in suites.CARD if each.by_original] == ["squad_adversarial"]


def test_sets_come_once_and_in_order():
    assert names("mlqa.de", "squad", "mlqa", "card")[:3] == ["mlqa.de", "squad", "mlqa.ar"]
    assert len(names("mlqa.de", "squad", "mlqa", "card")) == 8 + 7
    assert len(names("xquad")) == 12


def test_a_file_takes_the_place_of_a_set():
    hub, file = suites.choose(["squad", "xquad.de"], ["xquad.de=de.json"])
    assert hub.source == "rajpurkar/squad:plain_text:validation" and hub.file is None
    assert file.source == "de.json" and file.dataset == "google/xquad"
    assert suites.SETS["xquad.de"].file is None


@pytest.mark.parametrize(
    ("wanted", "files", "words"),
    [
        (["crad"], [], "--suite crad is not known: did you mean card?"),
        (["squadshift.nyt"], [], "did you mean squadshifts.nyt?"),
        (["qqq"], [], "give one of card, xquad, mlqa, squad_v2"),
        (["xquad.dd"], [], "--suite xquad.dd: dd is not known: give one of ar, de, el"),
        (["mlqa.deu"], [], "did you mean de?"),
        (["card"], ["squadv2=x"], "--data squadv2 is not known: did you mean squad_v2?"),
        (["card"], ["card=x"], "--data card is not known"),
        (["card"], ["x.json"], "--data x.json does not say which set of --suite it is"),
        (["card"], ["xquad.de=x"], "--data xquad.de=x is no set of --suite: add xquad.de"),
    ],
)
def test_names_that_are_not_known(wanted, files, words):
    with pytest.raises(UserError) as caught:
        suites.choose(wanted, files)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("some/dev-v2.0.json", "dev-v2.0"),
        ("rajpurkar/squad_v2:squad_v2:validation", "squad_v2"),
        ("deepset/germanquad@refs/convert/parquet:plain_text:test", "germanquad"),
    ],
)
def test_a_set_of_ones_own_is_named_after_its_source(source, name):
    own = suites.own_set(source)
    assert (own.name, own.source, own.unanswerable) == (name, source, True)


ROW = {"id": "1", "question": "?", "context": "a b", "answers": {"text": [], "answer_start": []}}


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("squad_v2", (("rajpurkar/squad_v2", "squad_v2"), {"split": "validation"})),
        (
            "squad_adversarial",
            (
                ("parquet",),
                {
                    "data_files": "hf://datasets/stanfordnlp/squad_adversarial@refs/convert/parquet"
                    "/AddOneSent/validation/*.parquet",
                    "split": "train",
                },
            ),
        ),
    ],
)
def test_what_the_hub_is_asked_for(monkeypatch, name, asked):
    found = []

    def load_dataset(*place, **options):
        found.append((place, {key: value for key, value in options.items() if value}))
        return [ROW]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (example,) = read.read_examples(suites.SETS[name].source)
    assert example.id == "1" and found == [asked]


def test_a_revision_of_a_dataset(monkeypatch):
    found = {}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *place, **options: found.update(options) or [ROW]
    )
    read.read_examples("some/set@0123abc:plain:test")
    assert found == {"split": "test", "revision": "0123abc"}


def test_each_set_has_the_rule_of_its_papers():
    assert {each.metric for each in (*suites.CARD, *suites.XQUAD, suites.GERMANQUAD)} == {"squad"}
    assert {each.rule.label for each in suites.MLQA} == {
        f"mlqa ({code})" for code in suites.MLQA_LANGUAGES
    }
    rules = {name: suites.SETS[name].rule.name for name in ("cmrc2018", "korquad", "jaquad")}
    assert rules == {"cmrc2018": "cmrc", "korquad": "korquad", "jaquad": "korquad"}


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("facebook/mlqa@refs/convert/parquet:mlqa.zh.zh:test", "mlqa (zh)"),
        ("google/xquad:xquad.zh:validation", "squad"),
        ("SkelterLabsInc/JaQuAD", "korquad"),
        ("hfl/cmrc2018:default:validation", "cmrc"),
        ("some/mlqa.json", "squad"),
    ],
)
def test_a_known_dataset_brings_its_rule(source, rule):
    assert suites.own_set(source).scored_by(None, None).rule.label == rule


def test_flags_over_the_rule_of_a_set():
    own = suites.own_set("file.json")
    assert own.scored_by("mlqa", "de").rule.label == "mlqa (de)"
    assert suites.SETS["mlqa.zh"].scored_by("squad", None).rule.label == "squad"
    assert suites.SETS["xquad.zh"].scored_by("mlqa", None).rule.label == "mlqa (zh)"
    for wanted, given, words in (
        (own, ("mlqa", None), "give --language"),
        (suites.SETS["xquad.el"], ("mlqa", None), "none for el"),
        (suites.own_set("facebook/mlqa"), (None, None), "give --language"),
        (own, (None, "de"), "goes with --metric mlqa, and file is scored by squad"),
    ):
        with pytest.raises(UserError, match=words):
            wanted.scored_by(*given)
