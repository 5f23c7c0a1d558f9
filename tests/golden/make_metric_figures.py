"""Writes metric_figures.json: what the official scripts of three benchmarks make of small cases.

    python -m tests.golden.make_metric_figures MLQA_SCRIPT CMRC_SCRIPT KORQUAD_SCRIPT

The scripts are mlqa_evaluation_v1.py (facebookresearch/MLQA 24bf470b2e68), cmrc2018_evaluate.py of
baseline/ (ymcui/cmrc2018 c0eb1b6ba219, version 6, for Python 3) and evaluate-v1.0.py of KorQuAD 1.0
(as in nakjun/Llama-3.2-1B-Instruct-KorQuAD-Finetune 443869d519cf); none of their code is here. The
CMRC script needs NLTK. Where NLTK has no Punkt model it is told not to look for sentences; no case
has more than one outside Chinese, so that the figures are the same.

The texts are made up for this file.
"""

import argparse
import hashlib
import importlib.util
import json
from pathlib import Path

TARGET = Path(__file__).with_name("metric_figures.json")

# Gold answers, and the answers that are scored against all of them.
CHINESE = [
    (["天气很好"], ["天气", "天气很好。", "好很气天", "天 气 很 好", "很好，天气", ""]),
    (
        ["苹果公司的iPhone 12 Pro", "iPhone 12"],
        ["iphone 12", "iPhone12", "IPHONE 12 PRO手机", "的iPhone"],
    ),
    (["《红楼梦》", "红楼梦"], ["红楼梦", "《红楼梦》、", "「红楼梦」", "……", "红…楼梦"]),
    (["1,000元（约）"], ["1,000元", "1000元", "１，０００元", "1,000 元 (约)"]),
    (["由U.S. Army管理"], ["U.S. Army", "us army", "由U.S.Army管理", "army管理的"]),
    (['don\'t 说 "yes"'], ["don't", "说yes", '"yes"', "do n't 说"]),
    (["北京、上海和广州", "上海"], ["上海、北京", "和广州", "广州和上海", "上海　北京"]),
    (["。"], ["，", "", "。"]),
    (["龥龦䶵𠀀"], ["龥", "龦", "䶵𠀀", "𠀀䶵"]),
    (["a-b_c:d/e"], ["abcde", "a b c d e", "a－b"]),
]
KOREAN = [
    (["임종석", "임종석 비서실장"], ["임종석은", "비서실장 임종석", "임 종 석", "임정석"]),
    (
        ["《무궁화 꽃이 피었습니다》"],
        ["무궁화 꽃이", "〈무궁화꽃이〉 피었습니다", "<무궁화>", "‘꽃이’"],
    ),
    (["1,000만 원"], ["1000만원", "1,000만 원에", "천만 원", "만,원,1000"]),
    (["KBS(한국방송)", 'K"B"S'], ["kbs 한국방송", "KBS한국방송", "K'B'S", "（한국방송）"]),
    (["()"], ["", "<>", "없음"]),
    (["日本の首都、東京"], ["東京", "首都、東京", "東京 日本", "東京。", "とうきょう"]),
]
OTHERS = {
    "ar": [
        (["في القاهرة", "القاهرة"], ["القاهرة", "قاهرة", "مدينة القاهرة،", "الالقاهرة"]),
        (["حال المال والأعمال"], ["حال المال", "مال", "حامال", "حال، المال؛ والأعمال؟"]),
        (["ال"], ["ال", "", "الال"]),
        (["محمد (الأول)"], ["محمد الأول", "مُحَمَّد الأول", "محمد 《الأول》"]),
    ],
    "de": [
        (["die Stadt Köln", "Köln"], ["Köln", "der Stadt Köln", "eine Stadt", "STADT KÖLN!"]),
        (["das-Haus"], ["Haus", "dashaus", "das Haus"]),
        (["„Straße“ des 17. Juni"], ["Straße 17 Juni", "STRASSE", "strasse des 17 Juni"]),
        (["einem", "Dem"], ["der", "", "einem einem"]),
    ],
    "en": [
        (["The U.S. Army", "an army"], ["army", "the us army", "us—army", "U.S. (army)"]),
        (["“café” – the bar"], ["cafe bar", "café bar", "a café"]),
        (["$1,000 & more"], ["1000 more", "1,000", "1 000 & more"]),
    ],
    "es": [
        (["La Plata", "¿el río?"], ["plata", "río", "lo plata", "los ríos"]),
        (["una casa de las afueras"], ["casa afueras", "unos casa de", "casa de las"]),
        (["la"], ["la", "el", "plata"]),
    ],
    "hi": [
        (["नई दिल्ली।"], ["नई दिल्ली", "दिल्ली॥", "नयी दिल्ली", "दिल्ली, नई"]),
        (["एक a the"], ["a the एक", "एक", "the"]),
    ],
    "vi": [
        (["của người Việt", "những ngày"], ["người Việt", "là người", "ngày", "NHỮNG NGÀY"]),
        (["cái chiếc xe đạp"], ["xe đạp", "xe", "chiếcxe đạp", "xe đạp (cũ)"]),
    ],
}
CASES = {
    "mlqa": {**OTHERS, "zh": CHINESE},
    "cmrc": {"": CHINESE},
    "korquad": {"": [*KOREAN, *CHINESE[:4]]},
}


def main() -> None:
    import nltk

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in CASES:
        parser.add_argument(name, type=Path)
    scripts = vars(parser.parse_args())
    loaded = {name: load(path, name) for name, path in scripts.items()}
    try:
        nltk.word_tokenize("one")
    except LookupError:
        whole = nltk.word_tokenize
        loaded["cmrc"].nltk = type("", (), {"word_tokenize": lambda text: whole(text, "", True)})
    found = [
        {"metric": metric, "language": language or None, "golds": golds, "answer": answer}
        | dict(zip(("exact", "f1"), ask(loaded[metric], language, golds, answer), strict=True))
        for metric, languages in CASES.items()
        for language, pairs in languages.items()
        for golds, answers in pairs
        for answer in answers
    ]
    made_by = {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in scripts.items()
    }
    lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in found)
    head = json.dumps({"nltk": nltk.__version__, "scripts_sha256": made_by})
    TARGET.write_text(f'{{"made_by": {head},\n"cases": [\n{lines}\n]}}\n', encoding="utf-8")


def load(path: Path, name: str):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(f"official_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(script, language: str, golds: list[str], answer: str) -> tuple[float, float]:
    """(exact, f1), 0 to 100, of a data set of one question."""
    asked = {"id": "q", "question": "?", "answers": [{"text": each} for each in golds]}
    articles = [{"paragraphs": [{"qas": [asked]}]}]
    if script.__name__ == "official_cmrc":
        f1, exact, _, _ = script.evaluate({"data": articles}, {"q": answer})
        return exact, f1
    figures = script.evaluate(articles, {"q": answer}, *([language] if language else []))
    return figures["exact_match"], figures["f1"]


if __name__ == "__main__":
    main()
