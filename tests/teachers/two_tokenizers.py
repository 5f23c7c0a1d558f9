"""A student and a teacher of different tokenizers on the same questions, and aligning by the book.

`by_the_book` says in plain loops over single tokens what kdfast.teachers.alignment must do.
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers, processors

from kdfast.config import WindowSettings
from kdfast.data.prepare import prepare_windows
from kdfast.teachers.alignment import Aligner
from kdfast.teachers.rewindow import rewindow
from kdfast.tokenizers.template import Template

# In memory where there is such a folder: every file of a cache is synced, which disks are slow at.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def wrapped(backend, ends=1):
    """A fast tokenizer around a backend: [CLS] q [SEP] d [SEP], with so many [SEP] between."""
    pair = f"[CLS] $A {'[SEP] ' * ends}$B [SEP]"
    known = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, known)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def by_pattern(*tokens, pattern=" ", ends=1):
    """Whole runs between the places where `pattern` matches, each of them in `tokens`."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *tokens])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(pattern), "removed")
    return wrapped(backend, ends)


def by_wordpiece(*tokens, accents=False):
    """WordPiece of exactly these tokens, lower case, accents stripped unless `accents`."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *tokens])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=not accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return wrapped(backend)


def write(path, asked):
    """A file of unlabelled (id, question, context)."""
    rows = [dict(zip(("id", "question", "context"), each, strict=True)) for each in asked]
    Path(path).write_text(json.dumps(rows), encoding="utf-8")


def aligner(
    student,
    teacher,
    asked,
    *,
    max_seq_length=384,
    max_query_length=64,
    doc_stride=128,
    teacher_length=512,
    teacher_stride=None,
):
    """The Aligner for (question, context) pairs, from files and caches that are gone afterwards."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        source = os.path.join(folder, "asked.json")
        write(source, [(str(i), *pair) for i, pair in enumerate(asked)])
        windows = prepare_windows(
            source,
            student,
            WindowSettings(max_seq_length, max_query_length, doc_stride),
            cache_dir=folder,
        )
        read = rewindow(
            windows,
            source,
            teacher,
            WindowSettings(teacher_length, doc_stride=teacher_stride or doc_stride),
            cache_dir=folder,
        )
    return Aligner(windows, read, Template.learn(student), Template.learn(teacher))


def characters_of(starts, counts, at, many):
    """(first, past) of `many` tokens from `at` on."""
    first = starts[at : at + many].astype(int)
    return np.stack([first, first + counts[at : at + many]], 1).tolist()


def segments(windows, template, window):
    """The window's tokens by part: lists of (position in the window, first, past)."""
    w = windows
    before, between, after = map(len, (template.before, template.between, template.after))
    at = w.question_token_start[w.question[window]]
    many = int(w.question_token_start[w.question[window] + 1] - at)
    prefix, count = int(w.prefix[window]), int(w.count[window])
    assert prefix == before + many + between
    assert w.lengths[window] == prefix + count + after
    from_ = int(w.context_token_start[w.context[window]] + w.first_token[window])
    question = characters_of(w.question_char_start, w.question_char_count, at, many)
    context = characters_of(w.context_char_start, w.context_char_count, from_, count)
    return {
        "before": [(i, None, None) for i in range(before)],
        "question": [(before + i, *span) for i, span in enumerate(question)],
        "between": [(before + many + i, None, None) for i in range(between)],
        "context": [(prefix + i, *span) for i, span in enumerate(context)],
        "after": [(prefix + count + i, None, None) for i in range(after)],
    }


def holder(tokens, char, end):
    """The position of the token that holds char, or of the nearest; 0 where there is no token."""
    solid = [(place, first, past) for place, first, past in tokens if past > first]
    if not solid:
        return tokens[0][0] if tokens else 0

    def distance(token):
        _, first, past = token
        away = max(first - char, char - (past - 1), 0)
        side = first > char if end else past - 1 < char  # halfway, the other side has it
        return away, side

    nearest = min(map(distance, solid))
    places = [token[0] for token in solid if distance(token) == nearest]
    return places[-1] if end else places[0]


def by_the_book(aligner, logits, window, temperature):
    """What Aligner.align must give for one window of the student: float64 (tokens, 2)."""
    teacher, first = aligner.teacher.windows, aligner.teacher.first
    numbers = range(first[window], first[window + 1])
    parts = [segments(teacher, aligner.teacher_template, number) for number in numbers]
    ours = segments(aligner.student, aligner.student_template, window)

    # Every token of the merged window: where it goes, and its logits in the windows that count.
    found = {}
    for number, segment in zip(numbers, parts, strict=True):
        rows = logits[teacher.window_start[number] : teacher.window_start[number + 1]].astype(float)
        rows = rows - rows[0]
        for part, tokens in segment.items():
            for i, (place, char, past) in enumerate(tokens):
                name = part, i + (teacher.first_token[number] if part == "context" else 0)
                edges = min(i + 0.5, len(tokens) - i - 0.5)
                found.setdefault(name, []).append((edges, rows[place], char, past))
    result = np.zeros((aligner.student.lengths[window], 2))
    merged = {}
    for (part, i), seen in found.items():
        if part == "context":
            # Where most context is; in the very middle of a shared run, the later window.
            row = max(enumerate(seen), key=lambda each: (each[1][0], each[0]))[1][1]
        else:
            row = np.mean([each[1] for each in seen], axis=0)
        merged[part, i] = row
    total = np.exp(np.array(list(merged.values())) / temperature).sum(axis=0)
    for (part, i), row in merged.items():
        mass = np.exp(row / temperature) / total
        _, _, char, past = found[part, i][0]
        if char is None:
            places = [token[0] for token in ours[part]] or [0]
            targets = [places[min(i, len(places) - 1)]] * 2
        else:
            targets = [holder(ours[part], char, False), holder(ours[part], past - 1, True)]
        for head, target in enumerate(targets):
            result[target, head] += mass[head]
    return result
