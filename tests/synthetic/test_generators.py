"""Local generators: tiny models whose replies are nonsense, or are put in their mouths."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from kdfast import questions
from kdfast.common.errors import UserError
from kdfast.demo import TEACHER
from kdfast.synthetic.generators import LocalGenerator, Sampling
from tests import small_tokenizers
from tests.synthetic import endpoint

TEMPLATE = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<reply>"
GREEDY = Sampling(0.0, 8, 42)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A causal and a sequence-to-sequence model."""
    torch.manual_seed(0)
    tokenizer = small_tokenizers.roberta()
    ids = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
    sizes = {"vocab_size": len(tokenizer), **ids}
    causal = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        initializer_range=0.3,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
        **sizes,
    )
    seq2seq = T5Config(
        d_model=16,
        initializer_factor=9.0,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=1,
        **sizes,
    )
    found = {}
    for name, model in (
        ("causal", LlamaForCausalLM(causal)),
        ("seq2seq", T5ForConditionalGeneration(seq2seq)),
    ):
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        found[name] = folder
    (found["causal"] / "chat_template.jinja").write_text(TEMPLATE)
    return found


def asked(tmp_path, folder, **flags):
    given = {
        "data": tmp_path / "contexts.jsonl",
        "output": tmp_path / "made.json",
        "teacher": TEACHER,
        "generator": folder,
        "max_new_tokens": 8,
        "batch_size": 4,
        **flags,
    }
    return questions.main([f"--{name}={value}" for name, value in given.items()])


@pytest.mark.parametrize("name", ["causal", "seq2seq"])
def test_replies_do_not_depend_on_padding(folders, name):
    generator = LocalGenerator(str(folders[name]), GREEDY)
    prompts = ["Who?", "Where is the country of Normandy located?", "When?"]
    together = generator.replies(prompts, 0)
    assert together == [generator.replies([each], 0)[0] for each in prompts]
    assert len({reply.text for reply in together}) > 1
    # A model with random weights seldom comes to an end.
    assert "is cut by --max_new_tokens" in {each.fault for each in together}


def test_a_draw_depends_on_seed_and_batch(folders):
    generator = LocalGenerator(str(folders["causal"]), Sampling(1.0, 8, 42))
    first = generator.replies(["Who?"], 3)
    assert first == generator.replies(["Who?"], 3) != generator.replies(["Who?"], 4)


def test_the_chat_template_is_used(folders):
    generator = LocalGenerator(str(folders["causal"]), GREEDY)
    ids = generator._encode("Who?")
    assert generator.tokenizer.decode(ids) == "<user>Who?<reply>"


def test_a_prompt_too_long_is_said(folders):
    generator = LocalGenerator(str(folders["causal"]), Sampling(0.0, 2000, 42))
    long, short = generator.replies(["Who is that, and where? " * 20, "x"], 0)
    assert "too long" in long.fault and not short.fault


def speak(monkeypatch, model, replies, starts_with_prompt):
    """Let `generate` of a class of models give these replies, prompt after prompt."""
    tokenizer = small_tokenizers.roberta()
    texts = iter(replies)

    def generate(self, input_ids, **settings):
        rows = [tokenizer(next(texts), add_special_tokens=False)["input_ids"] for _ in input_ids]
        rows = [[*row, tokenizer.eos_token_id] for row in rows]
        most = max(map(len, rows))
        ids = torch.tensor([row + [1] * (most - len(row)) for row in rows])
        return torch.cat([input_ids, ids], 1) if starts_with_prompt else ids

    monkeypatch.setattr(model, "generate", generate)


@pytest.mark.program
def test_nonsense_is_dropped_and_kept_for_a_look(folders, tmp_path, capsys):
    endpoint.write_contexts(tmp_path / "contexts.jsonl", 5)
    assert asked(tmp_path, folders["causal"]) == 2
    said = capsys.readouterr()
    assert "dropped 5: a reply holds no question in JSON" in said.out
    assert "No question was kept" in said.err
    assert len((tmp_path / "made.json.candidates.jsonl").read_text().splitlines()) == 6


@pytest.mark.program
def test_an_instruct_model(folders, tmp_path, monkeypatch):
    endpoint.write_contexts(tmp_path / "contexts.jsonl", 6)
    replies = [endpoint.lines_of(passage) for passage in endpoint.PASSAGES[:6]]
    speak(monkeypatch, LlamaForCausalLM, replies, starts_with_prompt=True)
    assert asked(tmp_path, folders["causal"]) == 0
    whole = (tmp_path / "made.json").read_bytes()
    assert whole.count(b'"agreement"') > 12
    # What a kill between the two lines of a batch leaves: the batch is generated again, all of it.
    candidates = tmp_path / "made.json.candidates.jsonl"
    lines = candidates.read_bytes().splitlines(keepends=True)
    candidates.write_bytes(b"".join(lines[:6]))
    speak(monkeypatch, LlamaForCausalLM, replies[4:], starts_with_prompt=True)
    assert asked(tmp_path, folders["causal"]) == 0
    assert candidates.read_bytes() == b"".join(lines)
    assert (tmp_path / "made.json").read_bytes() == whole


@pytest.mark.program
def test_a_model_that_asks_for_an_answer(folders, tmp_path, monkeypatch):
    """The answers are those of the source, whose own questions are not made again."""
    passages = endpoint.PASSAGES[:4]
    own = [[q for q in passage.questions if q.answer] for passage in passages]
    data = [
        {
            "title": passage.title,
            "context": passage.text,
            "qas": [{"question": q.text if n == 0 else "?", "answers": [q.answer]} for q in asked],
        }
        for n, (passage, asked) in enumerate(zip(passages, own, strict=True))
    ]
    (tmp_path / "contexts.jsonl").write_text("\n".join(map(json.dumps, data)))
    (tmp_path / "prompt").write_text("generate question: {before}<hl> {answer} <hl>{after}")
    once = [
        [q for q in asked if passage.text.count(q.answer) == 1]
        for passage, asked in zip(passages, own, strict=True)
    ]
    flat = [q for each in once for q in each]
    speak(monkeypatch, T5ForConditionalGeneration, [q.text for q in flat], False)
    assert asked(tmp_path, folders["seq2seq"], prompt_file=tmp_path / "prompt", batch_size=2) == 0
    made = json.loads((tmp_path / "made.json").read_text())
    qas = [qa for a in made["data"] for p in a["paragraphs"] for qa in p["qas"]]
    kept = {qa["question"]: qa["synthetic"]["answer"] for qa in qas}
    assert len(kept) > len(flat) // 2 and kept.items() <= {q.text: q.answer for q in flat}.items()
    assert not kept.keys() & {q.text for q in once[0]}


def test_what_writes_no_text_is_refused(tmp_path, folders):
    with pytest.raises(UserError, match=r"does not load as a model that writes text|lacks weights"):
        LocalGenerator(str(TEACHER), GREEDY)
    with pytest.raises(UserError, match="give a smaller one"):
        LocalGenerator(str(folders["causal"]), Sampling(0.0, 4096, 42))
