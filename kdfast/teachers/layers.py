"""What a student learns from inside its teacher: hidden states and attention, layer by layer.

With k = teacher's layers / student's layers, hidden state i of the student (0: the embeddings)
learns from the teacher's i * k, and the attention of layer i from that of layer (i + 1) * k - 1:
TinyBERT's stage (Jiao et al. 2020, arxiv.org/abs/1909.10351) with the map of Haystack 1.x. The
teacher runs next to the student: on a disk the hidden states of a token would take some ten
thousand bytes.
"""

import math

import torch
from torch import nn

from kdfast.common.errors import UserError
from kdfast.common.run import Run
from kdfast.config import TrainConfig
from kdfast.models.checks import nonfinite_weight
from kdfast.models.hub import local_folder
from kdfast.models.load import Loaded, check_fits, load_reader
from kdfast.models.span_model import SpanModel
from kdfast.models.structure import head_parameters
from kdfast.teachers import cache
from kdfast.teachers.layer_losses import AttentionCapture, AttentionTerm, RelationTerm, hidden_term
from kdfast.tokenizers.load import has_token_types, load_tokenizer
from kdfast.tokenizers.template import Template, same_tokens


class LayerLosses(nn.Module):
    """A student and its teacher; forward() gives how far their layers are apart.

    attention: "none"; "probabilities", before dropout, of every layer; or "relations" among the
    queries, keys and values of the last one (MiniLMv2). What is compared is fp32, or fp64 for fp64
    models. Where the widths of the two differ, `projection` (layers + 1, width,
    teacher's width), drawn from `seed`, bridges the two and trains with the student.

    The teacher and the student's span head are frozen. Raises UserError where layers or heads
    cannot be mapped.
    """

    def __init__(self, student: SpanModel, teacher: SpanModel, attention: str, seed: int):
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        for _, each in head_parameters(student.reader):
            each.requires_grad_(False)
        own, taught = student.reader.config, teacher.reader.config
        self.every = layers_apart(own.num_hidden_layers, taught.num_hidden_layers)
        self.attention = attention
        layers = list(range(own.num_hidden_layers))
        if attention == "relations":
            layers = layers[-1:]
        self.own = AttentionCapture(student, attention, "student", layers)
        self.taught = AttentionCapture(
            teacher, attention, "teacher", [(layer + 1) * self.every - 1 for layer in layers]
        )
        self.heads = own.num_attention_heads
        if attention == "relations":
            self.heads = math.gcd(own.num_attention_heads, taught.num_attention_heads)
        elif attention == "probabilities" and self.heads != taught.num_attention_heads:
            raise UserError(
                f"--attention_loss probabilities: the student has {self.heads} attention heads and "
                f"--teacher has {taught.num_attention_heads}: give relations, which need no equal "
                "number, or none."
            )
        self.projection = None
        if own.hidden_size != taught.hidden_size:
            shape = (own.num_hidden_layers + 1, own.hidden_size, taught.hidden_size)
            draw = torch.Generator().manual_seed(seed)
            self.projection = nn.Parameter(
                torch.randn(shape, generator=draw) / math.sqrt(own.hidden_size)
            )

    def train(self, mode: bool = True) -> "LayerLosses":
        """As every module's, but the teacher never has dropout."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(B, 2): of each window the hidden states' term and the attention's, 0 without one.

        Arguments as SpanModel's.
        """
        inputs = (input_ids, attention_mask, token_type_ids)
        mask = attention_mask
        if mask is None:
            mask = torch.ones_like(input_ids, dtype=torch.bool)
        with self.own, self.taught:
            with torch.no_grad():
                targets = self.teacher.hidden_states(*inputs)[:: self.every]
            states = self.student.hidden_states(*inputs)
            with torch.autocast(input_ids.device.type, enabled=False):
                hidden = hidden_term(states, targets, mask, self.projection)
                return torch.stack([hidden, self._attention(mask).to(hidden.dtype)], dim=1)

    def _attention(self, mask: torch.Tensor) -> torch.Tensor:
        """(B,): the attention's term."""
        total = torch.zeros(len(mask), device=mask.device)
        for own, taught in zip(self.own.take(), self.taught.take(), strict=True):
            if self.attention == "probabilities":
                wanted = taught.scored(self.heads)
                total = total + AttentionTerm.apply(*own.scored(self.heads), wanted, mask)
            else:
                for each in zip(own.split(self.heads), taught.split(self.heads), strict=True):
                    total = total + RelationTerm.apply(*each, mask)
        return total


def layers_apart(layers: int, teacher_layers: int) -> int:
    """How many layers of the teacher stand for one of the student. Raises UserError for a part."""
    if teacher_layers % layers:
        raise UserError(
            f"--stage layers: the teacher's {teacher_layers} layers are no multiple of the "
            f"student's {layers}: give a --student, or --student_layers, whose number divides it."
        )
    return teacher_layers // layers


def layer_teacher_key(config: TrainConfig, student: Loaded) -> str:
    """The weights_key of the teacher of stage layers.

    Raises UserError for one whose tokens, or token types, are not the student's.
    """
    name = config.model.teacher[0]
    folder = local_folder(name, "--teacher")
    own = load_tokenizer(folder, "--teacher")
    if not same_tokens(own, student.tokenizer):
        raise UserError(
            f"--stage layers: --teacher {name} has another tokenizer than the student, and hidden "
            "states are compared token by token: give a teacher with the student's tokenizer, or "
            "--stage predictions."
        )
    read, given = (Template.learn(each).uses_token_types for each in (own, student.tokenizer))
    if read != given and has_token_types(folder):
        raise UserError(
            f"--stage layers: --teacher {name} was trained with{'' if read else 'out'} token types "
            f"and the student with{'' if given else 'out'} them, and both read one input: give a "
            "teacher that was trained as the student, or --stage predictions."
        )
    return cache.weights_key(folder)


def load_layer_teacher(config: TrainConfig, student: SpanModel, run: Run) -> LayerLosses:
    """The student with the teacher that stage layers needs, loaded on the run's device.

    The teacher's span head is not used: it may have none. Raises UserError for a teacher that does
    not fit.
    """
    name, seed = config.model.teacher[0], config.optimization.seed
    loaded = load_reader(name, "--teacher", new_head_seed=seed)
    check_fits(loaded, config.windows.max_seq_length, name)
    if weight := nonfinite_weight(loaded.model.named_parameters()):
        raise UserError(
            f"--teacher {name} has weights that are not finite ({weight}): name a sound model."
        )
    terms = LayerLosses(student, loaded.model, config.model.attention_loss, seed).to(run.device)
    if run.dtype is not None:
        terms.teacher.cast_linear_layers(run.dtype)
    return terms
