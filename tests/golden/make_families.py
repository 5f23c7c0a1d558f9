"""Writes families.tar.xz and families.json: a small reader of each supported kind, with random
weights, as transformers 4 saves it, and what transformers 4 makes of a few awkward texts.

    python -m venv v4
    v4/bin/pip install torch==2.13.0 transformers==4.57.6 sentencepiece==0.2.3 protobuf==7.36.2
    v4/bin/python tests/golden/make_families.py

Kept as one archive, since each SentencePiece model holds the same character map of 240 KB.
"""

import importlib.metadata
import json
import shutil
import sys
import tarfile
import tempfile
import warnings
from pathlib import Path

import sentencepiece
import torch
import transformers
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
from transformers import pipeline

HERE = Path(__file__).parent
LENGTH = 160  # of the longest window
# Trained on. Written for this purpose.
SENTENCES = """
Anna Weber has been the head of the school in Dornow since 1902, and nobody knows her motto.
The bridge over the river was built in 17 months by 340 workers, who came from the villages.
Its height is 24 metres; its length is 318 metres, which was a record at that time.
When the war ended, the factory made bicycles instead of engines and sold 12,500 of them a year.
The museum opens at nine o'clock, closes at five, and is free for children under 14.
Where did the painter live? He lived in a small house near the harbour, with two cats and a dog.
She wrote that the café was "the only place to think", and that its crème brûlée was naïve.
In the north the winters are long and dark, so the people tell stories and mend their nets.
What is the name of the ship that brought the first letters from the island to the capital?
Who won the race in 1936, and how many seconds was the second rider behind the winner?
Die Brücke über den Fluss wurde in siebzehn Monaten gebaut; die Straße führte weiter nach Süden.
Wer war der Leiter der Schule, und in welchem Jahr übernahm er das Amt von seinem Bruder?
El puente sobre el río fue construido en diecisiete meses por trescientos cuarenta obreros.
¿Quién escribió la canción que los niños cantaban en la plaza mayor del pueblo cada año?
Le musée ouvre à neuf heures, ferme à dix-sept heures, et il est gratuit pour les élèves.
Où habitait le peintre qui a offert ses tableaux à la ville après la guerre de 1870 ?
Школа в деревне была основана в 1902 году, и её директором была Анна Вебер.
学校成立于一九零二年，校长是安娜，她来自河边的小城。桥有多高？桥高二十四米。
谁写了这首歌？孩子们每年都在广场上唱歌。博物馆九点开门，五点关门。
東京は日本の首都です。学校は何年にできましたか。橋の高さはどのくらいですか。
โรงเรียนตั้งอยู่ริมแม่น้ำ ใครเป็นครูใหญ่ของโรงเรียน น้ำใสและท้องฟ้าสีคราม ทำงานทุกวัน
تأسست المدرسة عام 1902 وكانت آنا مديرة المدرسة في القرية الصغيرة قرب النهر.
""".strip().splitlines()
ENGLISH = (
    "Who is the head of the school?",
    "The school in Dornow was founded in 1902. Its head is Anna Weber, and its motto is old.",
)
TEXTS = {
    "English": ENGLISH,
    "full width": (
        "Ｗｈｏ ｉｓ ｔｈｅ ｈｅａｄ？",
        "Ｔｈｅ school ｏｆ １９０２ ｉｓ ｉｎ Dornow，ｗｉｔｈ ３４０ pupils：Anna ｉｓ head。",
    ),
    "ligatures": ("Where is the oﬃce?", "The ﬁrst oﬃce was ﬂat: a ﬅone ﬄower of ﬀ and ĳ, œuvre."),
    "fractions": ("How long is it?", "It is 2½ metres long, ¾ wide, x² deep, №5, ⅓ of it ㎏ or ℃."),
    "blanks": (
        "Who\u00a0is\u3000the head?",
        "\u3000Anna\u00a0Weber\u2003is \u200bthe  head\tof\r\nthe\u3000school \u00ad .",
    ),
    "Thai": ("ใครเป็นครูใหญ่", "น้ำใส ทำงาน คำนำ โรงเรียนริมแม่น้ำ\u0e33 ๑๙๐๒ ก\u0e4d\u0e32"),
    "dots": ("What then…?", "He waited... and waited…… then ‥ “spoke” — ``so'' he said—‘go’ ․․․"),
    "accents": (
        "Where is the cafe\u0301?",
        "The cafe\u0301 of Rene\u0301e Nu\u0308n\u0303ez, the café of Renée Núñez: Å, Ǆ İ ß ẞ.",
    ),
    "final newline": ("Who is the head?\n", "The head is Anna Weber.\n"),
    "newlines": ("Who is\nthe head?", "\n\nThe head\nis Anna.\n\nThe school is old. \n \n"),
    "Chinese": (
        "桥有多高？",
        "桥高二十四米，長さは３１８メートル。學校成立於１９０２年，校長是安娜。",
    ),
    "half width": ("ｶﾞｯｺｳ?", "ﾄｳｷｮｳ is 東京、㍿ and ﷺ ﻻ ｡ Ⅷ ⑨ ᴬ"),
    "special": (
        "Who is <mask>?",
        "The <s> head </s> is [SEP] Anna <mask> Weber [MASK], she said [CLS] <pad> [UNK] <unk>.",
    ),
    "emoji": ("Who flew? 🚀", "👩\u200d🚀 Anna flew 🚀 to Dornow ☎️, and 🇩🇪 stayed \ufeff at home."),
    "blank question": (" ", ENGLISH[1]),
    "two windows": (ENGLISH[0], " ".join([ENGLISH[1], "It has 340 pupils of ３ villages."] * 3)),
}
SETTINGS = ({}, {"top_k": 3, "handle_impossible_answer": True}, {"align_to_words": False})


def sentencepiece_model(path: Path, **arguments) -> str:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 3),
        model_prefix=str(path.with_suffix("")),
        vocab_size=400,
        character_coverage=1.0,
        normalization_rule_name="nmt_nfkc",
        num_threads=1,
        minloglevel=2,
        **arguments,
    )
    return str(path)


def byte_level(folder: Path, special: list[str]) -> list[str]:
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(SENTENCES, 450, 2, False, special)
    return model.save_model(str(folder))


def word_piece(folder: Path, special: list[str], lowercase: bool = True) -> str:
    model = BertWordPieceTokenizer(lowercase=lowercase)
    model.train_from_iterator(
        SENTENCES, 520, 2, special_tokens=special, show_progress=False, limit_alphabet=300
    )
    return model.save_model(str(folder))[0]


BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
# How the published DeBERTa-v3 attends.
RELATIVE = {
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_biased_input": False,
    "pos_att_type": "p2c|c2p",
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
}


def tokenizers_of(work: Path) -> dict[str, transformers.PreTrainedTokenizerFast]:
    """A tokenizer of each kind, as transformers 4 makes it of a vocabulary's files."""
    folders = {}
    for name in ("bert", "cased", "klue", "mpnet", "roberta", "deberta"):
        folders[name] = work / name
        folders[name].mkdir()
    t = transformers
    klue = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    mpnet = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
    bert = word_piece(folders["bert"], BERT)
    cased = word_piece(folders["cased"], BERT, lowercase=False)
    byte = byte_level(folders["roberta"], ROBERTA)
    deberta = byte_level(folders["deberta"], [*klue[:4], "[MASK]"])
    plain = sentencepiece_model(work / "plain.model")
    brackets = {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]"}
    ids = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    spm = sentencepiece_model(work / "spm.model", unk_piece="[UNK]", **brackets, **ids)
    spiece = sentencepiece_model(
        work / "spiece.model",
        pad_id=0,
        unk_id=1,
        bos_id=-1,
        eos_id=-1,
        control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        user_defined_symbols=["(", ")", '"', "-", ".", "–", "£", "€"],
    )
    return {
        "albert": t.AlbertTokenizerFast(spiece),
        "bert": t.BertTokenizerFast(bert),
        "camembert": t.CamembertTokenizerFast(plain),
        "deberta": t.DebertaTokenizerFast(*deberta),
        "deberta-v2": t.DebertaV2TokenizerFast(spm),
        "electra": t.ElectraTokenizerFast(cased, do_lower_case=False, strip_accents=False),
        "mpnet": t.MPNetTokenizerFast(word_piece(folders["mpnet"], mpnet)),
        "roberta": t.RobertaTokenizerFast(*byte),
        "xlm-roberta": t.XLMRobertaTokenizerFast(plain),
        # RoBERTa's weights with BERT's tokenizer, as klue/roberta-base has.
        "klue": t.BertTokenizerFast(
            word_piece(folders["klue"], klue, lowercase=False),
            do_lower_case=False,
            bos_token="[CLS]",
            eos_token="[SEP]",
        ),
    }


def config_of(name: str, tokenizer) -> transformers.PretrainedConfig:
    """A small configuration with the settings that the published models of this kind have."""
    own = {
        "albert": {"embedding_size": 16, "type_vocab_size": 2, "hidden_act": "gelu_new"},
        "bert": {"type_vocab_size": 2},
        "camembert": {"type_vocab_size": 1},
        "deberta": {**RELATIVE, "pos_att_type": "c2p|p2c"},
        "deberta-v2": {
            **RELATIVE,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
        "electra": {"embedding_size": 16, "type_vocab_size": 2},
        "klue": {"type_vocab_size": 1},
        "mpnet": {},
        "roberta": {"type_vocab_size": 1},
        "xlm-roberta": {"type_vocab_size": 1},
    }[name]
    offset = name in ("camembert", "klue", "mpnet", "roberta", "xlm-roberta")
    return transformers.AutoConfig.for_model(
        "roberta" if name == "klue" else name,
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH + 2 * offset,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        initializer_range=0.5,
        **own,
    )


def close(one: list[dict], other: list[dict]) -> bool:
    """Whether two lists of answers are one, so that nothing hangs on rounding."""
    return len(one) == len(other) and all(
        a["start"] == b["start"]
        and a["end"] == b["end"]
        and abs(a["score"] - b["score"]) <= 1e-5 * abs(b["score"]) + 1e-9
        for a, b in zip(one, other, strict=True)
    )


def as_list(answers) -> list[dict]:
    return [answers] if isinstance(answers, dict) else answers


def golden(folder: Path, typed: bool) -> dict:
    """What transformers 4 makes of TEXTS with the reader in `folder`."""
    single, double = (
        pipeline("question-answering", str(folder), device="cpu", dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    tokenizer = single.tokenizer
    if not typed:
        # Their models have no second type, or no types at all: transformers 4 ends in an error.
        for each in (single, double):
            each.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    encoded = {
        text: dict(tokenizer(*pair, add_special_tokens=True)) for text, pair in TEXTS.items()
    }
    answers = []
    for text, (question, context) in TEXTS.items():
        for settings in SETTINGS:
            pair = {"question": question, "context": context}
            found = single(**pair, **settings)
            if close(as_list(found), as_list(double(**pair, **settings))):
                answers.append({"text": text, "settings": settings, "answers": found})
    return {
        "class": type(tokenizer).__name__,
        "token_types": "token_type_ids" in tokenizer.model_input_names,
        "ids": {text: each["input_ids"] for text, each in encoded.items()},
        "answers": answers,
    }


# What is left of a folder that holds vocabulary files and little else, as the oldest published
# models do (microsoft/deberta-v3-base holds spm.model and these two settings).
BARE = {
    "deberta-v2": {"do_lower_case": False, "vocab_type": "spm"},
    "electra": {"do_lower_case": False},
    "klue": {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": True},
}
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "*.model")


def bare(folder: Path, name: str, target: Path) -> dict:
    """The ids of a folder that holds config.json, a vocabulary and BARE's settings."""
    target.mkdir()
    files = [path for pattern in VOCABULARIES for path in folder.glob(pattern)]
    for path in [*files, folder / "config.json"]:
        shutil.copy(path, target)
    if name in BARE:
        (target / "tokenizer_config.json").write_text(json.dumps(BARE[name]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(target)
    return {
        "settings": BARE.get(name),
        "ids": {text: tokenizer(*pair)["input_ids"] for text, pair in TEXTS.items()},
    }


# By how much ids are higher than those of the SentencePiece model, which has fewer special pieces.
SHIFT = {"camembert": 4, "deberta-v2": 0, "xlm-roberta": 1}


def by_sentencepiece(folder: Path, name: str) -> dict[str, list[int]]:
    """The ids of the contexts by SentencePiece itself, of texts without a name of a special token.

    An unknown piece has id 3 in all of them.
    """
    model = sentencepiece.SentencePieceProcessor()
    model.Load(str(next(folder.glob("*.model"))))
    return {
        text: [
            3 if number == model.unk_id() else number + SHIFT[name]
            for number in model.encode(context)
        ]
        for text, (_, context) in TEXTS.items()
        if text != "special"
    }


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    packages = ("transformers", "tokenizers", "torch", "sentencepiece")
    content = {
        "versions": {
            "python": sys.version.split()[0],
            **{package: importlib.metadata.version(package) for package in packages},
        },
        "texts": {text: list(pair) for text, pair in TEXTS.items()},
        "families": {},
    }
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as out:
        for number, (name, tokenizer) in enumerate(tokenizers_of(Path(work)).items()):
            folder = Path(out) / name
            tokenizer.model_max_length = LENGTH
            torch.manual_seed(number)
            config = config_of(name, tokenizer)
            model = transformers.AutoModelForQuestionAnswering.from_config(config)
            model.half().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            family = golden(folder, typed=name != "klue")
            family["bare"] = bare(folder, name, Path(work) / f"{name}-bare")
            if name in SHIFT:
                family["sentencepiece"] = by_sentencepiece(folder, name)
            content["families"][name] = family
            print(name, family["class"], family["token_types"], len(family["answers"]), "answers")
        with tarfile.open(HERE / "families.tar.xz", "w:xz") as archive:
            for folder in sorted(Path(out).iterdir()):
                archive.add(folder, arcname=folder.name, filter=anonymous)
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    (HERE / "families.json").write_text(text + "\n", encoding="utf-8")


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """No user, no time: the archive is the same whoever makes it."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.isdir() else 0o644
    return member


if __name__ == "__main__":
    main()
